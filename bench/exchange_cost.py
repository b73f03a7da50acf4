"""What it costs that pickers hear one another: `python -m bench.exchange_cost`.

A real management server, and pickers that do nothing else: each is given requests of the agents of bench/worker_hits.py
to tell, at a steady rate. All pickers are in this process: what one takes is a share of it.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from tempfile import TemporaryDirectory
from typing import Any

from bench.child import end, with_parent
from bench.envoy import free_port
from bench.report import Table, cpu_seconds, number, progress, show
from bench.worker_hits import CACHE, PODS, Hearing, run
from picker.cost import PodLoad, PoolLoad
from picker.exchange import Inbox, Outbox
from picker.exchange_client import ExchangeClient
from picker.memory import PEERS, Memory
from picker.metrics import PickerMetrics
from picker.pick import Picker
from picker.prefix import CHUNK_TOKENS
from xds.log import configure
from xds.wire.exchange_pb2 import Hello

CASES = ((1, 100), (2, 100), (4, 100), (4, 1000), (16, 1000))  # pickers, and requests a second of all together
SECONDS = 6.0  # that one case is measured
STEP = 0.01  # seconds between looks at what is to be told
READY = 20.0  # seconds for all pickers to hear one another
RECORDED = 4_000  # requests of agents; the first half fills the caches, the rest is told again and again

Told = tuple[str, str, int, int, Sequence[Any]]


def recorded(requests: int = RECORDED) -> list[Told]:
    """What two pickers tell of requests of agents, caches warm."""
    hearing = Hearing(2, 1)
    run(hearing.pickers, requests, 1, hearing.until)
    return hearing.told[len(hearing.told) // 2 :]


class Member:
    """A picker's end of the exchange."""

    def __init__(self, number: int, server: str) -> None:
        self.memory = Memory()
        self.outbox = Outbox()
        self.metrics = PickerMetrics()
        picker = Picker(random.random, 1, self.memory)
        pods = tuple(PodLoad(f"default/pod-{pod}", kv_tokens=CACHE * CHUNK_TOKENS) for pod in range(PODS))
        picker.update(PoolLoad("pool", pods), time.monotonic())
        hello = Hello(picker=number, node=f"picker-{number}")
        self.client = ExchangeClient(
            [server], hello, self.outbox, Inbox(picker), self.memory, self.metrics,
            clock=time.monotonic, random=random.random,
        )  # fmt: skip

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"vllm_xds_picker_exchange_{name}_total", labels) or 0.0

    @property
    def counted(self) -> tuple[float, float, float]:
        """Bytes told and heard, and requests noted."""
        return self.value("bytes", direction="told"), self.value("bytes", direction="heard"), self.value("requests")


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[str, int]]:
    """A management server with nothing to serve; its address and its process."""
    address, status = (f"127.0.0.1:{free_port()}" for _ in range(2))
    with TemporaryDirectory() as empty:
        options = ("--config", empty, "--listen", address, "--status", status, "--log-level", "error")
        command = with_parent(sys.executable, "-m", "xds", "serve", *options)
        server = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE)
        try:
            yield address, server.pid
        finally:
            await end(server)


async def case(pickers: int, rate: float, told: Sequence[Told], seconds: float = SECONDS) -> tuple[str, ...]:
    """The row of so many pickers that are sent `rate` requests a second together."""
    async with serving() as (address, server):
        members = [Member(number, address) for number in range(pickers)]
        tasks = [asyncio.create_task(member.client.run()) for member in members]
        try:
            await _hearing(members)
            before = [member.counted for member in members]
            own, its, began = time.process_time(), cpu_seconds(server), time.monotonic()
            sent = 0
            while (now := time.monotonic()) < began + seconds:
                due = int((now - began) * rate)
                for index in range(sent, due) if pickers > 1 else ():
                    members[index % pickers].outbox.tell(*told[index % len(told)])
                sent = due
                await asyncio.sleep(STEP)
            took = time.monotonic() - began
            cpu, its_cpu = time.process_time() - own, cpu_seconds(server) - its
            after = [member.counted for member in members]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
    out, heard, noted = (
        sum(last[column] - first[column] for last, first in zip(after, before, strict=True)) / pickers / took
        for column in range(3)
    )
    others = rate * (pickers - 1) / pickers
    return (
        f"{pickers}, {rate:,.0f}",
        number(out / 1000),
        number(heard / 1000),
        number(100 * noted / others) if others else "-",
        number(100 * cpu / pickers / took),
        number(100 * its_cpu / took),
    )


async def _hearing(members: Sequence[Member]) -> None:
    """Until the server is there, and each hears all others."""

    def heard(member: Member) -> bool:
        joined = member.memory.words[PEERS] > 0
        return joined and member.memory.peers(time.monotonic())[1] == len(members) - 1

    async with asyncio.timeout(READY):
        while not all(map(heard, members)):  # noqa: ASYNC110 - other processes change it
            await asyncio.sleep(STEP)


async def measure(
    cases: Sequence[tuple[int, float]] = CASES, seconds: float = SECONDS, requests: int = RECORDED
) -> Table:
    """A row for each case."""
    told = recorded(requests)
    rows = []
    for pickers, rate in cases:
        progress(f"{pickers} pickers, {rate:.0f} requests a second")
        rows.append(await case(pickers, rate, told, seconds))
    chunks = sum(len(each[4]) for each in told) / len(told)
    columns = (
        "pickers, requests/s together",
        "KB/s one tells",
        "KB/s one hears",
        "requests of others noted, %",
        "CPU of one, %",
        "CPU of the server, %",
    )
    return Table(f"{seconds:.0f} s of requests of {number(chunks)} new chunks each", columns, tuple(rows))


async def main() -> None:
    configure("auto", "error")
    show([await measure()])


if __name__ == "__main__":
    asyncio.run(main())
