"""Memory of a picker that is sent ever new prompts: `python -m bench.picker_memory`."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

from bench.report import Table, number, progress, show
from picker.cost import PodLoad, PoolLoad
from picker.pick import Picker, Reason
from picker.prefix import CHUNK

PREFIXES = (0, 10_000, 100_000, 1_000_000)  # different prompts so far
PODS = 8
KV_TOKENS = 64 << 20  # of a pod: together as much as a picker remembers
CHUNKS = 2  # of a prompt
RATE = 1000.0  # prompts a second of the picker's clock


def resident() -> int:
    """Bytes of this process that are in memory (proc_pid_statm(5))."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(prefixes: Sequence[int] = PREFIXES) -> Table:
    """A row for each number of prompts, none of which shares a chunk with another."""
    picker = Picker(random.Random(1).random)
    load = PoolLoad("pool", tuple(PodLoad(f"default/pod-{index}", kv_tokens=KV_TOKENS) for index in range(PODS)))
    filler = "x" * CHUNK * CHUNKS
    rows: list[tuple[str, ...]] = []
    sent, before = 0, 0
    for count in prefixes:
        progress(f"{count:,} prompts")
        while sent < count:
            now = sent / RATE
            if sent % RATE == 0:
                picker.update(load, now)
            body = json.dumps({"model": "m", "prompt": f"{sent:012}{filler}"}).encode()
            if picker.pick("pool", body, now).reason is not Reason.COST:
                raise AssertionError("a prompt was not picked by cost")
            sent += 1
        size = resident()
        before = before or size
        rows.append((f"{count:,}", number(size / 1e6), number((size - before) / 1e6), f"{picker.chunks:,}"))
    columns = ("different prompts", "resident MB", "more than at first, MB", "chunks held")
    return Table(f"The picker's memory, {PODS} pods", columns, tuple(rows))


if __name__ == "__main__":
    show([measure()])
