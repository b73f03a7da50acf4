"""Policies side by side on a simulated fleet, over generated traffic and traces. `make simulate`.

    python -m bench.simulate --trace mooncake_conversation.jsonl --write

What is simulated, and how the figures are to be read, is in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from bench.report import Table, progress, put
from bench.sim_fleet import CONFIG, SMALL
from bench.sim_policies import POLICIES
from bench.sim_report import (
    BASE,
    OURS,
    Case,
    Results,
    by_load,
    capacities,
    distributions,
    each,
    losses,
    over_time,
    summary,
)
from bench.sim_requests import GENERATED, TraceError, Workload, read_trace, trace_workload
from bench.sim_run import SCENARIOS, STEADY, Job, Result, Scenario, capacity, simulate

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- written by python -m bench.simulate --write -->\n", "<!-- end of bench.simulate -->\n"

K = TypeVar("K")
V = TypeVar("V")

PODS = 8
LOADS = (0.5, 0.7, 0.85, 0.95)  # of what the fleet keeps up with under BASE
LOAD = 0.85  # of the comparisons at one load
LIGHT = 0.7  # of the scenarios: a pod fewer is no overload yet
CONFIGS = {"32B": CONFIG, "8B": SMALL}
GUESS = 2.0  # requests a second and pod, where the search for capacity begins
CAPACITY = {"chat": 9.15, "rag": 5.11, "prefixes": 5.37, "agent": 3.41, "random": 3.32}  # what it ends with at 32B
TWO = (BASE, OURS)
FEW = ("DEFAULT", *TWO)
TIMELINE = "mooncake_conversation"  # the workload whose pods are shown over time, where it is there; else the first
SHOWN = ("round robin", "DEFAULT", "first-block hash", BASE, OURS)  # in plots: more lines are not told apart
QUICK_PODS = 2
QUICK_WARM, QUICK_SPAN = 15.0, 45.0  # seconds: a form that shows that all of it runs; its figures mean little


@dataclass(frozen=True, slots=True)
class Task:
    """A job by names, so that it can go to another process. `trace` "" = a generated workload."""

    case: Case
    trace: str
    pods: int
    capacity: float  # requests a second and pod
    policies: tuple[str, ...]
    model: str
    scenario: Scenario = STEADY


@cache
def workload(name: str, trace: str, *, quick: bool = False) -> Workload:
    if not trace:
        made = next(each for each in GENERATED if each.name == name)
        return replace(made, warm=QUICK_WARM, span=QUICK_SPAN) if quick else made
    with Path(trace).open() as lines:
        return trace_workload(name, read_trace(lines))


def find_capacity(name: str, trace: str, model: str, *, quick: bool) -> float:
    return GUESS if quick else capacity(workload(name, trace), PODS, GUESS, BASE, CONFIGS[model])


def run(task: Task, seed: int, *, quick: bool) -> list[Result]:
    job = Job(
        workload(task.case.workload, task.trace, quick=quick),
        task.pods,
        task.capacity * task.case.load * task.pods,
        task.scenario,
        CONFIGS[task.model],
        seed,
    )
    return list(simulate(job, task.policies))


def tasks(names: Mapping[str, str], found: Mapping[str, float], model: str, *, quick: bool) -> Iterator[Task]:
    """Every job, the longest first; `found` are capacities by workload."""

    def task(
        name: str, fleet: str, load: float, pods: int, policies: tuple[str, ...], scenario: Scenario = STEADY
    ) -> Task:
        return Task(Case(name, fleet, load), names[name], pods, found[name], policies, model, scenario)

    if quick:
        yield from (task(name, f"{QUICK_PODS} pods", LOAD, QUICK_PODS, FEW) for name in names)
        return
    yield from (task(name, "32 pods", LOAD, 32, TWO) for name in names)
    for name in names:
        for load in LOADS:
            yield task(name, f"{PODS} pods", load, PODS, tuple(POLICIES) if load == LOAD else FEW)
        yield task(name, "4 pods", LOAD, 4, TWO)
        for scenario in SCENARIOS:
            yield task(name, scenario.name, LIGHT, PODS, TWO, scenario)


def execute(
    names: Mapping[str, str], known: Mapping[str, float], model: str, jobs: int, seed: int, *, quick: bool
) -> tuple[dict[str, float], dict[Case, list[Result]]]:
    """Capacities that are not `known`, then all tasks, over `jobs` processes; results in the order of the tasks."""
    # Not forked: gRPC's threads, where the caller has any, do not survive it, and a child may spin for ever.
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        searches = {
            pool.submit(find_capacity, name, trace, model, quick=quick): name
            for name, trace in names.items()
            if name not in known
        }
        found = {**known, **dict(_finished("capacities", searches))}
        work = list(tasks(names, found, model, quick=quick))
        running = {pool.submit(run, task, seed, quick=quick): task.case for task in work}
        results = dict(_finished("jobs", running))
    return {name: found[name] for name in names}, {task.case: results[task.case] for task in work}


def _finished(what: str, running: Mapping[Future[V], K]) -> Iterator[tuple[K, V]]:
    """Each as it ends, told with how long the rest may take."""
    began = time.monotonic()
    for count, future in enumerate(as_completed(running), 1):
        key = running[future]
        spent = time.monotonic() - began
        left = spent / count * (len(running) - count)
        progress(f"{count} of {len(running)} {what}: {key}; {spent:.0f} s, about {left:.0f} s left")
        yield key, future.result()


def part(results: Results, fleets: Sequence[str], load: float | None = None) -> Results:
    return {c: found for c, found in results.items() if c.fleet in fleets and load in {None, c.load}}


def tables(found: Mapping[str, float], results: Results) -> list[Table]:
    """Everything that is printed."""
    steady = next(case.fleet for case in results if case.fleet in (f"{PODS} pods", f"{QUICK_PODS} pods"))
    others = [fleet for fleet in dict.fromkeys(case.fleet for case in results) if fleet != steady]
    return [
        capacities(found),
        summary("Over all workloads", part(results, [steady])),
        each(f"{OURS} beside {BASE}", results, TWO),
        each(f"All policies, {steady}, {LOAD:.0%} load", part(results, [steady], LOAD)),
        *([summary("Other fleets", part(results, others))] if others else []),
    ]


def plots(results: Results) -> dict[str, str]:
    """Files of docs/ and what is in them."""
    steady = {
        case: [result for result in found if result.policy in SHOWN]
        for case, found in part(results, [f"{PODS} pods"]).items()
    }
    at_load = {case: found for case, found in steady.items() if case.load == LOAD}
    by_workload = {case.workload: found for case, found in at_load.items()}
    timeline = by_workload.get(TIMELINE) or next(iter(by_workload.values()))
    return {
        "simulation-ttft.svg": distributions(at_load),
        "simulation-hits.svg": by_load(steady, "prompt tokens found in cache, %", lambda r: 100 * r.hit_ratio),
        "simulation-balance.svg": over_time([result for result in timeline if result.policy in ("round robin", *FEW)]),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.simulate", description=__doc__)
    parser.add_argument("--trace", action="append", default=[], metavar="FILE", help="a trace in Mooncake's JSON lines")
    parser.add_argument("--workload", action="append", metavar="NAME", help="only this one (repeat it for several)")
    parser.add_argument("--quick", action="store_true", help=f"seconds: {QUICK_PODS} pods, one load, three policies")
    parser.add_argument("--model", choices=CONFIGS, default="32B", help="what the pods serve (default: %(default)s)")
    parser.add_argument(
        "--capacity",
        action="append",
        type=_rate,
        metavar="NAME=RATE",
        default=[],
        help="requests a second and pod that are 100 %% load of a workload, instead of a search for it; 0: search",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every result there, too")
    parser.add_argument("--write", action="store_true", help="write tables and plots into docs/")
    args = parser.parse_args(argv)
    names = {generated.name: "" for generated in GENERATED} | {Path(file).stem: file for file in args.trace}
    if unknown := {*(args.workload or ()), *dict(args.capacity)} - set(names):
        parser.error(f"unknown workload: {', '.join(sorted(unknown))} (there are {', '.join(names)})")
    if args.quick and args.write:
        parser.error("--quick has no figures to --write")
    names = {name: trace for name, trace in names.items() if not args.workload or name in args.workload}
    try:
        for name, trace in names.items():
            workload(name, trace)
    except (OSError, TraceError) as error:
        parser.error(str(error))
    given = (CAPACITY if args.model == "32B" and not args.quick else {}) | dict(args.capacity)
    known = {name: rate for name, rate in given.items() if rate and name in names}
    began = time.monotonic()
    found, results = execute(names, known, args.model, args.jobs, args.seed, quick=args.quick)
    text = "\n".join(map(str, tables(found, results))) + _told(losses(results))
    print(text)
    progress(f"{time.monotonic() - began:.0f} s")
    if args.json:
        rows = [asdict(case) | asdict(result) for case, all_of_it in results.items() for result in all_of_it]
        args.json.write_text(json.dumps(rows))
    if args.write:
        put(text, DOCS / "benchmarks.md", BEGIN, END)
        for name, picture in plots(results).items():
            (DOCS / name).write_text(picture)
    return 0


def _rate(text: str) -> tuple[str, float]:
    name, _, rate = text.rpartition("=")
    try:
        return name, float(rate)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=RATE") from None


def _told(lines: Sequence[str]) -> str:
    return f"\n### Where {OURS} is behind\n\n" + ("\n".join(lines) or "Nowhere.") + "\n"


if __name__ == "__main__":
    sys.exit(main())
