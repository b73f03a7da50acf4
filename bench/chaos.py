"""Every part of a running gateway is broken under load, and what that costs requests is measured. `make chaos`.

A scenario breaks something, waits, heals it and waits for full service, while requests go on at a steady rate. Each
says what it promises; the exit code is 1 when a promise is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.chaos_faults import COURSES, SHORT, Course, Scenario
from bench.chaos_gateway import PODS, Gateway
from bench.chaos_traffic import RATE, Outcome, Traffic
from bench.load import percentile
from bench.report import Table, machine, put

DOCUMENT = Path(__file__).parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- written by python -m bench.chaos --write -->\n", "<!-- end -->\n"

CALM = 2.0  # seconds of traffic before each fault: what is usual
NOISE = 0.15  # seconds: how late two busy cores alone make a request now and then
ADDED = 0.01  # seconds a fault may add once it is seen: to the median, which noise does not move


@dataclass(frozen=True, slots=True)
class Result:
    """What was seen. Times in seconds to the first byte; `usual` is the median before the fault and `settled` the one
    once it is seen, the others are worst. `cut` were under way when the fault began, `failed_late` were sent after it
    was seen. `whole`: nan = never. `lag` is the most that this process itself was late after the fault: as much may a
    request be. `unmet` is what else was promised and is not so."""

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
    settled: float
    whole: float
    errors: tuple[tuple[str, int], ...]
    lag: float = 0.0
    unmet: str = ""

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
            more = late + NOISE + self.lag
            if worst > self.before + more:
                found.append(f"a request took {worst:.3f} s {when}, {more:.2f} s more than before is the bound")
        if self.settled > self.usual + ADDED:
            found.append(f"half of the requests took {self.settled:.3f} s or more once the fault was seen")
        if math.isnan(self.whole):
            found.append("no full service again")
        if self.unmet:
            found.append(self.unmet)
        return found


def judge(
    scenario: Scenario, outcomes: Sequence[Outcome], fault: float, healed: float, whole: float, unmet: str = ""
) -> Result:
    """The scenario's result from its requests, some of them sent before `fault` (a time, as `healed`)."""
    usual = sorted(o.first for o in outcomes if o.due < fault and not o.error)
    noticed = fault + scenario.seen
    hit = [o for o in outcomes if o.due >= fault]
    failed = [o for o in hit if o.error]
    cut = [o for o in outcomes if o.due < fault and o.error]
    later = sorted(o.first for o in hit if o.due >= noticed and not o.error)
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
        later=max(later, default=math.nan),
        settled=percentile(later, 50) if later else math.nan,
        whole=whole,
        errors=tuple(Counter(o.error for o in (*cut, *failed)).most_common()),
        lag=max((o.lag for o in hit), default=0.0),
        unmet=unmet,
    )


# --- running and telling ----------------------------------------------------------------------------------------------


async def play(scenario: Scenario, gateway: Gateway, traffic: Traffic) -> Result:
    """Run one scenario; its requests are those due from now until it is over."""
    began = time.perf_counter()
    await asyncio.sleep(CALM)
    gateway.mark()
    fault = time.perf_counter()
    await scenario.breaks(gateway)
    await asyncio.sleep(scenario.lasts)
    unmet = await scenario.holds(gateway)
    healed = time.perf_counter()
    await scenario.heals(gateway)
    is_whole = await scenario.whole(gateway, traffic, healed)
    over = time.perf_counter()
    await traffic.answered()
    mine = [outcome for outcome in traffic.outcomes if began <= outcome.due < over]
    return judge(scenario, mine, fault, healed, over - healed if is_whole else math.nan, unmet)


async def run(course: Course) -> list[Result]:
    """Play a course's scenarios one after another, telling each result."""
    results = []
    made = Gateway(course.pickers, picking=course.picking, delta=course.delta, linked=course.linked)
    ports = (made.port, made.plain_port) if course.plain else (made.port,)
    async with made as gateway, Traffic(*ports) as traffic:
        if course.picking and not await gateway.picks():
            raise RuntimeError("the pickers do not pick")
        gc.collect()
        gc.freeze()  # what is loaded by now stays: collections, which delay requests, need not look at it
        for scenario in course.scenarios:
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
            _millis(result.usual),
            *(_added(result, worst) for worst in (result.before, result.first, result.later)),
            f"{result.whole:.1f}",
        )
        for result in results
    ]
    return Table("Faults", columns, tuple(rows), (_once_seen(results),))


def _once_seen(results: Sequence[Result]) -> str:
    """How what a fault costs once it is seen compares with ADDED."""
    seen = [result for result in results if not math.isnan(result.later)]
    median = max((result.settled - result.usual for result in seen), default=0.0)
    late = [(result.later - result.before, result.scenario.name) for result in seen]
    over = "; ".join(f"{name}: {_millis(more)} ms" for more, name in late if more > ADDED)
    return (
        f"Once a fault is seen, the median is at most {_millis(median)} ms above the usual one in any row. The slowest "
        f"request took at most {_millis(ADDED)} ms longer than the slowest before the fault"
        + (f", except in these rows ({over})." if over else " in every row.")
    )


def _millis(seconds: float) -> str:
    return f"{seconds * 1000:.0f}"


def _added(result: Result, worst: float) -> str:
    """Milliseconds beyond the usual."""
    return "" if math.isnan(worst) else _millis(worst - result.usual)


def write(text: str, document: Path = DOCUMENT) -> None:
    """Put the tables into the document, in place of those between its two marks."""
    put(text, document, BEGIN, END)


async def _run(*, short: bool) -> list[Result]:
    return [result for course in ((SHORT,) if short else COURSES) for result in await run(course)]


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
