"""The cost pick: the pod where a prompt costs least, in tokens of prefill. Pure; time and randomness are arguments.

For a prompt of L tokens with chunk hashes h, each pod p costs

    U = L - 512 * (longest prefix of h that p has seen), times (1 - PRIOR) on the key's primary pod
    C = B + U * (1 + ETA * n) + CN * n + KAPPA * max(0, kv + U + output - 0.95 * capacity)

B is p's virtual backlog: the U of every pick, leaking at 0.7 of p's prefill rate. n (requests) and kv (tokens) are the
pod's last load report plus E times what this picker sent there since, E being the number of independent pickers. The
cheapest pod is picked; of equal ones the one with fewest requests, of those any.

What p has seen, B and what was sent are in a `Memory` (picker/memory.py): the worker processes of one picker share it,
and so are one picker, not several.

A pod without a fresh report is taken to be as busy as the mean of the others: neither flooded nor starved for a
metrics page that cannot be read. With no fresh report at all there is no cost pick.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from picker.memory import TOKEN_BITS, TOKENS, WRAP, Key, Memory, PodMemory, keys
from picker.prefix import CHUNK_TOKENS

ETA = 0.3  # a request's prefill shares its steps with each one running: more trades the tail for hits, less the reverse
CN = 100.0  # tokens: what a running request costs the next, however short its prompt
KAPPA = 2.0  # tokens a token: beyond the KV cache a token preempts another, which is prefilled again
PRIOR_ALONE = 0.2  # share of U waived on the primary: gathers new prefixes before anything has been seen
PRIOR_MANY = 0.8  # the same with several pickers: the primary is all they agree on
OUTPUT = 200.0  # tokens: a usual answer; a client's max_tokens counts only when it is less, being mostly a mere ceiling
LEAK = 0.7  # of the prefill rate: the rest of a pod's steps is decoding
PREFILL_RATE = (
    8000.0  # tokens/s until the pod's own is known: an 8B model on one datacentre GPU; a factor 2 costs 10-20 %
)
KV_USABLE = 0.95  # of the capacity: above it vLLM begins to preempt
STALE = 10.0  # seconds: five scrape rounds; a report older than this says nothing of now
UNKNOWN_CHUNKS = 1024  # capacity of a pod whose KV cache is unknown: 512k tokens, an 8B model on 80 GB


@dataclass(frozen=True, slots=True)
class PodLoad:
    """One pod in a load report; the fields are those of `EndpointLoad` in xds/wire/load.proto."""

    hash_key: str
    address: str = ""
    age: float = 0.0  # seconds between reading the pod's metrics and the report; negative = never read
    running: float = 0.0
    waiting: float = 0.0
    kv_usage: float = 0.0  # 0..1
    kv_tokens: int = 0  # 0 = unknown
    prefill_rate: float = 0.0  # tokens/s, 0 = unknown
    start_time: float = 0.0  # unix seconds, 0 = unknown


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """What the management server reports of a pool: every pod that may be picked."""

    name: str
    pods: tuple[PodLoad, ...]


@dataclass(frozen=True, slots=True)
class _Sent:
    """A look at what all workers had sent to a pod: before and after a request of our own."""

    at: float  # seconds
    before: int
    after: int


class _Pod:
    """What the picker knows of one pod. Mutable."""

    __slots__ = ("_base", "_looks", "_reported_kv", "_reported_n", "load", "memory", "read_at")

    def __init__(self, load: PodLoad, memory: PodMemory, now: float) -> None:
        self.load = load
        self.memory = memory
        self.read_at = -inf
        self._reported_n = 0.0
        self._reported_kv = 0.0
        self._base = memory.sent  # what had been sent when the last load was read
        self._looks = deque([_Sent(now, self._base, self._base)])

    def report(self, load: PodLoad, max_chunks: int, now: float) -> None:
        """Take a load report that arrived at `now`; a new start time or address is a new, empty pod."""
        self.load = load
        self.read_at = now - load.age if load.age >= 0 else -inf
        capacity = max(1, min(load.kv_tokens // CHUNK_TOKENS or UNKNOWN_CHUNKS, max_chunks))
        restarted = self.memory.report(load.address, load.start_time, capacity, now)
        self._reported_n = load.running + load.waiting
        self._reported_kv = load.kv_usage * load.kv_tokens
        self._rebase(now if restarted else max(self.read_at, now - STALE), now)

    def _rebase(self, read_at: float, now: float) -> None:
        """Count only what was sent after `read_at`: what others sent between two looks of ours, in proportion."""
        looks, sent = self._looks, self.memory.sent
        looks.append(_Sent(now, sent, sent))
        while len(looks) > 1 and looks[1].at <= read_at:
            looks.popleft()
        self._base = looks[0].after
        if len(looks) > 1 and looks[0].at < read_at:
            share = (read_at - looks[0].at) / (looks[1].at - looks[0].at)
            between = (looks[1].before - looks[0].after) & WRAP
            requests, tokens = between >> TOKEN_BITS, between & TOKENS
            self._base += (round(share * requests) << TOKEN_BITS) + round(share * tokens)

    def busyness(self, pickers: int) -> tuple[float, float]:
        """n and kv of the module's formula."""
        since = (self.memory.sent - self._base) & WRAP
        return self._reported_n + pickers * (since >> TOKEN_BITS), self._reported_kv + pickers * (since & TOKENS)

    def cost(self, uncached: float, output: float, n: float, kv: float, now: float) -> float:
        """C of the module's formula, in tokens."""
        capacity = self.load.kv_tokens
        preempted = max(0.0, kv + uncached + output - KV_USABLE * capacity) if capacity else 0.0
        return self.backlog(now) + uncached * (1.0 + ETA * n) + CN * n + KAPPA * preempted

    @property
    def _leak(self) -> float:
        return LEAK * (self.load.prefill_rate or PREFILL_RATE)  # tokens/s

    def backlog(self, now: float) -> float:
        """B: prefill tokens sent here and, at the leak's rate, not yet done."""
        return max(0.0, self.memory.busy_until - now) * self._leak

    def send(self, chunks: Sequence[Key], uncached: float, output: float, now: float) -> None:
        """Note a request that was picked for this pod."""
        memory = self.memory
        memory.busy_until = max(memory.busy_until, now) + uncached / self._leak
        before = memory.sent
        memory.send(int(uncached + output))
        self._looks.append(_Sent(now, before, memory.sent))
        memory.touch(chunks, now)


class Pool:
    """One pool's pods. Mutable.

    `random` gives floats in [0, 1); `pickers` is the number of independent pickers (this one included). Pools of one
    `memory` have different names.
    """

    def __init__(
        self, random: Callable[[], float], pickers: int = 1, memory: Memory | None = None, name: str = ""
    ) -> None:
        self._random = random
        self._memory = memory or Memory()
        self._name = name
        self._pickers = pickers
        self._prior = PRIOR_ALONE if pickers == 1 else PRIOR_MANY
        self._pods: dict[str, _Pod] = {}

    def __len__(self) -> int:
        return len(self._pods)

    @property
    def chunks(self) -> int:
        """Chunk hashes held for all pods."""
        return sum(len(pod.memory) for pod in self._pods.values())

    @property
    def read_at(self) -> float:
        """When the freshest report was read from its pod, in seconds; -inf when never."""
        return max((pod.read_at for pod in self._pods.values()), default=-inf)

    def update(self, load: PoolLoad, max_chunks: int, now: float) -> None:
        """Take a report: new pods appear, missing ones are dropped with all that is known of them."""
        known = self._pods
        self._pods = {}
        for pod_load in load.pods:
            pod = known.get(pod_load.hash_key)
            if pod is None or not pod.memory.mine:
                pod = _Pod(pod_load, self._memory.pod(f"{self._name}\0{pod_load.hash_key}", now), now)
            pod.report(pod_load, max_chunks, now)
            self._pods[pod_load.hash_key] = pod

    def pick(
        self,
        hashes: Sequence[bytes],
        tokens: int,
        max_tokens: int | None,
        primary: str | None,
        now: float,
    ) -> str | None:
        """The hash key of the cheapest pod, now counted as sent to; None when no report is fresh.

        `tokens` is the prompt's length, `primary` the hash key of the stateless key's pod, `now` in seconds.
        """
        fresh = {name: pod.busyness(self._pickers) for name, pod in self._pods.items() if now - pod.read_at <= STALE}
        if not fresh:
            return None
        chunks = keys(hashes)
        mean = (sum(n for n, _ in fresh.values()) / len(fresh), 0.0)
        output = OUTPUT if max_tokens is None else min(OUTPUT, max_tokens)
        best: list[tuple[str, _Pod, float]] = []
        best_cost = (inf, inf)
        for name, pod in self._pods.items():
            uncached: float = tokens - CHUNK_TOKENS * pod.memory.longest_prefix(chunks)
            if name == primary:
                uncached *= 1.0 - self._prior
            n, kv = fresh.get(name, mean)
            cost = (pod.cost(uncached, output, n, kv, now), n)
            if cost < best_cost:
                best_cost = cost
                best = [(name, pod, uncached)]
            elif cost == best_cost:
                best.append((name, pod, uncached))
        name, pod, uncached = best[int(self._random() * len(best))]
        pod.send(chunks, uncached, output, now)
        return name
