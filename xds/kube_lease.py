"""The Lease of an API server, held by one of several replicas: xds/lease.py's decisions, carried out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime

import structlog

from xds.api_wire import Failure, Served
from xds.kube_client import MERGE, Client
from xds.lease import ANSWER, Elector, Read, Wait, Write, read_record
from xds.metrics import Metrics

RELEASE = 2.0  # seconds to give the Lease back at the end: without it the next holder waits for its duration
LEASES = Served("coordination.k8s.io", "v1", "Lease", "leases", namespaced=True)

log = structlog.get_logger()


def clock() -> float:
    """Seconds since the machine has started, also while it is suspended: the others' clocks run on meanwhile."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Troubles:
    """What can not be written and is tried again: a line when it begins, when it is another, and when it is over."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, str], str] = {}  # what, and of which object or kind -> the reason

    def tell(self, what: str, failure: Failure | None, subject: str = "") -> None:
        """`failure` None: it has been written. `subject` "": it is about all of them."""
        about = {"object": subject} if subject else {}
        told = self._told.pop((what, subject), None)
        if failure is not None:
            self._told[what, subject] = failure.reason
            if told != failure.reason:
                log.warning("write failed", what=what, reason=failure.reason, message=failure.message, **about)
        elif told is not None:
            log.info("write recovered", what=what, reason=told, **about)

    def forget(self, what: str, subject: str) -> None:
        self._told.pop((what, subject), None)


class LeaseHolder:
    """One replica's part in the Lease `name` (namespace, name); mutable, one event loop.

    After each exchange with the API server `changed` is called with whether this is the holder now. Between two calls
    the right may end: what counts for a write is `leads`, and `seconds_left` for how long it may take.
    """

    def __init__(
        self,
        client: Client,
        name: tuple[str, str],
        identity: str,
        metrics: Metrics,
        troubles: Troubles,
        changed: Callable[[bool], None],
        jitter: Callable[[], float],
    ) -> None:
        self.name = "/".join(name)
        self._client = client
        self._elector = Elector(identity, jitter, clock())
        self._metrics = metrics
        self._troubles = troubles
        self._changed = changed
        self._leading = False  # and said so
        self._answered = False  # the last step was
        self._namespace, self._own_name = name
        self._path = f"{LEASES.path(name[0])}/{name[1]}"
        metrics.leader.set_function(self.leads)

    @property
    def identity(self) -> str:
        return self._elector.identity

    @property
    def holder(self) -> str:
        """Who has it, as far as is known; "" for nobody."""
        return self._elector.holder

    def leads(self, for_seconds: float = 0.0) -> bool:
        """Whether this replica may write, for so long from now."""
        return self._elector.leads(clock() + for_seconds)

    @property
    def seconds_left(self) -> float:
        """Of this replica's right to write; below 0 where it has none."""
        return self._elector.until - clock()

    async def run(self) -> None:
        """Until cancelled; what is written in its name has to be over then, before `release`."""
        while True:
            step = self._elector.next(clock(), datetime.now(UTC))
            match step:
                case Wait(seconds):
                    if self._answered:  # and there is no more to do: a Lease that can be read may still not be written
                        self._troubles.tell("lease", None)
                    await asyncio.sleep(seconds)
                case Read():
                    self._take(await self._client.get(self._path, {}, ANSWER), step)
                case Write():
                    self._take(await self._send(step, ANSWER), step)
            self._report()

    async def release(self) -> None:
        """Let another take over at once, if this is the holder."""
        step = self._elector.release(datetime.now(UTC))
        self._leading = False
        if step is not None:
            answer = await self._send(step, RELEASE)
            log.info("leadership released", lease=self.name, answered=not isinstance(answer, Failure))
            self._metrics.leader_changes.labels("released").inc()

    async def _send(self, step: Write, within: float) -> object | Failure:
        """A patch leaves labels and annotations as they are; it is for the version that was read, as a PUT is."""
        body: dict[str, object] = {"metadata": {"resourceVersion": step.version}, "spec": step.spec}
        if step.version:
            return await self._client.send("PATCH", self._path, body, within, MERGE)
        body |= {"apiVersion": LEASES.api_version, "kind": LEASES.kind}
        body["metadata"] = {"name": self._own_name, "namespace": self._namespace}
        return await self._client.send("POST", LEASES.path(self._namespace), body, within)

    def _take(self, answer: object | Failure, step: Read | Write) -> None:
        now = clock()
        if isinstance(step, Read) and isinstance(answer, Failure) and answer.status == 404:
            self._elector.found(None, now)
            return
        record = answer if isinstance(answer, Failure) else read_record(answer)
        if isinstance(record, Failure):
            if record.status != 409:  # another was faster
                self._troubles.tell("lease", record)
            self._answered = False
            self._elector.failed(now, record.retry_after)
            return
        self._answered = True
        if isinstance(step, Read):
            self._elector.found(record, now)
        else:
            self._elector.written(record, now)

    def _report(self) -> None:
        leads = self.leads()
        if leads != self._leading:
            self._leading = leads
            if leads:
                log.info("leadership acquired", lease=self.name, identity=self.identity)
            else:
                log.warning("leadership lost", lease=self.name, holder=self.holder)
            self._metrics.leader_changes.labels("acquired" if leads else "lost").inc()
        self._changed(leads)
