"""The objects of an API server as a stream of `Config`s, like those of a directory.

    a task for each resource   Reflector says what to ask ─▶ Client asks ─▶ parse ─▶ LiveIndex ─hold-off─▶ Config
    a task for discovery       which resources there are, each through one version ─▶ Reflector

- The first Config comes when every resource the server has was read once: an earlier one would take from running Envoys
  what is merely not read yet. A resource that may not be read holds it up too, unless it is `optional`.
- From then on nothing is lost to a fault: what was read last is served until the API server says otherwise.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import structlog

from xds.api_wire import Failure, GroupKind, Served, choose, group_path, group_versions, read_event, read_page
from xds.index import LiveIndex
from xds.kube_client import Client
from xds.metrics import Metrics, ResourceCollector, ResourceState
from xds.model import CORE, ENVOY_GATEWAY, Config, ObjectRef
from xds.parse import KINDS, parse
from xds.parse_core import TLS_TYPE
from xds.reflector import NOTHING, Changes, List, Reflector, Wait, Watch
from xds.status_patch import Live, read_live

PAGE = 250  # objects a page: to read that many pods takes 35 ms, in which no stream is answered
LIST = 60.0  # seconds for a whole page
SLACK = 10.0  # seconds a watch may take longer than it was asked to; then its connection is taken for half-open
LOOK = 15.0  # seconds between two looks at which resources there are: so soon a new CRD is noticed
LOOK_AGAIN = 1.0  # seconds at least between two looks, when a resource was not where it should be
LOOK_TIMEOUT = 10.0  # seconds for one answer of discovery
HOLD_OFF = 0.1  # seconds of quiet before a Config: a rollout is a burst of pod events
MAX_HOLD_OFF = 0.5  # seconds: how long a burst without an end may keep a pod's deletion from Envoy

# Of Secrets those that are read: others may be a megabyte each (Helm's), and are nobody's business here.
SELECTED = {(CORE, "Secret"): f"type={TLS_TYPE}"}

log = structlog.get_logger()


@dataclass(slots=True)
class _Follower:
    """One resource in one namespace ("" = all), and what its task waits for."""

    kind: GroupKind
    namespace: str
    reflector: Reflector
    optional: bool  # it only refines, and may be left unreadable
    served: Served | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    missing: bool = False  # and said so

    @property
    def name(self) -> str:
        """As RBAC and `kubectl get` name it."""
        group, kind = self.kind
        name = self.served.name if self.served else f"{kind}.{group}"
        return f"{name} in {self.namespace}" if self.namespace else name


class KubernetesSource:
    """An API server as a stream of `Config`s, with the memory of the last good version of each object.

    Mutable, bound to one event loop: `index` is what the last `Config` was made of. `namespaces` () = all. `observe`
    says of which objects more is kept than is served: what their statuses are written from.
    """

    def __init__(
        self,
        client: Client,
        metrics: Metrics,
        namespaces: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        observe: Callable[[ObjectRef], bool] = lambda _: False,
    ) -> None:
        self.client = client
        self.index = LiveIndex()
        self.live: dict[ObjectRef, Live] = {}  # the objects that are to be observed
        self._observe = observe
        self._observers: list[Callable[[ObjectRef], None]] = []
        self._metrics = metrics
        self._clock = clock
        # Another product's kind; what only HTTPS listeners need, and not everybody is shown; and one whose list shows
        # every namespace, where only some are to be read.
        optional = [(ENVOY_GATEWAY, "BackendTrafficPolicy"), (CORE, "Secret")]
        optional += [(CORE, "Namespace")] if namespaces else []
        self._versions = {kind: versions for kind, (versions, _) in KINDS.items()}
        self._followers = [
            _Follower(kind, namespace, Reflector(jitter, clock()), kind in optional)
            for kind, (_, namespaced) in KINDS.items()
            for namespace in (namespaces if namespaced else ()) or ("",)
        ]
        self._looked = False  # at what there is, once, with success
        self._look_again = asyncio.Event()
        self._progress = asyncio.Event()  # towards a complete configuration
        self._changed = asyncio.Event()  # the configuration
        self._told: dict[str, Failure] = {}  # what is being waited out, by resource
        metrics.registry.register(ResourceCollector(self.states))

    def __str__(self) -> str:
        return self.client.server

    async def configs(self) -> AsyncGenerator[Config, None]:
        """The configuration when all of it is read, and again after each change; it ends only by being closed.

        Leave it with `contextlib.aclosing`, or by cancelling its task: then every connection is closed.
        """
        running = asyncio.create_task(self._run(), name="kubernetes")
        running.add_done_callback(self._wake)
        try:
            while not self._is_complete():
                await _next(self._progress, running)
            while True:
                self._changed.clear()
                yield self.index.config()
                await _next(self._changed, running)
                await self._hold_off(running)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def follow_live(self, follow: Callable[[ObjectRef], None]) -> None:
        """Call `follow` with each object of `live` that has come, changed or gone."""
        self._observers.append(follow)

    def states(self) -> Iterable[ResourceState]:
        """What /metrics says of each resource that is there; of several namespaces the sum, and the worst."""
        now, found = self._clock(), dict[str, ResourceState]()
        for follower in self._followers:
            if follower.served is not None and follower.reflector.path:
                name, staleness = follower.served.name, now - follower.reflector.heard_at
                seen = found.get(name, ResourceState(name, 0, 0.0))
                objects = seen.objects + len(follower.reflector.known)
                found[name] = ResourceState(name, objects, max(seen.staleness, staleness))
        return found.values()

    # --- when to say what ---

    def _is_complete(self) -> bool:
        """Whether every resource was read once, of those that are there and may be read."""
        return self._looked and all(map(_is_settled, self._followers))

    def _wake(self, _: asyncio.Task[None]) -> None:
        self._progress.set()
        self._changed.set()

    async def _hold_off(self, running: asyncio.Task[None]) -> None:
        """Return after HOLD_OFF seconds without a change, and after MAX_HOLD_OFF in any case."""
        loop = asyncio.get_running_loop()
        last = loop.time() + MAX_HOLD_OFF
        try:
            while True:
                async with asyncio.timeout_at(min(loop.time() + HOLD_OFF, last)):
                    await _next(self._changed, running)
        except TimeoutError:
            return

    # --- tasks ---

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._discover(), name="discovery")
            for follower in self._followers:
                group.create_task(self._follow(follower), name=follower.name)

    async def _discover(self) -> None:
        """Look at what there is, again and again."""
        while True:
            found = await self._look()
            if isinstance(found, Failure):
                self._count_failure("discovery", found)
                self._tell("discovery", found)
            else:
                self._tell("discovery", None)
                self._looked = True
                for follower in self._followers:
                    self._discovered(follower, found.get(follower.kind))
                self._progress.set()
            self._look_again.clear()
            await asyncio.sleep(LOOK_AGAIN)
            try:
                async with asyncio.timeout(LOOK - LOOK_AGAIN if self._looked else 0):
                    await self._look_again.wait()
            except TimeoutError:
                pass

    async def _look(self) -> Mapping[GroupKind, Served] | Failure:
        """Which of our kinds the server has. One that is starting does not say yet: it may not know its CRDs."""
        ready = await self.client.get("/readyz", {}, LOOK_TIMEOUT, text=True)
        if isinstance(ready, Failure) and not 400 <= ready.status < 500:  # some do not let everybody ask
            return ready
        groups = await self.client.get("/apis", {}, LOOK_TIMEOUT)
        if isinstance(groups, Failure):
            return groups
        wanted = group_versions(self._versions, groups)
        if isinstance(wanted, Failure):
            return wanted
        lists = {}
        for group, version in wanted:
            found = await self.client.get(group_path(group, version), {}, LOOK_TIMEOUT)
            if isinstance(found, Failure) and found.status != 404:  # gone since
                return found
            lists[group, version] = found
        return choose(self._versions, lists)

    def _discovered(self, follower: _Follower, served: Served | None) -> None:
        path = served.path(follower.namespace) if served else ""
        changes = follower.reflector.discovered(path, self._clock())
        if served is not None:
            follower.served, follower.missing = served, False
            follower.wake.set()
        self._take(follower, changes)
        if follower.reflector.absent and not follower.missing:
            follower.missing = True
            log.info("resource missing", resource=follower.name)
        self._report(follower)

    async def _follow(self, follower: _Follower) -> None:
        """Do what the reflector says, for ever."""
        while True:
            step = follower.reflector.next(self._clock())
            match step:
                case Wait(seconds):
                    follower.wake.clear()
                    try:
                        async with asyncio.timeout(None if seconds == math.inf else seconds):
                            await follower.wake.wait()
                    except TimeoutError:
                        pass
                case List():
                    await self._list(follower, step)
                case Watch():
                    await self._watch(follower, step)
            self._report(follower)

    async def _list(self, follower: _Follower, step: List) -> None:
        reflector, served = follower.reflector, follower.served
        assert served is not None  # noqa: S101 - a reflector without a path waits
        if not step.token:
            self._metrics.lists.labels(served.name, step.reason).inc()
        query = {"limit": PAGE} | ({"continue": step.token} if step.token else {}) | _selection(follower)
        answer = await self.client.get(reflector.path, query, LIST)
        page = answer if isinstance(answer, Failure) else read_page(answer, served)
        if isinstance(page, Failure):
            self._failed(follower, page)
            return
        first = not reflector.synced
        self._take(follower, reflector.listed(page, self._clock()))
        if first and reflector.synced:
            objects = len(reflector.known)
            log.info("resource synced", resource=follower.name, version=served.api_version, objects=objects)
            self._progress.set()

    async def _watch(self, follower: _Follower, step: Watch) -> None:
        reflector, served = follower.reflector, follower.served
        assert served is not None  # noqa: S101 - a reflector without a path waits
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": step.version,
            "timeoutSeconds": step.seconds,
        } | _selection(follower)
        async with aclosing(self.client.lines(reflector.path, query, step.seconds + SLACK)) as lines:
            async for line in lines:
                event = line if isinstance(line, Failure) else read_event(line, served)
                if isinstance(event, Failure):
                    self._failed(follower, event)
                    return
                self._take(follower, reflector.happened(event, self._clock()))
                self._report(follower)
        reflector.ended(self._clock())

    # --- what came of it ---

    def _take(self, follower: _Follower, changes: Changes) -> None:
        if changes is NOTHING:
            return
        group, kind = follower.kind
        new = False
        for item in changes.put:
            ref = ObjectRef(group, kind, *item.key)
            new |= self.index.put(ref, parse(item.document))
            if follower.served is not None and self._observe(ref):
                self.live[ref] = read_live(item, follower.served)
                self._observed(ref)
        for key in changes.gone:
            ref = ObjectRef(group, kind, *key)
            new |= self.index.drop(ref)
            if self.live.pop(ref, None):
                self._observed(ref)
        if new:
            self._changed.set()

    def _observed(self, ref: ObjectRef) -> None:
        for follow in self._observers:
            follow(ref)

    def _failed(self, follower: _Follower, failure: Failure) -> None:
        follower.reflector.failed(failure, self._clock())
        self._count_failure(follower.served.name if follower.served else follower.name, failure)
        if failure.status == 404:
            self._look_again.set()

    def _count_failure(self, resource: str, failure: Failure) -> None:
        self._metrics.api_failures.labels(resource, failure.reason).inc()

    def _report(self, follower: _Follower) -> None:
        trouble = follower.reflector.trouble
        if self._told.get(follower.name) != trouble:
            self._tell(follower.name, trouble)
            self._progress.set()  # what may not be read is not waited for

    def _tell(self, resource: str, trouble: Failure | None) -> None:
        """Say it when it begins and when it ends, and of what several resources have in common only once."""
        told = self._told.pop(resource, None)
        others = {each.message for each in self._told.values()}
        if trouble is not None:
            self._told[resource] = trouble
            if told is None or told.reason != trouble.reason:
                write = log.debug if trouble.message in others else log.warning
                write("watch failed", resource=resource, reason=trouble.reason, message=_explained(trouble))
        elif told is not None:
            write = log.debug if told.message in others else log.info
            write("watch recovered", resource=resource, reason=told.reason)


async def _next(event: asyncio.Event, running: asyncio.Task[None]) -> None:
    """Wait for the event, and take it; an end of the tasks is a mistake of theirs, and raised here."""
    await event.wait()
    event.clear()
    if running.done():
        running.result()


def _selection(follower: _Follower) -> dict[str, str]:
    """The part of a query that leaves out what is not read."""
    return {"fieldSelector": SELECTED[follower.kind]} if follower.kind in SELECTED else {}


def _is_settled(follower: _Follower) -> bool:
    reflector = follower.reflector
    refused = reflector.trouble is not None and reflector.trouble.status in (401, 403)
    return reflector.synced or reflector.absent or (refused and follower.optional)


def _explained(trouble: Failure) -> str:
    match trouble.status:
        case 401:
            return f"{trouble.message}: the API server does not accept the credentials"
        case 403:
            return f"{trouble.message}: grant list and watch to this user (RBAC)"
    return trouble.message
