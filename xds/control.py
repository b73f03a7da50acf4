"""The flow from objects and metrics pages to the management server; every decision on the way is made elsewhere.

    configs -> resolve -> translate -> publish          when an object changes
    readings -> weigh -> reweigh, pool loads -> publish  each scrape interval
    in flight -> pool loads -> publish                  each second, where Envoys report it
    answers -> quarantine -> resolve -> ...             when an Envoy refuses what no check of ours found
    statuses, rejections -> whoever follows them        after each of these but loads

What an operator watches is logged here: what is served, what is not and why, and every change of a weight.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import replace
from itertools import chain

import structlog

from xds.conditions import after_envoys
from xds.envoy import Options
from xds.in_flight import INTERVAL as IN_FLIGHT_INTERVAL
from xds.in_flight import InFlight
from xds.loads import pool_load
from xds.metrics import EndpointCollector, EndpointState, Metrics
from xds.model import Cluster, Config, Endpoint, Level, Rejection, Status, Topology, authority
from xds.quarantine import REASON as REFUSED
from xds.quarantine import Quarantine
from xds.resolve import CONTROLLER_NAMES, resolve
from xds.scrape import Reading, Scraper
from xds.server import ManagementServer
from xds.snapshot import Snapshot, missing
from xds.translate import Weights, reweigh, translate, with_loads
from xds.weights import Pool, Sample, WeightChange, weigh

# Seconds between an Envoy's refusal and what follows from it: another may accept what the first one refuses, and is
# then not to be taken back and forth.
SECOND_OPINION = 0.2

log = structlog.get_logger()


class Control:
    """The running server (mutable, one event loop): what is served now, and the weights' memory of each pool."""

    def __init__(
        self,
        server: ManagementServer,
        scraper: Scraper,
        metrics: Metrics,
        *,
        interval: float,
        options: Options,
        controller_names: tuple[str, ...] = CONTROLLER_NAMES,
        in_flight: InFlight | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.server = server
        self.scraper = scraper
        self.metrics = metrics
        self.interval = interval
        self.options = options
        self.controller_names = controller_names
        self.in_flight = in_flight or InFlight()
        self.clock = clock

        self.topology = Topology()
        self.rejections: tuple[Rejection, ...] = ()
        self.snapshot: Snapshot | None = None  # what is served: None until the first configuration is there
        self.quarantine = Quarantine()
        self.config = Config()
        self._made = Snapshot.of({})  # what is served, without the quarantine's fallbacks
        self.pools: dict[str, Pool] = {}
        self.loads: dict[str, bytes] = {}
        self.round = 0
        self._turn = asyncio.Lock()  # one change at a time
        self._published = asyncio.Event()  # set, and replaced, at each publication
        self._answered = asyncio.Event()  # an Envoy has said what calls for a review
        self._followers: list[Callable[[Iterable[Status], tuple[Rejection, ...]], None]] = []
        server.follow_answers(self._note)
        metrics.registry.register(EndpointCollector(self.states))

    async def run(self, configs: AsyncIterator[Config]) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.scraper.run(), name="scrape")
            group.create_task(self._follow_loads(), name="weights")
            group.create_task(self._follow_reports(), name="in flight")
            group.create_task(self._follow_answers(), name="quarantine")
            async for config in configs:
                await self.configure(config)

    async def _follow_loads(self) -> None:
        while True:
            await asyncio.sleep(self.interval)
            await self.follow(self.scraper.readings())

    async def _follow_reports(self) -> None:
        while True:
            await asyncio.sleep(IN_FLIGHT_INTERVAL)
            if self.in_flight.is_reported(self.clock()):
                await self.refresh_loads()

    async def _follow_answers(self) -> None:
        while True:
            await self._answered.wait()
            await asyncio.sleep(SECOND_OPINION)
            await self.review()

    def _note(self, type_url: str, resources: Mapping[str, str], verdict: str) -> None:
        if self.quarantine.answered(type_url, resources, verdict):
            self._answered.set()

    async def review(self) -> None:
        """Draw the conclusions of what Envoys have refused and accepted."""
        self._answered.clear()
        while self.quarantine.review():
            await self.configure(self.config)
        async with self._turn:
            self._report_rejections()
            if self.snapshot is not None and self.quarantine.fall_back(self._made).versions != self.snapshot.versions:
                self._publish(self._made)
            self._report_statuses()

    def follow_statuses(self, follow: Callable[[Iterable[Status], tuple[Rejection, ...]], None]) -> None:
        """Call `follow` with every status and rejection after each change of the objects or of what Envoys say."""
        self._followers.append(follow)

    def _report_statuses(self) -> None:
        if not self._followers or self.quarantine.searching:  # what is served may be a trial, not worth a word
            return
        statuses = tuple(after_envoys(self.topology.statuses, self.quarantine.refusals()))
        for follow in self._followers:
            follow(statuses, self.rejections)

    async def configure(self, config: Config) -> None:
        """Serve this Config from now on; a first one without any listener is not served, but waited out."""
        async with self._turn:
            began = time.perf_counter()
            self.config = config
            admitted = self.quarantine.admit(config.http_routes)
            refused = (*self.quarantine.withheld(), *config.refused)
            admissible = replace(config, http_routes=admitted, refused=refused)
            topology = await asyncio.to_thread(resolve, admissible, self.controller_names)
            pools = {c.name: c for c in topology.clusters if c.strategy is not None}
            self.pools = {name: pool for name, pool in self.pools.items() if name in pools}
            self.loads = {name: load for name, load in self.loads.items() if name in pools}
            # A pod that joins begins at its ramp's weight, and is known to the picker, not only a round later.
            joined = [c for c in pools.values() if self._members(c.name) != {e.hash_key for e in c.endpoints}]
            self._weigh(joined, self.scraper.readings())
            # In a thread, as above: routes and clusters cost milliseconds each, and streams must not wait for that.
            snapshot = await asyncio.to_thread(translate, topology, self.options, self._weights())
            seconds = time.perf_counter() - began
            self._count(config)
            _log_endpoints(self.topology.clusters, topology.clusters)
            self.topology = topology
            self.quarantine.offered(snapshot, topology, admitted)
            self._report_rejections()
            self.scraper.set_targets(pools.values())
            self.metrics.translate_seconds.observe(seconds)
            if self.snapshot is None and not topology.listeners:
                # An empty directory at the start is a missing mount or a mistake, and would wipe running Envoys.
                log.warning("configuration empty", objects=len(config.objects), rejections=len(self.rejections))
            else:
                self._publish(with_loads(snapshot, self.loads))
                if not self.quarantine.searching:
                    _log_configuration(topology, self.rejections, seconds)
            self._report_statuses()

    async def follow(self, readings: Mapping[str, Reading]) -> None:
        """One round of weights and pool loads from the last readings, by metrics_url."""
        async with self._turn:
            if self.snapshot is None:
                return
            changed = self._weigh([c for c in self.topology.clusters if c.strategy is not None], readings)
            snapshot = with_loads(self._made, self.loads)
            self._publish(reweigh(snapshot, changed, self._weights()) if changed else snapshot)

    async def refresh_loads(self) -> None:
        """Pool loads with what is in flight now, between two rounds of weights."""
        async with self._turn:
            if self.snapshot is None:
                return
            self.round += 1
            for cluster in self.topology.clusters:
                if cluster.name in self.pools:
                    self.loads[cluster.name] = self._load(cluster)
            self._publish(with_loads(self._made, self.loads))

    def _load(self, cluster: Cluster) -> bytes:
        now = self.clock()
        return pool_load(cluster, self.pools[cluster.name], now, self.round, self.in_flight.of(cluster.name, now))

    def _weigh(self, clusters: Iterable[Cluster], readings: Mapping[str, Reading]) -> list[Cluster]:
        """One round for these pools; returns those with a weight that changed."""
        self.round += 1
        now = self.clock()
        changed = []
        for cluster in clusters:
            samples = [_sample(endpoint, readings) for endpoint in cluster.endpoints]
            pool, changes = weigh(self.pools.get(cluster.name, Pool(cluster.name)), samples, now, self.interval)
            self.pools[cluster.name] = pool
            self.loads[cluster.name] = self._load(cluster)
            if changes:
                changed.append(cluster)
                _log_weights(changes)
        return changed

    def _members(self, cluster: str) -> set[str] | None:
        return set(self.pools[cluster].members) if cluster in self.pools else None

    async def wait_until(self, true: Callable[[Control], bool]) -> None:
        """Wait until `true` holds for what is served; it is asked now and after each publication."""
        while not true(self):
            await self._published.wait()

    def states(self) -> Iterable[EndpointState]:
        """What /metrics says of each pool's endpoints."""
        now = self.clock()
        for cluster in self.topology.clusters:
            reported = self.in_flight.of(cluster.name, now)
            members = self.pools[cluster.name].members if cluster.name in self.pools else {}
            for endpoint in cluster.endpoints:
                if member := members.get(endpoint.hash_key):
                    requests = reported.to(endpoint.address, endpoint.port) if reported else None
                    yield EndpointState(
                        cluster.name, endpoint.hash_key, member.weight, member.age(now), member.load, requests
                    )

    def _publish(self, made: Snapshot) -> None:
        snapshot = self.quarantine.fall_back(made)
        dangling = missing(snapshot)
        if dangling:  # an Envoy would answer 503 where it is told of a cluster or routes that are not there
            log.error("snapshot inconsistent", missing=[f"{a[1]} -> {b[1]}" for a, b in dangling[:10]])
            return
        self._made, self.snapshot = made, snapshot
        self.server.publish(snapshot)
        self._published.set()
        self._published = asyncio.Event()

    def _weights(self) -> Weights:
        return {name: {key: m.weight for key, m in pool.members.items()} for name, pool in self.pools.items()}

    def _count(self, config: Config) -> None:
        result = "rejected" if any(each.level is Level.ERROR for each in config.rejections) else "ok"
        self.metrics.loads.labels(result).inc()
        self.metrics.objects.clear()
        for kind, count in Counter(each.meta.ref.kind for each in config.objects).items():
            self.metrics.objects.labels(kind).set(count)

    def _report_rejections(self) -> None:
        """One line for each rejection that is new, and one for each that is gone."""
        before = dict.fromkeys(self.rejections)
        sources = (self.config.rejections, self.topology.rejections, self.quarantine.rejections())
        rejections = dict.fromkeys(chain(*sources))  # in order, without repetitions
        for rejection in rejections:
            if rejection not in before:
                write = log.error if rejection.level is Level.ERROR else log.warning
                write("object rejected", **_fields(rejection))
        for rejection in before:
            if rejection not in rejections:
                log.info("rejection cleared", **_fields(rejection))
        self.metrics.rejections.clear()
        self.metrics.refused.clear()
        for rejection in rejections:
            self.metrics.rejections.labels(rejection.level, rejection.reason).inc()
            if rejection.reason == REFUSED:
                self.metrics.refused.labels(str(rejection.ref or "")).set(1)
        self.rejections = tuple(rejections)


def _sample(endpoint: Endpoint, readings: Mapping[str, Reading]) -> Sample:
    reading = readings.get(endpoint.metrics_url)
    if reading is None:
        return Sample(endpoint.hash_key, draining=endpoint.draining)
    return Sample(endpoint.hash_key, reading.load, reading.read_at, endpoint.draining)


# --- log --------------------------------------------------------------------------------------------------------------


def _fields(rejection: Rejection) -> dict[str, str]:
    given = {
        "object": str(rejection.ref) if rejection.ref else "",
        "field": rejection.field,
        "reason": rejection.reason,
        "message": rejection.message,
        "source": rejection.source,
    }
    return {name: value for name, value in given.items() if value}


def _log_configuration(topology: Topology, rejections: tuple[Rejection, ...], seconds: float) -> None:
    log.info(
        "configuration applied",
        ports=sorted({listener.port for listener in topology.listeners}),
        groups=topology.groups,
        routes=sum(len(host.routes) for listener in topology.listeners for host in listener.all_virtual_hosts),
        clusters={c.name: len(c.endpoints) for c in topology.clusters},
        rejections=sum(rejection.level is Level.ERROR for rejection in rejections),
        seconds=round(seconds, 4),
    )


def _log_endpoints(before: tuple[Cluster, ...], after: tuple[Cluster, ...]) -> None:
    """One line for each endpoint that came, drains or went; a pool's first ones are in `configuration applied`."""
    known = {c.name: {e.hash_key: e for e in c.endpoints} for c in before}
    for cluster in after:
        old = known.get(cluster.name)
        if old is None:
            continue
        new = {e.hash_key: e for e in cluster.endpoints}
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                _log_endpoint(cluster.name, key, old.get(key), new.get(key))


def _log_endpoint(cluster: str, key: str, old: Endpoint | None, new: Endpoint | None) -> None:
    event = "endpoint changed"
    if old is None:
        event = "endpoint added"
    elif new is None:
        event = "endpoint removed"
    elif new.draining and not old.draining:
        event = "endpoint draining"
    shown = new or old
    log.info(event, cluster=cluster, endpoint=key, address=authority(shown.address, shown.port) if shown else "")


def _log_weights(changes: Iterable[WeightChange]) -> None:
    for change in changes:
        log.info(
            "weight changed",
            pool=change.cluster,
            endpoint=change.endpoint,
            old=change.old,
            new=change.new,
            reason=change.reason,
            running=change.running,
            waiting=round(change.waiting, 2),
            kv_usage=round(change.kv_usage, 3),
            speed=round(change.speed, 2),
            ramp=round(change.ramp, 2),
            age=round(change.age, 1),
        )
