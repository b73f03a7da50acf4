"""CPU time a request in Envoy and in the picker, by route and size of the body: `python -m bench.request_cpu`."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

from bench.closed_loop import hammer, requests
from bench.report import Table, cpu_seconds, idle_share, micros, number, progress, show
from bench.rig import PICKED, PLAIN, Rig, RigError
from picker.cost import PodLoad, PoolLoad
from picker.pick import Picker, Reason
from picker.worker import keep_memory

SIZES = (2_000, 6_000, 16_000, 200_000, 1_000_000, 10_000_000)  # bytes of a body
CLIENTS = 4  # enough to keep Envoy busy, too few to queue
LARGE = 1_000_000  # bytes: four such at once would wait for each other longer than Envoy waits for the picker
SECONDS = 4.0  # of requests, each route and size: an error of 10 ms is 0.3 %
IDLE = 4.0  # seconds of watching the processes do nothing
PODS = (4, 100)  # of the pools the picker alone picks from
ROUNDS = 5  # the fastest one is what the work takes when nothing else has the core


async def measure(
    rig: Rig, sizes: Sequence[int] = SIZES, seconds: float = SECONDS, idle: float = IDLE
) -> tuple[Table, Table]:
    """Both processes' CPU a request; what they take without requests is measured apart and subtracted."""
    envoy: list[tuple[str, ...]] = []
    picker: list[tuple[str, ...]] = []
    shares = await idle_share(([rig.envoy_pid], rig.picker_pids), idle)
    for size in sizes:
        sent = requests(size)
        cost = {}
        for route in rig.ports:
            progress(f"{route}, bodies of {size / 1000:,g} KB")
            cost[route] = await cpu(rig, route, sent, shares, CLIENTS if size < LARGE else 1, seconds)
        envoy.append((f"{size / 1000:,g} KB", *(micros(both[0]) for both in cost.values())))
        mine = cost[PICKED][1]
        picker.append((f"{size / 1000:,g} KB", micros(mine), number(1 / mine), *_alone(sent)))
    return (
        Table("Envoy's CPU a request", ("body", *(f"{route}, us" for route in rig.ports)), tuple(envoy)),
        Table(
            "The picker's CPU a request",
            (
                *("body", "the process, us", "requests/s a core"),
                *(f"the decision alone, {pods} pods, us" for pods in PODS),
            ),
            tuple(picker),
        ),
    )


async def cpu(
    rig: Rig, route: str, sent: Sequence[bytes], shares: Sequence[float], clients: int, seconds: float
) -> list[float]:
    """CPU seconds a request of Envoy and of the picker; RigError when the picker did not pick what it had to."""
    parts = ([rig.envoy_pid], rig.picker_pids)
    await hammer(rig.ports[route], sent, clients, seconds / 8)
    picks, began, before = await rig.picks(), time.perf_counter(), [cpu_seconds(*pids) for pids in parts]
    count = await hammer(rig.ports[route], sent, clients, seconds)
    elapsed = time.perf_counter() - began
    used = [cpu_seconds(*pids) - each for pids, each in zip(parts, before, strict=True)]
    picks = await rig.picks() - picks
    if route != PLAIN and picks < 0.99 * count:
        raise RigError(f"{route}: only {picks} of {count} requests were picked by cost")
    return [(each - share * elapsed) / count for each, share in zip(used, shares, strict=True)]


def _alone(sent: Sequence[bytes]) -> list[str]:
    bodies = [request.partition(b"\r\n\r\n")[2] for request in sent]
    return [micros(decision(bodies, pods)) for pods in PODS]


def decision(bodies: Sequence[bytes], pods: int, rounds: int = ROUNDS) -> float:
    """CPU seconds of one `Picker.pick`, whose pods have seen these prompts before."""
    picker = Picker(random.Random(1).random)
    loads = (PodLoad(f"default/pod-{index}", running=4, kv_usage=0.5, kv_tokens=400_000) for index in range(pods))
    picker.update(PoolLoad("pool", tuple(loads)), 0.0)
    times = []
    for _ in range(rounds + 1):  # the first one fills the memory
        began = time.process_time()
        picks = [picker.pick("pool", body, 0.01) for body in bodies]
        times.append((time.process_time() - began) / len(bodies))
        if {pick.reason for pick in picks} != {Reason.COST}:
            raise RigError(f"not every prompt was picked by cost: {picks}")
    return min(times[1:])


async def main() -> None:
    keep_memory()  # as the picker's process does
    async with Rig() as rig:
        show(await measure(rig))


if __name__ == "__main__":
    asyncio.run(main())
