"""What every pod has been sent, in memory that several processes share without a lock. Pure: the memory is an argument.

One buffer (a bytearray, or an mmap that worker processes share) holds a row for each pod and one table of chunks for
all of them, in words of eight bytes:

    header  HEADER words, of which the first says how many other pickers are heard, and when that was so
    rows    ROWS rows of ROW words: whose it is, what was sent there, and when its generations began (see below)
    table   sets of WAYS words; a word is a chunk that a pod has been sent: 40 bits of time, 24 bits of the chunk's hash

A chunk's set follows from its hash and its pod's row; in the set it takes the place of the chunk longest untouched.

**Sharing.** A word is read and written whole: an aligned store of eight bytes. No state needs two words to agree, so a
process may be killed at any instruction, and a restarted one finds all there is. Two processes that add to a word at
once may lose one of the two: a request more or less in a pod's count until its next load report, one chunk in its age.

**Forgetting, as the pod does.** vLLM frees its least recently used block when it needs one. A pod's history is cut
into generations, each of 1/GENERATIONS of its capacity in chunks; what was last touched before the last GENERATIONS of
them, the current one included, is forgotten. A chunk that was not there counts one. One that was counts the share of
the cache it overtakes by being used again, which is its age over the age of the oldest: that is how far its use moves
all others to the end.

Of one prompt the last chunk is the oldest, as vLLM frees blocks: a chunk seldom outlives the ones before it. So "is
chunk k there" answers for the whole prefix, and the longest one is found by bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from mmap import mmap
from struct import Struct
from typing import Protocol

import mmh3

Key = tuple[bytes, int]  # a chunk's tag and what chooses its set

CHUNKS = 1 << 20  # of all pods together, half a billion tokens; a power of two
WORD = 8  # bytes
HEADER = 8  # words: a cache line
ROWS = 4096  # pods of all pools; more of them than that take each other's rows, and so forget
ROW = 64  # words
PROBES = 32  # rows a pod may have, from the one its name hashes to
WAYS = 8  # words of a set: a cache line
SET = WAYS * WORD
GENERATIONS = 16  # the cache is taken to be up to a sixteenth smaller than it is
NEW = GENERATIONS  # what a chunk that was not there counts: a generation is full when it has counted `capacity`
UNUSED = 60_000  # ms without a load report, then a row may be another pod's
EPOCH = 1_000_000  # ms: keeps every stamp above that of an empty word, 0
SIZE = (HEADER + ROWS * ROW + 2 * CHUNKS) * WORD  # bytes of a buffer, 18 MB: half of the table's words stay spare
TAG_BITS = 24  # a wrong tag is taken for the right one in one look of two million
TOKEN_BITS = 40  # of a row's SENT: tokens below, requests above
TOKENS = (1 << TOKEN_BITS) - 1
WRAP = (1 << 64) - 1
PEERS = 0  # word of the header: 48 bits of time, 16 of how many
MAX_PEERS = (1 << 16) - 1
SILENT = 3_000  # ms: then other pickers are not heard; the management server says each second how many they are
# words of a row
OWNER, USED, ADDRESS, START, SENT, BUSY, FILLED, COUNT, BEGAN = 0, 1, 2, 3, 4, 5, 6, 7, 32
_SPREAD = 0x9E3779B1  # odd: rows differ in their low bits, and so do their products with it

_KEY = Struct("<3sxI")


def keys(hashes: Sequence[bytes]) -> list[Key]:
    """What `hashes`, of eight bytes each, are found by."""
    return read_keys(b"".join(hashes))


def read_keys(data: bytes) -> list[Key]:
    """The same for hashes one after another: a multiple of eight bytes."""
    return list(_KEY.iter_unpack(data))


def write_keys(chunks: Sequence[Key]) -> bytes:
    """Bytes that `read_keys` makes the same of: the hashes, but for their fourth byte, by which nothing is found."""
    return b"".join([_KEY.pack(tag, place) for tag, place in chunks])


class Buffer(Protocol):
    """A bytearray or an mmap."""

    def find(self, sub: bytes, start: int, end: int, /) -> int: ...

    def __buffer__(self, flags: int, /) -> memoryview: ...


class Memory:
    """All pods'. Mutable, and shared with whoever has the same buffer, which is of SIZE bytes and at first zero."""

    __slots__ = ("find", "floats", "mask", "table", "words")

    def __init__(self, buffer: Buffer | None = None) -> None:
        if buffer is None:
            buffer = mmap(-1, SIZE)  # our own: no page of it is there before it is written
        view = memoryview(buffer)
        self.words = view.cast("Q")
        self.floats = view.cast("d")
        self.find: Callable[[bytes, int, int], int] = buffer.find
        self.table = HEADER + ROWS * ROW  # word
        self.mask = (len(self.words) - self.table) * WORD - SET  # of a set's first byte in the table

    def peers(self, now: float) -> tuple[int, int]:
        """How many other pickers were heard when any were last, and how many are."""
        word = self.words[PEERS]
        known = word & MAX_PEERS
        return known, known if (word >> 16) + SILENT >= _stamp(now) else 0

    def note_peers(self, heard: int, now: float) -> None:
        """Say to all processes how many other pickers are heard: until it is SILENT, then it has to be said again."""
        self.words[PEERS] = _stamp(now) << 16 | min(heard, MAX_PEERS)

    def pod(self, name: str, now: float) -> PodMemory:
        """The memory of the pod of this name, which says pool and pod; empty when it has none."""
        owner = mmh3.mmh3_x64_128_utupledigest(name.encode())[0] | 1
        first, words, stamp = owner >> 1, self.words, _stamp(now)
        rows = [HEADER + (first + probe) % ROWS * ROW for probe in range(PROBES)]
        for row in rows:
            if words[row + OWNER] == owner:
                found = PodMemory(self, row, owner)
                if words[row + USED] + UNUSED < stamp:
                    found.forget(now)
                return found
        unused = [row for row in rows if not words[row + OWNER] or words[row + USED] + UNUSED < stamp]
        row = unused[0] if unused else min(rows, key=lambda row: words[row + USED])
        made = PodMemory(self, row, owner)
        words[row + USED] = stamp
        words[row + ADDRESS] = words[row + START] = 0
        made.forget(now)
        words[row + OWNER] = owner
        return made


class PodMemory:
    """One pod's. Mutable; `now` is in seconds, of one clock for all processes."""

    __slots__ = ("_capacity", "_find", "_floats", "_mask", "_owner", "_row", "_salt", "_table", "_words")

    def __init__(self, memory: Memory, row: int, owner: int) -> None:
        self._words = memory.words
        self._floats = memory.floats
        self._find = memory.find
        self._table = memory.table * WORD
        self._mask = memory.mask
        self._row = row
        self._owner = owner
        self._salt = row // ROW * _SPREAD * SET
        self._capacity = 1

    def __len__(self) -> int:
        """How many chunks the pod is taken to hold, about."""
        words, row = self._words, self._row
        filled = words[row + FILLED] * self._capacity + words[row + COUNT] % (1 << 32)
        return int(min(filled // NEW, self._capacity))

    @property
    def mine(self) -> bool:
        """Whether the row is still this pod's: two processes may have claimed it at once for different pods."""
        return self._words[self._row + OWNER] == self._owner

    def report(self, address: str, start_time: float, capacity: int, now: float) -> bool:
        """Note a load report: the pod holds `capacity` chunks. Whether it restarted: whoever sees it first clears all.

        `start_time` 0 is unknown and says nothing.
        """
        words, row = self._words, self._row
        words[row + USED] = _stamp(now)
        self._capacity = capacity
        place = mmh3.mmh3_x64_128_utupledigest(address.encode())[0] | 1
        known, started = words[row + ADDRESS], self._floats[row + START]
        restarted = known not in (0, place) or 0 < started != start_time > 0
        if restarted:
            self.forget(now)
        words[row + ADDRESS] = place
        if start_time:
            self._floats[row + START] = start_time
        return restarted

    def forget(self, now: float) -> None:
        """The pod's cache is empty, and nothing that was sent is still there."""
        words, row, stamp = self._words, self._row, _stamp(now)
        for generation in range(2 * GENERATIONS):
            words[row + BEGAN + generation] = stamp
        words[row + COUNT] = words[row + FILLED] = 0
        self._floats[row + BUSY] = 0.0

    # --- chunks ---

    def longest_prefix(self, chunks: Sequence[Key]) -> int:
        """How many of the first `chunks` are here."""
        if not chunks or not self._holds(*chunks[0]):
            return 0
        low, high = 1, len(chunks)
        while low < high:
            middle = (low + high + 1) // 2
            if self._holds(*chunks[middle - 1]):
                low = middle
            else:
                high = middle - 1
        return low

    def touch(self, chunks: Sequence[Key], now: float) -> list[Key]:
        """Make `chunks` the most recently used, the first of them last to be forgotten.

        Those that were not, in their order: what another memory has to touch to know what this one does.
        """
        words, find, stamp = self._words, self._find, _stamp(now)
        oldest = self._oldest()
        span = max(1, stamp - oldest)
        current = words[self._row + BEGAN + (words[self._row + COUNT] >> 32) % (2 * GENERATIONS)]
        stamp += len(chunks)
        counted = 0
        written = []
        for chunk in chunks:
            tag, place = chunk
            stamp -= 1
            start = self._table + ((place ^ self._salt) & self._mask)
            found = self._next(tag, find(tag, start, start + SET), start + SET) // WORD
            if found < 0:
                start //= WORD
                ways = words[start : start + WAYS].tolist()
                found = start + ways.index(min(ways))
                counted += NEW
            else:
                touched = words[found] >> TAG_BITS
                if touched >= current and touched >= oldest:
                    continue  # lately: neither its place in the order nor other processes' caches are to be disturbed
                counted += NEW if touched < oldest else max(0, stamp - touched) * NEW // span
            words[found] = stamp << TAG_BITS | int.from_bytes(tag, "little")
            written.append(chunk)
        if counted:
            self._count(counted, now)
        return written

    def _holds(self, tag: bytes, place: int) -> bool:
        start = self._table + ((place ^ self._salt) & self._mask)
        found = self._find(tag, start, start + SET)
        if found < 0:
            return False
        if found % WORD:
            found = self._next(tag, found, start + SET)
        return self._words[found // WORD] >> TAG_BITS >= self._oldest() if found >= 0 else False

    def _next(self, tag: bytes, found: int, end: int) -> int:
        """The byte of the first word with this tag, -1 for none; it was `found` here, perhaps among others' bytes."""
        while found >= 0 and found % WORD:
            found = self._find(tag, found + 1, end)
        return found

    def _oldest(self) -> int:
        """What was touched before this is forgotten."""
        words, row = self._words, self._row
        return words[row + BEGAN + ((words[row + COUNT] >> 32) + 1 - GENERATIONS) % (2 * GENERATIONS)]

    def _count(self, counted: int, now: float) -> None:
        """Add to the current generation, and begin others when it is full."""
        words, row = self._words, self._row
        generation, count = divmod(words[row + COUNT], 1 << 32)
        full, count = divmod(count + counted, self._capacity)
        for begun in range(generation + 1 + max(0, full - 2 * GENERATIONS), generation + 1 + full):
            words[row + BEGAN + begun % (2 * GENERATIONS)] = _stamp(now)
        words[row + FILLED] = min(GENERATIONS, words[row + FILLED] + full)
        words[row + COUNT] = (generation + full) % (1 << 32) << 32 | count

    # --- what was sent, by all processes ---

    @property
    def sent(self) -> int:
        """Requests and their tokens so far, as one number: requests << TOKEN_BITS | tokens. It wraps at WRAP."""
        return self._words[self._row + SENT]

    def send(self, tokens: int, requests: int = 1) -> None:
        """So many requests more, of so many tokens together."""
        at = self._row + SENT
        self._words[at] = self._words[at] + (requests << TOKEN_BITS) + tokens & WRAP

    @property
    def busy_until(self) -> float:
        """When the pod will have prefilled all it was sent, in seconds."""
        return self._floats[self._row + BUSY]

    @busy_until.setter
    def busy_until(self, until: float) -> None:
        self._floats[self._row + BUSY] = until


def _stamp(now: float) -> int:
    return int(now * 1000) + EPOCH
