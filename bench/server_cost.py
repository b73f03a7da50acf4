"""What the picker's server costs, against others around the same picker: `python -m bench.server_cost`.

Each has a gateway of its own, all in one run: requests take turns between them, so that whatever else the machine does
hits all alike. See bench/grpc_servers.py for the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

from bench.closed_loop import alternate, requests
from bench.load import percentile
from bench.report import Table, idle_share, micros, millis, number, progress, show
from bench.request_cpu import CLIENTS, cpu
from bench.rig import PICKED, PLAIN, Rig

OURS, OTHER = "picker/listen.py", "grpc.aio on uvloop"
SERVERS = {
    OURS: Rig(),
    f"{OURS}, 2 workers": Rig(workers=2),
    "h2 library": Rig(picker=("bench.grpc_servers", "h2")),
    "grpc, synchronous": Rig(picker=("bench.grpc_servers", "sync")),
    OTHER: Rig(picker=("bench.grpc_servers", "aio")),
}
SIZES = (2_000, 6_000, 16_000, 200_000)  # bytes of a body
SECONDS = 1.0  # of requests for each server, in each of ROUNDS
ROUNDS = 4
ALONE = 1500  # requests of one client to each
IDLE = 4.0  # seconds of watching the processes do nothing


async def measure(
    rigs: Mapping[str, Rig],
    sizes: Sequence[int] = SIZES,
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
    alone: int = ALONE,
    idle: float = IDLE,
) -> Table:
    """A row for each size and server; `x` is what grpc.aio takes of the picker's CPU, over this one."""
    rows: list[tuple[str, ...]] = []
    shares = {name: await idle_share(([rig.envoy_pid], rig.picker_pids), idle) for name, rig in rigs.items()}
    ports = {name: rig.ports[PICKED] for name, rig in rigs.items()} | {PLAIN: rigs[OURS].ports[PLAIN]}
    for size in sizes:
        progress(f"bodies of {size / 1000:g} KB")
        sent = requests(size)
        await alternate(ports, sent, CLIENTS, blocks=2, block=16)
        times = await alternate(ports, sent, 1, blocks=alone, block=1)
        costs: dict[str, list[list[float]]] = {name: [] for name in rigs}
        for _ in range(rounds):
            for name, rig in rigs.items():
                costs[name].append(await cpu(rig, PICKED, sent, shares[name], CLIENTS, seconds))
        mean = {name: [sum(part) / rounds for part in zip(*each, strict=True)] for name, each in costs.items()}
        for name in rigs:
            envoy, mine = mean[name]
            added = [percentile(times[name], share) - percentile(times[PLAIN], share) for share in (50, 99)]
            ratio = number(mean[OTHER][1] / mine) if OTHER in mean else ""
            rows.append((f"{size / 1000:g} KB", name, micros(mine), ratio, micros(envoy), *map(millis, added)))
    columns = ("body", "server", "picker, us", "x", "Envoy, us", "added p50 ms", "added p99 ms")
    return Table("CPU and time a request by the picker's server", columns, tuple(rows))


async def main() -> None:
    async with AsyncExitStack() as stack:
        for rig in SERVERS.values():
            await stack.enter_async_context(rig)
        show([await measure(SERVERS)])


if __name__ == "__main__":
    asyncio.run(main())
