"""The server's own metrics (Prometheus). Labels are bounded by what is configured, never a request or a client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from xds.model import Load


class Metrics:
    """Every series of `vllm-xds serve`; one object for each server, so tests never share a registry."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = r = registry if registry is not None else CollectorRegistry()
        # configuration
        self.objects = Gauge("vllm_xds_objects", "Accepted objects.", ["kind"], registry=r)
        self.rejections = Gauge("vllm_xds_rejections", "Current rejections.", ["level", "reason"], registry=r)
        self.refused = Gauge(
            "vllm_xds_objects_refused",
            "Objects that an Envoy refuses, though all checks passed.",
            ["object"],
            registry=r,
        )
        self.loads = Counter(
            "vllm_xds_config_loads",
            "Times the configuration was read: ok, or rejected in part.",
            ["result"],
            registry=r,
        )
        self.translate_seconds = Histogram(
            "vllm_xds_translate_seconds",
            "From a change of objects to a new snapshot.",
            registry=r,
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
        )
        self.resources = Gauge("vllm_xds_resources", "Resources in the snapshot.", ["type"], registry=r)
        # API server
        self.lists = Counter(
            "vllm_xds_api_lists",
            "Times all objects of a resource were listed, by why (see xds/reflector.py).",
            ["resource", "reason"],
            registry=r,
        )
        self.api_failures = Counter(
            "vllm_xds_api_failures",
            "Lists and watches that were refused, broke off or did not answer in time.",
            ["resource", "reason"],
            registry=r,
        )
        self.leader = Gauge("vllm_xds_leader", "Whether this replica writes statuses: it holds the Lease.", registry=r)
        self.leader_changes = Counter(
            "vllm_xds_leader_changes",
            "Times this replica acquired, lost or released the Lease.",
            ["result"],
            registry=r,
        )
        self.status_writes = Counter(
            "vllm_xds_status_writes",
            "Statuses written, or not: conflict, gone, failed.",
            ["kind", "result"],
            registry=r,
        )
        self.status_pending = Gauge("vllm_xds_status_pending", "Objects whose status is to be looked at.", registry=r)
        self.events = Counter("vllm_xds_events", "Events written, or not.", ["result"], registry=r)
        # protocol
        self.streams = Gauge("vllm_xds_streams", "Open xDS streams.", ["variant"], registry=r)
        self.requests = Counter(
            "vllm_xds_requests",
            "Requests received, by what they were (see xds/stream.py).",
            ["type", "kind"],
            registry=r,
        )
        self.responses = Counter("vllm_xds_responses", "Responses sent.", ["type"], registry=r)
        self.response_bytes = Counter("vllm_xds_response_bytes", "Bytes of resources sent.", ["type"], registry=r)
        self.nacks = Counter("vllm_xds_nacks", "Responses a client refused.", ["type"], registry=r)
        # loads
        self.reporting = Gauge("vllm_xds_load_reporting_envoys", "Envoys that report their load (LRS).", registry=r)
        self.scrapes = Counter("vllm_xds_scrapes", "Metrics pages asked for.", ["pool", "result"], registry=r)
        self.scrape_seconds = Histogram(
            "vllm_xds_scrape_seconds",
            "From the request for a page to its parsed load.",
            ["pool"],
            registry=r,
            buckets=(0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
        )
        # exchange between pickers
        self.exchange_pickers = Gauge("vllm_xds_exchange_pickers", "Pickers that take part.", registry=r)
        self.exchange_batches = Counter("vllm_xds_exchange_batches", "Batches pickers have told.", registry=r)
        self.exchange_bytes = Counter("vllm_xds_exchange_bytes", "Bytes handed on to other pickers.", registry=r)
        self.exchange_dropped = Counter(
            "vllm_xds_exchange_dropped", "Batches that a picker did not read in time.", registry=r
        )


@dataclass(frozen=True, slots=True)
class EndpointState:
    """What one endpoint's series say; `load` None: its page was never read, `in_flight` None: no Envoy reports."""

    pool: str
    endpoint: str
    weight: int
    age: float
    load: Load | None
    in_flight: int | None = None


class EndpointCollector(Collector):
    """Series of each endpoint, made from the state when they are asked for: none outlives its endpoint."""

    def __init__(self, states: Callable[[], Iterable[EndpointState]]) -> None:
        self._states = states

    def collect(self) -> Iterator[Metric]:
        labels = ["pool", "endpoint"]
        weight = GaugeMetricFamily("vllm_xds_endpoint_weight", "load_balancing_weight given to Envoy.", labels=labels)
        age = GaugeMetricFamily("vllm_xds_endpoint_load_age_seconds", "Age of the last load.", labels=labels)
        running = GaugeMetricFamily("vllm_xds_endpoint_running", "Requests running, last read.", labels=labels)
        waiting = GaugeMetricFamily("vllm_xds_endpoint_waiting", "Requests waiting, last read.", labels=labels)
        kv_usage = GaugeMetricFamily("vllm_xds_endpoint_kv_usage", "KV cache in use, 0..1, last read.", labels=labels)
        in_flight = GaugeMetricFamily(
            "vllm_xds_endpoint_in_flight", "Requests under way, as Envoys report them.", labels=labels
        )
        for state in self._states():
            names = [state.pool, state.endpoint]
            weight.add_metric(names, state.weight)
            age.add_metric(names, state.age)
            if state.load is not None:
                running.add_metric(names, state.load.running)
                waiting.add_metric(names, state.load.waiting)
                kv_usage.add_metric(names, state.load.kv_usage)
            if state.in_flight is not None:
                in_flight.add_metric(names, state.in_flight)
        yield from (weight, age, running, waiting, kv_usage, in_flight)


@dataclass(frozen=True, slots=True)
class ResourceState:
    """What one resource's series say: `staleness` is seconds since the API server last showed it to be current."""

    resource: str
    objects: int
    staleness: float


class ResourceCollector(Collector):
    """Series of each resource of the API server, made from the state when they are asked for."""

    def __init__(self, states: Callable[[], Iterable[ResourceState]]) -> None:
        self._states = states

    def collect(self) -> Iterator[Metric]:
        labels = ["resource"]
        objects = GaugeMetricFamily("vllm_xds_api_objects", "Objects known of the API server.", labels=labels)
        staleness = GaugeMetricFamily(
            "vllm_xds_api_staleness_seconds", "Since a list, an event or a bookmark of it came.", labels=labels
        )
        for state in self._states():
            objects.add_metric([state.resource], state.objects)
            staleness.add_metric([state.resource], state.staleness)
        yield from (objects, staleness)
