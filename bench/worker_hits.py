"""Whether several workers pick as one: `python -m bench.worker_hits`.

Agents' conversations over a pool of pods that are no more than a prefix cache and a prefill queue; the pickers are the
product's. Requests go to the workers in turn, as Envoy's round robin sends them. Once the workers share their memory,
once each has its own and knows how many there are (`--pickers`).
"""

from __future__ import annotations

import asyncio
import heapq
import json
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from bench.load import percentile
from bench.report import Table, millis, number, progress, show
from picker.cost import PodLoad, PoolLoad
from picker.memory import Memory
from picker.pick import Picker
from picker.prefix import CHUNK_TOKENS, chunk_hashes
from picker.prompt import read_prompt

PODS = 8
CACHE = 1500  # chunks a pod holds: 768k tokens
PREFILL = 8000.0  # tokens/s of a pod
DECODE = 6.0  # seconds from the first token to the end
REPORT = 2.0  # seconds between load reports
DELAY = 0.05  # seconds a report is old when it arrives
AGENTS = 400  # conversations at a time
TURNS = 20  # of a conversation, on average
SYSTEMS, SYSTEM = 6, 30_000  # system prompts, and bytes of one
TURN = (500, 6_000)  # bytes a turn adds
LOAD = 0.8  # share of what the pods could prefill if nine tenths were cached
REQUESTS = 10_000  # of each of the runs
SEEDS = range(1, 6)  # runs: their seconds differ by half, their hits do not


@dataclass(slots=True)
class Pod:
    """A prefix cache that is exactly an LRU, a queue for prefill, and what runs."""

    chunks: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    free: float = 0.0  # seconds: when the queue is empty
    ends: list[float] = field(default_factory=list)

    def serve(self, hashes: Sequence[bytes], tokens: int, now: float) -> tuple[int, float]:
        """Tokens that were cached, and seconds to the first token."""
        cached = 0
        for chunk in hashes:
            if chunk not in self.chunks:
                break
            cached += 1
        for chunk in reversed(hashes):
            self.chunks[chunk] = None
            self.chunks.move_to_end(chunk)
        while len(self.chunks) > CACHE:
            self.chunks.popitem(last=False)
        self.free = max(self.free, now) + (tokens - cached * CHUNK_TOKENS) / PREFILL
        heapq.heappush(self.ends, self.free + DECODE)
        return cached * CHUNK_TOKENS, self.free - now

    def load(self, name: str, now: float) -> PodLoad:
        while self.ends and self.ends[0] <= now:
            heapq.heappop(self.ends)
        waiting = min(len(self.ends), round(max(0.0, self.free - now) * PREFILL / 4000))
        return PodLoad(
            name,
            age=DELAY,
            running=len(self.ends) - waiting,
            waiting=waiting,
            kv_tokens=CACHE * CHUNK_TOKENS,
            prefill_rate=PREFILL,
            start_time=1.0,
        )


def bodies(count: int, seed: int) -> Iterator[bytes]:
    """Chat completions of agents: each conversation grows by a turn, and is followed by another's when it is over."""
    rng = random.Random(seed)
    systems = [rng.randbytes(SYSTEM // 2).hex() for _ in range(SYSTEMS)]

    def begin() -> list[dict[str, str]]:
        return [{"role": "system", "content": systems[min(int(rng.expovariate(0.7)), SYSTEMS - 1)]}]

    agents = [begin() for _ in range(AGENTS)]
    for _ in range(count):
        index = int(rng.random() ** 2 * AGENTS)  # some are busier than others
        if rng.random() < 1 / TURNS:
            agents[index] = begin()
        role = "user" if len(agents[index]) % 2 else "assistant"
        agents[index].append({"role": role, "content": rng.randbytes(rng.randint(*TURN) // 2).hex()})
        yield json.dumps({"model": "m", "messages": agents[index]}).encode()


def run(workers: int, *, shared: bool, requests: int = REQUESTS, seed: int = 1) -> tuple[float, list[float]]:
    """The share of all tokens that were cached, and the sorted seconds to the first token."""
    rng = random.Random(seed)
    memory = Memory()
    pickers = [
        Picker(random.Random(seed + index).random, 1 if shared else workers, memory if shared else None)
        for index in range(workers)
    ]
    pods = {f"default/pod-{index}": Pod() for index in range(PODS)}
    rate = 0.0  # set by the first requests' length: the load is a share of what the pods can do
    now, due, total, hit = 0.0, 0.0, 0, 0
    times = []
    pending: PoolLoad | None = None
    for turn, body in enumerate(bodies(requests, seed)):
        prompt = read_prompt(body)
        assert prompt is not None  # noqa: S101 - what `bodies` makes can be read
        hashes, tokens = chunk_hashes(prompt), prompt.tokens
        rate = rate + ((tokens / 10) - rate) / min(turn + 1, 500)
        now += rng.expovariate(LOAD * PODS * PREFILL / rate)
        while now >= due:  # a report is of DELAY before it arrives
            if pending is not None:
                for picker in pickers:
                    picker.update(pending, due)
            pending = PoolLoad("pool", tuple(pod.load(name, due) for name, pod in pods.items()))
            due += DELAY if due % REPORT < DELAY / 2 else REPORT - DELAY
            if due % REPORT < DELAY / 2:
                pending = None
        pick = pickers[turn % workers].pick("pool", body, now)
        pod = pods[pick.pod or rng.choice(list(pods))]
        cached, seconds = pod.serve(hashes, tokens, now)
        if turn > requests // 4:  # caches are warm
            hit += cached
            total += tokens
            times.append(seconds)
    return hit / total, sorted(times)


def measure(counts: Sequence[int] = (1, 2, 4), requests: int = REQUESTS, seeds: Sequence[int] = SEEDS) -> Table:
    """A row for each number of workers, with and without shared memory, over all runs."""
    rows = []
    for workers in counts:
        for shared in (True, False) if workers > 1 else (True,):
            progress(f"{workers} workers, {'shared' if shared else 'separate'} memory")
            runs = [run(workers, shared=shared, requests=requests, seed=seed) for seed in seeds]
            hits = sum(share for share, _ in runs) / len(runs)
            times = sorted(chain.from_iterable(seconds for _, seconds in runs))
            what = "one" if workers == 1 else "shared" if shared else "separate"
            cells = (number(100 * hits), millis(sum(times) / len(times)), millis(percentile(times, 99)))
            rows.append((f"{workers}, {what}", *cells))
    columns = ("workers, memory", "cached tokens, %", "first token mean ms", "p99 ms")
    return Table(f"{len(seeds)} times {requests:,} requests of agents over {PODS} pods", columns, tuple(rows))


async def main() -> None:
    show([measure()])


if __name__ == "__main__":
    asyncio.run(main())
