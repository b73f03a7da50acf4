"""Paged KV blocks with a prefix cache, as vLLM V1 keeps them: chained block hashes, LRU over unreferenced blocks.

A block is in exactly one of four states:

    blank      no content worth keeping
    private    held by one sequence, content not (yet) addressable: a partly filled block
    referenced held by one or more sequences, found by its hash
    idle       found by its hash, held by nobody: the first to go, least recently used first

`free` = blank + idle, and `blank + private + referenced + idle` is always the capacity.

Two things are simpler than in vLLM. Blank blocks are used up before idle ones are evicted (vLLM keeps both in one
queue). A block whose content another sequence has published already is given back at once (vLLM keeps both copies).
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

BYTES_PER_TOKEN = 4  # English text through a 150k-entry BPE vocabulary is 4 to 4.5 bytes a token


def block_hashes(text: bytes, block_size: int, seed: object = None) -> tuple[int, ...]:
    """Chained hashes of the full blocks of `text`, a block being `block_size * BYTES_PER_TOKEN` bytes.

    Hash i stands for the whole text up to and including block i; texts with another `seed` (cache salt, adapter)
    share nothing. Values are Python's: equal within one process only.
    """
    width = block_size * BYTES_PER_TOKEN
    chained = hash(seed)
    hashes = []
    for start in range(0, len(text) - width + 1, width):
        chained = hash((chained, text[start : start + width]))
        hashes.append(chained)
    return tuple(hashes)


class KVCache:
    """The blocks of one engine; mutable. Sequences hold leading blocks by hash and the rest as a number."""

    __slots__ = ("_blank", "_idle", "_references", "capacity")

    def __init__(self, num_gpu_blocks: int) -> None:
        if num_gpu_blocks < 2:
            raise ValueError(
                f"num_gpu_blocks must be at least 2 (vLLM keeps block 0 as the null block), not {num_gpu_blocks}"
            )
        self.capacity = num_gpu_blocks - 1
        self._blank = self.capacity
        self._references: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        return self._blank + len(self._idle)

    @property
    def usage(self) -> float:
        """vllm:kv_cache_usage_perc: the share of blocks that sequences hold, 0..1; idle blocks count as free."""
        return 1.0 - self.free / self.capacity

    def match(self, hashes: tuple[int, ...], limit: int) -> int:
        """How many leading blocks of `hashes`, at most `limit`, are here."""
        count = 0
        for block in islice(hashes, limit):
            if block not in self._references and block not in self._idle:
                break
            count += 1
        return count

    def fits(self, hashes: tuple[int, ...], blocks: int) -> bool:
        """Whether a sequence of `blocks` blocks, of which `hashes` are here, could hold them all now."""
        revived = sum(1 for block in hashes if block in self._idle)
        return blocks - len(hashes) <= self.free - revived

    def hold(self, hashes: tuple[int, ...]) -> None:
        """Take a reference on blocks that `match` has found."""
        for block in hashes:
            count = self._references.get(block)
            if count is None:
                del self._idle[block]
                count = 0
            self._references[block] = count + 1

    def take(self, blocks: int) -> bool:
        """Turn free blocks into private ones, evicting idle content where needed; False (and no change) if too few."""
        if blocks > self.free:
            return False
        while self._blank < blocks:
            self._idle.popitem(last=False)
            self._blank += 1
        self._blank -= blocks
        return True

    def publish(self, hashes: tuple[int, ...]) -> None:
        """Make private blocks, now full, findable; their holder holds them by hash from here on."""
        for block in hashes:
            count = self._references.get(block)
            if count is not None:
                self._references[block] = count + 1
                self._blank += 1
            else:
                if block in self._idle:
                    del self._idle[block]
                    self._blank += 1
                self._references[block] = 1

    def release(self, hashes: tuple[int, ...], private: int) -> None:
        """Give back what a sequence holds. Its tail becomes the older content: a prefix is worth more than its end."""
        for block in reversed(hashes):
            count = self._references[block]
            if count == 1:
                del self._references[block]
                self._idle[block] = None
            else:
                self._references[block] = count - 1
        self._blank += private

    def clear(self) -> None:
        """Forget all idle content."""
        self._blank += len(self._idle)
        self._idle.clear()
