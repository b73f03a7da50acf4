"""Both ports of the real gateway under a stress test in small: what is gained, and how even the pods are.

    for each shape of prompts, for each route: start anew -> warm-up -> the time that counts -> last answers

Nothing is shared between two runs but the requests: caches, weights and what the picker remembers begin empty.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from bench.envoy import EnvoyNotFoundError
from bench.live_figures import Run, Sample, figures, picture, table
from bench.live_shapes import SHAPES, Shape, bodies, in_flight
from bench.load import Answer, error_kinds, keep_under_way
from bench.report import machine, progress
from bench.stack import POD_NAME, Plan, Stack, StackError, fleet_options, plan, until_signal, write_manifests
from xds.exposition import Unreadable, parse_page
from xds.model import Load

DESCRIPTION = """\
Sends the same requests through port 8080 (HTTP route to a Service: round robin) and through port 8081 (route to an
InferencePool) with the strategies DEFAULT and PREFIX_CACHE, on the real Envoy with its management server and picker,
and pods that are simulated. Prints one table in Markdown, with ratios to 8080, and draws the KV-cache use of each pod
over time."""

EPILOG = """\
shapes:
  random         prompts that share nothing, 248-372 tokens in and 288-432 out: `vllm bench serve
                 --random-input-len 1550 --random-output-len 1800 --random-range-ratio 0.2` at a fifth of its lengths
  shared-prefix  system prompts of 3,000-6,000 tokens, 6 a pod, and a question; 80-120 tokens out

load:
  A fixed number of requests is under way, as with --max-concurrency there: as many on each pod as it needs to give
  --load of the tokens a second it ever gives. They are found on the simulated engine in virtual time, from requests
  as round robin gives them to a pod. Two ports are so compared at the same number of users, not of requests a second.

columns:
  TTFT and TPOT (from the first token to the last, a token) as the client sees them; tokens/s as the pods count them;
  prefix hits of the prompts' tokens; preempted sequences; KV use averaged over pods and time; spread: the most less
  the least KV use of all pods at one moment, and the deviation over them, in percent of a cache; x: ratio to 8080.

examples:
  python -m bench.live                                  all six runs, some four minutes
  python -m bench.live --shape random --slow-pod        what the weights are for: one pod at half speed
  python -m bench.live --seconds 60 --seed 7            steadier figures, of other requests

exit status: 0 when every request of every run was answered, 1 when not or when something did not start, 2 for a wrong
option, 130 when interrupted. Nothing is left running.
"""

PODS = (2, 32)
WARM = 8.0  # seconds: a request of either shape is over by then, and the picker has read every pod's page
TICK = 1.0  # seconds between two looks at the pods
TELL = 5  # ticks between two lines about a run
LATE = 0.1  # seconds a tick may be late; if more are, the machine is measured and not the routing
PLOT = Path(__file__).parents[1] / "docs" / "live.svg"


@dataclass(frozen=True, slots=True)
class Route:
    """A port, and the strategy of the pool behind 8081."""

    name: str
    strategy: str
    pooled: bool = True

    def address(self, where: Plan) -> str:
        return where.llm if self.pooled else where.plain


ROUTES = (
    Route("8080 round robin", "PREFIX_CACHE", pooled=False),
    Route("8081 DEFAULT", "DEFAULT"),
    Route("8081 PREFIX_CACHE", "PREFIX_CACHE"),
)


class Watch:
    """Looks at all pods each TICK; mutable. `late` is the most that a look came late, in seconds."""

    def __init__(self, http: aiohttp.ClientSession, pods: Sequence[str]) -> None:
        self._http = http
        self._pods = pods
        self.samples: list[Sample] = []
        self.late = 0.0

    async def run(self) -> None:
        """Until cancelled. Raises StackError when a pod does not say how it is."""
        began = time.perf_counter()
        while True:
            due = len(self.samples) * TICK
            await asyncio.sleep(began + due - time.perf_counter())
            at = time.perf_counter() - began
            self.late = max(self.late, at - due)
            loads = await asyncio.gather(*map(self._load, self._pods))
            self.samples.append(
                Sample(
                    at,
                    tuple(load.kv_usage for load in loads),
                    sum(load.generation_tokens for load in loads),
                    sum(load.preemptions for load in loads),
                )
            )

    async def _load(self, pod: str) -> Load:
        try:
            async with self._http.get(f"http://{pod}/metrics") as reply:
                load = parse_page(await reply.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise StackError(f"pod {pod} has no metrics page: {error}") from error
        if isinstance(load, Unreadable):
            raise StackError(f"pod {pod} has an unreadable metrics page: {load}")
        return load


async def measure(
    shape: Shape, route: Route, stack: Stack, under_way: int, seconds: float, seed: int, warm: float = WARM
) -> tuple[Run, float]:
    """One run on a stack that has seen no traffic, and how late the looks at the pods were at most."""
    where, title = stack.plan, f"{shape.name}, {route.name}"
    answers: list[tuple[float, Answer]] = []
    url = f"http://{route.address(where)}/v1/chat/completions"
    sent = bodies(shape, len(where.pods), seed)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        watch = Watch(http, where.pods)
        watching = asyncio.create_task(watch.run())
        sending = asyncio.create_task(
            keep_under_way(http, url, sent, under_way, warm, seconds, lambda *answer: answers.append(answer))
        )
        try:
            while not sending.done():
                await asyncio.wait({sending, watching}, timeout=TELL * TICK, return_when=asyncio.FIRST_COMPLETED)
                stack.check()
                if watching.done():
                    await watching  # raises: it has no other end
                if watch.samples and not sending.done():
                    _tell(title, warm + seconds, len(answers), watch.samples[-1])
            await sending
        finally:
            for task in (sending, watching):
                task.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
    counted = tuple(answer for at, answer in answers if at >= warm)
    samples = tuple(sample for sample in watch.samples if sample.at < warm + seconds + TICK / 2)
    return Run(shape.name, route.name, warm, counted, samples), watch.late


def _tell(title: str, duration: float, answers: int, sample: Sample) -> None:
    least, most = 100 * min(sample.kv_usage), 100 * max(sample.kv_usage)
    when = f"{sample.at:.0f} of {duration:.0f} s" if sample.at < duration else "the last answers are coming in"
    progress(f"{title}: {when}, {answers} answers, KV use {least:.0f} to {most:.0f} %")


async def _live(args: argparse.Namespace) -> int:
    began = time.monotonic()
    shapes = [shape for shape in SHAPES if shape.name in (args.shape or [shape.name])]
    scratch = Path(tempfile.mkdtemp(prefix="vllm-xds-live-"))
    progress(f"logs in {scratch}")
    runs, late, notes = [], 0.0, []
    for shape in shapes:
        each = in_flight(shape, args.pods, args.load, args.seed)
        notes.append(f"{shape.name}: {each * args.pods} requests under way, {each} a pod.")
        progress(notes[-1])
        for route in ROUTES:
            where = plan(args.pods)
            for note in where.notes:
                progress(note)
            directory = scratch / f"{shape.name} {route.name}".replace(" ", "-")
            directory.mkdir()
            write_manifests(where, directory / "config", route.strategy)
            options = fleet_options(shape.config, args.pods, slow=args.slow_pod)
            async with Stack(where, directory / "config", directory, options) as stack:
                run, worst = await measure(shape, route, stack, each * args.pods, args.seconds, args.seed)
            runs.append(run)
            late = max(late, worst)
    pods = [f"{POD_NAME}-{index}" for index in range(args.pods)]
    slow = f", {pods[-1]} at half speed" if args.slow_pod else ""
    if late > LATE:
        notes.append(f"This machine was too busy to trust the times: a look at the pods came {late:.2f} s late.")
    notes += [
        f"{count} times {kind} in {run.shape}, {run.route}" for run in runs for kind, count in error_kinds(run.answers)
    ]
    print(f"{machine()}\n")
    title = f"{args.pods} pods{slow}, {args.seconds:g} s each, load {args.load:g}, seed {args.seed}"
    print(table(title, runs, notes))
    args.plot.write_text(picture(runs, pods))
    progress(f"{args.plot} written; {time.monotonic() - began:.0f} s")
    return 1 if any(figures(run).errors for run in runs) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m bench.live",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--pods", metavar="N", type=_pods, default=8, help=f"simulated pods, {PODS[0]} to {PODS[1]} (default 8)")
    add("--seconds", metavar="S", type=_seconds, default=20.0, help="that count, of each run (default 20)")
    add("--load", metavar="SHARE", type=_share, default=0.75, help="of what the pods can do, above 0 (default 0.75)")
    add("--seed", metavar="N", type=int, default=1, help="another seed is other requests (default 1)")
    names = [shape.name for shape in SHAPES]
    add("--shape", choices=names, action="append", help="only this one; may be repeated")
    add("--slow-pod", action="store_true", help="let the last pod run at half speed")
    add("--plot", metavar="FILE", type=Path, default=PLOT, help="where the picture goes, SVG (default docs/live.svg)")
    return parser


def _pods(text: str) -> int:
    value = int(text)
    if not PODS[0] <= value <= PODS[1]:
        raise argparse.ArgumentTypeError(f"expected {PODS[0]} to {PODS[1]} pods, found {text}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 1 < value <= 3600:
        raise argparse.ArgumentTypeError(f"expected more than 1 and at most 3600 seconds, found {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and at most 1, found {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code, see EPILOG."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.plot.is_dir() or not args.plot.parent.is_dir():  # not after minutes
        parser.error(f"--plot {args.plot}: expected a file in a folder that exists")
    try:
        return asyncio.run(until_signal(_live(args)))  # uvloop knows no process_group, which Envoy is started with
    except (StackError, EnvoyNotFoundError, OSError) as error:
        print(f"bench.live: {error}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        print("bench.live: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
