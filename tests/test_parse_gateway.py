"""The Gateway API kinds and BackendTrafficPolicy: what is served as written, in part, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from xds.model import (
    CORE,
    GATEWAY,
    INFERENCE_X,
    AllowedRoutes,
    BackendRef,
    BackendTrafficPolicy,
    ConditionType,
    Filters,
    Gateway,
    HeaderModifier,
    HTTPRoute,
    Level,
    Listener,
    MatchType,
    ObjectRef,
    ParentRef,
    PathMatch,
    PathModifier,
    Problem,
    ReferenceGrant,
    Rejection,
    RequestRedirect,
    Requirement,
    RouteMatch,
    RouteRule,
    URLRewrite,
    ValueMatch,
)
from xds.parse import Parsed, parse


def _parse(api: str, kind: str, spec: Any) -> Parsed:
    """One object named `x`; `spec` is a mapping, or its YAML."""
    spec = yaml.safe_load(spec) if isinstance(spec, str) else spec
    return parse({"apiVersion": api, "kind": kind, "metadata": {"name": "x"}, "spec": spec})


def _gateway(*listeners: Any) -> Parsed:
    return _parse(f"{GATEWAY}/v1", "Gateway", {"gatewayClassName": "c", "listeners": list(listeners)})


def _route(rule: Any, **spec: Any) -> Parsed:
    """An HTTPRoute of one rule, given as YAML."""
    return _parse(f"{GATEWAY}/v1", "HTTPRoute", {"rules": [yaml.safe_load(rule)], **spec})


def _rule(rule: str) -> RouteRule:
    """The one rule of a route that is accepted without a word."""
    parsed = _route(rule)
    assert parsed.rejections == ()
    assert isinstance(parsed.object, HTTPRoute)
    return parsed.object.rules[0]


def _only(parsed: Parsed) -> Rejection:
    (rejection,) = parsed.rejections
    return rejection


def _assert_invalid(parsed: Parsed, field: str) -> None:
    """The whole object is rejected, for this field."""
    assert parsed.object is None
    assert (_only(parsed).reason, _only(parsed).field) == ("Invalid", field)
    assert parsed.ref is not None


# --- Gateway ----------------------------------------------------------------------------------------------------------


def test_listeners() -> None:
    """Hostname and allowedRoutes are read; without them a listener takes any host and routes of its own namespace."""
    parsed = _gateway(
        {"name": "a", "port": 80, "protocol": "HTTP"},
        {
            "name": "b",
            "port": 80,
            "protocol": "HTTP",
            "hostname": "*.example.com",
            "allowedRoutes": {
                "namespaces": {"from": "Selector", "selector": {"matchLabels": {"team": "x"}}},
                "kinds": [{"kind": "HTTPRoute"}],
            },
        },
    )
    assert parsed.rejections == ()
    assert isinstance(parsed.object, Gateway)
    allowed = AllowedRoutes("Selector", {"team": "x"}, ((GATEWAY, "HTTPRoute"),))
    assert parsed.object.listeners == (
        Listener("a", 80, "HTTP"),
        Listener("b", 80, "HTTP", "*.example.com", allowed),
    )


CERTIFICATE = {"name": "cert"}


def _https(of_listener: Any, **spec: Any) -> Parsed:
    """A Gateway with an HTTPS listener and an HTTP one behind it."""
    listeners = [
        {"name": "a", "port": 443, "protocol": "HTTPS", "hostname": "a.io", "tls": of_listener},
        {"name": "b", "port": 80, "protocol": "HTTP"},
    ]
    return _parse(f"{GATEWAY}/v1", "Gateway", {"gatewayClassName": "c", "listeners": listeners, **spec})


@pytest.mark.parametrize("mode", [{}, {"mode": "Terminate"}])
def test_https_listener(mode: dict[str, str]) -> None:
    """Its certificates are Secrets, of the Gateway's namespace unless they name another."""
    refs = [
        CERTIFICATE,
        {"group": "", "kind": "Secret", "name": "other", "namespace": "there"},
        {"kind": "X", "name": "x"},
    ]
    parsed = _https({**mode, "certificateRefs": refs, "options": {"a.io/b": "c"}})
    assert parsed.rejections == ()
    assert isinstance(parsed.object, Gateway)
    (first, _) = parsed.object.listeners
    assert (first.protocol, first.hostname, first.field) == ("HTTPS", "a.io", "spec.listeners[0].tls.certificateRefs")
    assert first.certificates == (
        ObjectRef(CORE, "Secret", "default", "cert"),
        ObjectRef(CORE, "Secret", "there", "other"),
        ObjectRef(CORE, "X", "default", "x"),
    )


@pytest.mark.parametrize(
    ("tls", "field", "spec"),
    [
        ({"mode": "Passthrough"}, "mode", {}),
        ({}, "certificateRefs", {}),
        ({"options": {"a.io/b": "c"}}, "certificateRefs", {}),
        ({"certificateRefs": [CERTIFICATE], "frontendValidation": {}}, "frontendValidation", {}),
        ({"certificateRefs": [CERTIFICATE]}, "frontendValidation", {"tls": {"frontend": {"default": {}}}}),
    ],
)
def test_tls_that_is_not_served_costs_its_listener(tls: Any, field: str, spec: Any) -> None:
    """Passthrough, no certificate, and above all a listener that would let in clients without a certificate. It is
    handed on with the problem, and the other one without."""
    parsed = _https(tls, **spec)
    assert isinstance(parsed.object, Gateway)
    rejection = next(each for each in parsed.rejections if each.level is Level.ERROR)
    assert rejection.field == f"spec.listeners[0].tls.{field}"
    assert "listener a is not served" in rejection.message
    (lost, served) = parsed.object.listeners
    condition = ConditionType.RESOLVED_REFS if field == "certificateRefs" else ConditionType.ACCEPTED
    assert lost.problems == (Problem.of(condition, rejection),)
    assert served.problems == ()


@pytest.mark.parametrize("protocol", ["TLS", "TCP", "UDP", "example.com/mine"])
def test_unsupported_protocol_costs_its_listener_only(protocol: str) -> None:
    """The other listeners of the Gateway are served, and the lost one is handed on with its problem."""
    parsed = _gateway(
        {"name": "a", "port": 443, "protocol": protocol, "tls": {"mode": "Terminate"}},
        {"name": "b", "port": 80, "protocol": "HTTP"},
    )
    assert isinstance(parsed.object, Gateway)
    assert (_only(parsed).reason, _only(parsed).level) == ("UnsupportedProtocol", Level.ERROR)
    assert _only(parsed).field == "spec.listeners[0].protocol"
    (lost, served) = parsed.object.listeners
    assert lost == Listener("a", 443, protocol, problems=(Problem.of(ConditionType.ACCEPTED, _only(parsed)),))
    assert served.problems == ()


def test_the_case_of_a_protocol_does_not_count() -> None:
    """`http` is HTTP; what only resembles it is not."""
    parsed = _gateway({"name": "a", "port": 80, "protocol": "http"}, {"name": "b", "port": 81, "protocol": "httpx"})
    assert isinstance(parsed.object, Gateway)
    assert [(each.protocol, bool(each.problems)) for each in parsed.object.listeners] == [
        ("HTTP", False),
        ("httpx", True),
    ]


def test_kinds_of_routes_that_are_not_served() -> None:
    """Each is named in a warning and a problem of the listener's references; HTTPRoute is none of them."""
    kinds = [{"kind": "HTTPRoute"}, {"kind": "GRPCRoute"}, {"group": "example.com", "kind": "HTTPRoute"}]
    parsed = _gateway({"name": "a", "port": 80, "protocol": "HTTP", "allowedRoutes": {"kinds": kinds}})
    assert isinstance(parsed.object, Gateway)
    found = [(each.reason, each.level, each.field) for each in parsed.rejections]
    where = "spec.listeners[0].allowedRoutes.kinds"
    assert found == [("InvalidRouteKinds", Level.WARNING, f"{where}[{i}].kind") for i in (1, 2)]
    problems = parsed.object.listeners[0].problems
    assert problems == tuple(Problem.of(ConditionType.RESOLVED_REFS, each) for each in parsed.rejections)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"infrastructure": {"parametersRef": {"group": "a.io", "kind": "B", "name": "c"}}}, "InvalidParameters"),
        ({"addresses": [{"type": "NamedAddress", "value": "mine"}]}, "UnsupportedAddress"),
    ],
)
def test_what_a_gateway_may_not_ask_for(spec: Any, reason: str) -> None:
    """Parameters of any kind, and addresses of a kind of others: Gateway API has it refused, not served without."""
    listeners = [{"name": "a", "port": 80, "protocol": "HTTP"}]
    parsed = _parse(f"{GATEWAY}/v1", "Gateway", {"gatewayClassName": "c", "listeners": listeners, **spec})
    assert parsed.object is None
    assert _only(parsed).reason == reason


def test_addresses_asked_for() -> None:
    """With their type, IPAddress where none is given; one without a value asks for any of its type."""
    addresses = [{"value": "10.0.0.1"}, {"type": "Hostname", "value": "a.io"}, {"type": "Hostname"}]
    listeners = [{"name": "a", "port": 80, "protocol": "HTTP"}]
    spec = {"gatewayClassName": "c", "listeners": listeners, "addresses": addresses}
    parsed = _parse(f"{GATEWAY}/v1", "Gateway", spec)
    assert parsed.rejections == ()
    assert isinstance(parsed.object, Gateway)
    assert parsed.object.addresses == (("IPAddress", "10.0.0.1"), ("Hostname", "a.io"), ("Hostname", ""))


def test_selector_with_expressions() -> None:
    """Each operator with the values it wants; one with none, or with too many, rejects the Gateway."""

    def selecting(*expressions: Any) -> Parsed:
        selector = {"matchLabels": {"a": "b"}, "matchExpressions": list(expressions)}
        allowed = {"namespaces": {"from": "Selector", "selector": selector}}
        return _gateway({"name": "a", "port": 80, "protocol": "HTTP", "allowedRoutes": allowed})

    parsed = selecting({"key": "c", "operator": "Exists"}, {"key": "d.io/e", "operator": "NotIn", "values": ["f"]})
    assert parsed.rejections == ()
    assert isinstance(parsed.object, Gateway)
    requirements = (Requirement("c", "Exists"), Requirement("d.io/e", "NotIn", ("f",)))
    assert parsed.object.listeners[0].allowed == AllowedRoutes("Selector", {"a": "b"}, (), requirements)
    where = "spec.listeners[0].allowedRoutes.namespaces.selector.matchExpressions[0]"
    _assert_invalid(selecting({"key": "c", "operator": "In"}), f"{where}.values")
    _assert_invalid(selecting({"key": "c", "operator": "DoesNotExist", "values": ["x"]}), f"{where}.values")
    _assert_invalid(selecting({"key": "c", "operator": "Gt", "values": ["x"]}), f"{where}.operator")


@pytest.mark.parametrize(
    ("listener", "field"),
    [
        ({"port": 0}, "spec.listeners[0].port"),
        ({"port": "80"}, "spec.listeners[0].port"),
        ({"name": "Bad_Name"}, "spec.listeners[0].name"),
        ({"hostname": "EXAMPLE.com"}, "spec.listeners[0].hostname"),
        ({"hostname": "*"}, "spec.listeners[0].hostname"),
        ({"tls": {}}, "spec.listeners[0].tls"),
        ({"allowedRoutes": {"namespaces": {"from": "Everywhere"}}}, "spec.listeners[0].allowedRoutes.namespaces.from"),
        ({"name": "second"}, "spec.listeners"),
        ({"port": 81}, "spec.listeners"),
    ],
)
def test_bad_listener_rejects_the_gateway(listener: Any, field: str) -> None:
    """A listener its CRD would refuse rejects the Gateway, as an API server would; so does a repeated one."""
    first = {"name": "first", "port": 80, "protocol": "HTTP"} | listener
    _assert_invalid(_gateway(first, {"name": "second", "port": 81, "protocol": "HTTP"}), field)


NODES = "vllm-xds/nodes"


def _for_nodes(text: str) -> Parsed:
    metadata = {"name": "x", "annotations": {NODES: text}}
    spec = {"gatewayClassName": "c", "listeners": [{"name": "a", "port": 80, "protocol": "HTTP"}]}
    return parse({"apiVersion": f"{GATEWAY}/v1", "kind": "Gateway", "metadata": metadata, "spec": spec})


def test_groups_of_a_gateway() -> None:
    """The annotation names the Envoys a Gateway is for, in any order and spacing; without it, it is for all."""
    parsed = _for_nodes(" edge, envoy-7.ns:1/a ,edge")
    assert parsed.rejections == ()
    assert isinstance(parsed.object, Gateway)
    assert parsed.object.groups == ("edge", "envoy-7.ns:1/a")
    assert isinstance(without := _gateway({"name": "a", "port": 80, "protocol": "HTTP"}).object, Gateway)
    assert without.groups == ()


@pytest.mark.parametrize("text", ["", " ", "a,,b", "a b", "a,é", "-a", "a" * 254, ",".join(map(str, range(17)))])
def test_bad_groups_reject_the_gateway(text: str) -> None:
    """Served without them it would be served by every Envoy, which its author did not want."""
    _assert_invalid(_for_nodes(text), f"metadata.annotations[{NODES}]")


def test_number_of_listeners() -> None:
    """A Gateway has from 1 to 64 listeners."""
    _assert_invalid(_gateway(), "spec.listeners")
    many = [{"name": f"l{i}", "port": i + 1, "protocol": "HTTP"} for i in range(65)]
    _assert_invalid(_gateway(*many), "spec.listeners")
    assert _gateway(*many[:64]).rejections == ()


# --- HTTPRoute --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
def test_route_with_defaults(version: str) -> None:
    """Parents default to Gateways of the own namespace; a route without rules has one that matches everything."""
    spec = {"parentRefs": [{"name": "gw"}, {"name": "gw", "namespace": "b", "sectionName": "s", "port": 80}]}
    parsed = _parse(f"{GATEWAY}/{version}", "HTTPRoute", spec)
    assert isinstance(parsed.object, HTTPRoute)
    assert parsed.object.parents == (
        ParentRef(ObjectRef(GATEWAY, "Gateway", "default", "gw")),
        ParentRef(ObjectRef(GATEWAY, "Gateway", "b", "gw"), "s", 80),
    )
    assert parsed.object.rules == (RouteRule(),)
    assert parsed.object.rules[0].matches == (RouteMatch(PathMatch(MatchType.PREFIX, "/")),)


def test_matches() -> None:
    """Path, headers (names in lower case, the first of equivalent ones), query parameters and method."""
    rule = _rule("""
      matches:
      - path: {type: Exact, value: /a}
        headers:
        - {name: X-A, value: "1"}
        - {name: x-a, value: "2"}
        - {name: b, type: RegularExpression, value: "v[0-9]+"}
        queryParams: [{name: Q, value: x}, {name: q, value: y}]
        method: POST
      - {}
    """)
    assert rule.matches == (
        RouteMatch(
            PathMatch(MatchType.EXACT, "/a"),
            (ValueMatch("x-a", "1"), ValueMatch("b", "v[0-9]+", MatchType.REGEX)),
            (ValueMatch("Q", "x"), ValueMatch("q", "y")),
            "POST",
        ),
        RouteMatch(),
    )


def test_backends() -> None:
    """A Service of the own namespace by default, any kind otherwise; a pool needs no port. The field path is kept."""
    rule = _rule("""
      backendRefs:
      - {name: svc, port: 80, weight: 0}
      - {group: inference.networking.x-k8s.io, kind: InferencePool, name: p, namespace: b}
    """)
    assert rule.backends == (
        BackendRef(ObjectRef(CORE, "Service", "default", "svc"), "spec.rules[0].backendRefs[0]", 80, 0),
        BackendRef(ObjectRef(INFERENCE_X, "InferencePool", "b", "p"), "spec.rules[0].backendRefs[1]", 0, 1),
    )


def test_filters() -> None:
    """Every supported filter of a rule and of a backendRef; of equivalent header names the first counts."""
    rule = _rule("""
      matches: [{path: {value: /a}}]
      filters:
      - type: RequestHeaderModifier
        requestHeaderModifier:
          set: [{name: A, value: "1"}, {name: a, value: "2"}]
          add: [{name: b, value: "3"}]
          remove: [c]
      - {type: ResponseHeaderModifier, responseHeaderModifier: {remove: [d]}}
      - type: URLRewrite
        urlRewrite: {hostname: e.example, path: {type: ReplacePrefixMatch, replacePrefixMatch: /f}}
      backendRefs:
      - {name: s, port: 1, filters: [{type: RequestHeaderModifier, requestHeaderModifier: {remove: [g]}}]}
    """)
    assert rule.filters == Filters(
        request_headers=HeaderModifier((("A", "1"),), (("b", "3"),), ("c",)),
        response_headers=HeaderModifier(remove=("d",)),
        rewrite=URLRewrite("e.example", PathModifier(full=False, value="/f")),
    )
    assert rule.backends[0].filters == Filters(request_headers=HeaderModifier(remove=("g",)))


def test_redirect() -> None:
    """Scheme, host, port, path and status; 302 when nothing is said."""
    rule = _rule("""
      filters:
      - type: RequestRedirect
        requestRedirect:
          {scheme: https, hostname: h.a, port: 1, statusCode: 308, path: {type: ReplaceFullPath, replaceFullPath: /x}}
    """)
    path = PathModifier(full=True, value="/x")
    assert rule.filters.redirect == RequestRedirect("https", "h.a", path, 1, 308)
    assert _rule("filters: [{type: RequestRedirect, requestRedirect: {}}]").filters.redirect == RequestRedirect()


@pytest.mark.parametrize(
    "filters",
    [
        "[{type: RequestMirror, requestMirror: {backendRef: {name: x, port: 1}}}]",
        "[{type: CORS, cors: {allowOrigins: ['*']}}]",
        "[{type: ExtensionRef, extensionRef: {group: a, kind: B, name: c}}]",
        "[{type: Later, later: {}}]",
        "[{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: Host, value: x}]}}]",
        "[{type: ResponseHeaderModifier, responseHeaderModifier: {remove: [host]}}]",
        "[{type: RequestHeaderModifier, requestHeaderModifier: {add: [{name: Content-Length, value: '0'}]}}]",
        "[{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: Upgrade, value: x}]}}]",
        "[{type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: content-length, value: '0'}]}}]",
    ],
)
def test_filter_that_cannot_be_served_empties_its_rule(filters: str) -> None:
    """An unsupported filter is not skipped: its rule keeps its matches and has nothing to send to; other rules stay."""
    good = {"backendRefs": [{"name": "s", "port": 1}]}
    bad = {"matches": [{"path": {"value": "/m"}}], "filters": yaml.safe_load(filters), **good}
    parsed = _parse(f"{GATEWAY}/v1", "HTTPRoute", {"rules": [bad, good]})
    assert isinstance(parsed.object, HTTPRoute)
    first, second = parsed.object.rules
    rejection = _only(parsed)
    problem = Problem.of(ConditionType.ACCEPTED, rejection)
    assert first == RouteRule((RouteMatch(PathMatch(MatchType.PREFIX, "/m")),), problem=problem)
    assert (len(second.backends), second.problem) == (1, None)
    assert (rejection.reason, rejection.level) == ("UnsupportedValue", Level.ERROR)
    assert rejection.field.startswith("spec.rules[0].filters")
    assert "500" in rejection.message


def test_incompatible_filters_empty_their_rule() -> None:
    """A redirect beside a rewrite cannot both be done."""
    parsed = _route("""
      filters: [{type: RequestRedirect, requestRedirect: {}}, {type: URLRewrite, urlRewrite: {}}]
    """)
    assert isinstance(parsed.object, HTTPRoute)
    assert parsed.object.rules == (RouteRule(problem=Problem.of(ConditionType.ACCEPTED, _only(parsed))),)
    assert _only(parsed).reason == "IncompatibleFilters"


def test_redirect_of_a_backend_empties_its_rule() -> None:
    """Of a backendRef only header modifiers are served: Envoy redirects before it chooses a cluster."""
    parsed = _route("""
      backendRefs: [{name: s, port: 1, filters: [{type: RequestRedirect, requestRedirect: {}}]}, {name: t, port: 1}]
    """)
    assert isinstance(parsed.object, HTTPRoute)
    assert parsed.object.rules == (RouteRule(problem=Problem.of(ConditionType.ACCEPTED, _only(parsed))),)
    assert _only(parsed).field == "spec.rules[0].backendRefs[0].filters[0].type"


def test_timeouts() -> None:
    """Seconds; a zero request timeout is none, and bounds nothing."""
    rule = _rule("timeouts: {request: 1m, backendRequest: 500ms}")
    assert (rule.timeout, rule.backend_timeout) == (60.0, 0.5)
    assert _rule("timeouts: {request: 0s, backendRequest: 10s}").timeout == 0.0
    assert _rule("timeouts: {}").timeout is None
    _assert_invalid(_route("timeouts: {request: 1s, backendRequest: 2s}"), "spec.rules[0].timeouts.backendRequest")


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        ("matches: [{path: {type: Exact, value: a}}]", "matches[0].path.value"),
        ("matches: [{path: {value: /a//b}}]", "matches[0].path.value"),
        ("matches: [{path: {value: /a/../b}}]", "matches[0].path.value"),
        ("matches: [{path: {value: /a/.}}]", "matches[0].path.value"),
        ("matches: [{path: {value: /a%2Fb}}]", "matches[0].path.value"),
        ("matches: [{path: {value: '/a b'}}]", "matches[0].path.value"),
        ("matches: [{path: {value: '/a?b'}}]", "matches[0].path.value"),
        ("matches: [{path: {type: Glob, value: /a}}]", "matches[0].path.type"),
        ("matches: [{path: {type: RegularExpression, value: '/(?=a)'}}]", "matches[0].path.value"),
        ("matches: [{path: {type: RegularExpression, value: '/['}}]", "matches[0].path.value"),
        ("matches: [{headers: [{name: ':path', value: a}]}]", "matches[0].headers[0].name"),
        ("matches: [{headers: [{name: a}]}]", "matches[0].headers[0].value"),
        ("matches: [{queryParams: [{name: a, type: PathPrefix, value: b}]}]", "matches[0].queryParams[0].type"),
        ("matches: [{method: post}]", "matches[0].method"),
        ("matches: POST", "matches"),
        ("backendRefs: [{name: s}]", "backendRefs[0].port"),
        ('backendRefs: [{name: "s\\e[2J", port: 1}]', "backendRefs[0].name"),
        ("backendRefs: [{name: s, port: 1, weight: -1}]", "backendRefs[0].weight"),
        ("backendRefs: [{name: s, port: 1, weight: 1000001}]", "backendRefs[0].weight"),
        ("filters: [{type: URLRewrite}]", "filters[0].urlRewrite"),
        ("filters: [{type: URLRewrite, urlRewrite: {}}, {type: URLRewrite, urlRewrite: {}}]", "filters[1].type"),
        (
            "filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath}}}]",
            "filters[0].urlRewrite.path.replaceFullPath",
        ),
        ("filters: [{type: URLRewrite, urlRewrite: {hostname: '*.a'}}]", "filters[0].urlRewrite.hostname"),
        (
            "filters: [{type: RequestRedirect, requestRedirect: {statusCode: 304}}]",
            "filters[0].requestRedirect.statusCode",
        ),
        (
            "{backendRefs: [{name: s, port: 1}], filters: [{type: RequestRedirect, requestRedirect: {}}]}",
            "backendRefs",
        ),
        (
            "{matches: [{path: {type: Exact, value: /a}}], filters: [{type: URLRewrite, "
            "urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}}]}",
            "filters",
        ),
    ],
)
def test_bad_rule_rejects_the_route(rule: str, field: str) -> None:
    """What the CRD refuses, by schema or by CEL, rejects the route with the path of the field."""
    _assert_invalid(_route(rule), f"spec.rules[0].{field}")


HEADERS = "matches: [{headers: [%s]}]"
QUERY = "matches: [{queryParams: [%s]}]"
PATH = "matches: [{path: {value: '%s'}}]"
REWRITE = "filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: '%s'}}}]"
REPLACE = "filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: '%s'}}}]"
REDIRECT = "filters: [{type: RequestRedirect, requestRedirect: {path: {type: ReplaceFullPath, replaceFullPath: '%s'}}}]"
SET = "filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: %s}]}}]"


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        ("matches: [{method: CONNECT}]", "matches[0].method"),
        *((PATH % value, "matches[0].path.value") for value in ("/%41", "/a%2eb", "/%5C", "/%00", "/.;a", "/a/..;b/c")),
        (HEADERS % "{name: Upgrade, value: a}", "matches[0].headers[0].name"),
        (HEADERS % "{name: transfer-encoding, type: RegularExpression, value: .*}", "matches[0].headers[0].name"),
        *(
            (HEADERS % f"{{name: a, value: {text}}}", "matches[0].headers[0].value")
            for text in ('" a"', '"a\\t"', '"\\r"')
        ),
        (QUERY % "{name: a&b, value: a}", "matches[0].queryParams[0].name"),
        *(
            (QUERY % f"{{name: a, value: '{text}'}}", "matches[0].queryParams[0].value")
            for text in ("a b", "é", "a#b", "a&b")
        ),
        *(
            (REWRITE % text, "filters[0].urlRewrite.path.replaceFullPath")
            for text in ("/a b", "/é", "/a?b", "/a#b", "/%4")
        ),
        *((REPLACE % text, "filters[0].urlRewrite.path.replacePrefixMatch") for text in ("/a?b", '/"', "/a|b", "/{a}")),
        *((REDIRECT % text, "filters[0].requestRedirect.path.replaceFullPath") for text in ("/a#b", "/a?b c", "/<a>")),
        (SET % '"a\\nb: c"', "filters[0].requestHeaderModifier.set[0].value"),
        (SET % '"a "', "filters[0].requestHeaderModifier.set[0].value"),
    ],
)
def test_what_envoy_cannot_do_rejects_the_route(rule: str, field: str) -> None:
    """What the API allows, but Envoy refuses, never matches or sends on as no server reads it."""
    parsed = _route(rule)
    assert parsed.object is None
    assert (_only(parsed).reason, _only(parsed).field) == ("UnsupportedValue", f"spec.rules[0].{field}")


@pytest.mark.parametrize(
    "rule",
    [
        "matches: [{method: TRACE}]",
        *(PATH % value for value in ("/%20", "/%c3%a9", "/%25", "/%5B", "/%60", "/...", "/.a;b", "/a;/b")),
        HEADERS % "{name: te, value: trailers}",
        HEADERS % '{name: a, value: "é %41 a\\tb"}',
        HEADERS % '{name: a, type: RegularExpression, value: " ?[\\x01-\\x7f]"}',
        QUERY % "{name: a, value: 'a%20b+c=d/?|\"'}",
        QUERY % "{name: a, type: RegularExpression, value: 'a b'}",
        *(REWRITE % text for text in ("", "a", "/%20", "/a;b/", "/..")),
        *(REDIRECT % text for text in ("/a?b=c?d", "?a")),
        SET % '"100% é,\\tb"',
        "filters: [{type: RequestHeaderModifier, requestHeaderModifier: {remove: [connection, content-length]}}]",
    ],
)
def test_what_is_next_to_it_is_served(rule: str) -> None:
    """No value is rejected that Envoy does serve as it is written."""
    _rule(rule)


def test_sizes_of_a_route() -> None:
    """The CRD's maxima: 16 rules, hostnames and backends, 64 matches in a rule, 128 in all; no empty rules."""
    api = f"{GATEWAY}/v1"
    _assert_invalid(_parse(api, "HTTPRoute", {"rules": [{}] * 17}), "spec.rules")
    _assert_invalid(_parse(api, "HTTPRoute", {"rules": []}), "spec.rules")
    _assert_invalid(_parse(api, "HTTPRoute", {"hostnames": ["a"] * 17}), "spec.hostnames")
    _assert_invalid(_parse(api, "HTTPRoute", {"hostnames": ["a..b"]}), "spec.hostnames[0]")
    backends = [{"name": "s", "port": 1}] * 17
    _assert_invalid(_parse(api, "HTTPRoute", {"rules": [{"backendRefs": backends}]}), "spec.rules[0].backendRefs")
    _assert_invalid(_parse(api, "HTTPRoute", {"rules": [{"matches": [{}] * 65}]}), "spec.rules[0].matches")
    _assert_invalid(_parse(api, "HTTPRoute", {"rules": [{"matches": [{}] * 64}] * 3}), "spec.rules")
    assert _parse(api, "HTTPRoute", {"rules": [{"matches": [{}] * 64}] * 2}).rejections == ()


def test_unknown_field_of_a_rule() -> None:
    """A typo is a warning with its path; the route is served without what it meant."""
    parsed = _route("{backendRef: [{name: s, port: 1}]}")
    assert isinstance(parsed.object, HTTPRoute)
    rejection = _only(parsed)
    assert (rejection.reason, rejection.level) == ("UnknownField", Level.WARNING)
    assert rejection.field == "spec.rules[0].backendRef"


# --- ReferenceGrant, BackendTrafficPolicy -----------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
def test_reference_grant(version: str) -> None:
    """Both ends, a target without a name standing for all; one source and one target at least."""
    spec = {
        "from": [{"group": GATEWAY, "kind": "HTTPRoute", "namespace": "a"}],
        "to": [{"group": "", "kind": "Service"}, {"group": INFERENCE_X, "kind": "InferencePool", "name": "p"}],
    }
    parsed = _parse(f"{GATEWAY}/{version}", "ReferenceGrant", spec)
    assert isinstance(parsed.object, ReferenceGrant)
    assert parsed.object.sources == ((GATEWAY, "HTTPRoute", "a"),)
    assert parsed.object.targets == (("", "Service", ""), (INFERENCE_X, "InferencePool", "p"))
    _assert_invalid(_parse(f"{GATEWAY}/{version}", "ReferenceGrant", spec | {"to": []}), "spec.to")


def _policy(spec: str) -> Parsed:
    return _parse("gateway.envoyproxy.io/v1alpha1", "BackendTrafficPolicy", spec)


@pytest.mark.parametrize("target", ["targetRef: {G}", "targetRefs: [{G}]"])
def test_traffic_policy(target: str) -> None:
    """One target or a list, and the four timeouts in seconds; those not given are None."""
    target = target.replace("{G}", f"{{group: {GATEWAY}, kind: Gateway, name: gw}}")
    parsed = _policy(f"{{{target}, timeout: {{http: {{requestTimeout: 1h, streamIdleTimeout: 0s}}}}}}")
    assert parsed.rejections == ()
    policy = parsed.object
    assert isinstance(policy, BackendTrafficPolicy)
    assert policy.targets == ((ObjectRef(GATEWAY, "Gateway", "default", "gw"), ""),)
    assert (policy.request_timeout, policy.stream_idle_timeout) == (3600.0, 0.0)
    assert (policy.connection_idle_timeout, policy.connect_timeout) == (None, None)


def test_rest_of_a_traffic_policy_is_ignored_with_warnings() -> None:
    """Every field of the policy that is not a timeout of ours is named; the timeouts are served."""
    parsed = _policy(f"""
      targetRef: {{group: {GATEWAY}, kind: HTTPRoute, name: r}}
      loadBalancer: {{type: Random}}
      retry: {{numRetries: 3}}
      timeout: {{tcp: {{connectTimeout: 3s}}, http: {{maxConnectionDuration: 1h, connectionIdleTimeout: 5m}}}}
    """)
    assert isinstance(parsed.object, BackendTrafficPolicy)
    assert (parsed.object.connect_timeout, parsed.object.connection_idle_timeout) == (3.0, 300.0)
    assert {each.field for each in parsed.rejections} == {
        "spec.loadBalancer",
        "spec.retry",
        "spec.timeout.http.maxConnectionDuration",
    }
    assert {(each.level, each.message) for each in parsed.rejections} == {(Level.WARNING, "not supported, ignored")}


@pytest.mark.parametrize("zero", ["0s", "0h0ms"])
def test_no_connect_timeout_is_not_served(zero: str) -> None:
    """Envoy refuses a cluster without one; the default is served, and the policy's other timeouts."""
    target = f"targetRef: {{group: {GATEWAY}, kind: Gateway, name: gw}}"
    parsed = _policy(f"{{{target}, timeout: {{tcp: {{connectTimeout: {zero}}}, http: {{requestTimeout: 0s}}}}}}")
    assert isinstance(parsed.object, BackendTrafficPolicy)
    assert (parsed.object.connect_timeout, parsed.object.request_timeout) == (None, 0.0)
    rejection = _only(parsed)
    assert (rejection.reason, rejection.level) == ("UnsupportedValue", Level.ERROR)
    assert rejection.field == "spec.timeout.tcp.connectTimeout"


def test_targets_of_a_traffic_policy() -> None:
    """A target of another kind is dropped and named; a policy without any target is refused."""
    parsed = _policy(f"targetRefs: [{{group: {GATEWAY}, kind: GRPCRoute, name: r}}]")
    assert isinstance(parsed.object, BackendTrafficPolicy)
    assert parsed.object.targets == ()
    assert (_only(parsed).reason, _only(parsed).field) == ("UnsupportedValue", "spec.targetRefs[0].kind")
    _assert_invalid(_policy("timeout: {}"), "spec.targetRefs")
