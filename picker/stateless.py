"""The stateless key: which prefix stands for a prompt when nothing is known of the pods. Pure; time is an argument.

The chunks are walked from the first. A chunk is hot while its decayed share of the pool's traffic is above half a pod's
fair share; the walk goes deeper below a hot chunk and stops at the first that is not. The key moves down only across a
real branch: a chunk that nearly all who go on share is the same conversation or the same preamble, and a long session
would lose its key with each turn.

A request's hint, where it has one, is walked as if it were the chunk before the first: a session keeps to its own key,
and a hint that a large part of the traffic carries (an application's name) is hot, and split like a common preamble.

The key needs no pods. With pods known, `Ring` says which of them is the key's primary.
"""

from __future__ import annotations

from bisect import bisect
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from math import exp

import mmh3

TIME_CONSTANT = 120.0  # seconds: several turns of a conversation, several thousand requests of a busy pool
MIN_COUNT = 8.0  # requests: below it a share is noise
BRANCH = 0.9  # a chunk carrying less of the traffic that goes on than this is one of several
MAX_NODES = 8192  # chunks remembered in a pool, some 2 MB; hot ones are touched too often to be the oldest
POD_POINTS = 64  # points of a pod on the ring: shares within some 15 % of equal
_RESCALE = 1e100  # far from the largest float (1e308), reached after about 8 hours


class _Node:
    """`count`: requests that reached this chunk; `continued`: those that went on below it."""

    __slots__ = ("continued", "count")

    def __init__(self) -> None:
        self.count = 0.0
        self.continued = 0.0


_NONE = _Node()


class HotPrefixes:
    """One pool's decayed counts. Mutable.

    Counts decay forward: a request at time t adds exp((t - start) / TIME_CONSTANT), so that shares need no sweep.
    """

    def __init__(self) -> None:
        self._nodes: OrderedDict[bytes, _Node] = OrderedDict()
        self._total = 0.0
        self._start: float | None = None

    def __len__(self) -> int:
        return len(self._nodes)

    def key(self, hashes: Sequence[bytes], pods: int, now: float, *, counted: bool = True) -> bytes | None:
        """A request's key, one of `hashes`, and count the request; None when there are none. `now` in seconds.

        Unless it is `counted`: then it is the key it would have.
        """
        one = self._weight(now)
        total = self._total + one
        if counted:
            self._total = total
        hot = max(total / (2 * pods), MIN_COUNT * one)
        key, continued = None, float("inf")
        for chunk in hashes:
            node = self._touch(chunk) if counted else self._nodes.get(chunk, _NONE)
            count = node.count + one
            if counted:
                node.count = count
            if key is None or count < BRANCH * continued:
                key = chunk
            if count <= hot or chunk is hashes[-1]:
                break
            continued = node.continued + one
            if counted:
                node.continued = continued
        return key

    def _touch(self, chunk: bytes) -> _Node:
        node = self._nodes.get(chunk)
        if node is None:
            node = self._nodes[chunk] = _Node()
            if len(self._nodes) > MAX_NODES:
                self._nodes.popitem(last=False)
        else:
            self._nodes.move_to_end(chunk)
        return node

    def _weight(self, now: float) -> float:
        if self._start is None:
            self._start = now
        weight = exp(min(max(now - self._start, 0.0) / TIME_CONSTANT, 700.0))
        if weight > _RESCALE:
            self._start = now
            self._total /= weight
            for node in self._nodes.values():
                node.count /= weight
                node.continued /= weight
            weight = 1.0
        return weight


class Ring:
    """A consistent hash over pods' hash keys, by MurmurHash3: the pod that independent pickers agree on for a key.

    It is not Envoy's ring (xxHash64, weighted): it only has to be the same in every picker, and a pod's coming or going
    moves only its share.
    """

    def __init__(self, hash_keys: Iterable[str]) -> None:
        points = sorted((_point(f"{name}_{i}".encode()), name) for name in hash_keys for i in range(POD_POINTS))
        self._points = [point for point, _ in points]
        self._names = [name for _, name in points]

    def primary(self, key: bytes) -> str | None:
        """The pod whose point follows the key's; None when there are no pods."""
        return self._names[bisect(self._points, _point(key)) % len(self._names)] if self._names else None


def _point(value: bytes) -> int:
    return mmh3.mmh3_x64_128_utupledigest(value)[0]
