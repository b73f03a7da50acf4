"""The cost pick: the pod where a prompt costs least, in tokens of prefill. Pure; time and randomness are arguments.

For a prompt of L tokens with chunk hashes h, each pod p costs

    U = L - 512 * (longest prefix of h that p has seen), with several pickers times (1 - PRIOR) on the key's primary
        pod; where p has seen nothing of h, but the request's hint, the hint counts as one chunk
    C = B + U * (1 + ETA * n) + CN * n + KAPPA * max(0, kv + U + output - 0.95 * capacity) + A

B is what p is taken to have still to prefill: the U of every pick, leaking at 0.7 of p's prefill rate, and for each
request that waits there by p's last metrics page the usual U, the mean of this process's last picks. The rate that a
page tells is several times too low on a busy pod, where prefills share steps and each lasts as long as all of them. So
the rate is at least the one that is set, and what there is of more than DOUBT seconds leaks faster, the faster the more
it is: of whatever is sent at a steady rate, B comes to rest, where a leak that is too slow would let it grow until
nothing else counted.

n (requests) and kv (tokens) are what p's last metrics page said plus E times what is known to have been sent there
since, E being the number of pickers over the number of those whose sends are known: this one and the ones it hears
(picker/exchange.py). What those send is in n, kv, B and what p has seen as if this picker had sent it. Where Envoys
report what they have in flight to p, n is that with what was sent since, if it is more: a burst is there before any
page shows it. The cheapest pod is picked; of equal ones the one with fewest requests, of those any.

A is what a request for a LoRA adapter, a model that some pod of the pool has reported as one, has to wait for: nothing
where the pod holds the adapter, a load where there is room, more where requests wait for the adapter already, most
where every place is taken by running ones. A pod holds what its last report shows running and what it was sent last,
`max_lora` adapters at most.

What p has seen, B and what was sent are in a `Memory` (picker/memory.py): the worker processes of one picker share it,
and so are one picker, not several. Which adapters p was sent last, and the usual U, are each process's own.

A pod without a fresh report is taken to be as busy as the mean of the others: neither flooded nor starved for a
metrics page that cannot be read. With no fresh report at all there is no cost pick.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, inf, log

from picker.memory import TOKEN_BITS, TOKENS, WRAP, Key, Memory, PodMemory, keys
from picker.prefix import CHUNK_TOKENS

ETA = 0.15  # a prefill shares its steps with each request running: more trades the tail for hits, less the reverse
CN = 100.0  # tokens: what a running request costs the next, however short its prompt
KAPPA = 2.0  # tokens a token: beyond the KV cache a token preempts another, which is prefilled again
PRIOR_ALONE = 0.0  # share of U waived on the primary: one picker knows where everything is
PRIOR_MANY = 0.8  # the same where no other picker is heard: the primary is all they agree on; in between, in proportion
OUTPUT = 200.0  # tokens: a usual answer; a client's max_tokens counts only when it is less, being mostly a mere ceiling
LEAK = 0.7  # of the prefill rate: the rest of a pod's steps is decoding
DOUBT = 5.0  # seconds of B: about as long as the longest prompts are prefilled; half or twice as much costs some 5 %
MOST_BUSY = 300.0  # seconds that exp is given at most: 10^26 seconds' worth of tokens
USUAL = 1000.0  # tokens: the usual U before any pick
USUAL_SHARE = 0.03  # of a pick in it: about the last thirty
PREFILL_RATE = 8000.0  # tokens/s, if a pod's page tells no more: a 32B model in fp8 on one datacentre GPU
KV_USABLE = 0.95  # of the capacity: above it vLLM begins to preempt
STALE = 10.0  # seconds: five scrape rounds; a report older than this says nothing of now
HEARD_BACKLOG = 60.0  # seconds in which the B that other pickers' sends come to is gone: and with it a wrong one's cost
# Tokens of prefill an adapter is worth; only their order and size matter, as vLLM says nothing of how long it takes.
ADAPTER_LOAD = 400.0  # 50 ms at PREFILL_RATE: weights of some 100 MB from the host's memory, while the engine stands
ADAPTER_WAITS = 1000.0  # others wait for it there: a place is being made, and it will be shared
ADAPTER_FULL = 4000.0  # half a second: the rest of the shortest of some running answers, before a place is free
MAX_ADAPTERS = 4096  # adapter names known of a pool: more than a page names, over all its pods
UNKNOWN_CHUNKS = 1024  # capacity of a pod whose KV cache is unknown: 512k tokens, an 8B model on 80 GB


@dataclass(frozen=True, slots=True)
class Costs:
    """What an operator may set of a pool's costs: OUTPUT, PREFILL_RATE and CN, in their units."""

    output_tokens: float = OUTPUT
    prefill_rate: float = PREFILL_RATE
    request_cost: float = CN


DEFAULT_COSTS = Costs()


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
    start_time: float = 0.0  # changes with a restart, 0 = unknown
    in_flight: int = 0  # requests that Envoys have under way to it
    max_lora: int = 0  # 0 = unknown
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """What the management server reports of a pool: every pod that may be picked.

    `in_flight_age` is how old the pods' `in_flight` was, in seconds; None: no Envoy reports any.
    """

    name: str
    pods: tuple[PodLoad, ...]
    in_flight_age: float | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """What a request would cost on a pod, in tokens, and why: the names of the module's formula.

    `cached` of the prompt's tokens are probably there, `uncached` is U. `running` is n and `kv_tokens` kv, those of a
    pod without a `fresh` report the mean of the others. The cost is the sum of the terms, in the formula's order.
    """

    pod: str
    fresh: bool
    cached: int
    uncached: float
    running: float
    kv_tokens: float
    cost: float
    backlog: float
    prefill: float
    requests: float
    preempted: float
    adapter: float


@dataclass(frozen=True, slots=True)
class Placed:
    """What a picker has sent to one pod in a while: U of all requests in `uncached`, with their output in `tokens`.

    `prompts` has of each request the chunks that the pod had not been sent, or not lately.
    """

    pool: str
    hash_key: str
    requests: int
    tokens: int
    uncached: int
    prompts: tuple[Sequence[Key], ...]


Tell = Callable[[str, str, int, int, Sequence[Key]], None]  # the fields of a Placed of one request


@dataclass(frozen=True, slots=True)
class _Sent:
    """A look at what all workers had sent to a pod: before and after a request of our own."""

    at: float  # seconds
    before: int
    after: int


class _Pod:
    """What the picker knows of one pod. Mutable."""

    __slots__ = ("_base", "_held", "_in_flight", "_looks", "_reported_kv", "_reported_n", "load", "memory", "read_at")

    def __init__(self, load: PodLoad, memory: PodMemory, now: float) -> None:
        self.load = load
        self.memory = memory
        self.read_at = -inf
        self._reported_n = 0.0
        self._reported_kv = 0.0
        self._base = memory.sent  # what had been sent when the last page was read
        self._in_flight: tuple[int, int] | None = None  # what Envoys reported, and what had been sent then
        self._looks = deque([_Sent(now, self._base, self._base)])
        self._held: OrderedDict[str, None] = OrderedDict()  # adapters, the last used one last

    def report(self, load: PodLoad, max_chunks: int, now: float, in_flight_age: float | None = None) -> None:
        """Take a load report that arrived at `now`; a new start time or address is a new, empty pod."""
        if _restarted(self.load, load):
            self._held.clear()
        self.load = load
        self.read_at = now - load.age if load.age >= 0 else -inf
        capacity = max(1, min(load.kv_tokens // CHUNK_TOKENS or UNKNOWN_CHUNKS, max_chunks))
        restarted = self.memory.report(load.address, load.start_time, capacity, now)
        self._reported_n = load.running + load.waiting
        self._reported_kv = load.kv_usage * load.kv_tokens
        self._looks.append(_Sent(now, self.memory.sent, self.memory.sent))
        page = now if restarted else max(self.read_at, now - STALE)
        flight = now if restarted or in_flight_age is None else max(now - in_flight_age, now - STALE)
        while len(self._looks) > 1 and self._looks[1].at <= min(page, flight):
            self._looks.popleft()
        self._base = self._sent_until(page)
        self._in_flight = None if in_flight_age is None else (load.in_flight, self._sent_until(flight))
        for adapter in load.running_adapters:
            self._hold(adapter)

    def _sent_until(self, at: float) -> int:
        """What had been sent at this time: of what others sent between two looks of ours, a share in proportion."""
        before, after = self._looks[0], None
        for look in self._looks:
            if look.at > at:
                after = look
                break
            before = look
        if after is None or before.at >= at:
            return before.after
        share = (at - before.at) / (after.at - before.at)
        between = (after.before - before.after) & WRAP
        requests, tokens = between >> TOKEN_BITS, between & TOKENS
        return before.after + (round(share * requests) << TOKEN_BITS) + round(share * tokens)

    def busyness(self, pickers: float) -> tuple[float, float, float]:
        """n and kv of the module's formula, and how many requests wait; `pickers` is E."""
        since = (self.memory.sent - self._base) & WRAP
        n = self._reported_n + pickers * (since >> TOKEN_BITS)
        if self._in_flight is not None:
            in_flight, base = self._in_flight
            n = max(n, in_flight + pickers * ((self.memory.sent - base & WRAP) >> TOKEN_BITS))
        return n, self._reported_kv + pickers * (since & TOKENS), self.load.waiting

    def terms(
        self, uncached: float, output: float, n: float, kv: float, queued: float, now: float, costs: Costs, adapter: str
    ) -> tuple[float, float, float, float, float]:
        """What C of the module's formula is the sum of, in tokens; `adapter` "" for a model that is none.

        `queued` is the part of B that waits.
        """
        beyond = kv + uncached + output - KV_USABLE * self.load.kv_tokens
        return (
            self.backlog(now, costs) + queued,
            uncached * (1.0 + ETA * n),
            costs.request_cost * n,
            KAPPA * beyond if beyond > 0.0 and self.load.kv_tokens else 0.0,
            self.adapter_cost(adapter) if adapter else 0.0,
        )

    def adapter_cost(self, adapter: str) -> float:
        """A of the module's formula, in tokens."""
        if adapter in self._held:
            return 0.0
        if adapter in self.load.waiting_adapters:
            return ADAPTER_WAITS
        taken = len(self.load.running_adapters)
        return ADAPTER_FULL if taken >= self.load.max_lora > 0 else ADAPTER_LOAD

    def _hold(self, adapter: str) -> None:
        self._held[adapter] = None
        self._held.move_to_end(adapter)
        while len(self._held) > max(1, self.load.max_lora):
            self._held.popitem(last=False)

    def _leak(self, costs: Costs) -> float:
        return LEAK * max(self.load.prefill_rate, costs.prefill_rate)  # tokens/s

    def backlog(self, now: float, costs: Costs) -> float:
        """Prefill tokens sent here and, as far as is known, not yet done: B without what waits."""
        seconds = self.memory.busy_until - now
        if seconds > DOUBT:
            seconds = DOUBT * exp(min(seconds, MOST_BUSY) / DOUBT - 1.0)
        return max(0.0, seconds) * self._leak(costs)

    def _busy_until(self, backlog: float, now: float, costs: Costs) -> float:
        """The time from which `backlog` gives back so many tokens."""
        seconds = backlog / self._leak(costs)
        return now + (DOUBT * (1.0 + log(seconds / DOUBT)) if seconds > DOUBT else seconds)

    def cached(self, chunks: Sequence[Key], hint: Sequence[Key], tokens: int) -> int:
        """How many of a prompt's tokens are probably in this pod's prefix cache.

        A hint is worth a chunk at most: what a wrong one can cost.
        """
        if seen := self.memory.longest_prefix(chunks):
            return CHUNK_TOKENS * seen
        return min(tokens, CHUNK_TOKENS) if self.memory.longest_prefix(hint) else 0

    def send(
        self, chunks: Sequence[Key], adapter: str, uncached: float, output: float, now: float, costs: Costs
    ) -> list[Key]:
        """Note a request that was picked for this pod; `adapter` "" for a model that is none.

        The chunks that were not among the ones it was sent last.
        """
        memory = self.memory
        memory.busy_until = self._busy_until(self.backlog(now, costs) + uncached, now, costs)
        before = memory.sent
        memory.send(int(uncached + output))
        self._looks.append(_Sent(now, before, memory.sent))
        if adapter:
            self._hold(adapter)
        return memory.touch(chunks, now)

    def hear(self, placed: Placed, now: float, costs: Costs) -> None:
        """Note what another picker has sent here."""
        memory = self.memory
        until = self._busy_until(self.backlog(now, costs) + placed.uncached, now, costs)
        memory.busy_until = max(memory.busy_until, min(until, now + HEARD_BACKLOG))
        memory.send(placed.tokens, placed.requests)
        for chunks in placed.prompts:
            memory.touch(chunks, now)


def _restarted(old: PodLoad, new: PodLoad) -> bool:
    moved = old.address != new.address
    return moved or (0 < old.start_time != new.start_time > 0)


class Pool:
    """One pool's pods. Mutable.

    `random` gives floats in [0, 1); `pickers` is the number of pickers there are at least, this one included. Pools of
    one `memory` have different names. Where other pickers are heard, `tell` is told of each pick.
    """

    def __init__(
        self,
        random: Callable[[], float],
        pickers: int = 1,
        memory: Memory | None = None,
        name: str = "",
        tell: Tell | None = None,
    ) -> None:
        self._random = random
        self._memory = memory or Memory()
        self._name = name
        self._pickers = pickers
        self._tell = tell
        self._pods: dict[str, _Pod] = {}
        self._adapters: OrderedDict[str, None] = OrderedDict()  # every name a pod has reported as one
        self._usual = USUAL
        self.costs = DEFAULT_COSTS

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

    def saturated(self, waiting: float, kv_usage: float, now: float) -> bool:
        """Whether the pods' average of the larger of waiting / `waiting` and KV use / `kv_usage` is 1 or more.

        A pod without a fresh report counts as idle: nobody is refused for what is not known.
        """
        loads = [pod.load for pod in self._pods.values() if now - pod.read_at <= STALE]
        total = sum(max(load.waiting / waiting, load.kv_usage / kv_usage) for load in loads)
        return bool(loads) and total >= len(self._pods)

    def update(self, load: PoolLoad, max_chunks: int, now: float) -> None:
        """Take a report: new pods appear, missing ones are dropped with all that is known of them."""
        known = self._pods
        self._pods = {}
        for pod_load in load.pods:
            pod = known.get(pod_load.hash_key)
            if pod is None or not pod.memory.mine:
                pod = _Pod(pod_load, self._memory.pod(f"{self._name}\0{pod_load.hash_key}", now), now)
            pod.report(pod_load, max_chunks, now, load.in_flight_age)
            self._pods[pod_load.hash_key] = pod
            for adapter in (*pod_load.running_adapters, *pod_load.waiting_adapters):
                self._adapters[adapter] = None
        while len(self._adapters) > MAX_ADAPTERS:
            self._adapters.popitem(last=False)

    def pick(
        self,
        hashes: Sequence[bytes],
        tokens: int,
        max_tokens: int | None,
        primary: str | None,
        now: float,
        hint: bytes | None = None,
        model: str = "",
        offers: list[Offer] | None = None,
    ) -> str | None:
        """The hash key of the cheapest pod, now counted as sent to; None when no report is fresh.

        `tokens` is the prompt's length, `primary` the hash key of the stateless key's pod, `now` in seconds, `hint` the
        hash of the session or cache key the client named, `model` what the pod will be asked for. With `offers` every
        pod's is added there, and nothing is counted.
        """
        known, heard = self._memory.peers(now)
        pickers = max(self._pickers, 1 + known)
        everyone = pickers / (1 + heard)
        fresh = {name: pod.busyness(everyone) for name, pod in self._pods.items() if now - pod.read_at <= STALE}
        if not fresh:
            return None
        unheard = pickers - 1 - heard
        prior = PRIOR_ALONE + (PRIOR_MANY - PRIOR_ALONE) * unheard / (pickers - 1) if unheard else PRIOR_ALONE
        chunks, by_hint = keys(hashes), keys((hint,)) if hint is not None else []
        mean_n, _, mean_waiting = (sum(column) / len(fresh) for column in zip(*fresh.values(), strict=True))
        mean = (mean_n, 0.0, mean_waiting)
        costs = self.costs
        output = costs.output_tokens if max_tokens is None else min(costs.output_tokens, max_tokens)
        adapter = model if model in self._adapters else ""
        best: list[tuple[str, _Pod, float]] = []
        best_cost = (inf, inf)
        for name, pod in self._pods.items():
            cached = pod.cached(chunks, by_hint, tokens)
            uncached: float = tokens - cached
            if name == primary:
                uncached *= 1.0 - prior
            n, kv, waiting = fresh.get(name, mean)
            terms = pod.terms(uncached, output, n, kv, waiting * self._usual, now, costs, adapter)
            backlog, prefill, requests, preempted, waits = terms
            cost = (backlog + prefill + requests + preempted + waits, n)
            if offers is not None:
                offers.append(Offer(name, name in fresh, cached, uncached, n, kv, cost[0], *terms))
            if cost < best_cost:
                best_cost = cost
                best = [(name, pod, uncached)]
            elif cost == best_cost:
                best.append((name, pod, uncached))
        name, pod, uncached = best[int(self._random() * len(best))]
        if offers is None:
            self._usual += USUAL_SHARE * (uncached - self._usual)
            written = pod.send([*by_hint, *chunks], adapter, uncached, output, now, costs)
            if heard and self._tell is not None:
                self._tell(self._name, name, int(uncached + output), int(uncached), written)
        return name

    def hear(self, placed: Placed, now: float) -> bool:
        """Note what another picker has sent to a pod; False when there is no such pod here."""
        pod = self._pods.get(placed.hash_key)
        if pod is not None:
            pod.hear(placed, now, self.costs)
        return pod is not None
