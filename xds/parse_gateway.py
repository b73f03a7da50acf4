"""GatewayClass, Gateway, ReferenceGrant and Envoy Gateway's BackendTrafficPolicy.

Schemas: the CRDs of kubernetes-sigs/gateway-api v1.6.1 (standard channel), with the rules they state in CEL, and
`BackendTrafficPolicy` of envoyproxy/gateway.
"""

from __future__ import annotations

import re

from xds.fields import (
    GROUP,
    HOSTNAME,
    KIND,
    LABEL_VALUE,
    MAP_KEY,
    NAME,
    NAMESPACE,
    OBJECT_NAME,
    Reader,
    Text,
    describe,
)
from xds.model import (
    CORE,
    GATEWAY,
    ROUTE_KINDS,
    AllowedRoutes,
    BackendTrafficPolicy,
    ConditionType,
    Gateway,
    GatewayClass,
    Listener,
    Meta,
    ObjectRef,
    Problem,
    ReferenceGrant,
    Requirement,
)

PROTOCOLS = ("HTTP", "HTTPS")  # of listeners; their case does not count (Gateway API's ProtocolType)
MAX_TARGETS = 64  # of one policy; Envoy Gateway sets no limit, a Gateway has as many listeners

NODES_ANNOTATION = "vllm-xds/nodes"  # on a Gateway: node.cluster or node.id of the Envoys it is for
MAX_NODES = 16  # names in one annotation

_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,252}")
_CONTROLLER = Text("a domain/path", 253, re.compile(r"[a-z0-9.-]+/[A-Za-z0-9/\-._~%!$&'()*+,;=:]+"))
_ADDRESS = Text("an address or its type", 253, shortest=0)
_PROTOCOL = Text("a protocol", 255, re.compile(r"[A-Za-z0-9./-]+"))


def read_gateway_class(document: Reader, meta: Meta) -> GatewayClass:
    spec = document.child("spec")
    spec.skip("description")
    return GatewayClass(meta, spec.text("controllerName", _CONTROLLER))


def read_gateway(document: Reader, meta: Meta) -> Gateway:
    """A listener that can not be served as it is written has its problems with it; the others are served."""
    spec = document.child("spec")
    if spec.child("infrastructure").get("parametersRef") is not None:
        message = "no kind of parameters is supported"
        raise spec.child("infrastructure").error("parametersRef", message, "InvalidParameters")
    readers = spec.children("listeners", most=64, least=1)
    # Whoever asks for clients' certificates does not want clients without.
    frontend = spec.child("tls").get("frontend") is not None
    listeners = tuple(_read_listener(reader, meta, frontend=frontend) for reader in readers)
    if len({each.name for each in listeners}) < len(listeners):
        raise spec.error("listeners", "expected names that differ")
    if len({(each.port, each.protocol, each.hostname) for each in listeners}) < len(listeners):
        raise spec.error("listeners", "expected combinations of port, protocol and hostname that differ")
    class_name = spec.text("gatewayClassName", OBJECT_NAME)
    addresses = tuple(_read_address(each) for each in spec.children("addresses", 16))
    return Gateway(meta, class_name, listeners, _read_groups(document, meta), addresses)


def _read_address(reader: Reader) -> tuple[str, str]:
    kind = reader.text("type", _ADDRESS, "IPAddress")
    if kind not in ("IPAddress", "Hostname"):
        raise reader.error("type", f"expected IPAddress or Hostname, found {describe(kind)}", "UnsupportedAddress")
    return kind, reader.text("value", _ADDRESS, "")


def _read_groups(document: Reader, meta: Meta) -> tuple[str, ...]:
    """NODES_ANNOTATION. A wrong one costs the object: served without it, all Envoys would have it."""
    text = meta.annotations.get(NODES_ANNOTATION)
    if text is None:
        return ()
    names = sorted({name.strip() for name in text.split(",")})
    if len(names) > MAX_NODES or not all(_NODE.fullmatch(name) for name in names):
        message = f"expected 1 to {MAX_NODES} names of letters, digits and ._:/- with commas, found {describe(text)}"
        raise document.error(f"metadata.annotations[{NODES_ANNOTATION}]", message)
    return tuple(names)


def _read_listener(reader: Reader, meta: Meta, *, frontend: bool) -> Listener:
    name = reader.text("name", NAME)
    port = reader.port("port")
    protocol = reader.text("protocol", _PROTOCOL)
    hostname = reader.text("hostname", HOSTNAME, "")
    if protocol.upper() not in PROTOCOLS:
        reader.skip()
        message = f"expected HTTP or HTTPS, found {describe(protocol)}; listener {name} is not served"
        problem = Problem.of(ConditionType.ACCEPTED, reader.reject("protocol", message, "UnsupportedProtocol"))
        return Listener(name, port, protocol, hostname, problems=(problem,))
    protocol = protocol.upper()
    certificates: tuple[ObjectRef, ...] = ()
    problems: list[Problem] = []
    if protocol == "HTTPS":
        certificates = _read_certificates(reader, name, meta.ref.namespace, problems, frontend=frontend)
    elif reader.get("tls") is not None:
        raise reader.error("tls", "expected no TLS on an HTTP listener")
    allowed = _read_allowed(reader.child("allowedRoutes"), problems)
    field = reader.at("tls.certificateRefs") if certificates else ""
    return Listener(name, port, protocol, hostname, allowed, certificates, field, tuple(problems))


def _read_certificates(
    reader: Reader, name: str, namespace: str, problems: list[Problem], *, frontend: bool
) -> tuple[ObjectRef, ...]:
    """The Secrets of an HTTPS listener, with a rejection and a problem for one that asks for what is not served."""
    tls = reader.child("tls")
    tls.skip("options")
    mode = tls.choice("mode", ("Terminate", "Passthrough"), "Terminate")
    refs = tuple(
        ObjectRef(
            ref.text("group", GROUP, CORE),
            ref.text("kind", KIND, "Secret"),
            ref.text("namespace", NAMESPACE, namespace),
            ref.text("name", OBJECT_NAME),
        )
        for ref in tls.children("certificateRefs", 64)
    )
    if mode == "Passthrough":
        message = f"expected Terminate, found Passthrough; listener {name} is not served"
        problems.append(Problem.of(ConditionType.ACCEPTED, tls.reject("mode", message, "UnsupportedValue")))
    elif frontend or tls.get("frontendValidation") is not None:
        message = f"clients' certificates are not validated here; listener {name} is not served"
        rejection = tls.reject("frontendValidation", message, "UnsupportedValue")
        problems.append(Problem.of(ConditionType.ACCEPTED, rejection))
    elif not refs:
        message = f"expected at least one Secret; listener {name} is not served"
        rejection = tls.reject("certificateRefs", message, "InvalidCertificateRef")
        problems.append(Problem.of(ConditionType.RESOLVED_REFS, rejection))
    return refs


def _read_allowed(reader: Reader, problems: list[Problem]) -> AllowedRoutes:
    namespaces = reader.child("namespaces")
    allowed = namespaces.choice("from", ("All", "Selector", "Same", "None"), "Same")
    selector = namespaces.child("selector")
    labels = selector.texts_by_key("matchLabels", 64, LABEL_VALUE)
    readers = reader.children("kinds", 8)
    kinds = tuple((kind.text("group", GROUP, GATEWAY), kind.text("kind", KIND)) for kind in readers)
    for kind, (group, name) in zip(readers, kinds, strict=True):
        if (group, name) not in ROUTE_KINDS:
            message = f"expected HTTPRoute, found {describe(name)} of group {describe(group)}; no such route is served"
            problems.append(Problem.of(ConditionType.RESOLVED_REFS, kind.warn("kind", message, "InvalidRouteKinds")))
    requirements = tuple(_read_requirement(each) for each in selector.children("matchExpressions", 64))
    return AllowedRoutes(allowed, labels, kinds, requirements)


def _read_requirement(reader: Reader) -> Requirement:
    operator = reader.choice("operator", ("In", "NotIn", "Exists", "DoesNotExist"))
    values = reader.texts("values", 64, LABEL_VALUE)
    if bool(values) != operator.endswith("In"):
        raise reader.error("values", f"expected {'some' if operator.endswith('In') else 'none'} for {operator}")
    return Requirement(reader.text("key", MAP_KEY), operator, values)


def read_reference_grant(document: Reader, meta: Meta) -> ReferenceGrant:
    spec = document.child("spec")
    sources = tuple(
        (source.text("group", GROUP), source.text("kind", KIND), source.text("namespace", NAMESPACE))
        for source in spec.children("from", most=16, least=1)
    )
    targets = tuple(
        (target.text("group", GROUP), target.text("kind", KIND), target.text("name", OBJECT_NAME, ""))
        for target in spec.children("to", most=16, least=1)
    )
    return ReferenceGrant(meta, sources, targets)


def read_traffic_policy(document: Reader, meta: Meta) -> BackendTrafficPolicy:
    """Its HTTP and TCP timeouts; every other field of the policy is ignored with a warning."""
    spec = document.child("spec")
    timeout = spec.child("timeout")
    http, tcp = timeout.child("http"), timeout.child("tcp")
    readers = (
        [spec.child("targetRef")] if spec.get("targetRef") is not None else spec.children("targetRefs", MAX_TARGETS)
    )
    if not readers and spec.get("targetSelectors") is None:
        raise spec.error("targetRefs", "expected at least one target")
    return BackendTrafficPolicy(
        meta,
        tuple(target for reader in readers if (target := _read_target(reader, meta.ref.namespace))),
        request_timeout=http.duration("requestTimeout"),
        stream_idle_timeout=http.duration("streamIdleTimeout"),
        connection_idle_timeout=http.duration("connectionIdleTimeout"),
        connect_timeout=_read_connect_timeout(tcp),
    )


def _read_connect_timeout(tcp: Reader) -> float | None:
    """0 would be no timeout, for which Envoy has no word."""
    timeout = tcp.duration("connectTimeout")
    if timeout == 0:
        tcp.reject("connectTimeout", "expected more than 0s; the default is served", "UnsupportedValue")
        return None
    return timeout


def _read_target(reader: Reader, namespace: str) -> tuple[ObjectRef, str] | None:
    group, kind = reader.text("group", GROUP), reader.text("kind", KIND)
    name, section = reader.text("name", OBJECT_NAME), reader.text("sectionName", NAME, "")
    if (group, kind) not in ((GATEWAY, "Gateway"), (GATEWAY, "HTTPRoute")):
        reader.reject(
            "kind", f"expected Gateway or HTTPRoute, found {describe(kind)}; not applied to it", "UnsupportedValue"
        )
        return None
    return ObjectRef(group, kind, namespace, name), section
