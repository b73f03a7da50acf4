"""What one pod probably still has in its prefix cache: the chunks sent to it, the least recently used forgotten. Pure.

Chunks are touched from a prompt's last to its first, as vLLM frees blocks: a chunk never outlives the ones before it.
So "is chunk k there" answers for the whole prefix, and the longest one is found by bisection.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class SeenChunks:
    """A bounded LRU of chunk hashes. Mutable; one for each pod."""

    __slots__ = ("_capacity", "_chunks")

    def __init__(self, capacity: int) -> None:
        self._chunks: OrderedDict[bytes, None] = OrderedDict()
        self._capacity = capacity

    def __len__(self) -> int:
        return len(self._chunks)

    def longest_prefix(self, hashes: Sequence[bytes]) -> int:
        """How many of the first `hashes` are here."""
        chunks = self._chunks
        if not hashes or hashes[0] not in chunks:
            return 0
        low, high = 1, len(hashes)
        while low < high:
            middle = (low + high + 1) // 2
            if hashes[middle - 1] in chunks:
                low = middle
            else:
                high = middle - 1
        return low

    def touch(self, hashes: Sequence[bytes]) -> None:
        """Make `hashes` the most recently used, the first of them last to be forgotten."""
        chunks = self._chunks
        for chunk in reversed(hashes):
            chunks[chunk] = None
            chunks.move_to_end(chunk)
        self._trim()

    def resize(self, capacity: int) -> None:
        """Hold at most `capacity` chunks from now on."""
        self._capacity = capacity
        self._trim()

    def forget(self) -> None:
        """The pod restarted: its cache is empty."""
        self._chunks.clear()

    def _trim(self) -> None:
        while len(self._chunks) > self._capacity:
            self._chunks.popitem(last=False)
