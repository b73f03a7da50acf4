"""Who of several replicas may write: a holder's time in a Lease of the API server (pure: no I/O, time is given).

    Read ──free, or silent for its duration──▶ Write (take) ──200──▶ holder ──Write (renew)──▶ ... ──Write (release)
      ▲                                          │ 409, lost                    │ TENURE without a 200
      └──────────────────────────────────────────┴─────────────────────────────┘

Two never write at once, whatever the connections and the clocks' settings do:

- A holder's time is counted on its own clock from the moment at which it *sent* the last renewal that was acknowledged,
  and ends after `TENURE`. Without an answer it ends all the same: an error does not prolong it.
- Another takes the Lease only when it has seen the same record for the record's whole duration, on its own clock: from
  the moment at which it first *read* it, which is after it was written, which is after it was sent. No time in the
  record is compared with any clock; they are for people.
- Every write has the resourceVersion that was read: of two that take it at once one is refused.

So clocks may be set to anything, and may run up to DURATION / TENURE = 1.5 times as fast as each other.
https://kubernetes.io/docs/concepts/architecture/leases/
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from xds.api_wire import Failure

DURATION = 15  # seconds, as client-go: what the others wait for a holder that says nothing any more
TENURE = 10.0  # seconds
RETRY = 2.0  # seconds between two renewals, and between two looks at another's Lease
ANSWER = 3.0  # seconds for one answer: three attempts fit in a tenure
LONGEST_DURATION = 3600  # seconds of a record's duration that are believed: another program may write anything


@dataclass(frozen=True, slots=True)
class Record:
    """A Lease as it was read: `version` is its resourceVersion, `spec` its record as the API server has it."""

    version: str
    spec: Mapping[str, object]

    @property
    def holder(self) -> str:
        value = self.spec.get("holderIdentity")
        return value if isinstance(value, str) else ""

    @property
    def duration(self) -> float:
        value = self.spec.get("leaseDurationSeconds")
        is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
        return min(float(value), LONGEST_DURATION) if is_number and isinstance(value, int) else float(DURATION)


@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Read:
    """Ask for the Lease."""


@dataclass(frozen=True, slots=True)
class Write:
    """Create it (`version` is ""), or replace the record it has at `version`."""

    version: str
    spec: Mapping[str, object]


def read_record(document: object) -> Record | Failure:
    """A Lease of the API server."""
    match document:
        case {"metadata": {"resourceVersion": str(version)}, **rest} if version:
            spec = rest.get("spec")
            return Record(version, spec if isinstance(spec, dict) else {})
    return Failure("Protocol", "no Lease")


class Elector:
    """One replica's part (mutable). `identity` is like no other process's, an earlier one of the same pod included.

    `holder` is who has the Lease as far as is known, `until` when this replica's right to write ends.
    """

    def __init__(self, identity: str, jitter: Callable[[], float], now: float) -> None:
        self.identity = identity
        self.holder = ""
        self.until = now
        self._jitter = jitter
        self._record: Record | None = None  # the last that was read or written; None: not read, or there is none
        self._is_read = False  # `_record` is what the API server had, and not older than the last answer
        self._seen_at = now  # when a record as it is was first read
        self._not_before = now
        self._sent_at = now

    def leads(self, now: float) -> bool:
        return now < self.until

    def next(self, now: float, utc: datetime) -> Read | Write | Wait:
        """What to do now; the answer is told to `found`, `written` or `failed`. `utc` is for the record alone."""
        if now < self._not_before:
            return Wait(self._not_before - now)
        if not self._is_read:
            return Read()
        record = self._record
        mine = record is not None and record.holder == self.identity
        if record is not None and record.holder and not mine and now < self._seen_at + record.duration:
            self._is_read = False
            return Read()
        self._sent_at = now
        return Write(record.version if record else "", self._spec(record, utc, mine))

    def release(self, utc: datetime) -> Write | None:
        """What lets another take over at once, if this replica has the Lease: after its last write has ended."""
        record, self.until = self._record, self._sent_at
        if record is None or record.holder != self.identity:
            return None
        spec = {**record.spec, "holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": micro_time(utc)}
        return Write(record.version, spec)

    def found(self, record: Record | None, now: float) -> None:
        """It was read; None: there is none."""
        if record is None or self._record is None or record.spec != self._record.spec:
            self._seen_at = now
        self._record, self._is_read = record, True
        self.holder = record.holder if record else ""
        if record is None or self.holder in ("", self.identity):
            return  # it is free, or an answer was lost: to be written at once
        self.until = min(self.until, now)
        if now < self._seen_at + record.duration:
            self._look_again(now)

    def written(self, record: Record, now: float) -> None:
        """What was sent was accepted."""
        self._record, self._is_read = record, True
        self.holder = self.identity
        self.until = self._sent_at + TENURE
        self._not_before = now + RETRY * (0.8 + 0.2 * self._jitter())

    def failed(self, now: float, retry_after: float = 0.0) -> None:
        """No answer, or a refusal: another may have written it. This replica's right ends when its time is over."""
        self._is_read = False
        self._not_before = now + max(RETRY / 2 * (1 + self._jitter()), min(retry_after, DURATION))

    def _look_again(self, now: float) -> None:
        self._not_before = now + RETRY * (1 + 0.2 * self._jitter())

    def _spec(self, record: Record | None, utc: datetime, mine: bool) -> Mapping[str, object]:
        old = dict(record.spec) if record else {}
        count = old.get("leaseTransitions")
        transitions = count if isinstance(count, int) and not isinstance(count, bool) and count >= 0 else 0
        taken = {"acquireTime": micro_time(utc), "leaseTransitions": transitions + 1 if record else 0}
        return {
            **old,
            "holderIdentity": self.identity,
            "leaseDurationSeconds": DURATION,
            "renewTime": micro_time(utc),
            **({} if mine else taken),
        }


def micro_time(utc: datetime) -> str:
    """As client-go writes a MicroTime: UTC, with microseconds."""
    return utc.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
