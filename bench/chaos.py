"""Every part of a running gateway is broken under load, and what that costs requests is measured. `make chaos`.

A scenario breaks something, waits, heals it and waits for full service, while requests go on at a steady rate. Each
says what it promises; the exit code is 1 when a promise is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.chaos_gateway import PODS, RATE, Gateway, Outcome, Traffic
from bench.load import percentile
from bench.report import Table, machine, put
from xds.envoy import Options

DOCUMENT = Path(__file__).parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- written by python -m bench.chaos --write -->\n", "<!-- end -->\n"

CALM = 2.0  # seconds of traffic before each fault: what is usual
NOISE = 0.15  # seconds: how late two busy cores alone make a request now and then
CHECKED = 1.5  # seconds until Envoy's health check has found a picker dead: interval 1, timeout 0.3
POD_CHECKED = 6.5  # seconds until it has found a pod hung: twice interval 2 and timeout 1
WATCHED = 1.5  # seconds until a saved file is in Envoy
VICTIM = 1  # the pod that is broken

Act = Callable[[Gateway], Awaitable[object]]
Whole = Callable[[Gateway, Traffic, float], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A fault, and what is promised. `lasts` and the other times are in seconds.

    `whole` waits for full service after `heals`, given when that was. Until the gateway has `seen` the fault a request
    may be `late` by so much; after it by NOISE alone. `fails` is why requests sent before it is seen may fail and
    `cuts` why those may that were under way when it began; "" = none does. `avoids` is a pod that gets none once the
    fault is seen.
    """

    name: str
    lasts: float
    breaks: Act
    heals: Act
    whole: Whole
    seen: float = CHECKED
    late: float = 0.0
    fails: str = ""
    cuts: str = ""
    avoids: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """What was seen. Times in seconds; `usual` is the median before the fault, the others are worst, all to the first
    byte. `cut` were under way when the fault began, `failed_late` were sent after it was seen. `whole`: nan = never."""

    scenario: Scenario
    requests: int
    failed: int
    failed_late: int
    cut: int
    strayed: int
    usual: float
    before: float
    first: float
    later: float
    whole: float
    errors: tuple[tuple[str, int], ...]

    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        scenario, found = self.scenario, []
        excused = self.failed - self.failed_late if scenario.fails else 0
        if self.failed > excused:
            found.append(f"{self.failed - excused} requests failed")
        if self.cut and not scenario.cuts:
            found.append(f"{self.cut} requests under way were cut")
        if self.strayed:
            found.append(f"{self.strayed} requests went to {scenario.avoids} when it was out")
        for worst, late, when in (
            (self.first, scenario.late, "at first"),
            (self.later, 0.0, "once the fault was seen"),
        ):
            if worst > self.before + late + NOISE:
                found.append(f"a request took {worst:.3f} s {when}, {late + NOISE:.2f} s more than before is the bound")
        if math.isnan(self.whole):
            found.append("no full service again")
        return found


def judge(scenario: Scenario, outcomes: Sequence[Outcome], fault: float, healed: float, whole: float) -> Result:
    """The scenario's result from its requests, some of them sent before `fault` (a time, as `healed`)."""
    usual = sorted(o.first for o in outcomes if o.due < fault and not o.error)
    noticed = fault + scenario.seen
    hit = [o for o in outcomes if o.due >= fault]
    failed = [o for o in hit if o.error]
    cut = [o for o in outcomes if o.due < fault and o.error]
    return Result(
        scenario=scenario,
        requests=len(outcomes),
        failed=len(failed),
        failed_late=sum(o.due >= noticed for o in failed),
        cut=len(cut),
        strayed=sum(noticed <= o.due < healed and o.pod == scenario.avoids != "" for o in hit),
        usual=percentile(usual, 50),
        before=max(usual, default=math.nan),
        first=max((o.first for o in hit if o.due < noticed and not o.error), default=math.nan),
        later=max((o.first for o in hit if o.due >= noticed and not o.error), default=math.nan),
        whole=whole,
        errors=tuple(Counter(o.error for o in (*cut, *failed)).most_common()),
    )


# --- scenarios --------------------------------------------------------------------------------------------------------


async def nothing(_: Gateway) -> None:
    """The fault was there from the beginning, or heals by itself."""


async def picked(gateway: Gateway, _: Traffic, __: float) -> bool:
    return await gateway.picks()


async def weighed(gateway: Gateway, _: Traffic, __: float) -> bool:
    return await gateway.weighs()


def answered_by(pod: int) -> Whole:
    async def seen(gateway: Gateway, traffic: Traffic, since: float) -> bool:
        return await traffic.answers_from(gateway.pods[pod].name, since)

    return seen


async def start_picker(gateway: Gateway) -> None:
    await gateway.pickers[0].start()


async def kill_picker(gateway: Gateway) -> None:
    await gateway.pickers[0].kill()


async def stop_picker(gateway: Gateway) -> None:
    await gateway.pickers[0].stop()


async def hang_picker(gateway: Gateway) -> None:
    gateway.pickers[0].send(signal.SIGSTOP)


async def continue_picker(gateway: Gateway) -> None:
    gateway.pickers[0].send(signal.SIGCONT)


async def start_server(gateway: Gateway) -> None:
    await gateway.server.start()


async def kill_server(gateway: Gateway) -> None:
    await gateway.server.kill()


async def hang_server(gateway: Gateway) -> None:
    gateway.server.send(signal.SIGSTOP)


async def continue_server(gateway: Gateway) -> None:
    gateway.server.send(signal.SIGCONT)


async def empty_directory(gateway: Gateway) -> None:
    await gateway.server.kill()
    await gateway.server_on_empty.start()


async def full_directory(gateway: Gateway) -> None:
    await gateway.server_on_empty.stop()
    await gateway.server.start()


async def kill_pod(gateway: Gateway) -> None:
    await gateway.pods[VICTIM].kill()


async def start_pod(gateway: Gateway) -> None:
    await gateway.pods[VICTIM].start()


async def hang_pod(gateway: Gateway) -> None:
    gateway.pods[VICTIM].faults.hang = True


async def restart_hung_pod(gateway: Gateway) -> None:
    await gateway.pods[VICTIM].kill()
    gateway.pods[VICTIM].faults.hang = False
    await gateway.pods[VICTIM].start()


async def refuse_in_pod(gateway: Gateway) -> None:
    gateway.pods[VICTIM].faults.completions = 503


async def accept_in_pod(gateway: Gateway) -> None:
    gateway.pods[VICTIM].faults.completions = 200


async def delete_pod(gateway: Gateway) -> None:
    gateway.write_pod(VICTIM, deleted=True)


async def replace_pod(gateway: Gateway) -> None:
    await gateway.pods[VICTIM].stop()
    await gateway.pods[VICTIM].start()
    gateway.write_pod(VICTIM)


async def list_new_pod(gateway: Gateway) -> None:
    gateway.write_pod(PODS)


async def start_new_pod(gateway: Gateway) -> None:
    await gateway.pods[PODS].start()


async def slow_pod(gateway: Gateway) -> None:
    pod = gateway.pods[VICTIM]
    pod.engine.config = replace(pod.config, speed=0.25)


async def speed_up_pod(gateway: Gateway) -> None:
    gateway.pods[VICTIM].engine.config = gateway.pods[VICTIM].config


async def break_pages(gateway: Gateway) -> None:
    for pod in gateway.pods:
        pod.faults.metrics = 500


async def mend_pages(gateway: Gateway) -> None:
    for pod in gateway.pods:
        pod.faults.metrics = 200


TIMEOUT = Options().picker_timeout
QUARTER = 0.15  # seconds: three more steps of 10 ms, for the one under way and the request's own
GONE = "what a pod is computing is lost with it"
PICKER_KILLED = Scenario("picker killed, another started", 3, kill_picker, start_picker, picked)
PICKER_HUNG = Scenario("picker hung (SIGSTOP), continued", 3, hang_picker, continue_picker, picked, late=TIMEOUT)
SERVER_KILLED = Scenario("management server killed, another started", 3, kill_server, start_server, weighed)
POD_KILLED = Scenario("pod killed, restarted", 3, kill_pod, start_pod, answered_by(VICTIM), cuts=GONE)
SHORT = tuple(replace(each, lasts=2) for each in (PICKER_KILLED, PICKER_HUNG, SERVER_KILLED, POD_KILLED))
ONE_PICKER = (
    Scenario("picker never started, then started", 3, nothing, start_picker, picked),
    PICKER_KILLED,
    PICKER_HUNG,
    Scenario("picker stopped (SIGTERM), port closed, started", 3, stop_picker, start_picker, picked),
    SERVER_KILLED,
    Scenario("management server hung (SIGSTOP) for 8 s, continued", 8, hang_server, continue_server, weighed),
    Scenario(
        "management server restarted with an empty directory, then with the full one",
        *(5, empty_directory, full_directory, weighed),
    ),
    POD_KILLED,
    Scenario(
        "pod hung, restarted after 10 s",
        *(10, hang_pod, restart_hung_pod, answered_by(VICTIM)),
        seen=POD_CHECKED,
        late=10,  # until its end, which is when Envoy can try another pod
        fails="what was sent to it before the health check took it out comes back all at once when it is restarted",
        cuts=GONE,
    ),
    Scenario("pod answering 503", 5, refuse_in_pod, accept_in_pod, answered_by(VICTIM)),
    Scenario(
        "pod deleted (deletionTimestamp) with streams running, then another in its place",
        *(4, delete_pod, replace_pod, answered_by(VICTIM)),
        seen=WATCHED,
        avoids=f"pod-{VICTIM}",
    ),
    Scenario(
        "pod at a quarter of its speed for 20 s",
        *(20, slow_pod, speed_up_pod, answered_by(VICTIM)),
        seen=math.inf,
        late=QUARTER,
    ),
    Scenario("all metrics pages broken for 10 s", 10, break_pages, mend_pages, weighed),
    Scenario("new cold pod, listed 3 s before it listens", 3, list_new_pod, start_new_pod, answered_by(PODS)),
)
TWO_PICKERS = (Scenario("one of two pickers killed, another started", 3, kill_picker, start_picker, picked),)


# --- running and telling ----------------------------------------------------------------------------------------------


async def play(scenario: Scenario, gateway: Gateway, traffic: Traffic) -> Result:
    """Run one scenario; its requests are those due from now until it is over."""
    began = time.perf_counter()
    await asyncio.sleep(CALM)
    fault = time.perf_counter()
    await scenario.breaks(gateway)
    await asyncio.sleep(scenario.lasts)
    healed = time.perf_counter()
    await scenario.heals(gateway)
    is_whole = await scenario.whole(gateway, traffic, healed)
    over = time.perf_counter()
    await traffic.answered()
    mine = [outcome for outcome in traffic.outcomes if began <= outcome.due < over]
    return judge(scenario, mine, fault, healed, over - healed if is_whole else math.nan)


async def run(scenarios: Sequence[Scenario], *, pickers: int = 1, picking: bool = True) -> list[Result]:
    """Play the scenarios one after another on a gateway of their own, telling each result."""
    results = []
    async with Gateway(pickers, picking=picking) as gateway, Traffic(gateway.port) as traffic:
        if picking and not await gateway.picks():
            raise RuntimeError("the pickers do not pick")
        gc.collect()
        gc.freeze()  # what is loaded by now stays: collections, which delay requests, need not look at it
        for scenario in scenarios:
            result = await play(scenario, gateway, traffic)
            results.append(result)
            print(line(result), flush=True)
    return results


def line(result: Result) -> str:
    """One result for people who wait."""
    text = (
        f"{result.scenario.name}: {result.requests} requests, {result.failed} failed, {result.cut} cut, "
        f"added at most {_added(result, result.first)} ms, then {_added(result, result.later)} ms, "
        f"full service after {result.whole:.1f} s"
    )
    errors = "".join(f"\n    {count} x {error}" for error, count in result.errors)
    return text + errors + "".join(f"\n    BROKEN: {promise}" for promise in result.broken())


def table(results: Sequence[Result]) -> Table:
    """All results."""
    columns = ("fault", "requests", "failed", "cut", "usual ms", "before", "at first", "once seen", "full service s")
    rows = [
        (
            result.scenario.name,
            *(f"{count:,}" for count in (result.requests, result.failed, result.cut)),
            f"{result.usual * 1000:.0f}",
            *(_added(result, worst) for worst in (result.before, result.first, result.later)),
            f"{result.whole:.1f}",
        )
        for result in results
    ]
    return Table("Faults", columns, tuple(rows))


def _added(result: Result, worst: float) -> str:
    """Milliseconds beyond the usual."""
    return "" if math.isnan(worst) else f"{(worst - result.usual) * 1000:.0f}"


def write(text: str, document: Path = DOCUMENT) -> None:
    """Put the tables into the document, in place of those between its two marks."""
    put(text, document, BEGIN, END)


async def _run(*, short: bool) -> list[Result]:
    if short:
        return await run(SHORT)
    return [*await run(ONE_PICKER, picking=False), *await run(TWO_PICKERS, pickers=2)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.chaos", description=__doc__)
    parser.add_argument("--short", action="store_true", help="only the four faults that CI watches, half a minute")
    parser.add_argument("--write", action="store_true", help="write the table into docs/reliability.md")
    args = parser.parse_args(argv)
    where = machine()
    print(f"{where}\n{RATE:.0f} requests/s to {PODS} pods\n", flush=True)
    results = asyncio.run(_run(short=args.short))
    print(f"\n{table(results)}")
    if args.write:
        write(f"Machine: {where}.\n\n{table(results)}")
    broken = [result.scenario.name for result in results if result.broken()]
    for name in broken:
        print(f"BROKEN: {name}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
