"""Which endpoints stand behind a backendRef: pools select pods, Services have EndpointSlices (pure).

A `Backends` answers for one Config. It remembers which clusters were asked for, so that Envoy is given the clusters
its routes name and no others.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial

from xds.model import (
    CORE,
    GATEWAY,
    INFERENCE,
    BackendRef,
    Cluster,
    Config,
    Endpoint,
    EndpointSlice,
    InferencePool,
    ObjectRef,
    Pod,
    PoolModels,
    Service,
    ServicePort,
    authority,
)
from xds.models import POOL_GROUPS, PoolKey

NO_RULES = PoolModels()
NO_MODELS: Mapping[PoolKey, PoolModels] = {}

TLS_PROTOCOLS = ("https", "kubernetes.io/wss")  # appProtocols that plaintext can not reach

MAX_ENDPOINTS = 100_000  # of all clusters together, but for the last one's: a pod is in each pool that selects it

METRICS_PATH = "/metrics"  # vLLM's, unless the pod's annotation prometheus.io/path says otherwise

_PORT = re.compile(r"[1-9][0-9]{0,4}")


def pool_cluster_name(namespace: str, name: str) -> str:
    """`pool/<namespace>/<name>`: the CDS, EDS and PoolLoad name, and `xds.cluster_name` as the picker sees it."""
    return f"pool/{namespace}/{name}"


def service_cluster_name(namespace: str, name: str, port: int) -> str:
    """`service/<namespace>/<name>/<port>`."""
    return f"service/{namespace}/{name}/{port}"


@dataclass(frozen=True, slots=True)
class _Found:
    """The name of a backend's cluster, how to make it, and its models."""

    name: str
    build: Callable[[], Cluster]
    models: PoolModels = NO_RULES


class Backends:
    """Resolves the backendRefs of one Config; `clusters` fills with what was resolved (mutable, one per resolution)."""

    def __init__(self, config: Config, models: Mapping[PoolKey, PoolModels] = NO_MODELS) -> None:
        self._models = models
        self.clusters: dict[str, Cluster] = {}
        self._room = MAX_ENDPOINTS
        self._services = {(s.meta.ref.namespace, s.meta.ref.name): s for s in config.services}
        # One pool seen through both API groups counts once: the newer group is preferred, and either name reaches it.
        self._pools = {(p.meta.ref.namespace, p.meta.ref.name): p for p in config.pools}
        self._pools |= {
            (p.meta.ref.namespace, p.meta.ref.name): p for p in config.pools if p.meta.ref.group == INFERENCE
        }
        self._pods: defaultdict[str, list[Pod]] = defaultdict(list)
        for pod in config.pods:
            self._pods[pod.meta.ref.namespace].append(pod)
        self._slices: defaultdict[tuple[str, str], list[EndpointSlice]] = defaultdict(list)
        for piece in config.endpoint_slices:
            self._slices[piece.meta.ref.namespace, piece.service].append(piece)
        self._grants = granted(config)

    def resolve(
        self, backend: BackendRef, route_namespace: str, connect: float | None = None, idle: float | None = None
    ) -> Cluster | tuple[str, str]:
        """The cluster of one backendRef, or (reason, message) as the ResolvedRefs condition of HTTPRoute has them.

        `connect` and `idle` are the connection timeouts (seconds) a policy gives the route. A cluster is shared by all
        routes that name it: the first one's timeouts hold.
        """
        found = self._find(backend, route_namespace)
        if isinstance(found, tuple):
            return found
        if found.name not in self.clusters:
            self.clusters[found.name] = replace(
                found.build(), models=found.models, connect_timeout=connect, connection_idle_timeout=idle
            )
            self._room -= len(self.clusters[found.name].endpoints)
        return self.clusters[found.name]

    def problem(self, backend: BackendRef, route_namespace: str) -> tuple[str, str] | None:
        """What `resolve` would say against the backendRef, without a cluster for it."""
        found = self._find(backend, route_namespace)
        return found if isinstance(found, tuple) else None

    def pool(self, ref: ObjectRef) -> InferencePool | None:
        """The pool that a reference to either API group reaches."""
        is_pool = ref.kind == "InferencePool" and ref.group in POOL_GROUPS
        return self._pools.get((ref.namespace, ref.name)) if is_pool else None

    def _find(self, backend: BackendRef, route_namespace: str) -> _Found | tuple[str, str]:
        found = self._look_up(backend, route_namespace)
        if isinstance(found, _Found) and found.name not in self.clusters and self._room <= 0:
            message = f"other backends have {MAX_ENDPOINTS} endpoints or more: {backend.ref} is given none"
            return "TooManyEndpoints", message
        return found

    def _look_up(self, backend: BackendRef, route_namespace: str) -> _Found | tuple[str, str]:
        ref = backend.ref
        source = (GATEWAY, "HTTPRoute", route_namespace)
        if ref.namespace != route_namespace and not is_granted(self._grants, source, ref):
            return (
                "RefNotPermitted",
                f"no ReferenceGrant in {ref.namespace} lets HTTPRoutes of {route_namespace} use {ref}",
            )
        if ref.kind == "InferencePool" and ref.group in POOL_GROUPS:
            return self._find_pool(ref)
        if (ref.group, ref.kind) != (CORE, "Service"):
            return "InvalidKind", f"{ref.kind} of group {ref.group!r} is not a Service or an InferencePool"
        service = self._services.get((ref.namespace, ref.name))
        if service is None:
            return "BackendNotFound", f"{ref} does not exist"
        port = next((p for p in service.ports if p.port == backend.port), None)
        if port is None:
            offered = ", ".join(str(p.port) for p in service.ports) or "none"
            return "BackendNotFound", f"{ref} has no port {backend.port} (its ports: {offered})"
        if port.app_protocol in TLS_PROTOCOLS:
            return "UnsupportedProtocol", f"port {port.port} of {ref} is {port.app_protocol}: backends are sent no TLS"
        name = service_cluster_name(ref.namespace, ref.name, port.port)
        slices, pods = self._slices[ref.namespace, ref.name], self._pods[ref.namespace]
        return _Found(name, partial(service_cluster, name, service, port, slices, pods))

    def _find_pool(self, ref: ObjectRef) -> _Found | tuple[str, str]:
        pool = self.pool(ref)
        if pool is None:
            return "BackendNotFound", f"{ref} does not exist"
        name = pool_cluster_name(ref.namespace, ref.name)
        models = self._models.get((ref.namespace, ref.name), NO_RULES)
        return _Found(name, partial(pool_cluster, name, pool, self._pods[ref.namespace]), models)


Grants = Set[tuple[tuple[str, str, str], str, tuple[str, str, str]]]  # (source, namespace, target) as in ReferenceGrant


def granted(config: Config) -> Grants:
    """What ReferenceGrants let refer to what."""
    return {
        (source, grant.meta.ref.namespace, target)
        for grant in config.reference_grants
        for source in grant.sources
        for target in grant.targets
    }


def is_granted(grants: Grants, source: tuple[str, str, str], ref: ObjectRef) -> bool:
    """Whether `source` (group, kind, namespace) may refer to this object of another namespace."""
    return any((source, ref.namespace, (ref.group, ref.kind, name)) in grants for name in ("", ref.name))


def pool_cluster(name: str, pool: InferencePool, pods: list[Pod]) -> Cluster:
    """Every ready pod of the pool's namespace that its selector matches, once for each target port.

    A pod with a deletionTimestamp is draining at once: it stays Ready=True, but vLLM refuses new work after SIGTERM.
    """
    several = len(pool.ports) > 1
    endpoints = [
        Endpoint(
            address=pod.ip,
            port=port,
            hash_key=f"{pod.meta.ref.namespace}/{pod.meta.ref.name}" + (f":{port}" if several else ""),
            draining=pod.deleting,
            metrics_url=_metrics_url(pod, port, several),
        )
        for pod in pods
        if pod.ready and pod.ip and _selects(pool.selector, pod.meta.labels)
        for port in pool.ports
    ]
    return Cluster(
        name=name,
        endpoints=_distinct(endpoints),
        strategy=pool.strategy,
        http2=pool.http2,
        ref=pool.meta.ref,
        settings=pool.settings,
    )


def service_cluster(
    name: str, service: Service, port: ServicePort, slices: list[EndpointSlice], pods: list[Pod]
) -> Cluster:
    """The ready endpoints of the Service's EndpointSlices.

    Without any slice the Service's own selector picks ready pods, as the EndpointSlice controller would: a directory
    of YAML has no controller, and a slice can not hold the loopback addresses a trial on one machine uses.
    """
    if slices:
        endpoints = [
            Endpoint(address, piece.ports[port.name], _slice_key(service, entry.pod, address))
            for piece in slices
            if port.name in piece.ports
            for entry in piece.endpoints
            if entry.ready and not entry.terminating
            for address in entry.addresses[:1]  # they are interchangeable, and one endpoint has one share
        ]
    else:
        endpoints = [
            Endpoint(pod.ip, number, f"{pod.meta.ref.namespace}/{pod.meta.ref.name}")
            for pod in pods
            if pod.ready and pod.ip and not pod.deleting and _selects(service.selector, pod.meta.labels)
            for number in [port.target if isinstance(port.target, int) else pod.ports.get(port.target, 0)]
            if number
        ]
    return Cluster(
        name=name,
        endpoints=_distinct(endpoints),
        http2=port.app_protocol == "kubernetes.io/h2c",
        ref=service.meta.ref,
    )


def _selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Equality of every pair; an empty selector selects nothing, as for a Service without one."""
    return bool(selector) and all(labels.get(name) == value for name, value in selector.items())


def _slice_key(service: Service, pod: str, address: str) -> str:
    return f"{service.meta.ref.namespace}/{pod}" if pod else address


def _metrics_url(pod: Pod, port: int, several: bool) -> str:
    """Where the pod's page is: the target port serves it, and prometheus.io/path, /port and /scrape may say otherwise.

    With several target ports each is a rank with its own page, so the pod's single annotated port does not apply.
    """
    notes = pod.meta.annotations
    if notes.get("prometheus.io/scrape") == "false":
        return ""
    annotated = notes.get("prometheus.io/port", "")
    number = int(annotated) if _PORT.fullmatch(annotated) and int(annotated) < 65536 and not several else port
    path = notes.get("prometheus.io/path", METRICS_PATH)
    return f"http://{authority(pod.ip, number)}{path if path.startswith('/') else '/' + path}"


def _distinct(endpoints: list[Endpoint]) -> tuple[Endpoint, ...]:
    """Sorted, one for each address and port: Envoy refuses an assignment that names a host twice.

    Of a pod that drains and one that has its address already, the second counts.
    """
    by_preference = sorted(endpoints, key=lambda e: (e.draining, e), reverse=True)
    return tuple(sorted({(e.address, e.port): e for e in by_preference}.values()))
