"""Topology and weights -> Snapshot (pure): the one place where all resources of the server are put together.

The configuration's part (listeners, routes, clusters) and the load's part (endpoints, pool loads) change at different
paces, so each is replaced alone and the other is shared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from xds.clusters import cluster, picker_cluster
from xds.endpoints import assignment
from xds.envoy import PICKER_CLUSTER, Options, listener_name
from xds.listeners import listener
from xds.model import Cluster, Forward, PortListener, Topology
from xds.routes import route_configuration
from xds.snapshot import CLUSTER, ENDPOINT, LISTENER, POOL_LOAD, ROUTE, Ref, Resource, Snapshot, make_resource

Weights = Mapping[str, Mapping[str, int]]  # cluster name -> hash key -> load_balancing_weight


def translate(topology: Topology, options: Options, weights: Weights) -> Snapshot:
    """Everything Envoys are to be told, but for the pool loads, which are the picker's."""
    groups = ("", *topology.groups) if topology.groups else ()
    return Snapshot.of(
        {
            LISTENER: [_listener(port, options) for port in topology.listeners],
            ROUTE: [_routes(port) for port in topology.listeners],
            CLUSTER: [_cluster(c) for c in topology.clusters]
            + [make_resource(CLUSTER, PICKER_CLUSTER, bytes(picker_cluster(options)))],
            ENDPOINT: [_endpoints(c, weights) for c in topology.clusters],
        },
        {group: [listener_name(p.port, p.group) for p in topology.listeners if p.group == group] for group in groups},
    )


def reweigh(snapshot: Snapshot, clusters: Iterable[Cluster], weights: Weights) -> Snapshot:
    """The same snapshot with new endpoints for these clusters; the others' are shared."""
    endpoints = dict(snapshot.resources[ENDPOINT])
    endpoints.update({c.name: _endpoints(c, weights) for c in clusters})
    return snapshot.replace({ENDPOINT: endpoints.values()})


def with_loads(snapshot: Snapshot, loads: Mapping[str, bytes]) -> Snapshot:
    """The same snapshot with these encoded PoolLoads, by pool cluster name, in place of those before."""
    return snapshot.replace({POOL_LOAD: [make_resource(POOL_LOAD, name, body) for name, body in loads.items()]})


def _listener(port: PortListener, options: Options) -> Resource:
    name = listener_name(port.port, port.group)
    body = bytes(listener(port.port, port.group, options))
    return make_resource(LISTENER, name, body, refs=[(ROUTE, name), (CLUSTER, PICKER_CLUSTER)])


def _routes(port: PortListener) -> Resource:
    actions = [route.action for host in port.virtual_hosts for route in host.routes]
    names = {name for action in actions if isinstance(action, Forward) for name, _, _ in action.clusters if name}
    refs: list[Ref] = [(CLUSTER, name) for name in sorted(names)]
    return make_resource(ROUTE, listener_name(port.port, port.group), bytes(route_configuration(port)), refs=refs)


def _cluster(source: Cluster) -> Resource:
    return make_resource(CLUSTER, source.name, bytes(cluster(source)), refs=[(ENDPOINT, source.name)])


def _endpoints(source: Cluster, weights: Weights) -> Resource:
    return make_resource(ENDPOINT, source.name, assignment(source, weights.get(source.name, {})))
