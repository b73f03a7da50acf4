"""Gateway API's rules of attachment, precedence and failure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.objects import (
    backend,
    config,
    exact,
    gateway,
    gateway_class,
    grant,
    inference_model,
    listener,
    objective,
    parent,
    pod,
    policy,
    pool,
    prefix,
    ref,
    rewrite,
    rewrite_rule,
    route,
    rule,
    secret,
    service,
)
from xds.model import (
    BackendRef,
    Config,
    Filters,
    Forward,
    HTTPRoute,
    Level,
    Listener,
    MatchType,
    Meta,
    Namespace,
    Object,
    ObjectRef,
    ParentRef,
    PathMatch,
    PoolSettings,
    Renames,
    RequestRedirect,
    Requirement,
    Respond,
    Route,
    RouteMatch,
    RouteRule,
    Strategy,
    Topology,
    ValueMatch,
)
from xds.resolve import resolve

CLUSTER = "service/default/web/80"
BACKENDS: tuple[Object, ...] = (gateway_class(), service(), pod("a", "10.0.0.1"))


def served(*objects: Object) -> Topology:
    """What is made of these, beside a class and the Service `web`."""
    return resolve(config(*BACKENDS, *objects))


def routed(topology: Topology) -> dict[tuple[int, str], list[str]]:
    """The names of the routes of each (port, hostname), in order."""
    return {
        (li.port, host.hostname): [r.name for r in host.routes]
        for li in topology.listeners
        for host in li.virtual_hosts
    }


def reasons(topology: Topology) -> list[str]:
    return [rejection.reason for rejection in topology.rejections]


def only_route(topology: Topology) -> Route:
    (found,) = [r for li in topology.listeners for host in li.virtual_hosts for r in host.routes]
    return found


# --- HTTPS ---


def chains(topology: Topology, port: int = 443) -> dict[str, dict[str, list[str]]]:
    """Server name -> hostname -> the names of its routes, of a port of HTTPS."""
    (found,) = [li for li in topology.listeners if li.port == port]
    assert found.virtual_hosts == ()
    return {
        c.hostname: {host.hostname: [r.name for r in host.routes] for host in c.virtual_hosts} for c in found.chains
    }


def test_https_has_a_chain_for_each_listener() -> None:
    """By server name, each with its own routes alone; what belongs to another of them is misdirected there. Its Secrets
    are those of the Topology, each once."""
    topology = served(
        gateway(
            listener("a", 443, "a.io", ["one"]),
            listener("b", 443, "*.io", ["one", "two"]),
            listener("c", 443, certificates=["two"]),
            listener("d", 80),
        ),
        *(secret(name) for name in ("one", "two", "unused")),
        route(rule(), hostnames=["a.io", "b.io", "c.com"]),
    )
    name = "default/route/0/0"
    assert chains(topology) == {
        "*": {"*.io": ["misdirected"], "a.io": ["misdirected"], "c.com": [name]},
        "*.io": {"*.io": [], "a.io": ["misdirected"], "b.io": [name]},
        "a.io": {"a.io": [name]},
    }
    assert [each.meta.ref.name for each in topology.secrets] == ["one", "two"]
    assert topology.rejections == ()
    (https,) = [li for li in topology.listeners if li.port == 443]
    assert [[ref.name for ref in chain.certificates] for chain in https.chains] == [["two"], ["one", "two"], ["one"]]


@pytest.mark.parametrize(
    ("certificate", "reason"),
    [
        ("missing", "InvalidCertificateRef"),
        ("there/cert", "RefNotPermitted"),
    ],
)
def test_a_listener_without_a_certificate_is_not_served(certificate: str, reason: str) -> None:
    """The Gateway is told which reference it is, and its other listeners are served, as is one with a good one left."""
    topology = served(
        gateway(
            listener("a", 443, "a.io", [certificate]), listener("b", 443, "b.io", [certificate, "cert"]), listener()
        ),
        secret(),
        secret(namespace="there"),
        route(rule(), hostnames=["a.io", "b.io"]),
    )
    assert chains(topology) == {"b.io": {"b.io": ["default/route/0/0"]}}
    assert [li.port for li in topology.listeners] == [443, 8080]
    assert [(r.reason, r.field) for r in topology.rejections] == [(reason, "spec.listeners[0].tls.certificateRefs[0]")]


def test_a_certificate_of_another_namespace_needs_a_grant() -> None:
    """One for Gateways, not for HTTPRoutes."""
    objects = gateway(listener("a", 443, certificates=["there/cert"])), secret(namespace="there")
    for source, ports in (("HTTPRoute", []), ("Gateway", [443])):
        topology = served(*objects, grant("default", "there", "Secret", "cert", source=source))
        assert [li.port for li in topology.listeners] == ports
        assert reasons(topology) == ([] if ports else ["RefNotPermitted"])


def test_what_is_no_secret_is_no_certificate() -> None:
    """A reference of another kind is named as such."""
    https = listener("a", 443, certificates=["cert"])
    other = replace(https, certificates=(ref("Service", "cert"),))
    topology = served(gateway(other), secret())
    assert topology.listeners == ()
    assert reasons(topology) == ["InvalidCertificateRef"]


def test_a_port_has_one_protocol() -> None:
    """The older Gateway's; the other's listener is left out, with ProtocolConflict. Within one Gateway there is no
    older one: both are left out."""
    topology = served(
        gateway(listener(port=443), name="old", created="2026-01-01T00:00:00Z"),
        gateway(listener("a", 443, "a.io", ["cert"]), listener("b", 444, certificates=["cert"]), name="new"),
        secret(),
    )
    assert [(li.port, bool(li.chains)) for li in topology.listeners] == [(443, False), (444, True)]
    assert [(r.ref and r.ref.name, r.reason) for r in topology.rejections] == [("new", "ProtocolConflict")]
    topology = served(gateway(listener(port=443), listener("a", 443, "a.io", ["cert"]), listener("b", 80)), secret())
    assert [li.port for li in topology.listeners] == [80]
    assert reasons(topology) == ["ProtocolConflict"] * 2


# --- groups of Envoys ---


def of_groups(topology: Topology) -> dict[str, dict[int, list[str]]]:
    """Group -> port -> the names of its routes."""
    found: dict[str, dict[int, list[str]]] = {}
    for li in topology.listeners:
        found.setdefault(li.group, {})[li.port] = [r.name for host in li.virtual_hosts for r in host.routes]
    return found


def test_a_gateway_is_for_the_envoys_it_names() -> None:
    """Each group has the Gateways that name it and those that name nobody; the same port is no conflict between groups.
    Routes follow their Gateways, and clusters are shared."""
    topology = served(
        gateway(name="all"),
        gateway(listener(port=81), name="edge", groups=["edge"]),
        gateway(listener(port=81), name="inner", groups=["inner", "spare"]),
        route(rule(), name="a", parents=[parent("all"), parent("edge")]),
        route(rule(), name="b", parents=[parent("inner")]),
    )
    a, b = "default/a/0/0", "default/b/0/0"
    assert topology.groups == ("edge", "inner", "spare")
    assert of_groups(topology) == {
        "": {8080: [a]},
        "edge": {81: [a], 8080: [a]},
        "inner": {81: [b], 8080: [a]},
        "spare": {81: [b], 8080: [a]},
    }
    assert [c.name for c in topology.clusters] == [CLUSTER]
    assert topology.rejections == ()


def test_a_conflict_within_a_group_is_said_once() -> None:
    """Two Gateways for one port conflict where one Envoy has both, and nowhere else."""
    topology = served(
        gateway(name="all", created="2026-01-01T00:00:00Z"),
        gateway(name="edge", groups=["edge", "inner"]),
        gateway(name="other", groups=["other"], created="2025-01-01T00:00:00Z"),
    )
    assert [(r.ref and r.ref.name, r.reason) for r in topology.rejections] == [
        ("edge", "HostnameConflict"),
        ("all", "HostnameConflict"),
    ]
    assert of_groups(topology) == {group: {8080: []} for group in ("", "edge", "inner", "other")}


def test_the_number_of_groups_is_bounded() -> None:
    """The first hundred names are served; a Gateway beyond them is told so, and its other names are served."""
    names = [f"g{i:03}" for i in range(101)]
    topology = served(gateway(groups=names[:60]), gateway(listener(port=81), name="more", groups=names[59:]))
    assert topology.groups == tuple(names[:100])
    (rejection,) = topology.rejections
    assert (rejection.ref and rejection.ref.name, rejection.reason) == ("more", "TooManyGroups")
    assert "g100" in rejection.message
    assert of_groups(topology)["g099"] == {81: []}


# --- Gateways ---


def test_a_gateway_without_routes_listens_and_answers_404() -> None:
    """A port is there as soon as its Gateway is; with no virtual host Envoy answers 404."""
    topology = served(gateway(listener(port=8080), listener("b", 8081)))
    assert [(li.port, li.virtual_hosts) for li in topology.listeners] == [(8080, ()), (8081, ())]
    assert topology.rejections == ()


def test_another_controllers_gateway_is_left_to_it() -> None:
    """Its routes are not ours to reject either."""
    topology = served(gateway_class("istio", "istio.io/gateway"), gateway(class_name="istio"), route(rule()))
    assert topology.listeners == ()
    (warning,) = topology.rejections
    assert (warning.reason, warning.level) == ("OtherController", Level.WARNING)


def test_a_gateway_without_a_class_is_rejected_once() -> None:
    """The Gateway is named, and its routes are not rejected for it again."""
    topology = served(gateway(class_name="missing"), route(rule()))
    assert topology.listeners == ()
    assert [(r.reason, r.level, r.field) for r in topology.rejections] == [
        ("GatewayClassNotFound", Level.ERROR, "spec.gatewayClassName")
    ]


def test_the_controllers_served_are_an_argument() -> None:
    """A name of one's own replaces the default ones."""
    objects = config(gateway_class(controller="example.com/mine"), gateway())
    assert [li.port for li in resolve(objects, ["example.com/mine"]).listeners] == [8080]
    assert resolve(objects).listeners == ()


def test_of_two_listeners_for_one_port_and_hostname_the_older_gateways_is_served() -> None:
    """Names do not decide, age does; the younger one's other listeners are served."""
    topology = served(
        gateway(listener(hostname="a.io"), listener("more", 8081), name="a-young", created="2026-01-01T00:00:00Z"),
        gateway(listener(hostname="a.io"), name="z-old", created="2025-01-01T00:00:00Z"),
        route(rule(), name="young", parents=[parent("a-young")]),
        route(rule(), name="old", parents=[parent("z-old")]),
    )
    assert routed(topology) == {(8080, "a.io"): ["default/old/0/0"], (8081, "*"): ["default/young/0/0"]}
    (conflict,) = topology.rejections
    assert (conflict.reason, conflict.field) == ("HostnameConflict", "spec.listeners[0]")
    assert conflict.ref == ref("Gateway", "a-young")
    assert "Gateway default/z-old listener http" in conflict.message


# --- attachment ---


@pytest.mark.parametrize(
    ("to", "ports"),
    [
        (parent(), [8080, 8081]),
        (parent(section="b"), [8081]),
        (parent(port=8080), [8080]),
        (parent(section="a", port=8080), [8080]),
        (parent(section="a", port=8081), []),
        (parent(section="missing"), []),
        (parent(port=1), []),
        (parent("missing"), []),
        (parent(namespace="other"), []),
    ],
)
def test_section_name_and_port_choose_listeners(to: ParentRef, ports: list[int]) -> None:
    """Both have to match where both are given; a parent that matches none is NoMatchingParent."""
    topology = served(gateway(listener("a", 8080), listener("b", 8081)), route(rule(), parents=[to]))
    assert [port for port, _ in routed(topology)] == ports
    assert reasons(topology) == ([] if ports else ["NoMatchingParent"])


def test_parents_that_are_not_gateways_are_not_ours() -> None:
    """A mesh's Service, another API's Gateway: neither served nor an error."""
    other = (ParentRef(ref("Service", "web")), ParentRef(ref("Gateway", "gw", group="networking.istio.io")))
    topology = served(gateway(), route(rule(), parents=other))
    assert (routed(topology), topology.rejections) == ({}, ())


def test_a_route_attached_twice_to_a_listener_is_there_once() -> None:
    """By its Gateway and by its section: the same listener."""
    topology = served(gateway(), route(rule(), parents=[parent(), parent(section="http"), parent(port=8080)]))
    assert routed(topology) == {(8080, "*"): ["default/route/0/0"]}


@pytest.mark.parametrize(
    ("allowed", "namespaces"),
    [
        (listener(), ["default"]),
        (listener(namespaces_from="Same"), ["default"]),
        (listener(namespaces_from="All"), ["default", "other"]),
        (listener(namespaces_from="None"), []),
        (listener(namespaces_from="Selector", selector={"kubernetes.io/metadata.name": "other"}), ["other"]),
        (listener(namespaces_from="Selector", selector={"team": "a"}), []),
        (listener(namespaces_from="Selector"), []),
        (
            listener(namespaces_from="Selector", selector={"kubernetes.io/metadata.name": "other", "team": "a"}),
            [],
        ),
        (listener(kinds=(("gateway.networking.k8s.io", "HTTPRoute"),)), ["default"]),
        (listener(kinds=(("gateway.networking.k8s.io", "GRPCRoute"),)), []),
        (listener(kinds=(("example.com", "HTTPRoute"),)), []),
    ],
)
def test_allowed_routes_admit_by_namespace_and_kind(allowed: Listener, namespaces: list[str]) -> None:
    """Same, All, None, and the one label every namespace has; what is not surely allowed is not."""
    routes = [route(rule(backend(namespace=n)), namespace=n) for n in ("default", "other")]
    topology = served(gateway(allowed), *routes, service(namespace="other"))
    names = [name for host in routed(topology).values() for name in host]
    assert names == [f"{n}/route/0/0" for n in namespaces]
    assert reasons(topology) == ["NotAllowedByListeners"] * (2 - len(namespaces))


def test_allowed_routes_select_by_the_labels_of_namespaces() -> None:
    """All pairs of the selector; a Namespace of another name, or with another value, lets nobody in."""
    admitting = gateway(listener(namespaces_from="Selector", selector={"team": "a", "tier": "x"}))
    labels = {
        "default": {"team": "a"},
        "one": {"team": "a", "tier": "x", "more": "y"},
        "two": {"team": "b", "tier": "x"},
    }
    spaces = [Namespace(Meta(ObjectRef("", "Namespace", "", name), labels=each)) for name, each in labels.items()]
    routes = [route(rule(backend(namespace=name)), namespace=name) for name in labels]
    topology = served(admitting, *routes, *spaces, service(namespace="one"))
    assert [name for host in routed(topology).values() for name in host] == ["one/route/0/0"]
    assert reasons(topology) == ["NotAllowedByListeners"] * 2


@pytest.mark.parametrize(
    ("requirement", "namespaces"),
    [
        (Requirement("team", "In", ("a", "b")), ["default", "two"]),
        (Requirement("team", "NotIn", ("a",)), ["one", "two"]),
        (Requirement("team", "Exists"), ["default", "two"]),
        (Requirement("team", "DoesNotExist"), ["one"]),
        (Requirement("kubernetes.io/metadata.name", "In", ("one",)), ["one"]),
    ],
)
def test_allowed_routes_select_by_expressions(requirement: Requirement, namespaces: list[str]) -> None:
    """As Kubernetes reads them; together with matchLabels all have to hold."""
    labels = {"default": {"team": "a", "tier": "x"}, "one": {"tier": "x"}, "two": {"team": "b"}}
    spaces = [Namespace(Meta(ObjectRef("", "Namespace", "", name), labels=each)) for name, each in labels.items()]
    objects = [route(rule(backend(namespace=name)), namespace=name) for name in labels]
    for selector in ({}, {"tier": "x"}):
        of = listener(namespaces_from="Selector", requirements=(requirement,), selector=selector)
        topology = served(gateway(of), *objects, *spaces)
        names = [name for host in routed(topology).values() for name in host]
        assert names == [f"{n}/route/0/0" for n in namespaces if selector.items() <= labels[n].items()]


@pytest.mark.parametrize(
    ("of_listener", "of_route", "hostnames"),
    [
        ("", [], ["*"]),
        ("", ["a.io", "*.b.io"], ["*.b.io", "a.io"]),
        ("a.io", [], ["a.io"]),
        ("a.io", ["a.io"], ["a.io"]),
        ("a.io", ["b.io"], []),
        ("a.io", ["*.io"], ["a.io"]),
        ("a.io", ["*.a.io"], []),
        ("*.a.io", [], ["*.a.io"]),
        ("*.a.io", ["*.a.io"], ["*.a.io"]),
        ("*.a.io", ["x.a.io", "x.y.a.io"], ["x.a.io", "x.y.a.io"]),
        ("*.a.io", ["a.io"], []),
        ("*.a.io", ["xa.io"], []),
        ("*.a.io", ["*.x.a.io"], ["*.x.a.io"]),
        ("*.x.a.io", ["*.a.io"], ["*.x.a.io"]),
        ("*.a.io", ["x.a.io", "b.io"], ["x.a.io"]),
    ],
)
def test_hostnames_intersect(of_listener: str, of_route: list[str], hostnames: list[str]) -> None:
    """`*.a.io` "would match both test.a.io, and foo.test.a.io, but not a.io"; the narrower of both is served."""
    topology = served(gateway(listener(hostname=of_listener)), route(rule(), hostnames=of_route))
    assert sorted(host for (_, host), names in routed(topology).items() if names) == hostnames
    assert reasons(topology) == ([] if hostnames else ["NoMatchingListenerHostname"])


# --- listener isolation ---


def test_a_hostname_belongs_to_its_most_specific_listener() -> None:
    """Exact before longer wildcard before wildcard before any: the others' routes never see its requests."""
    hosts = {"any": "", "wide": "*.a.io", "narrow": "*.b.a.io", "one": "c.b.a.io"}
    topology = served(
        gateway(*(listener(name, 8080, host) for name, host in hosts.items())),
        *(route(rule(), name=name, parents=[parent(section=name)]) for name in hosts),
    )
    assert routed(topology) == {(8080, host or "*"): [f"default/{name}/0/0"] for name, host in hosts.items()}


def test_a_listener_without_routes_hides_wider_ones() -> None:
    """A request that is the narrow listener's and matches no route of it is a 404, whatever the wide ones would do."""
    topology = served(
        gateway(listener("any"), listener("wide", 8080, "*.a.io"), listener("one", 8080, "b.a.io")),
        route(rule(), parents=[parent(section="any")]),
        route(rule(), name="wide", parents=[parent(section="wide")], hostnames=["x.a.io"]),
    )
    assert routed(topology) == {
        (8080, "*"): ["default/route/0/0"],
        (8080, "*.a.io"): [],
        (8080, "b.a.io"): [],
        (8080, "x.a.io"): ["default/wide/0/0"],
    }


def test_listeners_of_other_ports_hide_nothing() -> None:
    """Isolation is among the listeners of one port."""
    topology = served(
        gateway(listener("any", 8080), listener("one", 8081, "a.io")),
        route(rule(), hostnames=["a.io"], parents=[parent(section="any")]),
    )
    assert routed(topology) == {(8080, "a.io"): ["default/route/0/0"], (8081, "a.io"): []}


# --- precedence ---


def test_a_virtual_host_holds_the_rules_of_wider_hostnames_after_its_own() -> None:
    """A request no rule of the exact hostname matches goes on to the wildcard's, however specific that one's path."""
    topology = served(
        gateway(),
        route(rule(matches=[prefix("/a")]), name="one", hostnames=["x.a.io"]),
        route(rule(matches=[exact("/a/very/long/path")]), name="wild", hostnames=["*.a.io"]),
        route(rule(matches=[exact("/a/very/long/path/still")]), name="any"),
        route(rule(), name="other", hostnames=["x.b.io"]),
    )
    assert routed(topology) == {
        (8080, "*"): ["default/any/0/0"],
        (8080, "*.a.io"): ["default/wild/0/0", "default/any/0/0"],
        (8080, "x.a.io"): ["default/one/0/0", "default/wild/0/0", "default/any/0/0"],
        (8080, "x.b.io"): ["default/other/0/0", "default/any/0/0"],
    }


def header(name: str, value: str = "1") -> ValueMatch:
    return ValueMatch(name, value)


LADDER = [  # each goes before all that follow it
    exact("/a"),
    RouteMatch(PathMatch(MatchType.REGEX, "/a.*")),
    prefix("/aa/b"),
    prefix("/aa/"),  # as long as /aa: the slash at the end says nothing
    prefix("/a", method="GET", query=(header("q"),)),
    prefix("/a", method="GET"),
    prefix("/a", headers=(header("x"), header("y"))),
    prefix("/a", headers=(header("x"),), query=(header("q"), header("r"))),
    prefix("/a/", headers=(header("x"),), query=(header("q"),)),
    prefix("/a", headers=(header("x"),)),
    prefix("/a", query=(header("q"),)),
    prefix("/a"),
    prefix("/"),
]


@given(st.permutations(LADDER), st.booleans())
def test_matches_go_from_the_most_specific_to_the_least(matches: list[RouteMatch], apart: bool) -> None:
    """Exact, longest prefix, method, most headers, most query parameters; in one rule, or in routes of any age."""
    routes = [
        route(rule(matches=[match]), name=f"r{i}", created=f"2025-01-{i + 1:02}T00:00:00Z")
        for i, match in enumerate(matches)
    ]
    topology = served(gateway(), *(routes if apart else [route(rule(matches=matches))]))
    ((found,),) = [li.virtual_hosts for li in topology.listeners]
    assert [r.match for r in found.routes] == LADDER


def test_ties_go_to_the_older_route_then_to_the_first_name_then_to_the_first_rule() -> None:
    """Of equal matches; a route without a timestamp is the youngest."""
    objects = config(
        *BACKENDS,
        gateway(listener(namespaces_from="All")),
        service(namespace="aaa"),
        route(rule(), rule(matches=[prefix(), prefix()]), name="b"),
        route(rule(), name="a"),
        route(rule(), name="z", namespace="aaa", parents=[parent()]),
        route(rule(), name="y", created="2025-01-01T00:00:01Z"),
        route(rule(), name="x", created="2025-01-01T00:00:02Z"),
    )
    expected = {
        (8080, "*"): [
            "default/y/0/0",
            "default/x/0/0",
            "aaa/z/0/0",
            "default/a/0/0",
            "default/b/0/0",
            "default/b/1/0",
            "default/b/1/1",
        ]
    }
    assert routed(resolve(objects)) == expected
    assert routed(resolve(replace(objects, http_routes=objects.http_routes[::-1]))) == expected


HOSTS = st.lists(st.sampled_from(["a.io", "*.io", "x.a.io", "*.a.io", "b.org"]), unique=True, max_size=2)
MATCHES = st.lists(
    st.builds(
        RouteMatch,
        st.builds(PathMatch, st.sampled_from(MatchType), st.sampled_from(["/", "/a", "/a/", "/a/b"])),
        st.sampled_from([(), (header("x"),)]),
        st.sampled_from([(), (header("q"),)]),
        st.sampled_from(["", "GET"]),
    ),
    min_size=1,
    max_size=3,
)


@st.composite
def worlds(draw: st.DrawFn) -> list[Object]:
    """A few Gateways that share ports, and routes of them, some of them broken."""
    gateways = [
        gateway(
            *(listener(f"l{i}", draw(st.sampled_from([80, 81])), host) for i, host in enumerate(["", *draw(HOSTS)])),
            name=name,
            created=draw(st.sampled_from(["", "2025-01-01T00:00:00Z"])),
        )
        for name in ("g1", "g2")
    ]
    routes = [
        route(
            *(
                rule(backend(draw(st.sampled_from(["web", "missing"])), weight=draw(st.integers(0, 2))), matches=each)
                for each in draw(st.lists(MATCHES, min_size=1, max_size=2))
            ),
            name=f"r{i}",
            hostnames=draw(HOSTS),
            parents=[parent(draw(st.sampled_from(["g1", "g2", "g3"]))) for _ in range(draw(st.integers(1, 2)))],
            created=draw(st.sampled_from(["", "2025-01-01T00:00:00Z", "2025-01-01T00:00:01Z"])),
        )
        for i in range(draw(st.integers(0, 4)))
    ]
    return [*BACKENDS, *gateways, *routes]


@given(worlds(), st.randoms(use_true_random=False))
def test_equal_objects_in_any_order_give_an_equal_topology(objects: list[Object], rng: Random) -> None:
    """A second server reads the files in another order and serves the same, byte for byte."""
    expected = resolve(config(*objects))
    shuffled = list(objects)
    rng.shuffle(shuffled)
    assert resolve(config(*shuffled)) == expected
    for found in expected.listeners:
        hosts = [host.hostname for host in found.virtual_hosts]
        assert hosts == sorted(set(hosts))
        for host in found.virtual_hosts:
            assert len({r.name for r in host.routes}) == len(host.routes)


# --- backends ---


def forwarded(*objects: Object) -> Forward:
    action = only_route(served(gateway(), *objects)).action
    assert isinstance(action, Forward)
    return action


def test_a_service_is_a_plain_forward() -> None:
    """No backend of it is an LLM's."""
    found = forwarded(route(rule()))
    assert found == Forward(((CLUSTER, 1, Filters()),))


@pytest.mark.parametrize(("strategy", "picked"), [(Strategy.DEFAULT, False), (Strategy.PREFIX_CACHE, True)])
def test_a_pool_makes_an_llm_route_and_its_strategy_a_picked_one(strategy: Strategy, *, picked: bool) -> None:
    """One pool among the backends is enough for both."""
    found = forwarded(route(rule(backend(), backend("llm", "InferencePool"))), pool(strategy=strategy))
    assert (found.llm, found.picked) == (True, picked)


def test_models_ask_for_the_picker() -> None:
    """A renamed model or one that may be shed, also of a DEFAULT pool; then unknown names are refused there, too. A
    model that the pods serve as it is asks for nothing: the seed's pool needs no picker."""
    to = route(rule(backend("llm", "InferencePool")))
    plain = forwarded(to, pool(), inference_model("a", "m", ("m", 100)))
    assert (plain.asked, plain.refuses, plain.renames, plain.objectives) == (False, False, (), False)
    renamed = forwarded(to, pool(), inference_model("a", "m", ("lora", 1)))
    assert (renamed.asked, renamed.picked, renamed.refuses) == (True, False, True)
    assert renamed.renames == (Renames(("m",)),)
    alias = forwarded(to, pool(), rewrite("a", rewrite_rule("m", targets=(("lora", 1),))))
    assert (alias.asked, alias.refuses, alias.renames) == (True, False, (Renames(("m",)),))
    shed = forwarded(to, pool(), objective("low", -1))
    assert (shed.asked, shed.refuses, shed.objectives) == (True, True, True)
    picked = forwarded(to, pool(strategy=Strategy.PREFIX_CACHE), inference_model("a", "m", ("m", 100)))
    assert (picked.asked, picked.picked, picked.refuses, picked.renames) == (True, True, True, ())


def test_each_pool_of_a_route_has_its_models() -> None:
    """What one of them asks for is asked for the route; what two ask for alike, once."""
    found = forwarded(
        route(rule(*(backend(name, "InferencePool") for name in "abc"))),
        *(pool(name) for name in "abc"),
        inference_model("1", "m", ("x", 1), of="a"),
        inference_model("2", "m", ("y", 1), of="b"),
        rewrite("3", rewrite_rule("n", targets=(("z", 1),)), of="c"),
    )
    assert found.renames == (Renames(("m",)), Renames(("n",)))
    assert found.refuses


def test_conflicts_of_models_are_said_once() -> None:
    """They are part of the topology's rejections, however many routes reach the pool."""
    topology = served(
        gateway(),
        route(rule(backend("llm", "InferencePool")), name="a"),
        route(rule(backend("llm", "InferencePool"), matches=[prefix("/b")]), name="b"),
        pool(),
        inference_model("old", created="2024-01-01T00:00:00Z"),
        inference_model("young", created="2025-01-01T00:00:00Z"),
    )
    assert [(each.ref and each.ref.name, each.reason) for each in topology.rejections] == [("young", "Conflicted")]


def test_session_headers_are_those_of_picked_pools() -> None:
    """Each once, sorted; a pool without a picker has nobody to tell."""
    settings = {
        "a": ("x-b", Strategy.PREFIX_CACHE),
        "b": ("x-a", Strategy.PREFIX_CACHE),
        "c": ("x-c", Strategy.DEFAULT),
    }
    pools = [
        pool(name, strategy=strategy, settings=PoolSettings(session_header=header))
        for name, (header, strategy) in (settings | {"d": settings["a"], "e": ("", Strategy.PREFIX_CACHE)}).items()
    ]
    found = forwarded(route(rule(*(backend(name, "InferencePool") for name in "abcde"))), *pools)
    assert found.session_headers == ("x-a", "x-b")


@pytest.mark.parametrize(
    "backends",
    [
        (),
        (backend("missing"),),
        (backend("missing"), backend(port=1)),
        (backend(weight=0),),
        (backend("missing"), backend(weight=0)),
    ],
)
def test_a_rule_without_any_valid_backend_answers_500(backends: Sequence[BackendRef]) -> None:
    """None given, all invalid, or nothing but weights of 0."""
    topology = served(gateway(), route(RouteRule(backends=tuple(backends))))
    assert only_route(topology).action == Respond(500)
    assert topology.clusters == ()


def test_an_invalid_backend_among_valid_ones_keeps_its_share() -> None:
    """With equal weights "50 percent of traffic must receive a 500"; a weight of 0 has no share at all."""
    topology = served(gateway(), route(rule(backend(weight=3), backend("missing"), backend("unused", weight=0))))
    action = only_route(topology).action
    assert isinstance(action, Forward)
    assert action.clusters == ((CLUSTER, 3, Filters()), ("", 1, Filters()))
    assert reasons(topology) == ["BackendNotFound"]


def test_a_rejected_backend_is_named_once_with_its_field() -> None:
    """However many listeners, hostnames and matches the route has."""
    topology = served(
        gateway(listener(), listener("b", 8081)),
        route(rule(backend("missing"), matches=[prefix("/a"), prefix("/b")]), hostnames=["a.io", "b.io"]),
    )
    (rejection,) = topology.rejections
    assert (rejection.reason, rejection.field) == ("BackendNotFound", "spec.rules[0].backendRefs[0]")
    assert rejection.ref == ref("HTTPRoute", "route")


def test_clusters_are_those_the_routes_name() -> None:
    """Sorted, and none for what no attached route names."""
    topology = served(
        gateway(),
        route(rule(backend("z"), backend())),
        route(rule(backend("detached")), name="detached", parents=[parent(section="missing")]),
        *(service(name) for name in ("z", "unused", "detached")),
    )
    assert [c.name for c in topology.clusters] == [CLUSTER, "service/default/z/80"]


def test_a_backend_of_another_namespace_needs_a_grant() -> None:
    """Without it the share is a 500, with it the cluster of that namespace."""
    objects = (gateway(), route(rule(backend(namespace="other"))), service(namespace="other"))
    assert only_route(served(*objects)).action == Respond(500)
    assert reasons(served(*objects)) == ["RefNotPermitted"]
    action = only_route(served(*objects, grant("default", "other"))).action
    assert isinstance(action, Forward)
    assert action.clusters[0][0] == "service/other/web/80"


def test_a_redirect_needs_no_backend() -> None:
    """It is the action, whatever the rule's policies are."""
    redirect = RequestRedirect(scheme="https")
    topology = served(gateway(), route(rule(filters=Filters(redirect=redirect))))
    assert only_route(topology).action == redirect
    assert topology.rejections == ()


# --- timeouts ---

ROUTE, GATEWAY = ref("HTTPRoute", "route"), ref("Gateway", "gw")
ON_ROUTE = policy((ROUTE, ""), name="on-route", request_timeout=2.0, stream_idle_timeout=20.0)
ON_SECTION = policy((GATEWAY, "http"), name="on-section", request_timeout=3.0)
ON_GATEWAY = policy(
    (GATEWAY, ""), name="on-gateway", request_timeout=4.0, stream_idle_timeout=40.0, connect_timeout=9.0
)


@pytest.mark.parametrize(
    ("own", "policies", "expected"),
    [
        (1.0, [ON_ROUTE, ON_SECTION, ON_GATEWAY], (1.0, 20.0)),
        (0.0, [ON_ROUTE, ON_SECTION, ON_GATEWAY], (0.0, 20.0)),
        (None, [ON_GATEWAY, ON_SECTION, ON_ROUTE], (2.0, 20.0)),
        (None, [ON_GATEWAY, ON_SECTION], (3.0, 40.0)),
        (None, [ON_GATEWAY], (4.0, 40.0)),
        (None, [policy((GATEWAY, "another"), request_timeout=5.0)], (None, None)),
        (None, [policy((ref("HTTPRoute", "another"), ""), request_timeout=5.0)], (None, None)),
        (None, [policy((GATEWAY, ""), name="none", request_timeout=0.0)], (0.0, None)),
        (None, [], (None, None)),
    ],
)
def test_the_nearest_timeout_holds(
    own: float | None, policies: list[Object], expected: tuple[float | None, float | None]
) -> None:
    """Rule, then policy on the route, on the listener's section, on the Gateway; 0 is "none", and not "not given"."""
    found = forwarded(route(rule(timeout=own)), *policies)
    assert (found.timeout, found.idle_timeout) == expected


def test_of_two_policies_for_one_target_the_older_holds() -> None:
    """Gateway API's conflict rule."""
    found = forwarded(
        route(rule()),
        policy((ROUTE, ""), name="a", created="2026-01-01T00:00:00Z", request_timeout=1.0),
        policy((ROUTE, ""), name="b", created="2025-01-01T00:00:00Z", request_timeout=2.0),
    )
    assert found.timeout == 2.0


def test_connection_timeouts_reach_the_cluster() -> None:
    """Where the policy is on the Gateway, all its routes' clusters have it."""
    (cluster,) = served(gateway(), route(rule()), ON_GATEWAY).clusters
    assert (cluster.connect_timeout, cluster.connection_idle_timeout) == (9.0, None)


def test_a_timeout_by_section_differs_by_listener() -> None:
    """One rule on two listeners is two actions."""
    topology = served(gateway(listener(), listener("b", 8081)), route(rule()), ON_SECTION)
    timeouts = [r.action.timeout for li in topology.listeners for r in li.virtual_hosts[0].routes]  # type: ignore[union-attr]
    assert timeouts == [3.0, None]


def test_nothing_is_served_of_nothing() -> None:
    """An empty Config is a valid one."""
    assert resolve(Config()) == Topology()


def test_routes_on_a_wide_and_a_narrow_hostname_of_one_route() -> None:
    """A route that names both is once in the narrow one's virtual host."""
    both: HTTPRoute = route(rule(), hostnames=["*.a.io", "x.a.io"])
    names = ["default/route/0/0"]
    assert routed(served(gateway(), both)) == {(8080, "*.a.io"): names, (8080, "x.a.io"): names}


def test_routes_are_bounded_and_the_newest_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hostname takes the rules of wider ones with it: what is beyond MAX_ROUTES is named, what was before stays."""
    old, new = "2025-01-01T00:00:00Z", "2025-01-02T00:00:00Z"
    wide = route(rule(matches=[exact("/a"), exact("/b")]), name="wide", created=old)
    narrow = [route(name=name, hostnames=[f"{name}.io"], created=new) for name in "abc"]
    late = route(rule(matches=[exact("/c"), exact("/d")]), name="late", created="2025-01-03T00:00:00Z")
    objects: list[Object] = [gateway(), wide, *[replace(each, rules=(rule(),)) for each in narrow], late]
    whole = served(*objects)
    count = sum(len(host.routes) for host in whole.listeners[0].virtual_hosts)
    assert (reasons(whole), count) == ([], 4 + 3 * 5)
    monkeypatch.setattr("xds.resolve.MAX_ROUTES", 9)
    topology = served(*objects)
    assert routed(topology) == {
        (8080, "*"): ["default/wide/0/0", "default/wide/0/1"],
        (8080, "a.io"): ["default/a/0/0", "default/wide/0/0", "default/wide/0/1"],
        (8080, "b.io"): ["default/b/0/0", "default/wide/0/0", "default/wide/0/1"],
    }
    assert [(str(each.ref), each.reason, each.field) for each in topology.rejections] == [
        ("HTTPRoute default/c", "TooManyRoutes", "spec.rules[0]"),
        ("HTTPRoute default/late", "TooManyRoutes", "spec.rules[0]"),
    ]
    monkeypatch.setattr("xds.resolve.MAX_ROUTES", count)
    assert served(*objects) == whole


def test_attachments_are_bounded_and_the_newest_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parentRef may reach each listener: what is beyond MAX_ATTACHED is named, what was before stays."""
    times = [f"2025-01-0{day}T00:00:00Z" for day in (1, 2, 3)]
    routes = [route(rule(), name=name, created=created) for name, created in zip("abc", times, strict=True)]
    whole = served(gateway(), *routes)
    monkeypatch.setattr("xds.attach.MAX_ATTACHED", 6)  # a listener and its hostname each
    assert served(gateway(), *routes) == whole
    monkeypatch.setattr("xds.attach.MAX_ATTACHED", 4)
    topology = served(gateway(), *routes)
    assert routed(topology) == {(8080, "*"): ["default/a/0/0", "default/b/0/0"]}
    assert [(str(each.ref), each.reason, each.field) for each in topology.rejections] == [
        ("HTTPRoute default/c", "TooManyRoutes", "spec.parentRefs[0]"),
    ]


def test_https_listeners_of_a_port_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answers for the hostnames of all others, so their number counts squared; the last ones are left out."""
    listeners = [listener(name, 443, f"{name}.io", certificates=["cert"]) for name in "abcd"]
    whole = served(gateway(*listeners), secret())
    assert [len(chain.virtual_hosts) for chain in whole.listeners[0].chains] == [4] * 4
    monkeypatch.setattr("xds.resolve.MAX_ROUTES", 6)
    topology = served(gateway(*listeners), secret())
    assert [chain.hostname for chain in topology.listeners[0].chains] == ["a.io", "b.io", "c.io"]
    assert reasons(topology) == ["TooManyRoutes"]


def test_rejections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first are told, and that there are more; one found twice is one."""
    monkeypatch.setattr("xds.attach.MAX_REJECTIONS", 2)
    both = gateway(listener("a", 80), listener("b", 81))
    bad = route(rule(backend("no"), backend("none")))
    assert reasons(served(both, bad)) == ["BackendNotFound", "BackendNotFound"]
    bad = route(rule(backend("no"), backend("none")), parents=[parent("x"), parent()])
    assert reasons(served(both, bad)) == ["NoMatchingParent", "BackendNotFound", "TooMany"]
