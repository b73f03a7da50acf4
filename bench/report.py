"""How a figure is told: a Markdown table with the command that made it, and the machine it was made on."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.envoy import find_envoy


@dataclass(frozen=True, slots=True)
class Table:
    """One figure. The first column is text, the others are numbers with their unit in the column's name."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [self.columns, ("---", *("---:" for _ in self.columns[1:])), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join((f"### {self.title}", table, *self.notes)) + "\n"


def number(value: float) -> str:
    """Three significant digits, never an exponent: figures of one machine have no more."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3
    return f"{value:,.{digits}f}"


def micros(seconds: float) -> str:
    return number(seconds * 1e6)


def millis(seconds: float) -> str:
    return number(seconds * 1e3)


def progress(text: str) -> None:
    """What is being measured now; standard output is for figures."""
    print(f"  {text}", file=sys.stderr, flush=True)


def show(tables: Sequence[Table]) -> None:
    for table in tables:
        print(table, flush=True)


def put(text: str, document: Path, begin: str, end: str) -> None:
    """Write text into a document, in place of what is between two lines of it."""
    head, _, rest = document.read_text().partition(begin)
    document.write_text(f"{head}{begin}{text}{end}{rest.partition(end)[2]}")


def cpu_seconds(*pids: int) -> float:
    """CPU time of processes since their start, in steps of 10 ms (proc_pid_stat(5): utime and stime)."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


async def idle_share(parts: Sequence[Sequence[int]], seconds: float) -> list[float]:
    """CPU seconds a second the processes of each part take with no requests: health checks, scrapes, statistics."""
    before = [cpu_seconds(*pids) for pids in parts]
    await asyncio.sleep(seconds)
    return [(cpu_seconds(*pids) - cpu) / seconds for pids, cpu in zip(parts, before, strict=True)]


def machine() -> str:
    """One line: processor, cores, load, kernel, Python and Envoy."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    envoy = subprocess.run([find_envoy(), "--version"], capture_output=True, text=True, check=True)  # noqa: S603 - ours
    version = re.search(r"/(\d+\.\d+\.\d+[^/]*)/", envoy.stdout)
    parts = (
        f"{os.cpu_count()} cores ({cpu[1] if cpu else platform.machine()})",
        f"load {os.getloadavg()[0]:.1f} at the start",
        f"Linux {platform.release()}",
        f"Python {platform.python_version()}",
        f"Envoy {version[1] if version else 'unknown'} with one worker thread",
    )
    return ", ".join(parts)
