"""From the loads of a pool to the `load_balancing_weight` of its endpoints.

The law, in words. Every endpoint has weight 100, and so Envoy balances by its own request counts, which are younger
than any scrape; an unequal weight costs that, and is given only for one of these reasons, each relative to the pool
(a pool that is slow or full as a whole stays equal):

    slow or fast  its seconds a token differ from the pool's median: median / own, within 1/4 .. 2
    queue         requests wait there, smoothed over several rounds, beyond the pool's median: 1 / (1 + q)
    KV cache      its KV use, smoothed, is near exhaustion and beyond the pool's median: 1 / (1 + q)
    ramp          it joined or restarted (an empty prefix cache) while others were warm: from 1/4 to 1 over a minute
    blind         its load is older than three intervals: it keeps its weight, and after a grace goes back to equal

The product is laid on a geometric grid of weights (STEP), so that a small change of load changes nothing: a push
moves keys of a consistent hash and replaces EDS. An endpoint leaves its level only for one that is more than HOLD
steps away, and moves at most MOST_DOWN or MOST_UP levels a round. There is no integral term: with gain of 0.3 or more
every 2 s such laws oscillate, while 1 / (1 + q) comes to rest. No weight is 0 (Envoy refuses the whole resource), none
below a tenth of the largest. A draining endpoint keeps its weight: its health status takes it out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from statistics import median

from xds.model import Load
from xds.rates import UNKNOWN, Rate

BASE = 100  # the weight of an endpoint there is nothing to say about
STEP = 1.25  # ratio of two neighbouring weights: moving one endpoint of ten by it moves some 2 % of a hash's keys
LOWEST, HIGHEST = -7, 3  # levels, weights 21 and 195: the lowest is a tenth of the highest, whatever the pool
HOLD = 0.75  # levels: twice the reach past a border that +-10 % of noise has after smoothing
MOST_DOWN, MOST_UP = 3, 1  # levels a round: x0.51 and x1.25; unloading a pod is urgent, loading it again is not

SPEED_LEAST, SPEED_MOST = 0.25, 2.0  # share of the median's speed: beyond it a reading is doubted rather than followed
ENOUGH_TOKENS = 100.0  # tokens a sample of the token time: fewer are one request's luck
ENOUGH_SAMPLES = 3  # samples before a token time counts: 15 s of traffic
ENOUGH_PREFILL = 0.05  # seconds of prefill a sample of the prefill rate
SMOOTHING = 20.0  # seconds, time constant of waiting and KV use: a burst that is over in a few rounds is Envoy's
BATCH = 8.0  # requests: a queue is measured by what the median pod holds, taken to be this at least
KV_HIGH = 0.9  # KV use from which vLLM is about to preempt
KV_SCALE = 0.2  # KV use a q of 1 takes: 1.0 alone in its pool is two thirds of a weight; half of this follows noise
KV_MARGIN = 0.1  # KV use beyond the median that tells a pod from its pool: a pool that is all near 0.9 stays equal
RAMP = 60.0  # seconds, and
RAMP_START = 0.25  # share: about the time in which a pod's prefix cache fills with what is asked for most
STALE = 3  # intervals without a load until an endpoint is blind: two lost scrapes are bad luck
GRACE = 30.0  # seconds a blind endpoint keeps its weight: longer than a restart of its network, shorter than a shift
RESTARTED = 1.0  # seconds that two start times of one process may differ by rounding

_RAMP_LEVEL = round(math.log(RAMP_START, STEP))


class Reason(StrEnum):
    """What moves a weight away from BASE; EQUAL is its absence."""

    EQUAL = "equal"
    SLOW = "slow"
    FAST = "fast"
    QUEUE = "queue"
    KV_CACHE = "kv-cache"
    RAMP = "ramp"
    BLIND = "blind"


@dataclass(frozen=True, slots=True)
class Sample:
    """What is known of one endpoint now: its last Load however old (None = never read) and when it was read."""

    hash_key: str
    load: Load | None = None
    read_at: float = 0.0  # seconds, on the clock of `now`
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Member:
    """What is remembered of one endpoint. `since` is when it joined or restarted, `ramps` whether others were warm.

    `restarts` counts the restarts seen since it joined.
    """

    since: float
    ramps: bool
    level: int
    load: Load | None = None
    read_at: float = 0.0
    waiting: float = 0.0  # requests, smoothed
    kv_usage: float = 0.0  # 0..1, smoothed
    token_time: Rate = UNKNOWN  # seconds a token
    prefill: Rate = UNKNOWN  # tokens a second
    restarts: int = 0

    @property
    def weight(self) -> int:
        """Envoy's load_balancing_weight."""
        return round(BASE * STEP**self.level)

    @property
    def prefill_rate(self) -> float:
        """Tokens a second, smoothed; 0 = unknown."""
        return self.prefill.value

    def age(self, now: float) -> float:
        """Seconds since its load was read, or since it joined if it never was."""
        return now - (self.read_at if self.load else self.since)

    def ramp(self, now: float) -> float:
        """Share of a warm endpoint's load it may have, 0.25..1."""
        return min(1.0, RAMP_START + (1 - RAMP_START) * (now - self.since) / RAMP) if self.ramps else 1.0


@dataclass(frozen=True, slots=True)
class Pool:
    """The state between two rounds: start with `Pool(cluster.name)`. `members` is by hash_key, in its order."""

    cluster: str
    members: Mapping[str, Member] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WeightChange:
    """A weight that differs from the one before (`old` 0: the endpoint is new), and what it was decided from.

    `running` as last read; `waiting` and `kv_usage` smoothed; `speed` relative to the pool's median, `ramp` a share;
    `age` in seconds, negative: never read. `reason` is one or more of Reason, joined by `+`.
    """

    cluster: str
    endpoint: str  # hash_key
    old: int
    new: int
    reason: str
    running: float
    waiting: float
    kv_usage: float
    speed: float
    ramp: float
    age: float


@dataclass(frozen=True, slots=True)
class _Typical:
    """Medians over the endpoints that are seen; 0 with none. One alone is its own median: neither slow nor fast."""

    running: float
    waiting: float
    kv_usage: float
    token_time: float


@dataclass(frozen=True, slots=True)
class _Factors:
    """What the law makes of one endpoint: `queue` and `kv_cache` are the q of their 1 / (1 + q)."""

    speed: float = 1.0
    queue: float = 0.0
    kv_cache: float = 0.0
    ramp: float = 1.0
    blind: bool = False

    @property
    def share(self) -> float:
        return self.speed / (1 + self.queue + self.kv_cache) * self.ramp

    @property
    def reason(self) -> str:
        tell = STEP ** (1 - HOLD)  # what is nearer to 1 moves no weight alone
        reasons = {
            Reason.SLOW: self.speed < 1 / tell,
            Reason.FAST: self.speed > tell,
            Reason.QUEUE: 1 + self.queue > tell,
            Reason.KV_CACHE: 1 + self.kv_cache > tell,
            Reason.RAMP: self.ramp < 1,
            Reason.BLIND: self.blind,
        }
        return "+".join(reason for reason, given in reasons.items() if given) or Reason.EQUAL


def weigh(
    previous: Pool, samples: Iterable[Sample], now: float, interval: float
) -> tuple[Pool, tuple[WeightChange, ...]]:
    """One round: the new state, of exactly these endpoints, and the changes in order of hash_key.

    `interval` is the scrape interval in seconds. Call it about once an interval: what is capped, is capped a call.
    """
    by_key = {s.hash_key: s for s in sorted(samples, key=lambda s: s.hash_key)}
    known = {key: member for key, member in previous.members.items() if key in by_key and not by_key[key].draining}
    warm = {key for key, member in known.items() if now - member.since >= RAMP}
    observed = {
        key: _observe(previous.members.get(key), sample, now, others_warm=len(warm) > (key in warm))
        for key, sample in by_key.items()
    }
    stale = STALE * interval
    typical = _typical(m for key, m in observed.items() if not by_key[key].draining and m.load and m.age(now) <= stale)
    members: dict[str, Member] = {}
    changes: list[WeightChange] = []
    for key, member in observed.items():
        factors = _factors(member, typical, now, stale)
        held = by_key[key].draining or stale < member.age(now) <= stale + GRACE
        members[key] = member if held else replace(member, level=_move(member.level, factors.share))
        before = previous.members.get(key)
        if members[key].weight != (before.weight if before else BASE):
            changes.append(
                WeightChange(
                    cluster=previous.cluster,
                    endpoint=key,
                    old=before.weight if before else 0,
                    new=members[key].weight,
                    reason=factors.reason,
                    running=member.load.running if member.load else 0.0,
                    waiting=member.waiting,
                    kv_usage=member.kv_usage,
                    speed=factors.speed,
                    ramp=factors.ramp,
                    age=member.age(now) if member.load else -1.0,
                )
            )
    return Pool(previous.cluster, members), tuple(changes)


def _observe(member: Member | None, sample: Sample, now: float, *, others_warm: bool) -> Member:
    """The endpoint's memory with this round's load in it."""
    load = sample.load
    if member is None:
        member = Member(since=now, ramps=others_warm, level=_RAMP_LEVEL if others_warm else 0)
    elif load and member.load and _restarted(member.load, load):
        member = Member(since=now, ramps=others_warm, level=member.level, restarts=member.restarts + 1)
    if not load or (member.load and sample.read_at <= member.read_at):
        return member
    # Smoothing begins at 0: what the first page of an endpoint says has to last before it counts.
    alpha = 1 - math.exp((member.read_at - sample.read_at) / SMOOTHING) if member.load else 0.0
    return replace(
        member,
        load=load,
        read_at=sample.read_at,
        waiting=member.waiting + alpha * (load.waiting - member.waiting),
        kv_usage=member.kv_usage + alpha * (load.kv_usage - member.kv_usage),
        token_time=member.token_time.follow(load.token_seconds, load.token_count, sample.read_at, ENOUGH_TOKENS),
        prefill=member.prefill.follow(load.prefill_tokens, load.prefill_seconds, sample.read_at, ENOUGH_PREFILL),
    )


def _restarted(before: Load, now: Load) -> bool:
    """A new process: another start time, or, where the page has none (multiprocess mode), counters that went back."""
    if before.start_time and now.start_time:
        return abs(now.start_time - before.start_time) > RESTARTED
    return now.token_count < before.token_count or now.prompt_tokens < before.prompt_tokens


def _typical(seen: Iterable[Member]) -> _Typical:
    members = list(seen)
    times = [m.token_time.value for m in members if _timed(m)]
    return _Typical(
        running=median([m.load.running for m in members if m.load] or [0.0]),
        waiting=median([m.waiting for m in members] or [0.0]),
        kv_usage=median([m.kv_usage for m in members] or [0.0]),
        token_time=median(times or [0.0]),
    )


def _timed(member: Member) -> bool:
    return member.token_time.samples >= ENOUGH_SAMPLES and member.token_time.value > 0


def _factors(member: Member, typical: _Typical, now: float, stale: float) -> _Factors:
    if member.age(now) > stale:
        return _Factors(ramp=member.ramp(now), blind=True)
    speed = typical.token_time / member.token_time.value if typical.token_time and _timed(member) else 1.0
    return _Factors(
        speed=min(max(speed, SPEED_LEAST), SPEED_MOST),
        queue=max(0.0, member.waiting - typical.waiting) / max(typical.running + typical.waiting, BATCH),
        kv_cache=max(0.0, member.kv_usage - max(typical.kv_usage + KV_MARGIN, KV_HIGH)) / KV_SCALE,
        ramp=member.ramp(now),
    )


def _move(level: int, share: float) -> int:
    """The level after one round towards `share`."""
    wanted = min(max(math.log(share, STEP), LOWEST), HIGHEST)
    if abs(wanted - level) <= HOLD:
        return level
    return min(max(round(wanted), level - MOST_DOWN), level + MOST_UP)
