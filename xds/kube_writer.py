"""What is written to an API server by the holder of its Lease: the statuses of our objects, and Events.

    control ── statuses, rejections ──▶ wanted ─┐
    source ── objects as they are ────▶ live ───┴─▶ WriteQueue ─▶ patch ─▶ PATCH .../status
                                                        ▲           Events ─▶ POST
    LeaseHolder ── while it is ours ────────────────────┘

- Level, not edge: what is written follows from what is wanted and what is there, whoever changed which. A new holder
  looks at every object once, and writes nothing where all is said.
- Each write ends before this replica's time in the Lease does: then it is given up, answered or not.
- A fault of writing is a log line and a retry. Serving does not notice it.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from xds.api_wire import Failure
from xds.events import event
from xds.kube_client import MERGE, Client
from xds.kube_lease import LeaseHolder, Troubles, clock
from xds.metrics import Metrics
from xds.model import GATEWAY, ObjectRef, Rejection, Status
from xds.status_patch import REPORTING, Address, Live, patch
from xds.write_queue import WriteQueue, is_about_all

WRITERS = 4  # statuses written at the same time
WRITE = 5.0  # seconds for one answer
LEAST = 0.2  # seconds of this replica's time that are worth beginning a write for
MAX_EVENTS = 1000  # rejections that wait to be told: a thousand at once are a mistake somebody knows of
EVENT_SPACING = 0.1  # seconds between two Events
EVENT_DELAY = 5.0  # seconds before the next attempt, when nobody answers
CONTESTED = 3  # times in a row that somebody else undoes what was written, before it is worth a line
LOOK = 15.0  # seconds between two looks at the version of Gateway API's CRDs
LOOK_TIMEOUT = 3.0  # seconds for one answer of these

CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/gatewayclasses.gateway.networking.k8s.io"
BUNDLE = "gateway.networking.k8s.io/bundle-version"

_Said = tuple[Status | None, Sequence[Address], str | None]  # with the addresses and the CRDs' version of then

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Options:
    """`lease` is (namespace, name). `addresses` are the Gateways', beside those of the Service `service`."""

    lease: tuple[str, str]
    identity: str
    controllers: tuple[str, ...]
    addresses: tuple[Address, ...] = ()
    service: ObjectRef | None = None


def observes(service: ObjectRef | None) -> Callable[[ObjectRef], bool]:
    """What a source has to keep for a writer with these options."""
    return lambda ref: (ref.group, ref.kind) in REPORTING or ref == service


class StatusWriter:
    """Mutable, one event loop. `live` is a source's, whose changes are told to `observed`; `follow` is for control."""

    def __init__(
        self,
        client: Client,
        live: Mapping[ObjectRef, Live],
        options: Options,
        metrics: Metrics,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._troubles = Troubles()
        self.lease = LeaseHolder(
            *(client, options.lease, options.identity, metrics, self._troubles), self._lease_changed, jitter
        )
        self._client = client
        self._live = live
        self._options = options
        self._metrics = metrics
        self._jitter = jitter
        self._queue = WriteQueue(jitter, clock())
        self._wanted: dict[ObjectRef, Status] = {}
        self._judged = False  # `follow` was called: before that nothing is known to be wanted, or not to be
        self._bundle: str | None = None  # the version of Gateway API's CRDs, "" for none, None: not known
        self._said: dict[ObjectRef, _Said] = {}  # what was written last
        # By the version that was patched, the object as the answer has it: until the source has told of a newer one.
        self._ahead: dict[ObjectRef, tuple[str, Live]] = {}
        self._rejections: dict[Rejection, None] = {}
        self._events: deque[Rejection] = deque(maxlen=MAX_EVENTS)
        self._leading = False  # this term's queue is there
        self._news = asyncio.Event()  # something to write
        self._told = asyncio.Event()  # an Event to write
        metrics.status_pending.set_function(lambda: self.pending)

    @property
    def pending(self) -> int:
        """How many objects are to be looked at by this replica."""
        return len(self._queue) if self._leading else 0

    # --- what is to be said ---

    def follow(self, statuses: Iterable[Status], rejections: Iterable[Rejection]) -> None:
        """The statuses of all objects that are ours, and every rejection."""
        wanted = {status.ref: status for status in statuses}
        changed = [ref for ref in wanted.keys() | self._wanted.keys() if wanted.get(ref) != self._wanted.get(ref)]
        self._wanted, self._judged = wanted, True
        self._add(changed)
        self._news.set()
        before, self._rejections = self._rejections, dict.fromkeys(rejections)
        self._tell(each for each in self._rejections if each not in before)

    def observed(self, ref: ObjectRef) -> None:
        """The object has come, changed or gone."""
        if ref == self._options.service:
            self._add(each for each in self._wanted if each.kind == "Gateway")
        elif ref in self._live:
            self._add([ref])
        else:
            self._said.pop(ref, None)
            self._ahead.pop(ref, None)
            self._troubles.forget("statuses", str(ref))
            self._queue.forget(ref)

    def _add(self, refs: Iterable[ObjectRef]) -> None:
        if self._leading:
            for ref in refs:
                self._queue.add(ref, clock())
            self._news.set()

    def _tell(self, rejections: Iterable[Rejection]) -> None:
        """Only of what is ours: others' objects are none of our business, and neither is what we do not serve."""
        if self._leading:
            self._events.extend(each for each in rejections if each.ref in self._wanted)
            self._told.set()

    # --- tasks ---

    async def run(self) -> None:
        """Until cancelled; then the Lease is given back."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.lease.run(), name="lease")
                group.create_task(self._write_statuses(), name="statuses")
                group.create_task(self._write_events(), name="events")
                group.create_task(self._follow_bundle(), name="version")
        finally:
            await self.lease.release()

    def _lease_changed(self, leads: bool) -> None:
        if leads and not self._leading:
            self._leading = True
            self._queue = WriteQueue(self._jitter, clock())
            self._add([*self._live])
            self._tell(self._rejections)
        elif not leads:
            self._leading = False
            self._events.clear()
        self._news.set()  # there is time again, or none
        self._told.set()

    # --- statuses ---

    async def _write_statuses(self) -> None:
        slots = asyncio.Semaphore(WRITERS)
        async with asyncio.TaskGroup() as group:
            while True:
                await slots.acquire()
                queue, ref = await self._next()
                group.create_task(self._write_in(slots, queue, ref), name=f"status of {ref}")

    async def _next(self) -> tuple[WriteQueue, ObjectRef]:
        """The next object to look at, while this replica has the time to write; and the queue that has to be told."""
        while True:
            self._news.clear()
            now = clock()
            found = self._queue.next(now) if self._judged and self.lease.leads(LEAST) else None
            if isinstance(found, ObjectRef):
                return self._queue, found
            try:
                async with asyncio.timeout(found):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def _write_in(self, slots: asyncio.Semaphore, queue: WriteQueue, ref: ObjectRef) -> None:
        try:
            await self._write(queue, ref)
        finally:
            slots.release()
            self._news.set()

    async def _write(self, queue: WriteQueue, ref: ObjectRef) -> None:
        live = self._newest(ref)
        if live is None:
            queue.gone(ref, clock())
            return
        status, addresses = self._wanted.get(ref), self._addresses()
        body = patch(
            ref,
            status,
            live,
            f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            controllers=frozenset(self._options.controllers),
            addresses=addresses,
            bundle=self._bundle,
            is_others=self._is_others,
        )
        if body is None:
            queue.unchanged(ref, clock())
            return
        said = status, addresses, self._bundle
        undone = self._said.get(ref) == said
        queue.sending(clock())
        answer = await self._send("PATCH", f"{live.path}/status", body, MERGE)
        now = clock()
        if isinstance(answer, Failure):
            self._failed(queue, ref, answer, now)
            return
        self._count(ref, "written")
        for subject in _subjects(ref):
            self._troubles.tell("statuses", None, subject)
        self._said[ref] = said
        if newer := _read_answer(answer, live):
            self._ahead[ref] = live.version, newer
        queue.written(ref, now, undone=undone)
        if queue.contested(ref) == CONTESTED:
            log.warning("status contested", object=str(ref))

    async def _send(self, method: str, path: str, body: object, content: str = "application/json") -> object | Failure:
        """Write it in the time that this replica has; after its process was stopped for long there is none."""
        within = min(WRITE, self.lease.seconds_left)
        if within <= 0:
            return Failure("Timeout", "the Lease is another's by now")
        return await self._client.send(method, path, body, within, content)

    def _newest(self, ref: ObjectRef) -> Live | None:
        """As the source has it, or as our own last write left it, which the source has not told of yet."""
        live = self._live.get(ref)
        ahead = self._ahead.get(ref)
        if live is not None and ahead is not None and ahead[0] == live.version:
            return ahead[1]
        self._ahead.pop(ref, None)
        return live

    def _addresses(self) -> tuple[Address, ...]:
        service = self._live.get(self._options.service) if self._options.service else None
        return (*self._options.addresses, *(service.addresses if service else ()))

    def _is_others(self, parent: ObjectRef) -> bool:
        is_gateway = (parent.group, parent.kind) == (GATEWAY, "Gateway")
        return not is_gateway or (parent in self._live and parent not in self._wanted)

    def _failed(self, queue: WriteQueue, ref: ObjectRef, failure: Failure, now: float) -> None:
        match failure.status:
            case 404:  # the source will tell of it, or of where the object is now
                self._count(ref, "gone")
            case 409:
                self._count(ref, "conflict")
            case status:
                self._count(ref, "failed")
                everything, kind, one = _subjects(ref)
                subject = everything if is_about_all(failure) else kind if status == 403 else one
                self._troubles.tell("statuses", failure, subject)
        queue.failed(ref, failure, now)

    def _count(self, ref: ObjectRef, result: str) -> None:
        self._metrics.status_writes.labels(ref.kind, result).inc()

    async def _follow_bundle(self) -> None:
        """Who may not read CRDs says nothing of their version."""
        while True:
            answer = await self._client.get(CRD, {}, LOOK_TIMEOUT)
            match answer:
                case {"metadata": {"annotations": {**annotations}}}:
                    bundle = annotations.get(BUNDLE)
                    found: str | None = bundle if isinstance(bundle, str) else ""
                case Failure():
                    found = self._bundle
                case _:
                    found = ""
            if found != self._bundle:
                self._bundle = found
                self._add(ref for ref in self._wanted if ref.kind == "GatewayClass")
            await asyncio.sleep(LOOK)

    # --- Events ---

    async def _write_events(self) -> None:
        """One after the other; what can not be told now is told later, if it is still true then."""
        while True:
            self._told.clear()
            if not self._events or not self.lease.leads(LEAST):
                await self._told.wait()
                continue
            rejection = self._events.popleft()
            ref = rejection.ref
            live = self._live.get(ref) if ref else None
            if ref is None or live is None or rejection not in self._rejections:
                continue
            path, body = event(ref, rejection, live, self._options.identity, datetime.now(UTC))
            answer = await self._send("POST", path, body)
            if not isinstance(answer, Failure) or answer.status == 409:  # it is there already
                self._metrics.events.labels("written").inc()
                self._troubles.tell("events", None)
                await asyncio.sleep(EVENT_SPACING)
                continue
            self._metrics.events.labels("failed").inc()
            self._troubles.tell("events", answer)
            if answer.status in (0, 429) or answer.status >= 500:
                self._events.appendleft(rejection)
            await asyncio.sleep(EVENT_DELAY * (1 + self._jitter()) / 2)


def _subjects(ref: ObjectRef) -> tuple[str, str, str]:
    """Whose trouble a refusal may be: everything's, the kind's or the object's."""
    return "", ref.kind, str(ref)


def _read_answer(answer: object, before: Live) -> Live | None:
    """The object after a patch; None if the answer is not one."""
    match answer:
        case {"metadata": {"resourceVersion": str(version), **rest}, **fields}:
            status, generation = fields.get("status"), rest.get("generation")
            return Live(
                before.path,
                before.api_version,
                before.uid,
                version,
                generation if isinstance(generation, int) else before.generation,
                status if isinstance(status, dict) else {},
            )
    return None
