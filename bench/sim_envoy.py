"""Envoy's load balancers as its source has them, in virtual time. Pure; randomness is an argument.

    RoundRobin      round_robin over equal weights
    LeastRequest    least_request: P2C or FULL_SCAN over equal weights, else an EDF schedule of weight / (active + 1)
    RingHash        ring_hash with hash_balance_factor: 0 = no bounded load

(source/extensions/load_balancing_policies of v1.40: least_request, ring_hash, common/thread_aware_lb_impl.cc, and
source/common/upstream/edf_scheduler.h.) Hashes are MurmurHash3's where Envoy's are xxHash64: keys land elsewhere, in
the same shares.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_left
from collections.abc import Sequence

import mmh3

MINIMUM_RING = 1024  # points: Envoy's default


class Host:
    """One endpoint as Envoy sees it: `active` requests are those without a complete answer. Mutable."""

    __slots__ = ("active", "hash_key", "weight")

    def __init__(self, hash_key: str, weight: int = 100) -> None:
        self.hash_key = hash_key
        self.weight = weight
        self.active = 0

    def __repr__(self) -> str:
        return f"Host({self.hash_key!r}, weight={self.weight}, active={self.active})"


def hash64(key: str) -> int:
    """Where a key lies on the ring."""
    return mmh3.mmh3_x64_128_utupledigest(key.encode())[0]


class RoundRobin:
    """One after another, from any."""

    def __init__(self, hosts: Sequence[Host], draw: random.Random) -> None:
        self._hosts = hosts
        self._next = draw.randrange(len(hosts))

    def choose(self) -> Host:
        host = self._hosts[self._next % len(self._hosts)]
        self._next += 1
        return host


class LeastRequest:
    """Built anew whenever hosts or weights change, as Envoy does; `full_scan` False is N_CHOICES with two."""

    def __init__(self, hosts: Sequence[Host], draw: random.Random, *, full_scan: bool) -> None:
        self._hosts = hosts
        self._draw = draw
        self._full_scan = full_scan
        equal = len({host.weight for host in hosts}) <= 1
        self._schedule = None if equal else _Schedule(hosts, draw)

    def choose(self) -> Host:
        if self._schedule is not None:
            return self._schedule.choose()
        if not self._full_scan:
            one, other = self._draw.choice(self._hosts), self._draw.choice(self._hosts)
            return other if other.active < one.active else one
        least = min(host.active for host in self._hosts)
        return self._draw.choice([host for host in self._hosts if host.active == least])


class _Schedule:
    """Earliest deadline first: a host is due 1 / (weight / (active + 1)) after it was last picked.

    What a host is doing counts when it is put back, not when it is next picked.
    """

    def __init__(self, hosts: Sequence[Host], draw: random.Random) -> None:
        rates = [_rate(host) for host in hosts]
        start = draw.randrange(1 << 16)  # picks made already, so that no two Envoys are in step
        total = sum(rates)
        self._queue = [
            ((math.floor(rate * start / total) + 1) / rate, order, host)
            for order, (rate, host) in enumerate(zip(rates, hosts, strict=True))
        ]
        self._order = len(self._queue)
        heapq.heapify(self._queue)

    def choose(self) -> Host:
        due, _, host = self._queue[0]
        heapq.heapreplace(self._queue, (due + 1 / _rate(host), self._order, host))
        self._order += 1
        return host


def _rate(host: Host) -> float:
    return host.weight / (host.active + 1)


class RingHash:
    """Points of hosts by weight; a key belongs to the first point at or after its hash.

    With a balance factor a host's active requests are bounded to that percentage of its weighted share of all; what is
    beyond goes to the others in an order that depends on the key alone. Built anew whenever hosts or weights change.
    """

    def __init__(
        self, hosts: Sequence[Host], draw: random.Random, balance_factor: int = 0, minimum_size: int = MINIMUM_RING
    ) -> None:
        self._hosts = hosts
        self._draw = draw
        self._balance_factor = balance_factor
        total = sum(host.weight for host in hosts)
        self._shares = {host: host.weight / total for host in hosts}
        least = min(self._shares.values())
        scale = math.ceil(least * minimum_size) / least
        points: list[tuple[int, int]] = []
        wanted = 0.0
        for index, host in enumerate(hosts):
            wanted += scale * self._shares[host]
            number = 0
            while len(points) < wanted:
                points.append((hash64(f"{host.hash_key}_{number}"), index))
                number += 1
        points.sort()
        self._points = [point for point, _ in points]
        self._owners = [hosts[index] for _, index in points]

    def choose(self, key: str | None) -> Host:
        """The host for a header's value; without one any, by weight."""
        value = self._draw.getrandbits(64) if key is None else hash64(key)
        host = self._owners[bisect_left(self._points, value) % len(self._points)]
        if not self._balance_factor:
            return host
        active = sum(each.active for each in self._hosts)
        slots = ((active + 1) * self._balance_factor + 99) // 100
        if (least := self._overload(host, slots)) <= 1:
            return host
        best = host
        for other in random.Random(value).sample(self._hosts, len(self._hosts)):
            if other is not host and (overload := self._overload(other, slots)) < least:
                best, least = other, overload
                if least <= 1:
                    break
        return best

    def _overload(self, host: Host, slots: int) -> float:
        return host.active / max(math.ceil(slots * self._shares[host]), 1)
