"""Which endpoints stand behind a backendRef."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.objects import backend, config, endpoint_slice, entry, grant, pod, pool, service
from xds.backends import Backends, pool_cluster, service_cluster
from xds.model import (
    INFERENCE,
    INFERENCE_X,
    BackendRef,
    Cluster,
    Endpoint,
    InferencePool,
    Object,
    Pod,
    Service,
    ServicePort,
    Strategy,
)


def pooled(of: InferencePool, *pods: Pod) -> tuple[Endpoint, ...]:
    return pool_cluster("p", of, list(pods)).endpoints


def served(of: Service, *pods: Pod, slices: tuple[object, ...] = ()) -> tuple[Endpoint, ...]:
    return service_cluster("s", of, of.ports[0], list(slices), list(pods)).endpoints  # type: ignore[arg-type]


def resolved(ref: BackendRef, *objects: Object, namespace: str = "default") -> Cluster | tuple[str, str]:
    return Backends(config(*objects)).resolve(ref, namespace)


# --- pools ---


def test_a_pool_selects_ready_pods_by_all_its_labels() -> None:
    """Every pair of the selector has to match; a pod that is not ready or has no address yet is no endpoint."""
    of = pool(selector={"app": "web", "tier": "gpu"})
    labels = {"app": "web", "tier": "gpu", "more": "x"}
    pods = (
        pod("a", "10.0.0.1", labels=labels),
        pod("half", "10.0.0.2", labels={"app": "web"}),
        pod("other", "10.0.0.3", labels={"app": "web", "tier": "cpu"}),
        pod("starting", "10.0.0.4", labels=labels, ready=False),
        pod("pending", "", labels=labels),
    )
    assert [(e.address, e.port, e.hash_key, e.draining) for e in pooled(of, *pods)] == [
        ("10.0.0.1", 8000, "default/a", False)
    ]


def test_an_empty_selector_selects_nothing() -> None:
    """A pool or a Service without a selector does not take in every pod of its namespace."""
    assert pooled(pool(selector={}), pod("a", "10.0.0.1")) == ()
    assert served(service(selector={}), pod("a", "10.0.0.1")) == ()


def test_a_deleted_pod_of_a_pool_drains_and_one_of_a_service_goes() -> None:
    """A pool's pod finishes what it has; a Service's leaves at once, as its EndpointSlice would say."""
    leaving = pod("a", "10.0.0.1", deleting=True)
    assert [e.draining for e in pooled(pool(), leaving)] == [True]
    assert served(service(), leaving) == ()


def test_each_of_several_ports_is_an_endpoint_with_its_own_hash_key() -> None:
    """Data-parallel ranks have caches of their own; a single port is not in the key, so that it may change."""
    assert [(e.port, e.hash_key) for e in pooled(pool(ports=(8001, 8000)), pod("a", "10.0.0.1"))] == [
        (8000, "default/a:8000"),
        (8001, "default/a:8001"),
    ]
    assert [e.hash_key for e in pooled(pool(ports=(8001,)), pod("a", "10.0.0.1"))] == ["default/a"]


def test_one_address_is_one_endpoint_and_the_living_pod_has_it() -> None:
    """Envoy refuses an assignment that names a host twice; an address that is reused is not the draining pod's."""
    old, new = pod("a-old", "10.0.0.1", deleting=True), pod("b-new", "10.0.0.1")
    for pods in ((old, new), (new, old)):
        assert [(e.hash_key, e.draining) for e in pooled(pool(), *pods)] == [("default/b-new", False)]


@given(st.permutations([pod(f"p{i}", f"10.0.0.{i % 4}", deleting=i % 3 == 0) for i in range(6)]))
def test_the_order_of_pods_does_not_matter(pods: list[Pod]) -> None:
    """Equal pods in any order are equal endpoints in sorted order."""
    got = pooled(pool(ports=(8000, 8001)), *pods)
    assert got == pooled(pool(ports=(8001, 8000)), *sorted(pods, key=lambda p: p.meta.ref))
    assert list(got) == sorted(got)


# --- metrics ---


@pytest.mark.parametrize(
    ("annotations", "url"),
    [
        ({}, "http://10.0.0.1:8000/metrics"),
        ({"prometheus.io/port": "9090", "prometheus.io/path": "/m"}, "http://10.0.0.1:9090/m"),
        ({"prometheus.io/path": "m"}, "http://10.0.0.1:8000/m"),
        ({"prometheus.io/scrape": "false"}, ""),
        ({"prometheus.io/scrape": "true"}, "http://10.0.0.1:8000/metrics"),
        ({"prometheus.io/path": ""}, "http://10.0.0.1:8000/"),
        *(
            ({"prometheus.io/port": port}, "http://10.0.0.1:8000/metrics")
            for port in ("", "0", "-1", "65536", "80.5", "http", "9" * 5000, "\u0663", " 80", "080")
        ),
    ],
)
def test_annotations_say_where_the_page_is_and_garbage_says_nothing(annotations: dict[str, str], url: str) -> None:
    """prometheus.io/path, /port and /scrape are followed; a port that is none is the target port."""
    (endpoint,) = pooled(pool(), pod("a", "10.0.0.1", annotations=annotations))
    assert endpoint.metrics_url == url


@given(st.text(max_size=50), st.text(max_size=50), st.text(max_size=50))
def test_no_annotation_sends_the_scraper_elsewhere(port: str, path: str, scrape: str) -> None:
    """Whatever the annotations hold, only the pod's own address is asked, at a port a TCP connection can have."""
    annotations = {"prometheus.io/port": port, "prometheus.io/path": path, "prometheus.io/scrape": scrape}
    (endpoint,) = pooled(pool(), pod("a", "10.0.0.1", annotations=annotations))
    if endpoint.metrics_url:
        authority, slash, _ = endpoint.metrics_url.removeprefix("http://").partition("/")
        host, _, number = authority.partition(":")
        assert (host, slash) == ("10.0.0.1", "/")
        assert 0 < int(number) < 65536


def test_ranks_have_pages_of_their_own() -> None:
    """With several target ports the annotated port would be one rank's page for all of them."""
    one = pod("a", "10.0.0.1", annotations={"prometheus.io/port": "9090", "prometheus.io/path": "/m"})
    assert [e.metrics_url for e in pooled(pool(ports=(8000, 8001)), one)] == [
        "http://10.0.0.1:8000/m",
        "http://10.0.0.1:8001/m",
    ]


def test_ipv6_addresses_are_bracketed_in_urls_alone() -> None:
    """Envoy takes the bare address; a URL needs brackets."""
    (endpoint,) = pooled(pool(), pod("a", "fd00::1"))
    assert endpoint.address == "fd00::1"
    assert urlsplit(endpoint.metrics_url).hostname == "fd00::1"
    assert urlsplit(endpoint.metrics_url).port == 8000


# --- Services ---


def test_a_service_without_slices_selects_pods() -> None:
    """A directory of YAML has no EndpointSlice controller; named target ports are looked up in each pod."""
    pods = (
        pod("a", "10.0.0.1", ports={"api": 8001}),
        pod("b", "10.0.0.2", ports={"api": 8002}),
        pod("unnamed", "10.0.0.3"),
        pod("starting", "10.0.0.4", ports={"api": 8001}, ready=False),
    )
    assert [(e.address, e.port) for e in served(service(target="api"), *pods)] == [
        ("10.0.0.1", 8001),
        ("10.0.0.2", 8002),
    ]
    assert [e.port for e in served(service(target=9000), *pods)] == [9000] * 3
    assert {e.metrics_url for e in served(service(target=9000), *pods)} == {""}


def test_slices_come_before_the_selector() -> None:
    """Where the controller speaks, its ready and not terminating endpoints count, and no pod beside them."""
    slices = (
        endpoint_slice(
            entry("10.0.0.1", pod="a"),
            entry("10.0.0.2", pod="b", ready=False),
            entry("10.0.0.3", pod="c", terminating=True),
        ),
        endpoint_slice(entry("10.0.0.1", pod="a"), entry("10.0.0.4", "10.0.0.5"), name="web-2", ports={"": 8001}),
        endpoint_slice(entry("10.0.0.9"), name="web-3", ports={"other": 8001}),
    )
    got = served(service(), pod("z", "10.0.0.26"), slices=slices)
    assert [(e.address, e.port, e.hash_key) for e in got] == [
        ("10.0.0.1", 8000, "default/a"),
        ("10.0.0.1", 8001, "default/a"),
        ("10.0.0.4", 8001, "10.0.0.4"),
    ]
    assert served(service(), pod("z", "10.0.0.26"), slices=slices[2:]) == ()


def test_an_address_in_two_slices_is_one_endpoint() -> None:
    """Slices overlap while the controller moves endpoints between them."""
    slices = (endpoint_slice(entry("10.0.0.1")), endpoint_slice(entry("10.0.0.1"), name="web-2"))
    assert len(served(service(), slices=slices)) == 1


# --- references ---


def test_each_backend_has_the_cluster_its_name_says() -> None:
    """`pool/<namespace>/<name>` and `service/<namespace>/<name>/<port>`, each resolved once and remembered."""
    backends = Backends(config(service(), pool(strategy=Strategy.PREFIX_CACHE, http2=True), pod("a", "10.0.0.1")))
    web = backends.resolve(backend(), "default", connect=3.0, idle=7.0)
    llm = backends.resolve(backend("llm", "InferencePool", port=0), "default")
    assert isinstance(web, Cluster)
    assert isinstance(llm, Cluster)
    assert (web.name, web.strategy, web.http2) == ("service/default/web/80", None, False)
    assert (web.connect_timeout, web.connection_idle_timeout) == (3.0, 7.0)
    assert (llm.name, llm.strategy, llm.http2) == ("pool/default/llm", Strategy.PREFIX_CACHE, True)
    assert backends.resolve(backend(), "default", connect=9.0) is web
    assert set(backends.clusters) == {web.name, llm.name}


def test_endpoints_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once there are MAX_ENDPOINTS no further backend is given any, and says so; the ones before keep theirs."""
    monkeypatch.setattr("xds.backends.MAX_ENDPOINTS", 2)
    pods = [pod(name, f"10.0.0.{i}") for i, name in enumerate("abc", 1)]
    backends = Backends(config(service(), pool("p"), pool("q"), *pods))
    web = backends.resolve(backend(), "default")
    assert isinstance(web, Cluster)
    assert len(web.endpoints) == 3
    refused = backends.resolve(backend("p", "InferencePool"), "default")
    assert isinstance(refused, tuple)
    assert refused[0] == "TooManyEndpoints"
    assert backends.resolve(backend(), "default") == web
    assert list(backends.clusters) == [web.name]


def test_h2c_is_the_ports_own() -> None:
    """appProtocol is said port by port."""
    ports = (ServicePort("h1", 80, 8000), ServicePort("h2", 81, 8001, "kubernetes.io/h2c"))
    backends = Backends(config(service(ports=ports)))
    found = [backends.resolve(backend(port=port), "default") for port in (80, 81)]
    assert [c.http2 for c in found if isinstance(c, Cluster)] == [False, True]


@pytest.mark.parametrize(
    ("ref", "reason", "said"),
    [
        (backend("missing"), "BackendNotFound", "Service default/missing does not exist"),
        (backend(port=81), "BackendNotFound", "no port 81 (its ports: 80)"),
        (backend("missing", "InferencePool"), "BackendNotFound", "InferencePool default/missing does not exist"),
        (backend(kind="Pod"), "InvalidKind", "Pod of group ''"),
        (backend(group="apps"), "InvalidKind", "Service of group 'apps'"),
        (backend("llm", "InferencePool", group="other.io"), "InvalidKind", "InferencePool of group 'other.io'"),
        (backend(namespace="other"), "RefNotPermitted", "no ReferenceGrant in other lets HTTPRoutes of default"),
    ],
)
def test_an_invalid_reference_says_why(ref: BackendRef, reason: str, said: str) -> None:
    """The reasons are those of Gateway API's ResolvedRefs condition, and no cluster is made."""
    backends = Backends(config(service(), service(namespace="other"), pool()))
    found = backends.resolve(ref, "default")
    assert not isinstance(found, Cluster)
    assert found[0] == reason
    assert said in found[1]
    assert backends.clusters == {}


@pytest.mark.parametrize(
    ("given_to", "allowed"),
    [
        (grant("default", "other"), True),
        (grant("default", "other", name="web"), True),
        (grant("default", "other", name="another"), False),
        (grant("default", "other", kind="InferencePool"), False),
        (grant("third", "other"), False),
        (grant("default", "third"), False),
        (grant("other", "default"), False),
    ],
)
def test_a_reference_grant_is_exact(given_to: Object, allowed: bool) -> None:
    """Only a grant in the target's namespace, for the route's, of the target's kind and name (or all) permits."""
    found = resolved(backend(namespace="other"), service(namespace="other"), given_to)
    assert isinstance(found, Cluster) is allowed
    if not allowed:
        assert isinstance(found, tuple)
        assert found[0] == "RefNotPermitted"


def test_a_missing_backend_elsewhere_is_not_told_without_a_grant() -> None:
    """A route must not learn from messages what exists in a namespace it may not use."""
    found = resolved(backend("missing", namespace="other"))
    assert isinstance(found, tuple)
    assert found[0] == "RefNotPermitted"


def test_a_pool_seen_through_both_groups_is_one() -> None:
    """The API server serves one pool under both names during a migration: v1 says what it is, each name reaches it."""
    old = pool(group=INFERENCE_X, ports=(1,), strategy=Strategy.PREFIX_CACHE)
    for objects in ((old, pool()), (pool(), old)):
        backends = Backends(config(*objects, pod("a", "10.0.0.1")))
        found = {
            backends.resolve(backend("llm", "InferencePool", group=g), "default") for g in (INFERENCE, INFERENCE_X)
        }
        assert len(found) == 1
        assert [(c.strategy, c.endpoints[0].port) for c in backends.clusters.values()] == [(Strategy.DEFAULT, 8000)]


def test_pods_of_another_namespace_are_not_selected() -> None:
    """Selectors end at the namespace."""
    found = resolved(backend("llm", "InferencePool"), pool(), pod("a", "10.0.0.1", "other"), pod("b", "10.0.0.2"))
    assert isinstance(found, Cluster)
    assert [e.hash_key for e in found.endpoints] == ["default/b"]
