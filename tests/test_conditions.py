"""The conditions of every status: one case for each condition and reason, from objects as they are parsed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from tests.objects import (
    backend,
    config,
    gateway,
    gateway_class,
    grant,
    listener,
    parent,
    pod,
    pool,
    ref,
    route,
    rule,
    secret,
    service,
)
from xds.conditions import FEATURES
from xds.model import (
    GATEWAY,
    INFERENCE,
    INFERENCE_X,
    LLM_D,
    Condition,
    ConditionType,
    Criticality,
    Gateway,
    HTTPRoute,
    InferenceModel,
    InferenceModelRewrite,
    InferenceObjective,
    ListenerStatus,
    Meta,
    Object,
    ObjectRef,
    Problem,
    Refused,
    RewriteRule,
    RouteRule,
    ServicePort,
    Status,
)
from xds.parse import parse
from xds.resolve import CONTROLLER_NAMES, resolve

OURS = CONTROLLER_NAMES[0]
GENERATION = 7
Said = dict[str, tuple[str, str]]  # condition -> status and reason

ACCEPTED = {"Accepted": ("True", "Accepted")}
RESOLVED = {"ResolvedRefs": ("True", "ResolvedRefs")}
PROGRAMMED = {"Programmed": ("True", "Programmed")}
NOT_PROGRAMMED = {"Programmed": ("False", "Invalid")}
NO_CONFLICT = {"Conflicted": ("False", "NoConflicts")}


def aged(each: Any) -> Any:
    """The same object at GENERATION."""
    return replace(each, meta=replace(each.meta, generation=GENERATION))


def statuses(*objects: Object, refused: Iterable[Refused] = ()) -> dict[ObjectRef, Status]:
    """Of these objects, all of GENERATION, beside a class of ours and the Service `web`."""
    given = config(*map(aged, (gateway_class(), service(), pod("a", "10.0.0.1"), *objects)))
    topology = resolve(replace(given, refused=tuple(refused)))
    assert topology == resolve(replace(given, refused=tuple(refused)))
    return {status.ref: status for status in topology.statuses}


def said(conditions: Iterable[Condition]) -> Said:
    """By type, each of which is there once, of GENERATION and for a False one with a message."""
    found = tuple(conditions)
    assert len({each.type for each in found}) == len(found)
    assert all(each.generation == GENERATION for each in found)
    assert all(each.message for each in found if each.status == "False" and each.reason != "NoConflicts")
    return {each.type.value: (each.status, each.reason) for each in found}


def message(conditions: Iterable[Condition], kind: ConditionType) -> str:
    return next(each.message for each in conditions if each.type is kind)


# --- GatewayClass -----------------------------------------------------------------------------------------------------


def test_gateway_class() -> None:
    """Ours is accepted, with the features we support, sorted; another controller's has nothing of us."""
    found = statuses(gateway_class("istio", "istio.io/gateway"))
    status = found[ref("GatewayClass", "envoy", "")]
    assert said(status.conditions) == ACCEPTED
    assert list(status.features) == sorted(FEATURES)
    assert ref("GatewayClass", "istio", "") not in found


# --- Gateway ----------------------------------------------------------------------------------------------------------


def read_gateway(*listeners: Any, **spec: Any) -> Gateway:
    """One that is parsed: `gw` with these listeners."""
    of_class = {"gatewayClassName": "envoy", "listeners": list(listeners), **spec}
    document = {"apiVersion": f"{GATEWAY}/v1", "kind": "Gateway", "metadata": {"name": "gw"}, "spec": of_class}
    found = parse(document).object
    assert isinstance(found, Gateway)
    return found


HTTP = {"name": "http", "port": 80, "protocol": "HTTP"}
HTTPS = {"name": "https", "port": 443, "protocol": "HTTPS"}


def https(**tls: Any) -> dict[str, Any]:
    return HTTPS | {"tls": tls}


def gateway_says(*objects: Object, name: str = "gw") -> tuple[Said, dict[str, ListenerStatus]]:
    status = statuses(*objects)[ref("Gateway", name)]
    return said(status.conditions), {each.name: each for each in status.listeners}


def test_a_gateway_that_is_served() -> None:
    """All is well, and each listener says which routes it takes and how many it has."""
    gateway_said, listeners = gateway_says(gateway(), route(rule()), route(rule(), name="other"))
    assert gateway_said == ACCEPTED | PROGRAMMED
    assert listeners["http"].kinds == ((GATEWAY, "HTTPRoute"),)
    assert listeners["http"].attached == 2
    assert said(listeners["http"].conditions) == ACCEPTED | NO_CONFLICT | RESOLVED | PROGRAMMED


KINDS = {"allowedRoutes": {"kinds": [{"kind": "GRPCRoute"}]}}
BOTH = {"allowedRoutes": {"kinds": [{"kind": "GRPCRoute"}, {"kind": "HTTPRoute"}]}}
CERTIFICATE = {"name": "cert"}


def unresolved(reason: str) -> Said:
    return ACCEPTED | NO_CONFLICT | {"ResolvedRefs": ("False", reason)} | NOT_PROGRAMMED


def unaccepted(reason: str) -> Said:
    return {"Accepted": ("False", reason)} | NO_CONFLICT | RESOLVED | NOT_PROGRAMMED


@pytest.mark.parametrize(
    ("of_listener", "says", "kinds"),
    [
        (HTTPS | {"protocol": "TCP"}, unaccepted("UnsupportedProtocol"), 0),
        (HTTPS | {"protocol": "example.com/mine"}, unaccepted("UnsupportedProtocol"), 0),
        (https(mode="Passthrough"), unaccepted("UnsupportedValue"), 1),
        (https(certificateRefs=[CERTIFICATE], frontendValidation={"a": "b"}), unaccepted("UnsupportedValue"), 1),
        (https(options={"a.io/b": "c"}), unresolved("InvalidCertificateRef"), 1),
        (https(certificateRefs=[{"name": "missing"}]), unresolved("InvalidCertificateRef"), 1),
        (
            https(certificateRefs=[{"name": "cert", "kind": "X", "group": "a.io"}]),
            unresolved("InvalidCertificateRef"),
            1,
        ),
        (https(certificateRefs=[{"name": "cert", "namespace": "there"}]), unresolved("RefNotPermitted"), 1),
        (https(certificateRefs=[CERTIFICATE, {"name": "no"}]), unresolved("InvalidCertificateRef") | PROGRAMMED, 1),
        (https(certificateRefs=[CERTIFICATE]), ACCEPTED | NO_CONFLICT | RESOLVED | PROGRAMMED, 1),
        (HTTPS | KINDS | {"protocol": "HTTP"}, unresolved("InvalidRouteKinds") | PROGRAMMED, 0),
        (HTTPS | BOTH | {"protocol": "HTTP"}, unresolved("InvalidRouteKinds") | PROGRAMMED, 1),
    ],
)
def test_a_listener(of_listener: dict[str, Any], says: Said, kinds: int) -> None:
    """What is wrong with one listener is its own: the Gateway and the listener beside it are served."""
    objects = secret(), secret(namespace="there"), read_gateway(of_listener, HTTP)
    gateway_said, listeners = gateway_says(*objects)
    assert said(listeners["https"].conditions) == says
    assert len(listeners["https"].kinds) == kinds
    is_accepted = says["Accepted"][0] == "True"
    assert gateway_said["Accepted"] == ("True", "Accepted" if is_accepted else "ListenersNotValid")
    assert gateway_said["Programmed"] == ("True", "Programmed")
    assert said(listeners["http"].conditions) == ACCEPTED | NO_CONFLICT | RESOLVED | PROGRAMMED


def test_a_gateway_without_a_valid_listener() -> None:
    """It is not accepted, and says which listeners are to blame."""
    found = statuses(read_gateway(HTTP | {"protocol": "UDP"}))[ref("Gateway", "gw")]
    assert said(found.conditions) == {"Accepted": ("False", "ListenersNotValid")} | NOT_PROGRAMMED
    assert "http" in message(found.conditions, ConditionType.ACCEPTED)


def test_a_gateway_whose_only_certificate_is_missing() -> None:
    """It is accepted, as what it says is valid, and not programmed, as nothing of it is served."""
    gateway_said, _ = gateway_says(read_gateway(https(certificateRefs=[CERTIFICATE])))
    assert gateway_said == ACCEPTED | NOT_PROGRAMMED


CONFLICTED = {"Accepted": ("False", "Invalid")} | RESOLVED | NOT_PROGRAMMED


def test_conflicts_between_gateways() -> None:
    """The older one has none; the younger one's listeners say which it is."""
    old = gateway(listener("a", 80, "a.io"), listener("b", 81), name="old", created="2025-01-01T00:00:00Z")
    young = gateway(
        listener("a", 80, "a.io"), listener("b", 81, certificates=["cert"]), listener("c", 82), name="young"
    )
    objects = old, young, secret()
    assert gateway_says(*objects, name="old")[0] == ACCEPTED | PROGRAMMED
    gateway_said, listeners = gateway_says(*objects, name="young")
    assert gateway_said == {"Accepted": ("True", "ListenersNotValid")} | PROGRAMMED
    assert said(listeners["a"].conditions) == CONFLICTED | {"Conflicted": ("True", "HostnameConflict")}
    assert said(listeners["b"].conditions) == CONFLICTED | {"Conflicted": ("True", "ProtocolConflict")}
    assert said(listeners["c"].conditions) == ACCEPTED | NO_CONFLICT | RESOLVED | PROGRAMMED


def test_conflicts_within_a_gateway_have_no_winner() -> None:
    """Two protocols on one port cost both listeners, wherever they stand; the third is served."""
    spec = read_gateway(HTTP | {"port": 443}, https(certificateRefs=[CERTIFICATE]), HTTP | {"name": "more"})
    _, listeners = gateway_says(spec, secret())
    for name in ("http", "https"):
        assert said(listeners[name].conditions) == CONFLICTED | {"Conflicted": ("True", "ProtocolConflict")}
    assert said(listeners["more"].conditions) == ACCEPTED | NO_CONFLICT | RESOLVED | PROGRAMMED


def test_a_listener_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of HTTPS listeners whose answers to each other are too many, the last is not programmed and says why."""
    monkeypatch.setattr("xds.resolve.MAX_ROUTES", 1)
    two = [listener(name, 443, f"{name}.io", certificates=["cert"]) for name in "ab"]
    _, listeners = gateway_says(gateway(*two), secret())
    assert said(listeners["a"].conditions) == ACCEPTED | NO_CONFLICT | RESOLVED | PROGRAMMED
    assert said(listeners["b"].conditions) == ACCEPTED | NO_CONFLICT | RESOLVED | NOT_PROGRAMMED
    assert "more than 1 routes" in message(listeners["b"].conditions, ConditionType.PROGRAMMED)


def test_a_conflict_in_one_group_of_envoys() -> None:
    """The listener is served to the others and says that it is not served to all."""
    old = gateway(name="edge", groups=["edge"], created="2025-01-01T00:00:00Z")
    gateway_said, listeners = gateway_says(old, gateway(), name="gw")
    assert gateway_said == {"Accepted": ("False", "ListenersNotValid")} | PROGRAMMED
    assert said(listeners["http"].conditions) == CONFLICTED | {"Conflicted": ("True", "HostnameConflict")}


def test_overlapping_hostnames_of_https() -> None:
    """Those of one port that cover each other say so; on another port, with another name or without TLS none does."""
    names = {"a": "a.io", "b": "b.a.io", "wide": "*.a.io", "other": "x.io"}
    listeners = [listener(name, 443, host, ["cert"]) for name, host in names.items()]
    listeners += [listener("elsewhere", 444, "*.io", ["cert"]), listener("plain", 80, "b.a.io")]
    _, found = gateway_says(gateway(*listeners), secret())
    overlap = ("True", "OverlappingHostnames")
    assert {name: said(each.conditions).get("OverlappingTLSConfig") for name, each in found.items()} == {
        "a": None,
        "b": overlap,
        "wide": overlap,
        "other": None,
        "elsewhere": None,
        "plain": None,
    }
    _, found = gateway_says(gateway(*listeners[:1], listener("any", 443, certificates=["cert"])), secret())
    assert [said(each.conditions)["OverlappingTLSConfig"] for each in found.values()] == [overlap] * 2


def test_too_many_groups() -> None:
    """A Gateway that is only for Envoys beyond the bound is not programmed, and says why."""
    full = [gateway(listener(port=i + 1), name=f"g{i}", groups=[f"a{i}"]) for i in range(100)]
    found = statuses(*full, gateway(name="last", groups=["z"]))[ref("Gateway", "last")]
    assert said(found.conditions) == ACCEPTED | NOT_PROGRAMMED
    assert "more than 100 groups" in message(found.conditions, ConditionType.PROGRAMMED)


@pytest.mark.parametrize("reason", ["Invalid", "InvalidParameters", "UnsupportedAddress"])
@pytest.mark.parametrize("served", [True, False])
def test_a_gateway_whose_newest_version_is_refused(reason: str, served: bool) -> None:
    """It is accepted no more, at the new generation; the listeners of the version that is served stay told of."""
    newest = Gateway(Meta(ref("Gateway", "gw"), generation=GENERATION), "envoy", ())
    before = [replace(gateway(), meta=Meta(ref("Gateway", "gw"), generation=3))] if served else []
    topology = resolve(replace(config(aged(gateway_class()), *before), refused=(Refused(newest, reason, "spec: why"),)))
    (found,) = [each for each in topology.statuses if each.ref == ref("Gateway", "gw")]
    assert found.generation == GENERATION
    assert said(found.conditions) == {"Accepted": ("False", reason), "Programmed": ("False", "Invalid")}
    assert message(found.conditions, ConditionType.ACCEPTED) == "spec: why"
    assert [each.name for each in found.listeners] == ["http"] * served


def test_a_refused_gateway_of_another_class_is_not_ours() -> None:
    """Nor one whose class does not exist."""
    meta = Meta(ref("Gateway", "gw"), generation=GENERATION)
    for name in ("istio", "missing"):
        found = statuses(
            gateway_class("istio", "istio.io/x"), refused=[Refused(Gateway(meta, name, ()), "Invalid", "")]
        )
        assert list(found) == [ref("GatewayClass", "envoy", "")]


# --- HTTPRoute --------------------------------------------------------------------------------------------------------


def route_says(*objects: Object, refused: Iterable[Refused] = ()) -> list[tuple[str, Said]]:
    """Of the route `route` (parent's name, what its entry says), each written as the controller of the Gateway."""
    found = statuses(*objects, refused=refused).get(ref("HTTPRoute", "route"))
    parents = found.parents if found else ()
    assert all(each.controller == OURS for each in parents)
    return [(each.parent.ref.name, said(each.conditions)) for each in parents]


def unaccepted_route(reason: str) -> Said:
    return {"Accepted": ("False", reason)} | RESOLVED


@pytest.mark.parametrize(
    ("of_listener", "of_route", "reason"),
    [
        (listener(), {}, ""),
        (listener(), {"parents": [parent(section="missing")]}, "NoMatchingParent"),
        (listener(), {"parents": [parent(port=1)]}, "NoMatchingParent"),
        (listener(namespaces_from="None"), {}, "NotAllowedByListeners"),
        (listener(kinds=((GATEWAY, "GRPCRoute"),)), {}, "NotAllowedByListeners"),
        (replace(listener(), protocol="TCP"), {}, "NotAllowedByListeners"),
        (listener(hostname="a.io"), {"hostnames": ["b.io"]}, "NoMatchingListenerHostname"),
        (listener(hostname="a.io"), {"hostnames": ["b.io", "*.io"]}, ""),
        (listener("s", 443, certificates=["missing"]), {}, ""),
    ],
)
def test_a_route(of_listener: Any, of_route: dict[str, Any], reason: str) -> None:
    """Its references are told of whether it is accepted or not; only an accepted one counts for the listener."""
    objects = gateway(of_listener), route(rule(), **of_route)
    assert route_says(*objects) == [("gw", unaccepted_route(reason) if reason else ACCEPTED | RESOLVED)]
    assert gateway_says(*objects)[1][of_listener.name].attached == (not reason)


def test_a_route_has_an_entry_for_each_parent_of_ours() -> None:
    """In its order, by section and port; none for another controller's, for one that does not exist, for a mesh."""
    parents = [parent(), parent(section="http"), parent("istio"), parent("missing"), parent("gw2", port=1)]
    service_parent = replace(parent(), ref=ref("Service", "web"))
    objects = (
        gateway(),
        gateway(listener(port=81), name="gw2"),
        gateway_class("istio", "istio.io/gateway"),
        gateway(name="istio", class_name="istio"),
        route(rule(), parents=[*parents, service_parent]),
    )
    found = statuses(*objects)[ref("HTTPRoute", "route")].parents
    assert [each.parent for each in found] == [parents[0], parents[1], parents[4]]
    assert route_says(*objects)[2] == ("gw2", unaccepted_route("NoMatchingParent"))
    assert gateway_says(*objects)[1]["http"].attached == 1


@pytest.mark.parametrize(
    ("to", "reason"),
    [
        (backend("missing"), "BackendNotFound"),
        (backend(port=99), "BackendNotFound"),
        (backend("missing", "InferencePool", 0), "BackendNotFound"),
        (backend(kind="InferenceModel"), "InvalidKind"),
        (backend(namespace="there"), "RefNotPermitted"),
        (backend("tls", port=443), "UnsupportedProtocol"),
        (backend("missing", weight=0), "BackendNotFound"),
    ],
)
def test_references_of_a_route(to: Any, reason: str) -> None:
    """The first that can not be resolved is told of; the route is accepted all the same."""
    tls = service("tls", ports=[ServicePort("", 443, 8443, "https")])
    objects = gateway(), service(namespace="there"), tls, route(rule(), rule(backend(), to))
    assert route_says(*objects) == [("gw", ACCEPTED | {"ResolvedRefs": ("False", reason)})]
    found = statuses(*objects)[ref("HTTPRoute", "route")].parents[0].conditions
    assert message(found, ConditionType.RESOLVED_REFS).startswith(f"{to.field}: ")


def test_a_granted_reference_is_resolved() -> None:
    """As soon as its namespace lets it."""
    objects = gateway(), service(namespace="there"), route(rule(backend(namespace="there")))
    assert route_says(*objects, grant("default", "there")) == [("gw", ACCEPTED | RESOLVED)]


def broken(reason: str = "UnsupportedValue") -> RouteRule:
    return RouteRule(
        problem=Problem(ConditionType.ACCEPTED, reason, "spec.rules[1].filters: why; the rule answers 500")
    )


def test_a_route_with_an_invalid_rule() -> None:
    """It is accepted for the others, and says which rule is dropped."""
    objects = gateway(), route(rule(), broken(), rule())
    assert route_says(*objects) == [("gw", ACCEPTED | RESOLVED | {"PartiallyInvalid": ("True", "UnsupportedValue")})]
    found = statuses(*objects)[ref("HTTPRoute", "route")].parents[0].conditions
    text = message(found, ConditionType.PARTIALLY_INVALID)
    assert text == "Dropped Rule 1: spec.rules[1].filters: why; the rule answers 500"


@pytest.mark.parametrize("reason", ["UnsupportedValue", "IncompatibleFilters"])
def test_a_route_with_invalid_rules_alone(reason: str) -> None:
    """It is not accepted, counts for no listener, and is not partially invalid."""
    objects = gateway(), route(broken(reason), broken())
    assert route_says(*objects) == [("gw", unaccepted_route(reason))]
    assert gateway_says(*objects)[1]["http"].attached == 0


@pytest.mark.parametrize(("reason", "told"), [("Invalid", "UnsupportedValue"), ("RefusedByEnvoy", "RefusedByEnvoy")])
@pytest.mark.parametrize("served", [True, False])
def test_a_route_whose_newest_version_is_refused(reason: str, told: str, served: bool) -> None:
    """By a check or by Envoy: it is not accepted at its parents of now, and counts for no listener."""
    newest = HTTPRoute(Meta(ref("HTTPRoute", "route"), generation=GENERATION), (parent("gw2"), parent("x")), (), ())
    objects: list[Object] = [gateway(), gateway(listener(port=81), name="gw2"), *([route(rule())] if served else [])]
    refused = [Refused(newest, reason, "spec: why")]
    assert route_says(*objects, refused=refused) == [("gw2", {"Accepted": ("False", told)})]
    found = statuses(*objects, refused=refused)
    assert [each.attached for each in found[ref("Gateway", "gw")].listeners] == [0]


def test_a_rule_without_room_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of its route is served, and the route accepted; one that is served whole has nothing of it."""
    monkeypatch.setattr("xds.resolve.MAX_ROUTES", 1)
    found = statuses(gateway(), route(rule(), rule()))[ref("HTTPRoute", "route")].parents[0].conditions
    assert said(found) == ACCEPTED | RESOLVED | {"PartiallyInvalid": ("True", "TooManyRoutes")}
    assert message(found, ConditionType.PARTIALLY_INVALID).startswith("Dropped Rule spec.rules[1]: ")
    assert route_says(gateway(), route(rule())) == [("gw", ACCEPTED | RESOLVED)]


def test_a_backend_without_room_is_not_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is, and stays."""
    monkeypatch.setattr("xds.backends.MAX_ENDPOINTS", 1)
    objects = gateway(), service("other"), route(rule(), name="first"), route(rule(backend("other")))
    found = statuses(*objects)[ref("HTTPRoute", "first")].parents[0].conditions
    assert said(found) == ACCEPTED | RESOLVED
    assert route_says(*objects) == [("gw", ACCEPTED | {"ResolvedRefs": ("False", "TooManyEndpoints")})]


def test_a_route_of_nobody_has_no_status() -> None:
    """Neither served nor refused, without a parent that is ours."""
    newest = HTTPRoute(Meta(ref("HTTPRoute", "other"), generation=GENERATION), (parent("x"),), (), ())
    found = statuses(route(rule(), parents=[parent("x")]), refused=[Refused(newest, "Invalid", "why")])
    assert list(found) == [ref("GatewayClass", "envoy", "")]


# --- InferencePool and InferenceModel ---------------------------------------------------------------------------------


def pool_says(*objects: Object, group: str = INFERENCE, refused: Iterable[Refused] = ()) -> list[tuple[str, Said]]:
    found = statuses(*objects, refused=refused).get(ref("InferencePool", "llm", group=group))
    return [(each.parent.ref.name, said(each.conditions)) for each in (found.parents if found else ())]


def to_pool(group: str = INFERENCE, **kw: Any) -> RouteRule:
    return rule(backend("llm", "InferencePool", 0, group=group, **kw))


@pytest.mark.parametrize("group", [INFERENCE, INFERENCE_X])
def test_a_pool_has_an_entry_for_each_gateway_that_routes_to_it(group: str) -> None:
    """By whichever route and rule; a Gateway whose routes do not name it has none."""
    gateways = [gateway(listener(port=80 + i), name=name) for i, name in enumerate(("a", "b", "c"))]
    objects: tuple[Object, ...] = (
        *gateways,
        pool(group=group),
        route(rule(), to_pool(), parents=[parent("b"), parent("a")]),
        route(rule(), name="other", parents=[parent("c")]),
    )
    assert pool_says(*objects, group=group) == [("a", ACCEPTED | RESOLVED), ("b", ACCEPTED | RESOLVED)]


def test_a_picker_that_a_pool_names_is_ours() -> None:
    """Whether it exists or not, the reference is resolved, and the message says to what."""
    objects = gateway(), pool(extension="missing"), route(to_pool())
    assert pool_says(*objects) == [("gw", ACCEPTED | RESOLVED)]
    found = statuses(*objects)[ref("InferencePool", "llm")].parents[0].conditions
    assert "vllm-xds" in message(found, ConditionType.RESOLVED_REFS)


def test_a_pool_whose_routes_are_not_accepted() -> None:
    """One accepted route is enough."""
    rejected = route(to_pool(), parents=[parent(section="missing")])
    assert pool_says(gateway(), pool(), rejected) == [
        ("gw", {"Accepted": ("False", "HTTPRouteNotAccepted")} | RESOLVED)
    ]
    assert pool_says(gateway(), pool(), rejected, route(to_pool(), name="b")) == [("gw", ACCEPTED | RESOLVED)]


def test_a_pool_that_no_route_may_use() -> None:
    """Of another namespace, without a grant: no entry; with it there is one."""
    there = pool(namespace="there")
    objects = gateway(), there, route(to_pool(namespace="there"))
    assert there.meta.ref not in statuses(*objects)
    assert there.meta.ref in statuses(*objects, grant("default", "there", "InferencePool"))


def test_of_two_pools_with_one_name_the_newer_group_is_served() -> None:
    """The other one says so."""
    objects = gateway(), pool(), pool(group=INFERENCE_X), route(to_pool(INFERENCE_X))
    assert pool_says(*objects) == [("gw", ACCEPTED | RESOLVED)]
    assert pool_says(*objects, group=INFERENCE_X) == [
        ("gw", {"Accepted": ("False", "NotSupportedByGateway")} | RESOLVED)
    ]


@pytest.mark.parametrize("served", [True, False])
def test_a_pool_whose_newest_version_is_refused(served: bool) -> None:
    """At each Gateway that names it."""
    newest = aged(replace(pool(), selector={}, ports=()))
    objects: list[Object] = [gateway(), route(to_pool()), *([pool()] if served else [])]
    found = pool_says(*objects, refused=[Refused(newest, "Invalid", "spec: why")])
    assert found == [("gw", {"Accepted": ("False", "Invalid")})]


OF = ref("InferencePool", "llm", group=INFERENCE_X)


def model(name: str = "m", created: str = "") -> InferenceModel:
    return InferenceModel(Meta(ref("InferenceModel", name), created), "qwen", Criticality.STANDARD, (), OF)


def rewrite(*names: str, name: str = "m", created: str = "") -> InferenceModelRewrite:
    about = Meta(ref("InferenceModelRewrite", name, group=INFERENCE_X), created)
    return InferenceModelRewrite(about, tuple(RewriteRule((each,), (("x", 1),)) for each in names), OF)


def objective(name: str = "m", group: str = INFERENCE_X, created: str = "") -> InferenceObjective:
    return InferenceObjective(Meta(ref("InferenceObjective", name, group=group), created), -1, OF)


Model = InferenceModel | InferenceModelRewrite | InferenceObjective
READY = {"Ready": ("True", "Ready")}
OLD = "2025-01-01T00:00:00Z"


def model_says(of: Model, *objects: Object, refused: Iterable[Refused] = ()) -> Said | None:
    found = statuses(*objects, refused=refused).get(of.meta.ref)
    return said(found.conditions) if found else None


@pytest.mark.parametrize(("of", "ready"), [(model(), READY), (objective(), READY), (rewrite("a"), {})])
def test_what_is_said_of_a_pools_models(of: Model, ready: Said) -> None:
    """It is accepted where its pool is one of ours, ready where the pool is accepted, and nobody's otherwise."""
    assert model_says(of, gateway(), pool(), of, route(to_pool())) == ACCEPTED | ready
    rejected = route(to_pool(), parents=[parent(section="missing")])
    unready = {"Ready": ("False", "PoolNotAccepted")} if ready else {}
    assert model_says(of, gateway(), pool(), of, rejected) == ACCEPTED | unready
    assert model_says(of, gateway(), pool(), of) is None
    elsewhere = replace(of, pool=replace(OF, kind="Other"))
    assert model_says(of, gateway(), pool(), elsewhere, route(to_pool())) is None


@pytest.mark.parametrize(
    ("of", "older", "says"),
    [
        (model(), model("o", OLD), {"Accepted": ("False", "ModelNameInUse"), "Ready": ("False", "ModelNameInUse")}),
        (
            objective(),
            objective(group=LLM_D, created=OLD),
            {"Accepted": ("False", "Conflicted"), "Ready": ("False", "Conflicted")},
        ),
        (rewrite("a"), rewrite("a", name="o", created=OLD), {"Accepted": ("False", "Conflicted")}),
        (rewrite("a", "b"), rewrite("a", name="o", created=OLD), ACCEPTED),
    ],
)
def test_a_name_that_an_older_object_has(of: Model, older: Model, says: Said) -> None:
    """The younger says so; of a rewrite with other rules that count only the message does."""
    objects = gateway(), pool(), of, older, route(to_pool())
    assert model_says(of, *objects) == says
    found = statuses(*objects)[of.meta.ref].conditions
    assert older.meta.ref.name in message(found, ConditionType.ACCEPTED)
    assert (model_says(older, *objects) or {})["Accepted"] == ("True", "Accepted")


@pytest.mark.parametrize("of", [model(), objective(), rewrite("a")])
def test_a_model_whose_newest_version_is_refused(of: Model) -> None:
    """Whatever is served of it."""
    refused = [Refused(aged(of), "Invalid", "why")]
    found = model_says(of, gateway(), pool(), of, route(to_pool()), refused=refused)
    assert found is not None
    assert set(found.values()) == {("False", "Invalid")}
    assert model_says(of, gateway(), pool(), refused=refused) is None


# --- from documents ---------------------------------------------------------------------------------------------------


def test_what_is_rejected_is_refused() -> None:
    """A document that breaks its schema comes with as much of its object as says whose it is, and nothing that breaks
    even that."""
    meta = {"name": "x", "generation": GENERATION}

    def outlined(api: str, kind: str, spec: Any) -> Any:
        parsed = parse({"apiVersion": api, "kind": kind, "metadata": meta, "spec": spec})
        assert parsed.object is None
        if parsed.refused is not None:
            assert parsed.refused.object.meta.generation == GENERATION
            assert parsed.refused.message.startswith("spec.")
        return parsed.refused and parsed.refused.object

    v1, x = f"{GATEWAY}/v1", f"{INFERENCE_X}/v1alpha2"
    assert outlined(v1, "Gateway", {"gatewayClassName": "c", "listeners": []}).class_name == "c"
    assert outlined(v1, "Gateway", {"gatewayClassName": 1, "listeners": []}) is None
    found = outlined(v1, "HTTPRoute", {"parentRefs": [{"name": "gw"}], "rules": []})
    assert found.parents == (parent(),)
    assert outlined(v1, "HTTPRoute", {"parentRefs": [{"name": 1}]}) is None
    assert outlined(x, "InferencePool", {"selector": {}}).meta.ref.name == "x"
    for kind, spec in (("InferenceModel", {}), ("InferenceObjective", {"priority": "x"})):
        assert outlined(x, kind, {"poolRef": {"name": "p"}, **spec}).pool.name == "p"
    rules = {"rules": [{"matches": [{"model": {"type": "Regex"}}]}]}
    assert outlined(x, "InferenceModelRewrite", {"poolRef": {"name": "p"}, **rules}).pool.name == "p"
    assert outlined(f"{GATEWAY}/v1", "ReferenceGrant", {"from": []}) is None
