"""Whether several workers, or several pickers, pick as one: `python -m bench.worker_hits`.

Agents' conversations over a pool of pods that are no more than a prefix cache and a prefill queue; the pickers are the
product's. Requests go to them in turn, as Envoy's round robin sends them. Once they are workers that share their
memory, once pickers that hear one another, with the product's Outbox, Relay and Inbox between them, once pickers of
which each only knows how many there are (`--pickers`).
"""

from __future__ import annotations

import asyncio
import heapq
import json
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from bench.load import percentile
from bench.report import Table, millis, number, progress, show
from picker.cost import PodLoad, PoolLoad, Tell
from picker.exchange import PERIOD, Inbox, Outbox
from picker.memory import Key, Memory
from picker.pick import Picker
from picker.prefix import CHUNK_TOKENS, chunk_hashes
from picker.prompt import read_prompt
from xds.relay import Relay

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
ONE, SHARED, HEARD, APART = "picker", "workers", "pickers, exchange", "pickers, no exchange"
HOW = (SHARED, HEARD, APART)
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


def workers(count: int, seed: int) -> list[Picker]:
    """That share their memory."""
    memory = Memory()
    return [Picker(random.Random(seed + index).random, 1, memory) for index in range(count)]


def apart(count: int, seed: int) -> list[Picker]:
    """Pickers that know how many there are, and nothing else of one another."""
    return [Picker(random.Random(seed + index).random, count) for index in range(count)]


class Hearing:
    """Pickers that hear one another: what one has sent the others know PERIOD later at most.

    `told` has the arguments of every `Outbox.tell`.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.told: list[tuple[str, str, int, int, Sequence[Key]]] = []
        self._relay = Relay()
        self._due = 0.0
        self._ends = []
        self.pickers = []
        for index in range(count):
            memory, outbox = Memory(), Outbox()
            picker = Picker(random.Random(seed + index).random, 1, memory, self._telling(outbox))
            self._ends.append((memory, outbox, self._relay.join(index), Inbox(picker)))
            self.pickers.append(picker)

    def _telling(self, outbox: Outbox) -> Tell:
        def tell(pool: str, hash_key: str, tokens: int, uncached: int, chunks: Sequence[Key]) -> None:
            self.told.append((pool, hash_key, tokens, uncached, chunks))
            outbox.tell(pool, hash_key, tokens, uncached, chunks)

        return tell

    def until(self, now: float) -> None:
        """Let all batches be told and heard that are due by now."""
        while self._due <= now:
            for _, outbox, member, _ in self._ends:
                if batch := outbox.take():
                    self._relay.say(member, batch)
            for memory, _, member, inbox in self._ends:
                memory.note_peers(inbox.hear(self._relay.take(member), self._due).others, self._due)
            self._due += PERIOD


def run(
    pickers: Sequence[Picker],
    requests: int = REQUESTS,
    seed: int = 1,
    until: Callable[[float], None] = lambda _: None,
) -> tuple[float, list[float]]:
    """The share of all tokens that were cached, and the sorted seconds to the first token.

    `until` is told the time before each request and each report.
    """
    rng = random.Random(seed)
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
            until(due)
            if pending is not None:
                for picker in pickers:
                    picker.update(pending, due)
            pending = PoolLoad("pool", tuple(pod.load(name, due) for name, pod in pods.items()))
            due += DELAY if due % REPORT < DELAY / 2 else REPORT - DELAY
            if due % REPORT < DELAY / 2:
                pending = None
        until(now)
        pick = pickers[turn % len(pickers)].pick("pool", body, now)
        pod = pods[pick.pod or rng.choice(list(pods))]
        cached, seconds = pod.serve(hashes, tokens, now)
        if turn > requests // 4:  # caches are warm
            hit += cached
            total += tokens
            times.append(seconds)
    return hit / total, sorted(times)


def hits(count: int, how: str, requests: int, seed: int) -> tuple[float, list[float]]:
    """The same for so many pickers; `how` is of HOW."""
    if how == HEARD:
        hearing = Hearing(count, seed)
        return run(hearing.pickers, requests, seed, hearing.until)
    return run((workers if how in (ONE, SHARED) else apart)(count, seed), requests, seed)


def measure(counts: Sequence[int] = (1, 2, 4), requests: int = REQUESTS, seeds: Sequence[int] = SEEDS) -> Table:
    """A row for each number of them and each way they know of one another, over all runs."""
    rows = []
    for count in counts:
        for how in HOW if count > 1 else (ONE,):
            progress(f"{count} {how}")
            runs = [hits(count, how, requests, seed) for seed in seeds]
            share = sum(share for share, _ in runs) / len(runs)
            times = sorted(chain.from_iterable(seconds for _, seconds in runs))
            cells = (number(100 * share), millis(sum(times) / len(times)), millis(percentile(times, 99)))
            rows.append((f"{count} {how}", *cells))
    columns = ("who picks", "cached tokens, %", "first token mean ms", "p99 ms")
    return Table(f"{len(seeds)} times {requests:,} requests of agents over {PODS} pods", columns, tuple(rows))


async def main() -> None:
    show([measure()])


if __name__ == "__main__":
    asyncio.run(main())
