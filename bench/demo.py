"""`vllm-xds demo`: the whole product on this machine, with simulated pods, and both ports under the same traffic.

Stack up -> reset caches -> replay on 8080 -> reset caches -> the same replay on 8081 -> compare -> Stack down
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from bench.envoy import EnvoyNotFoundError
from bench.load import (
    Answer,
    Arrival,
    Summary,
    Workload,
    error_kinds,
    hit_ratio,
    percentile,
    replay,
    schedule,
    summarize,
)
from bench.stack import POD_NAME, Plan, Stack, StackError, fleet_options, plan, until_signal, write_manifests
from bench.table import PodRow, PortRow, Status, View, ports, seconds, share
from bench.vllm_engine import EngineConfig
from bench.vllm_server import MODEL

EPILOG = """\
It starts the management server, the picker, the real Envoy and the pods as processes of their own, sends the same
conversations at the same times first to port 8080 (HTTP route to a Service: round robin), then to port 8081 (route to
an InferencePool: PREFIX_CACHE), each from empty prefix caches, and compares. Nothing is left running.

exit status: 0 when 8081 had more prefix hits, a lower TTFT p50 and p99, and neither port an error; 1 when not, or when
something did not start; 130 when interrupted before the comparison. With --keep-running Ctrl-C ends it as usual.
"""

PODS = (4, 32)  # with fewer the caches together hold all prefixes several times; 32 and their traffic take 0.6 cores

# The pods: an 8B model at half of an H100's speed (about an L40S), the engine in real time. Half the speed halves the
# tokens this machine has to move for the same load, and makes what is measured long against what Python adds.
# 48,000 tokens of KV cache are room for the requests under way and some prefixes, never for all of them.
CONFIG = EngineConfig(speed=0.5, num_gpu_blocks=3000)

# The traffic.
RATE = 2.5  # requests a second and pod: what a pod can just prefill when nothing of it is cached
PROMPTS = 6  # system prompts a pod: 48 of them on 8 pods are 4.5 times a pod's cache
PROMPT_TOKENS = (3000, 6000)  # 12 to 24 KB: instructions with tools and examples
ZIPF = 0.9  # popularity, as measured of shared prefixes
TURNS = (2, 3)
OUTPUT_TOKENS = 100

TICK = 0.5  # seconds between two looks at everything
EVENTS = 5  # log lines under the table
WATCHED = {  # events of the management server that an audience wants to see, and their fields
    "weight changed": ("endpoint", "old", "new", "reason"),
    "configuration applied": ("ports", "rejections"),
    "object rejected": ("object", "field", "message"),
    "endpoint added": ("cluster", "endpoint"),
    "endpoint removed": ("cluster", "endpoint"),
    "endpoint draining": ("cluster", "endpoint"),
    "scrape failed": ("endpoint", "reason"),
    "scrape recovered": ("endpoint",),
    "client connected": ("node",),
    "client disconnected": ("node",),
}
LATE = 0.1  # seconds a request may be sent late; if more are, the machine is measured and not the routing

QUESTION = {
    "model": MODEL,
    "max_completion_tokens": 100,
    "temperature": 0,
    "messages": [{"role": "user", "content": "Write as if you were a critic: Los Angeles"}],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--duration", metavar="SECONDS", type=_positive, default=25.0, help="length of the traffic on each port"
    )
    parser.add_argument(
        "--pods", metavar="N", type=_pods, default=8, help=f"simulated vLLM pods, {PODS[0]} to {PODS[1]}"
    )
    parser.add_argument(
        "--slow-pod", action="store_true", help="let the last pod run at half speed, and see its weight"
    )
    parser.add_argument("--keep-running", action="store_true", help="leave everything running after the comparison")
    parser.add_argument("--seed", metavar="N", type=int, default=1, help="another seed is other traffic")
    parser.add_argument(
        "--log-dir", metavar="DIR", type=Path, help="where the processes' logs go (default: a new temporary directory)"
    )


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 86400:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, found {text}")
    return value


def _pods(text: str) -> int:
    value = int(text)
    if not PODS[0] <= value <= PODS[1]:
        raise argparse.ArgumentTypeError(f"expected {PODS[0]} to {PODS[1]} pods, found {text}")
    return value


def run(args: argparse.Namespace) -> int:
    """The exit code, see EPILOG."""
    try:
        return asyncio.run(until_signal(_demo(args)))  # uvloop knows no process_group, which Envoy is started with
    except BrokenPipeError:
        raise
    except (StackError, EnvoyNotFoundError, OSError) as error:
        print(f"vllm-xds demo: {error}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        print("vllm-xds demo: interrupted", file=sys.stderr)
        return 130


async def _demo(args: argparse.Namespace) -> int:
    console = Console()
    where = plan(args.pods)
    directory = Path(tempfile.mkdtemp(prefix="vllm-xds-demo-"))
    logs = args.log_dir or directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    write_manifests(where, directory / "config")
    for note in where.notes:
        _print(console, note)
    _print(console, f"configuration {directory / 'config'} (edit it: Envoy follows), logs {logs}")
    workload = _workload(args.pods)
    arrivals = schedule(workload, args.duration, args.seed)
    _print(
        console,
        f"{args.pods} simulated pods, {workload.rate:g} requests/s for {args.duration:g} s on each port: "
        f"{len(arrivals)} requests of {workload.prompts} shared system prompts, seed {args.seed}",
    )
    began = time.monotonic()
    async with (
        Stack(where, directory / "config", logs, fleet_options(CONFIG, args.pods, slow=args.slow_pod)) as stack,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
    ):
        _print(console, f"ready after {time.monotonic() - began:.1f} s; Ctrl-C stops everything")
        events = _Events(stack)
        comparison = _Comparison(where, arrivals, args.duration, http, events)
        with View(console) as view:
            plain = await comparison.phase(0, view)
            llm = await comparison.phase(1, view)
        better = _report(console, comparison.rows, (*plain, *llm))
        _say_where_next(console, where, directory, logs, running=args.keep_running)
        if args.keep_running:
            with suppress(asyncio.CancelledError):
                await _follow(console, events)
    return 0 if better else 1


def _workload(pods: int) -> Workload:
    return Workload(pods * RATE, pods * PROMPTS, PROMPT_TOKENS, ZIPF, TURNS, OUTPUT_TOKENS, MODEL)


class _Events:
    """The log lines worth showing, as they come; mutable."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._read = 0  # bytes of the server's log
        self._ended: set[str] = set()

    def new(self) -> Iterator[str]:
        """What has happened since the last call."""
        with (self._stack.logs / "serve.log").open("rb") as log:
            log.seek(self._read)
            for line in log:
                if not line.endswith(b"\n"):
                    break  # half written
                self._read += len(line)
                if text := _watched(line):
                    yield text
        for child in self._stack.children:
            if child.status is not None and child.name not in self._ended:
                self._ended.add(child.name)
                yield f"the {child.name} ended with status {child.status}: see {child.log}"


def _watched(line: bytes) -> str:
    """A log line for people, "" when it is not one of WATCHED."""
    try:
        event = json.loads(line)
    except ValueError:  # a traceback
        return ""
    fields = WATCHED.get(event.get("event", ""), ())
    text = " ".join(f"{name}={event[name]}" for name in fields if name in event)
    return f"{event['timestamp'][11:19]} {event['event']} {text}" if fields else ""


class _Comparison:
    """The same arrivals through one port after the other; mutable: what came back is kept for the view."""

    def __init__(
        self, where: Plan, arrivals: Sequence[Arrival], duration: float, http: aiohttp.ClientSession, events: _Events
    ) -> None:
        self._plan = where
        self._ports = (("round robin", where.plain), ("PREFIX_CACHE", where.llm))
        self._arrivals = arrivals
        self._duration = duration
        self._http = http
        self._events = events
        self._lines: deque[str] = deque(maxlen=EVENTS)
        self.rows: list[PortRow] = []

    async def phase(self, index: int, view: View) -> list[Answer]:
        """Empty every pod's prefix cache, send everything to one port, and wait for the last answer."""
        policy, address = self._ports[index]
        port = address.rpartition(":")[2]
        try:
            for pod in self._plan.pods:
                async with self._http.post(f"http://{pod}/reset_prefix_cache") as reply:
                    reply.raise_for_status()
        except aiohttp.ClientError as error:
            raise StackError(f"a prefix cache could not be reset: {error}") from error
        answers: list[Answer] = []
        self.rows.append(PortRow(f"{port} {policy}", summarize(answers)))
        began = time.monotonic()
        url = f"http://{address}/v1/chat/completions"
        sending = asyncio.create_task(replay(self._http, url, self._arrivals, answers.append))
        try:
            while not sending.done():
                pods = await self._pods(answers)
                await asyncio.wait({sending}, timeout=TICK)
                self.rows[-1] = PortRow(self.rows[-1].name, summarize(answers))
                self._lines.extend(self._events.new())
                phase = f"{index + 1} of 2: port {port}, {policy}"
                elapsed = time.monotonic() - began
                view.show(Status(phase, elapsed, self._duration, pods, self.rows, tuple(self._lines)))
            await sending
        finally:
            sending.cancel()
        return answers

    async def _pods(self, answers: Sequence[Answer]) -> list[PodRow]:
        """Each pod as the management server sees it now, if it is there, and what it answered in this phase."""
        page = ""
        with suppress(aiohttp.ClientError):
            async with self._http.get(f"http://{self._plan.status}/metrics") as reply:
                page = await reply.text()
        series: dict[str, dict[str, float]] = {}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if endpoint := sample.labels.get("endpoint"):
                    series.setdefault(endpoint, {})[sample.name.removeprefix("vllm_xds_endpoint_")] = sample.value
        rows = []
        for index in range(len(self._plan.pods)):
            name = f"{POD_NAME}-{index}"
            now = series.get(f"default/{name}", {})
            load = (int(now["running"]), int(now["waiting"]), now["kv_usage"]) if "running" in now else None
            mine = [answer for answer in answers if answer.pod == name]
            rows.append(PodRow(name, int(now.get("weight", 100)), load, len(mine), hit_ratio(mine)))
        return rows


def _report(console: Console, rows: Sequence[PortRow], answers: Sequence[Answer]) -> bool:
    """Print the comparison; whether the second port was better in everything."""
    console.print()
    console.print(ports(rows))
    console.print()
    plain, llm = (row.summary for row in rows)
    better = is_better(plain, llm)
    if better:
        _print(
            console,
            f"Port {rows[1].name}: {share(llm.hit_ratio)} of the prompts' tokens came from a prefix cache instead of "
            f"{share(plain.hit_ratio)}, and the first token {plain.ttft_p50 / llm.ttft_p50:.1f} times sooner at p50, "
            f"{plain.ttft_p99 / llm.ttft_p99:.1f} times at p99, {plain.ttft_mean / llm.ttft_mean:.1f} times on "
            "average.",
        )
    else:
        _print(console, f"Port {rows[1].name} was NOT better in prefix hits, TTFT p50, TTFT p99 and errors alike.")
    for kind, count in error_kinds(answers):
        _print(console, f"{count} times: {kind}")
    late = percentile(sorted(answer.late for answer in answers), 99)
    if late > LATE:
        _print(
            console,
            f"One request in 100 was sent {seconds(late)} late: this machine is too busy to trust the times.",
        )
    return better


def is_better(plain: Summary, llm: Summary) -> bool:
    """False, too, when either has no answers: its figures are nan."""
    return (
        plain.errors == llm.errors == 0
        and llm.hit_ratio > plain.hit_ratio
        and llm.ttft_p50 < plain.ttft_p50
        and llm.ttft_p99 < plain.ttft_p99
    )


def _say_where_next(console: Console, where: Plan, directory: Path, logs: Path, *, running: bool) -> None:
    question = json.dumps(QUESTION)
    lines = [
        "",
        f"Logs: {logs} (serve.log has every change of a weight). More: README.md, ARCHITECTURE.md, docs/",
        "Everything runs until Ctrl-C; try:" if running else "With --keep-running you could now try:",
        *(
            f"  curl -i http://{address}/v1/chat/completions -H 'Content-Type: application/json' -d '{question}'"
            for address in (where.plain, where.llm)
        ),
        f"  edit {directory / 'config'}/pool.yaml: PREFIX_CACHE to DEFAULT, and Envoy follows within two seconds",
        f"  open http://{where.admin}/clusters for Envoy's view, http://{where.status}/metrics for the server's",
    ]
    for line in lines:
        _print(console, line)


async def _follow(console: Console, events: _Events) -> None:
    """Print what happens, for ever."""
    while True:
        for event in events.new():
            _print(console, event)
        await asyncio.sleep(TICK)


def _print(console: Console, text: str) -> None:
    """Plain text, never wrapped: it is copied from the terminal."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
