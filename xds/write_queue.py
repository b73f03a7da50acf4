"""Which object's status to write next, and when: many changes at once are no storm (pure: time is given).

- An object that changes ten times while it waits is written once, as it is then.
- Writes begin `PACE` apart at most, and for one object `SPACING`; each time that somebody else undoes what was written,
  the spacing doubles: of two controllers that claim one object ours does not make a war.
- A refusal that is about one object waits for that object alone, longer each time; one that is about all of them
  (nobody answers, too many requests) waits for all. A right that is missing is missing for a kind of objects: each of
  them is tried again once in a while.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from xds.api_wire import Failure
from xds.model import ObjectRef

PACE = 0.02  # seconds: 50 writes a second, of a client alone what an API server takes with ease
SPACING = 1.0  # seconds: a Gateway whose routes are rolled out counts them once a second
LONGEST_SPACING = 300.0  # seconds
FIRST_DELAY = 0.2  # seconds after a first failure; a conflict is over when the watch has told of the newer version
LONGEST_DELAY = 60.0  # seconds
MANY = 30  # failures in a row after which the delay is the longest, and a power of two still a float


class WriteQueue:
    """Mutable. `jitter` gives numbers from 0 to 1. An object is given out by `next` to one writer at a time."""

    def __init__(self, jitter: Callable[[], float], now: float) -> None:
        self._jitter = jitter
        self._due: dict[ObjectRef, float] = {}
        self._heap: list[tuple[float, ObjectRef]] = []  # with entries that `_due` has overtaken
        self._busy: dict[ObjectRef, bool] = {}  # given out -> whether it has changed since
        self._not_before: dict[ObjectRef, float] = {}  # of objects that were written, for their spacing
        self._undone: dict[ObjectRef, int] = {}  # times in a row
        self._failures: dict[ObjectRef, int] = {}  # in a row
        self._pauses = 0  # in a row
        self._ready_at = now

    def __len__(self) -> int:
        """How many objects wait or are being written."""
        return len(self._due) + len(self._busy)

    def add(self, ref: ObjectRef, now: float) -> None:
        """There is something new of the object."""
        if ref in self._busy:
            self._busy[ref] = True
        else:
            self._put(ref, max(now, self._not_before.get(ref, now)))

    def next(self, now: float) -> ObjectRef | float | None:
        """An object to write now, or in how many seconds there is one, or None: nothing waits."""
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        if not self._heap:
            return None
        at = max(self._heap[0][0], self._ready_at)
        if now < at:
            return at - now
        _, ref = heapq.heappop(self._heap)
        del self._due[ref]
        self._busy[ref] = False
        return ref

    def sending(self, now: float) -> None:
        """Something is written indeed."""
        self._ready_at = max(self._ready_at, now + PACE)

    def unchanged(self, ref: ObjectRef, now: float) -> None:
        """There was nothing to write."""
        self._end(ref, now)

    def written(self, ref: ObjectRef, now: float, *, undone: bool) -> None:
        """It was written; `undone`: the same as the last time, because somebody else has written otherwise."""
        self._pauses = 0
        self._failures.pop(ref, None)
        self._undone[ref] = min(self._undone.get(ref, 0) + 1, MANY) if undone else 0
        self._not_before[ref] = now + min(LONGEST_SPACING, SPACING * 2 ** self._undone[ref])
        self._end(ref, now)

    def contested(self, ref: ObjectRef) -> int:
        """How often in a row somebody else has undone what was written."""
        return self._undone.get(ref, 0)

    def gone(self, ref: ObjectRef, now: float) -> None:
        """The object is not there any more."""
        self.forget(ref)
        self._end(ref, now)

    def forget(self, ref: ObjectRef) -> None:
        for memory in (self._not_before, self._undone, self._failures):
            memory.pop(ref, None)

    def failed(self, ref: ObjectRef, failure: Failure, now: float) -> None:
        """It was not written, as far as is known, and will be tried again."""
        self._busy.pop(ref, None)
        if is_about_all(failure):
            self._pauses += 1
            self._ready_at = now + max(self._delay(self._pauses), min(failure.retry_after, LONGEST_DELAY))
            self._put(ref, now)
            return
        self._failures[ref] = self._failures.get(ref, 0) + 1
        self._put(ref, now + self._delay(self._failures[ref] if failure.status != 403 else MANY))

    def _delay(self, failures: int) -> float:
        return float(min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(failures - 1, MANY)) * (1 + self._jitter()) / 2)

    def _put(self, ref: ObjectRef, at: float) -> None:
        if ref not in self._due or at < self._due[ref]:
            self._due[ref] = at
            heapq.heappush(self._heap, (at, ref))

    def _end(self, ref: ObjectRef, now: float) -> None:
        if self._busy.pop(ref, False):
            self.add(ref, now)


def is_about_all(failure: Failure) -> bool:
    """Whether any other write would have met the same."""
    return failure.status in (0, 401, 429) or failure.status >= 500
