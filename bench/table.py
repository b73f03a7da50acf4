"""What the demo shows: a live table in a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bench.load import Summary

LINE_EVERY = 5.0  # seconds between two lines where there is no terminal


@dataclass(frozen=True, slots=True)
class PodRow:
    """One pod: what the management server last read of it and gives it, and how it did in this phase.

    `load` is (running, waiting, KV use 0..1), None before its page was read.
    """

    name: str
    weight: int
    load: tuple[int, int, float] | None
    answers: int
    hit_ratio: float


@dataclass(frozen=True, slots=True)
class PortRow:
    """One of the Gateway's ports: its name for people, and what came back through it so far."""

    name: str
    summary: Summary


@dataclass(frozen=True, slots=True)
class Status:
    """Everything on the screen at one moment; times in seconds."""

    phase: str
    elapsed: float
    duration: float
    pods: Sequence[PodRow]
    ports: Sequence[PortRow]
    events: Sequence[str]


class View:
    """Shows one Status after another until closed; `with` it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._next_line = LINE_EVERY
        self._shown_events: Sequence[str] = ()

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, status: Status) -> None:
        if self._live:
            self._live.update(screen(status), refresh=True)
            return
        if status.elapsed < LINE_EVERY:
            self._next_line = LINE_EVERY
        if status.elapsed >= self._next_line:
            self._next_line += LINE_EVERY
            self._console.print(line(status), highlight=False, soft_wrap=True)


def screen(status: Status) -> RenderableType:
    """The whole table."""
    left = max(0.0, status.duration - status.elapsed)
    time = f"{left:.0f} s left" if left else "the last answers are coming in"
    header = Text.assemble(("vllm-xds demo  ", "bold"), (status.phase, "bold cyan"), f"  {time}")
    pods = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("pod", "weight", "running", "waiting", "KV use", "answers", "prefix hits"):
        pods.add_column(column, justify="left" if column == "pod" else "right")
    for pod in status.pods:
        running, waiting, kv_usage = (str(pod.load[0]), str(pod.load[1]), share(pod.load[2])) if pod.load else "???"
        pods.add_row(pod.name, str(pod.weight), running, waiting, kv_usage, str(pod.answers), share(pod.hit_ratio))
    log = Text("\n".join(status.events), style="dim", no_wrap=True, overflow="ellipsis")
    return Group(header, "", ports(status.ports), "", pods, "", log)


def ports(rows: Sequence[PortRow]) -> Table:
    """What came back through each port."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("port", "requests", "errors", "prefix hits", "TTFT p50", "p99", "mean"):
        table.add_column(column, justify="left" if column == "port" else "right")
    for row in rows:
        s = row.summary
        times = (seconds(s.ttft_p50), seconds(s.ttft_p99), seconds(s.ttft_mean))
        table.add_row(row.name, str(s.requests), str(s.errors), share(s.hit_ratio), *times)
    return table


def line(status: Status) -> str:
    """The same in a line: the port under way, and the least and the most of the pods."""
    row = status.ports[-1]
    s = row.summary
    loads = [pod.load for pod in status.pods if pod.load]
    running, waiting, kv_usage = (sorted(values) for values in zip(*loads, strict=True)) if loads else ([0], [0], [0.0])
    weights = sorted(pod.weight for pod in status.pods)
    return (
        f"{row.name} {status.elapsed:3.0f} s: {s.requests} answers, {s.errors} errors, "
        f"prefix hits {share(s.hit_ratio)}, TTFT p50 {seconds(s.ttft_p50)} p99 {seconds(s.ttft_p99)}; pods: "
        f"running {running[0]}-{running[-1]}, waiting {waiting[0]}-{waiting[-1]}, "
        f"KV {share(kv_usage[0])}-{share(kv_usage[-1])}, weights {weights[0]}-{weights[-1]}"
    )


def share(value: float) -> str:
    """A percentage; "-" for nan."""
    return "-" if isnan(value) else f"{value:.0%}"


def seconds(value: float) -> str:
    """`0.123 s`; "-" for nan."""
    return "-" if isnan(value) else f"{value:.3f} s"
