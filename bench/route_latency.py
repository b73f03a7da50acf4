"""What the LLM route adds to a request's time: `python -m bench.route_latency`.

The same requests go in turn through a plain route, the LLM route (picker, buffer, ring_hash) and the LLM route that is
matched by the body's model (JSON parsed in Envoy as well), all to the same pods, which answer at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from bench.closed_loop import alternate, requests
from bench.load import percentile
from bench.report import Table, millis, number, progress, show
from bench.rig import PLAIN, Rig, RigError


@dataclass(frozen=True, slots=True)
class Case:
    """`clients` send `blocks` times `block` requests each to every route; `pause` as in `alternate`."""

    name: str
    clients: int
    blocks: int
    block: int
    pause: float = 0.0


ALONE = Case("1 client", 1, blocks=2500, block=1)
CROWD = Case("16 clients, without pause", 16, blocks=20, block=16)
MASS = Case("128 clients, without pause", 128, blocks=8, block=5)
PACED = Case("16 clients, 160 requests/s", 16, blocks=25, block=5, pause=0.1)
WARM = Case("warm", 16, blocks=2, block=16)

PLAN = tuple((case, size) for size in (2_000, 6_000, 16_000) for case in (ALONE, PACED, CROWD, MASS))


async def measure(rig: Rig, plan: Sequence[tuple[Case, int]] = PLAN, warm: Case = WARM) -> Table:
    """A row for each case, size of the body in bytes, and route; RigError when the picker did not pick what it had to.

    What is added to the plain route's time is the difference of two percentiles, not a percentile of differences.
    """
    rows: list[tuple[str, ...]] = []
    for case, size in plan:
        progress(f"{case.name}, bodies of {size / 1000:g} KB")
        sent = requests(size)
        await alternate(rig.ports, sent, warm.clients, blocks=warm.blocks, block=warm.block)
        before = await rig.picks()
        times = await alternate(rig.ports, sent, case.clients, blocks=case.blocks, block=case.block, pause=case.pause)
        picked = await rig.picks() - before
        wanted = sum(len(seconds) for route, seconds in times.items() if route != PLAIN)
        if picked < 0.99 * wanted:  # the rest failed open: their time is not what is asked for
            raise RigError(f"only {picked} of {wanted} requests were picked by cost")
        for route, seconds in times.items():
            where = (f"{size / 1000:g} KB, {case.name}", route, f"{len(seconds):,}")
            mine, plain = ([percentile(each, share) for share in (50, 99)] for each in (seconds, times[PLAIN]))
            added = [millis(a - b) for a, b in zip(mine, plain, strict=True)]
            ratios = [number(a / b) for a, b in zip(mine, plain, strict=True)]
            rows.append((*where, *map(millis, mine), *(("",) * 4 if route == PLAIN else (*added, *ratios))))
    columns = ("body, load", "route", "requests", "p50 ms", "p99 ms", "added p50 ms", "added p99 ms", "p50 x", "p99 x")
    return Table("Time of a request by route", columns, tuple(rows))


async def main() -> None:
    async with Rig() as rig:
        show([await measure(rig)])


if __name__ == "__main__":
    asyncio.run(main())
