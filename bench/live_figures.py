"""From what `bench.live` has seen to its table and its picture. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from bench.load import Answer, summarize
from bench.plot import Line, Panel, svg
from bench.report import Table, millis, number


@dataclass(frozen=True, slots=True)
class Sample:
    """All pods' metrics pages at one moment: `at` in seconds of the run, each pod's KV use (0..1), counters' sums."""

    at: float
    kv_usage: tuple[float, ...]
    generation_tokens: float
    preemptions: float


@dataclass(frozen=True, slots=True)
class Run:
    """One shape through one route. `answers` are those to requests of the time that counts, `samples` also the warm-up
    before it, which took `warm` seconds."""

    shape: str
    route: str
    warm: float
    answers: tuple[Answer, ...]
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """Times in seconds, KV use in 0..1; nan where there is nothing to tell.

    `token_time` is from the first token to the last, a token, averaged over answers (vLLM's TPOT). `spread` is the most
    less the least KV use of all pods at one moment, `deviation` the standard deviation over them; each on average over
    time, and at its most.
    """

    requests: int
    errors: int
    ttft_mean: float
    ttft_p50: float
    ttft_p99: float
    token_time: float
    token_rate: float  # generated tokens a second, of all pods
    hit_ratio: float
    preemptions: float
    kv_usage: float
    spread_mean: float
    spread_most: float
    deviation_mean: float
    deviation_most: float


def figures(run: Run) -> Figures:
    summary = summarize(run.answers)
    slow = [
        (answer.seconds - answer.ttft) / (answer.output_tokens - 1)
        for answer in run.answers
        if not answer.error and answer.output_tokens > 1
    ]
    samples = [sample for sample in run.samples if sample.at >= run.warm]
    spreads = [max(sample.kv_usage) - min(sample.kv_usage) for sample in samples]
    deviations = [pstdev(sample.kv_usage) for sample in samples]
    tokens = preemptions = seconds = math.nan
    if len(samples) > 1:
        first, last = samples[0], samples[-1]
        seconds = last.at - first.at
        tokens = last.generation_tokens - first.generation_tokens
        preemptions = last.preemptions - first.preemptions
    return Figures(
        requests=summary.requests,
        errors=summary.errors,
        ttft_mean=summary.ttft_mean,
        ttft_p50=summary.ttft_p50,
        ttft_p99=summary.ttft_p99,
        token_time=_mean(slow),
        token_rate=tokens / seconds,
        hit_ratio=summary.hit_ratio,
        preemptions=preemptions,
        kv_usage=_mean([fmean(sample.kv_usage) for sample in samples]),
        spread_mean=_mean(spreads),
        spread_most=max(spreads, default=math.nan),
        deviation_mean=_mean(deviations),
        deviation_most=max(deviations, default=math.nan),
    )


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def _share(value: float) -> str:
    return f"{value * 100:.1f}"


# The table's columns: name, figure, how it is written, and whether a ratio of it says anything.
_COLUMNS: tuple[tuple[str, Callable[[Figures], float], Callable[[float], str], bool], ...] = (
    ("requests", lambda f: f.requests, lambda value: f"{value:,.0f}", False),
    ("TTFT mean ms", lambda f: f.ttft_mean, millis, True),
    ("p50", lambda f: f.ttft_p50, millis, True),
    ("p99", lambda f: f.ttft_p99, millis, True),
    ("TPOT ms", lambda f: f.token_time, millis, True),
    ("tokens/s", lambda f: f.token_rate, lambda value: f"{value:,.0f}", True),
    ("prefix hits %", lambda f: f.hit_ratio, _share, True),
    ("preempted", lambda f: f.preemptions, lambda value: f"{value:,.0f}", False),
    ("KV use %", lambda f: f.kv_usage, _share, False),
    ("spread mean", lambda f: f.spread_mean, _share, True),
    ("spread max", lambda f: f.spread_most, _share, True),
    ("deviation mean", lambda f: f.deviation_mean, _share, True),
    ("deviation max", lambda f: f.deviation_most, _share, True),
)


def table(title: str, runs: Sequence[Run], notes: Sequence[str] = ()) -> Table:
    """A row for each run, and under it its ratios to the first run of its shape."""
    rows = []
    bases: dict[str, Figures] = {}
    for run in runs:
        mine = figures(run)
        base = bases.setdefault(run.shape, mine)
        written = (write(value) if not math.isnan(value := get(mine)) else "-" for _, get, write, _ in _COLUMNS)
        rows.append((f"{run.shape}, {run.route}", *written))
        if base is not mine:
            ratios = (_ratio(get(mine), get(base)) if compared else "" for _, get, _, compared in _COLUMNS)
            rows.append(("x", *ratios))
    return Table(title, ("shape, route", *(name for name, *_ in _COLUMNS)), tuple(rows), tuple(notes))


def _ratio(value: float, base: float) -> str:
    return "" if math.isnan(value) or not base > 0 else number(value / base)


def picture(runs: Sequence[Run], pods: Sequence[str]) -> str:
    """KV use of each pod over the time of each run, as SVG: a row for each shape, a column for each route."""
    columns = len({run.route for run in runs})
    return svg([panel(run, pods) for run in runs], columns)


def panel(run: Run, pods: Sequence[str]) -> Panel:
    end = max((sample.at for sample in run.samples), default=1.0)
    lines = [
        Line(name, [(sample.at, round(100 * sample.kv_usage[place], 1)) for sample in run.samples])
        for place, name in enumerate(pods)
    ]
    title = f"{run.shape}, {run.route}"
    return Panel(title, lines, "seconds", "KV cache use, %", x_range=(0.0, end), y_range=(0.0, 100.0))
