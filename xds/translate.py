"""Topology and weights -> Snapshot (pure): the one place where all resources of the server are put together.

The configuration's part (listeners, routes, clusters) and the load's part (endpoints, pool loads) change at different
paces, so each is replaced alone and the other is shared. What is equal to what was built before is not built again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache

from envoy_data_plane.envoy.config.core.v3 import DataSource
from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import Secret, TlsCertificate

from xds import model
from xds.clusters import cluster, picker_cluster
from xds.endpoints import assignment
from xds.envoy import PICKER_CLUSTER, Options, listener_name, route_tables, secret_name
from xds.listeners import listener
from xds.model import Cluster, Forward, PortListener, Topology, VirtualHost
from xds.pools import pool_config
from xds.routes import route_configuration
from xds.snapshot import (
    CLUSTER,
    ENDPOINT,
    LISTENER,
    POOL_CONFIG,
    POOL_LOAD,
    ROUTE,
    SECRET,
    Ref,
    Resource,
    Snapshot,
    make_resource,
)

KEPT = 2_000  # clusters, and listeners, some 2 KB each: they take milliseconds to build, and seldom change

Weights = Mapping[str, Mapping[str, int]]  # cluster name -> hash key -> load_balancing_weight


def translate(topology: Topology, options: Options, weights: Weights) -> Snapshot:
    """Everything Envoys and pickers are to be told, but for the pool loads."""
    groups = ("", *topology.groups) if topology.groups else ()
    return Snapshot.of(
        {
            LISTENER: [_listener(_without_routes(port), options) for port in topology.listeners],
            ROUTE: [
                _routes(*table, port, debug=options.debug_headers)
                for port in topology.listeners
                for table in route_tables(port)
            ],
            SECRET: [_secret(each) for each in topology.secrets],
            CLUSTER: [_cluster(replace(c, endpoints=())) for c in topology.clusters] + [_picker_cluster(options)],
            ENDPOINT: [_endpoints(c, weights) for c in topology.clusters],
            POOL_CONFIG: [
                make_resource(POOL_CONFIG, c.name, pool_config(c)) for c in topology.clusters if c.strategy is not None
            ],
        },
        {group: [listener_name(port) for port in topology.listeners if port.group == group] for group in groups},
    )


def reweigh(snapshot: Snapshot, clusters: Iterable[Cluster], weights: Weights) -> Snapshot:
    """The same snapshot with new endpoints for these clusters; the others' are shared."""
    endpoints = dict(snapshot.resources[ENDPOINT])
    endpoints.update({c.name: _endpoints(c, weights) for c in clusters})
    return snapshot.replace({ENDPOINT: endpoints.values()})


def with_loads(snapshot: Snapshot, loads: Mapping[str, bytes]) -> Snapshot:
    """The same snapshot with these encoded PoolLoads, by pool cluster name, in place of those before."""
    return snapshot.replace({POOL_LOAD: [make_resource(POOL_LOAD, name, body) for name, body in loads.items()]})


def _without_routes(port: PortListener) -> PortListener:
    return replace(port, virtual_hosts=(), chains=tuple(replace(chain, virtual_hosts=()) for chain in port.chains))


@lru_cache(KEPT)
def _listener(port: PortListener, options: Options) -> Resource:
    refs = [(ROUTE, name) for name, _ in route_tables(port)] + [(CLUSTER, PICKER_CLUSTER)]
    secrets = sorted({secret_name(ref) for chain in port.chains for ref in chain.certificates})
    refs += [(SECRET, name) for name in secrets]
    return make_resource(LISTENER, listener_name(port), bytes(listener(port, options)), refs)


def _routes(table: str, hosts: tuple[VirtualHost, ...], port: PortListener, *, debug: bool) -> Resource:
    actions = [route.action for host in hosts for route in host.routes]
    names = {name for action in actions if isinstance(action, Forward) for name, _, _ in action.clusters if name}
    refs: list[Ref] = [(CLUSTER, name) for name in sorted(names)]
    body = route_configuration(table, hosts, port.port, tls=bool(port.chains), debug=debug)
    return make_resource(ROUTE, table, body, refs=refs)


def _secret(source: model.Secret) -> Resource:
    name = secret_name(source.meta.ref)
    pair = TlsCertificate(
        certificate_chain=DataSource(inline_bytes=source.certificate), private_key=DataSource(inline_bytes=source.key)
    )
    return make_resource(SECRET, name, bytes(Secret(name=name, tls_certificate=pair)))


@lru_cache(KEPT)
def _picker_cluster(options: Options) -> Resource:
    return make_resource(CLUSTER, PICKER_CLUSTER, bytes(picker_cluster(options)))


@lru_cache(KEPT)
def _cluster(source: Cluster) -> Resource:
    return make_resource(CLUSTER, source.name, bytes(cluster(source)), refs=[(ENDPOINT, source.name)])


def _endpoints(source: Cluster, weights: Weights) -> Resource:
    return make_resource(ENDPOINT, source.name, assignment(source, weights.get(source.name, {})))
