"""What the simulations say: tables and plots out of results. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, geometric_mean

from bench.plot import Line, Panel, svg
from bench.report import Table, number
from bench.sim_run import POINTS, Result

BASE = "EPP"  # what ratios are to
OURS = "PREFIX_CACHE"
MOMENTS = 150  # of a line over time: more are not told apart in a picture, and make it large
NOISE = 0.02  # a ratio below 1 + NOISE is no loss, nor are hits within NOISE: another seed moves them as much


@dataclass(frozen=True, slots=True, order=True)
class Case:
    """What a job is called; `load` is a share of capacity."""

    workload: str
    fleet: str
    load: float

    def __str__(self) -> str:
        return f"{self.workload}, {self.fleet}, {self.load:.0%}"


Results = Mapping[Case, Sequence[Result]]


def capacities(found: Mapping[str, float]) -> Table:
    """What each workload's load is a share of."""
    rows = tuple((name, number(rate)) for name, rate in found.items())
    return Table("Capacity", ("workload", "requests/s a pod"), rows)


def summary(title: str, results: Results) -> Table:
    """For each policy, fleet and load the geometric mean over workloads of its ratio to BASE."""
    groups: dict[tuple[str, str, float], list[tuple[Result, Result]]] = {}
    for case, found in results.items():
        base = _policy(found, BASE)
        for result in found:
            groups.setdefault((result.policy, case.fleet, case.load), []).append((result, base))
    order = list(dict.fromkeys(policy for policy, _, _ in groups))
    rows = []
    for policy, fleet, load in sorted(groups, key=lambda group: (order.index(group[0]), group[1:])):
        pairs = groups[policy, fleet, load]
        rows.append(
            (
                policy,
                f"{fleet}, {load:.0%}",
                *(_ratio(pairs, name) for name in ("mean", "p50", "p99")),
                f"{100 * fmean(one.hit_ratio - base.hit_ratio for one, base in pairs):+.1f}",
                f"{fmean(one.busiest for one, _ in pairs):.2f}",
            )
        )
    return Table(
        title, ("policy", "fleet, load", "mean x", "p50 x", "p99 x", "hits, points", "busiest pod x"), tuple(rows)
    )


def each(title: str, results: Results, policies: Sequence[str] = ()) -> Table:
    """Every workload by itself: seconds, and ratios to BASE. No `policies` are all of them."""
    rows = [
        (
            str(case),
            result.policy,
            *(number(value) for value in (result.mean, result.p50, result.p99)),
            *(_ratio([(result, _policy(found, BASE))], name) for name in ("mean", "p50", "p99")),
            f"{result.hit_ratio:.1%}",
            f"{result.busiest:.2f}",
        )
        for case, found in sorted(results.items())
        for result in found
        if not policies or result.policy in policies
    ]
    columns = (
        "workload, fleet, load",
        "policy",
        "mean s",
        "p50 s",
        "p99 s",
        "mean x",
        "p50 x",
        "p99 x",
        "hits",
        "busiest pod x",
    )
    return Table(title, columns, tuple(rows))


def losses(results: Results) -> tuple[str, ...]:
    """Where OURS is behind BASE, beyond NOISE: a line each."""
    lines = []
    for case, found in sorted(results.items()):
        one, base = _policy(found, OURS), _policy(found, BASE)
        worse = [
            f"{name} {getattr(one, name) / getattr(base, name):.2f} times"
            for name in ("mean", "p50", "p99")
            if getattr(one, name) > getattr(base, name) * (1 + NOISE)
        ]
        if one.hit_ratio < base.hit_ratio - NOISE / 2:
            worse.append(f"hits {100 * (one.hit_ratio - base.hit_ratio):+.1f} points")
        if worse:
            lines.append(f"- {case}: {', '.join(worse)}")
    return tuple(lines)


def _policy(found: Iterable[Result], name: str) -> Result:
    return next(result for result in found if result.policy == name)


def _ratio(pairs: Sequence[tuple[Result, Result]], name: str) -> str:
    return f"{geometric_mean(getattr(one, name) / getattr(base, name) for one, base in pairs):.2f}"


# --- plots ------------------------------------------------------------------------------------------------------------


def distributions(results: Results) -> str:
    """The TTFT's cumulative distribution, a panel for each case."""
    panels = []
    for case, found in sorted(results.items()):
        shown = [time for result in found for time in result.quantiles]
        panels.append(
            Panel(
                f"{case.workload}, {case.load:.0%}",
                [
                    Line(result.policy, [(time, 100 * i / POINTS) for i, time in enumerate(result.quantiles)])
                    for result in found
                ],
                "time to first token, s",
                "% of requests",
                log_x=True,
                x_range=(10 ** math.floor(math.log10(min(shown))), 10 ** math.ceil(math.log10(max(shown)))),
                y_range=(0, 100),
            )
        )
    return svg(panels, 3)


def by_load(results: Results, title: str, value: Callable[[Result], float]) -> str:
    """A figure over the load, a panel for each workload."""
    workloads: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for case, found in sorted(results.items()):
        for result in found:
            lines = workloads.setdefault(case.workload, {})
            lines.setdefault(result.policy, []).append((100 * case.load, value(result)))
    panels = [
        Panel(name, [Line(policy, points) for policy, points in lines.items()], "load, % of capacity", title)
        for name, lines in workloads.items()
    ]
    return svg(panels, 3)


def over_time(found: Sequence[Result]) -> str:
    """Requests in flight at each pod, a panel for each policy: MOMENTS of them, evenly."""
    most = max(max(moment.active) for result in found for moment in result.timeline)
    panels = []
    for result in found:
        pods = len(result.timeline[0].active)
        shown = result.timeline[:: max(1, len(result.timeline) // MOMENTS)]
        panels.append(
            Panel(
                result.policy,
                [Line(f"pod {pod}", [(moment.at, moment.active[pod]) for moment in shown]) for pod in range(pods)],
                "s",
                "requests in flight",
                y_range=(0, most),
                x_range=(result.timeline[0].at, result.timeline[-1].at),
            )
        )
    return svg(panels, 3)
