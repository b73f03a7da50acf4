"""Topology and weights to a Snapshot: endpoints as Envoy reads them, and what is shared between two snapshots."""

from __future__ import annotations

from dataclasses import replace

import pytest
from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment
from hypothesis import given
from hypothesis import strategies as st

from tests.goldens import decoded
from tests.objects import (
    backend,
    config,
    exact,
    gateway,
    gateway_class,
    listener,
    parent,
    pod,
    pool,
    route,
    rule,
    secret,
    service,
)
from xds import routes
from xds import snapshot as types
from xds.endpoints import assignment
from xds.envoy import PICKER_CLUSTER, Options
from xds.model import Cluster, Endpoint, PoolSettings, Strategy, Topology
from xds.pools import pool_config
from xds.resolve import resolve
from xds.snapshot import Snapshot, missing
from xds.translate import reweigh, translate, with_loads
from xds.weights import BASE
from xds.wire import pool_config_pb2 as pb

LLM = backend("llm", "InferencePool", port=0)
OBJECTS = (gateway_class(), gateway(), service(), pool(), pod("a", "10.0.0.1"), pod("b", "10.0.0.2"))
TOPOLOGY = resolve(config(*OBJECTS, route(rule(backend(), LLM))))
POOL, WEB = TOPOLOGY.clusters


def snapshot_of(topology: Topology, **weights: int) -> Snapshot:
    return translate(topology, Options(), {POOL.name: {f"default/{name}": each for name, each in weights.items()}})


def weights_of(snapshot: Snapshot, name: str = POOL.name) -> list[int]:
    (found,) = [
        each for each in decoded(snapshot, types.ENDPOINT, ClusterLoadAssignment) if each["cluster_name"] == name
    ]
    return [endpoint["load_balancing_weight"] for endpoint in found["endpoints"][0]["lb_endpoints"]]


# --- endpoints ---

ENDPOINTS = st.lists(
    st.builds(
        Endpoint,
        st.ip_addresses().map(str),
        st.integers(1, 65535),
        st.text("abc/-:", min_size=1, max_size=8),
        st.booleans(),
    ),
    max_size=5,
)
WEIGHTS = st.dictionaries(st.text("abc/-:", min_size=1, max_size=8), st.integers(-5, 2**31))


@given(ENDPOINTS, WEIGHTS)
def test_envoys_full_message_reads_what_was_meant(endpoints: list[Endpoint], weights: dict[str, int]) -> None:
    """Address, port, health, weight and hash key come out of envoy-data-plane's own message; no weight is below 1."""
    cluster = Cluster("pool/default/llm", tuple(endpoints))
    message = ClusterLoadAssignment.parse(assignment(cluster, weights))
    assert message.cluster_name == cluster.name
    (locality,) = message.endpoints
    got = []
    for entry in locality.lb_endpoints:
        address = entry.endpoint.address.socket_address
        key = entry.metadata.filter_metadata["envoy.lb"].fields["hash_key"].string_value
        got.append((address.address, address.port_value, key, entry.health_status.name, entry.load_balancing_weight))
    assert got == [
        (
            e.address,
            e.port,
            e.hash_key,
            "DRAINING" if e.draining else "UNKNOWN",
            max(1, weights.get(e.hash_key, BASE)),
        )
        for e in endpoints
    ]


@given(WEIGHTS.flatmap(lambda weights: st.tuples(st.just(weights), st.permutations(list(weights.items())))))
def test_equal_input_gives_equal_bytes(weights: tuple[dict[str, int], list[tuple[str, int]]]) -> None:
    """Versions are hashes of these bytes: in whatever order the weights were put into their mapping."""
    cluster = Cluster("c", tuple(Endpoint("10.0.0.1", 80, key) for key in sorted(weights[0])))
    assert assignment(cluster, weights[0]) == assignment(cluster, dict(weights[1]))


# --- snapshots ---


def test_a_snapshot_has_what_the_topology_has() -> None:
    """One listener and one route configuration a port, the clusters, the picker's own, and nothing dangling."""
    snapshot = snapshot_of(TOPOLOGY)
    assert {types.label(t): sorted(found) for t, found in snapshot.resources.items()} == {
        "Listener": ["http-8080"],
        "RouteConfiguration": ["http-8080"],
        "Cluster": [POOL.name, WEB.name, PICKER_CLUSTER],
        "ClusterLoadAssignment": [POOL.name, WEB.name],
        "Secret": [],
        "PoolConfig": [POOL.name],
        "PoolLoad": [],
    }
    assert missing(snapshot) == ()


def test_a_topology_without_its_cluster_dangles() -> None:
    """Routes say which clusters they need, so that a snapshot with a hole in it is seen before Envoy sees it."""
    broken = snapshot_of(replace(TOPOLOGY, clusters=(POOL,)))
    assert missing(broken) == (((types.ROUTE, "http-8080"), (types.CLUSTER, WEB.name)),)


def test_nothing_is_served_of_nothing_but_the_picker() -> None:
    """An empty topology is a snapshot too."""
    assert list(snapshot_of(Topology()).resources[types.CLUSTER]) == [PICKER_CLUSTER]


def test_weights_are_by_cluster_and_hash_key() -> None:
    """The same pod behind a Service keeps the weight of who is not weighed; an unknown key has BASE."""
    snapshot = snapshot_of(TOPOLOGY, b=30, gone=1)
    assert weights_of(snapshot) == [BASE, 30]
    assert weights_of(snapshot, WEB.name) == [BASE, BASE]


def test_reweigh_replaces_these_clusters_endpoints_alone() -> None:
    """Every other resource is the same object: a stream sees by identity that it needs no look."""
    before = snapshot_of(TOPOLOGY)
    after = reweigh(before, [POOL], {POOL.name: {"default/a": 50}})
    assert weights_of(after) == [50, BASE]
    for type_url in (types.LISTENER, types.ROUTE, types.CLUSTER, types.POOL_LOAD):
        assert after.resources[type_url] is before.resources[type_url]
    assert after.resources[types.ENDPOINT][WEB.name] is before.resources[types.ENDPOINT][WEB.name]
    assert weights_of(before) == [BASE, BASE]


def test_pool_loads_replace_those_before() -> None:
    """A pool that is gone takes its load with it; Envoy's resources are untouched."""
    before = with_loads(snapshot_of(TOPOLOGY), {"a": b"1", "b": b"2"})
    after = with_loads(before, {"b": b"3"})
    assert list(before.resources[types.POOL_LOAD]) == ["a", "b"]
    assert list(after.resources[types.POOL_LOAD]) == ["b"]
    assert after.resources[types.CLUSTER] is before.resources[types.CLUSTER]


def test_each_pool_has_its_config() -> None:
    """And no Service has one; what is set of a pool is in it, and touches nothing of Envoy's but the pool's cluster."""
    pool = replace(POOL, strategy=Strategy.PREFIX_CACHE)
    tuned = replace(pool, settings=PoolSettings(hash_balance_factor=150, request_cost=0))
    before, after = (snapshot_of(replace(TOPOLOGY, clusters=(each, WEB))) for each in (pool, tuned))
    assert list(before.resources[types.POOL_CONFIG]) == [POOL.name]
    assert pb.PoolConfig.FromString(pool_config(tuned)).costs == pb.Costs(request_cost=0)
    changed = {types.label(t) for t in types.TYPES if before.versions[t] != after.versions[t]}
    assert changed == {"PoolConfig", "Cluster"}


def test_a_change_of_routes_does_not_touch_the_listener() -> None:
    """A changed listener drains connections and cuts running answers: routes, strategy and pods leave it alone."""
    changed = resolve(
        config(
            *OBJECTS[:3],
            pool(strategy=Strategy.PREFIX_CACHE),
            pod("c", "10.0.0.3"),
            route(rule(LLM), hostnames=["a.io"]),
        )
    )
    before, after = snapshot_of(TOPOLOGY), snapshot_of(changed)
    assert before.versions[types.LISTENER] == after.versions[types.LISTENER]
    for type_url in (types.ROUTE, types.CLUSTER, types.ENDPOINT):
        assert before.versions[type_url] != after.versions[type_url]


def test_a_change_of_pods_touches_endpoints_alone() -> None:
    """A pod that comes or drains is no new cluster: that would reset its connections and health checks."""
    changed = resolve(config(*OBJECTS, pod("c", "10.0.0.3"), pod("a", "10.0.0.1", deleting=True), route(rule(LLM))))
    before = snapshot_of(resolve(config(*OBJECTS, route(rule(LLM)))))
    after = snapshot_of(changed)
    assert {types.label(t) for t in types.TYPES if before.versions[t] != after.versions[t]} == {"ClusterLoadAssignment"}


def test_a_port_of_https_has_routes_for_each_name_and_its_secrets() -> None:
    """A RouteConfiguration for each chain, a secret for each certificate in use, and nothing dangling; the listener
    does not change with what is in the Secret."""
    tls = listener("a", 443, "a.io", certificates=["one"]), listener("b", 443, certificates=["one", "two"])
    objects = (gateway_class(), gateway(*tls), service(), pod("a", "10.0.0.1"), route(rule(backend())))
    snapshot = snapshot_of(resolve(config(*objects, *(secret(name) for name in ("one", "two", "unused")))))
    assert missing(snapshot) == ()
    assert list(snapshot.resources[types.LISTENER]) == ["https-443"]
    assert list(snapshot.resources[types.ROUTE]) == ["https-443/*", "https-443/a.io"]
    assert list(snapshot.resources[types.SECRET]) == ["secret/default/one", "secret/default/two"]
    renewed = snapshot_of(resolve(config(*objects, secret("one", "second"), secret("two"))))
    assert {types.label(t) for t in types.TYPES if renewed.versions[t] != snapshot.versions[t]} == {"Secret"}


def test_what_is_equal_is_not_built_again() -> None:
    """Of two configurations that differ in one route of many: listener and clusters are the same objects, and the
    routes' bytes are those of a translation that knows nothing of the other."""

    def made(path: str) -> Snapshot:
        paths = [f"/{i}" for i in range(9)] + [path]
        several = (route(rule(matches=[exact(p)]), name=f"r{i}") for i, p in enumerate(paths))
        return snapshot_of(resolve(config(*OBJECTS, *several)))

    before, after = made("/old"), made("/new")
    for type_url in (types.LISTENER, types.CLUSTER):
        for name, resource in before.resources[type_url].items():
            assert after.resources[type_url][name] is resource
    assert before.versions[types.ROUTE] != after.versions[types.ROUTE]
    routes._routes.cache_clear()
    assert made("/new").versions == after.versions


def test_each_group_has_its_listeners_and_what_they_need() -> None:
    """A group's resources have names of their own; its view is consistent, and has nothing of another's."""
    objects = (
        *OBJECTS[:1],
        *OBJECTS[2:],
        gateway(name="all"),
        gateway(listener(port=81), name="edge", groups=["edge"]),
    )
    routes = (
        route(rule(backend()), name="a", parents=[parent("all")]),
        route(rule(LLM), name="b", parents=[parent("edge")]),
    )
    snapshot = snapshot_of(resolve(config(*objects, *routes)))
    assert missing(snapshot) == ()
    views = {group: snapshot.view(group).resources for group in snapshot.groups}
    assert {group: list(view[types.LISTENER]) for group, view in views.items()} == {
        "": ["http-8080"],
        "edge": ["http-8080@edge", "http-81@edge"],
    }
    assert list(views["edge"][types.ROUTE]) == ["http-8080@edge", "http-81@edge"]
    assert list(views[""][types.ENDPOINT]) == [WEB.name]
    assert list(views[""][types.CLUSTER]) == [WEB.name, PICKER_CLUSTER]
    assert list(views["edge"][types.CLUSTER]) == [POOL.name, WEB.name, PICKER_CLUSTER]
    assert snapshot_of(TOPOLOGY).groups == {}


@pytest.mark.parametrize("port", [80, 65535])
def test_ports_name_their_resources(port: int) -> None:
    """The listener's name, and the name of the routes it asks for."""
    snapshot = snapshot_of(resolve(config(gateway_class(), gateway(listener(port=port)))))
    assert list(snapshot.resources[types.LISTENER]) == list(snapshot.resources[types.ROUTE]) == [f"http-{port}"]
