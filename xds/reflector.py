"""Follow one resource of an API server: what to ask next, and what its answers change (pure: no I/O, time is given).

    List ──last page──▶ Watch ──event, bookmark, its time is over──▶ Watch
      ▲                   │
      └───────────────────┘  410 · silence that may be a lie · refused again and again · another version or path

- The state is never dropped: a fault is waited out with the last good one, and the next list corrects it. What a list
  does not name is gone then, event or not.
- A watch goes on from the last resourceVersion that was heard, after its server-side timeout as after a broken
  connection. One that was resumed after a fault has to hear something within `PROOF`, or everything is listed again:
  from a resourceVersion of the future (etcd restored from a backup) a server sends nothing, not even an error.
- A resource that is not there (its CRD) is waited for. One that is gone with objects known of it must be missing for
  `ABSENT_FOR`: a real deletion of a CRD deletes its objects first, one event each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from xds.api_wire import Event, Failure, Item, Key, Page

WATCH = 40.0  # seconds of a watch, up to half as much again: a half-open connection is noticed soon after
PROOF = 6.0  # seconds of the first watch after a fault: a server sends a bookmark 2 s before the end, if it can
EARLY = 3.0  # seconds before its time at which a watch may end and still count as over, not as broken
SPACING = 1.0  # seconds at least from one watch to the next: a server may end each after its first line
SILENCE = 120.0  # seconds in which no watch said anything: idle resources of a just started server have no bookmarks
ABSENT_FOR = 60.0  # seconds: longer than a starting API server needs to have its CRDs
FIRST_DELAY = 0.5  # seconds after a first fault; doubled with each further one of its kind
LONGEST_DELAY = 30.0  # seconds
REFUSED = 3  # faults of one kind in a row after which everything is listed: watches may never work, lists may


@dataclass(frozen=True, slots=True)
class List:
    """Ask for the page after `token` ("" = the first) of everything there is; `reason` is why."""

    token: str
    reason: str


@dataclass(frozen=True, slots=True)
class Watch:
    """Ask for what happens after `version`, for so many seconds."""

    version: str
    seconds: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Ask nothing for so many seconds (inf = until `discovered` has news)."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Changes:
    """What is new of the objects: in this order, and each object at most once."""

    put: tuple[Item, ...] = ()
    gone: tuple[Key, ...] = ()


NOTHING = Changes()


class Reflector:
    """One resource, or its part in one namespace (mutable). `jitter` gives numbers from 0 to 1.

    `trouble` is what is wrong, once it is worth telling a person: not a first broken connection, which is tried again
    at once. `heard_at` is when the server last said something that shows the state to be current.
    """

    def __init__(self, jitter: Callable[[], float], now: float) -> None:
        self._jitter = jitter
        self.known: dict[Key, tuple[str, str]] = {}  # uid and resourceVersion of every object
        self.path = ""  # "" = not there, as far as is known
        self.synced = False
        self.trouble: Failure | None = None
        self.failures = 0  # in a row, of one kind
        self.heard_at = now

        self._kind_of_failure = ""
        self._not_before = now
        self._absent_since: float | None = None
        self._version = ""  # to watch from; "" = list first
        self._reason = "Start"
        self._token = ""
        self._seen: set[Key] = set()
        self._watch = Watch("", 0)
        self._began = now
        self._heard = False  # something, on this watch
        self._resumed = False  # after a fault, and nothing heard since

    def discovered(self, path: str, now: float) -> Changes:
        """Where the server has the resource, "" if nowhere: said again and again, whether anything is new or not."""
        if path:
            self._absent_since = None
            if path != self.path:
                self.path, self._not_before = path, now
                self._list_again("Moved" if self.synced else "Start")
            return NOTHING
        if self._absent_since is None:
            self._absent_since = now
        if self.known and now - self._absent_since < ABSENT_FOR:
            return NOTHING
        gone = tuple(self.known)
        self.known.clear()
        self.path, self.synced, self.trouble, self.failures = "", False, None, 0
        self._list_again("Start")
        return Changes(gone=gone) if gone else NOTHING

    def next(self, now: float) -> List | Watch | Wait:
        """What to do now; the answer is told to `listed`, `happened`, `ended` or `failed`."""
        if not self.path:
            return Wait(math.inf)
        if now < self._not_before:
            return Wait(self._not_before - now)
        if not self._version:
            return List(self._token, self._reason)
        seconds = PROOF if self._resumed else WATCH * (1 + self._jitter() / 2)
        self._watch = Watch(self._version, round(seconds))
        self._began, self._heard = now, False
        return self._watch

    def listed(self, page: Page, now: float) -> Changes:
        """A page has come. With the last one, objects that no page had are gone."""
        if self._reason != "Refused":
            self.trouble = None  # else it is the watch that has to show that all is well
        if not self.path:  # gone while it was asked
            return NOTHING
        put = tuple(item for item in page.items if self._is_new(item))
        self._seen.update(item.key for item in page.items)
        self._token = page.token
        if page.token:
            return Changes(put)
        gone = tuple(key for key in self.known if key not in self._seen)
        for key in gone:
            del self.known[key]
        self._seen = set()
        self._version, self.synced, self.heard_at = page.version, True, now
        self._resumed = False
        return Changes(put, gone)

    def happened(self, event: Event, now: float) -> Changes:
        """A line of the watch."""
        if not self.path:
            return NOTHING
        if self._version:  # else everything is to be listed, through another path, as soon as this watch has ended
            self._version = event.version
        self.heard_at = now
        self._heard, self._resumed = True, False
        self.trouble, self.failures = None, 0
        item = event.item
        if item is None:
            return NOTHING
        if event.type == "DELETED":
            return Changes(gone=(item.key,)) if self.known.pop(item.key, None) else NOTHING
        return Changes((item,)) if self._is_new(item) else NOTHING

    def ended(self, now: float) -> None:
        """The watch has ended in order, as it does when its time is over."""
        if not self._heard and now - self._began < self._watch.seconds - EARLY:
            self.failed(Failure("Closed", "the server ended a watch before its time, without a word"), now)
            return
        self.trouble, self.failures = None, 0
        self._not_before = self._began + SPACING
        if not self._heard and (self._resumed or now - self.heard_at > SILENCE):
            self._list_again("Silence")

    def failed(self, failure: Failure, now: float) -> None:
        """A list or watch was refused, broke off or did not answer in time."""
        if failure.reason != self._kind_of_failure:
            self.failures = 0
        self._kind_of_failure = failure.reason
        self.failures += 1
        # At most 2 ** 30: the exponent of a server that is away for a year would not fit a float.
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(self.failures - 1, 30)) * (1 + self._jitter()) / 2
        self._not_before = now + max(delay, min(failure.retry_after, LONGEST_DELAY))
        patience = REFUSED if failure.status == 404 else 1  # of a missing resource discovery tells
        if self.failures > patience or failure.status in (401, 403):
            self.trouble = failure
        if not self._version:
            if failure.status in (400, 410):  # the token is too old
                self._list_again(self._reason)
        elif failure.status == 410:
            self._list_again("Expired")
        elif failure.reason in ("Protocol", "TooLarge") or (self.failures >= REFUSED and not _is_waited_out(failure)):
            self._list_again("Refused")
        else:
            self._resumed = True

    @property
    def absent(self) -> bool:
        """The server was asked, and does not have it."""
        return not self.path and self._absent_since is not None

    def _is_new(self, item: Item) -> bool:
        """Whether this version of the object was not seen; it is from here on."""
        seen = self.known.get(item.key)
        self.known[item.key] = (item.uid, item.version)
        return seen != (item.uid, item.version)

    def _list_again(self, reason: str) -> None:
        self._version, self._token, self._reason = "", "", reason
        self._seen = set()
        if reason in ("Moved", "Silence"):
            # The same resourceVersion may mean other content: through another version, or after another history.
            self.known = dict.fromkeys(self.known, ("", ""))


def _is_waited_out(failure: Failure) -> bool:
    """Faults that a list would only meet too: nobody answers, may not be asked, or has too much to do."""
    return failure.reason == "Unreachable" or failure.status in (401, 403, 429, 503)
