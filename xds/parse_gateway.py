"""GatewayClass, Gateway, ReferenceGrant and Envoy Gateway's BackendTrafficPolicy.

Schemas: the CRDs of kubernetes-sigs/gateway-api v1.6.1 (standard channel), with the rules they state in CEL, and
`BackendTrafficPolicy` of envoyproxy/gateway.
"""

from __future__ import annotations

import re

from xds.fields import GROUP, HOSTNAME, KIND, LABEL_VALUE, NAME, NAMESPACE, OBJECT_NAME, Reader, Text, describe
from xds.model import (
    CORE,
    GATEWAY,
    AllowedRoutes,
    BackendTrafficPolicy,
    Gateway,
    GatewayClass,
    Listener,
    Meta,
    ObjectRef,
    ReferenceGrant,
)

MAX_TARGETS = 64  # of one policy; Envoy Gateway sets no limit, a Gateway has as many listeners

NODES_ANNOTATION = "vllm-xds/nodes"  # on a Gateway: node.cluster or node.id of the Envoys it is for
MAX_NODES = 16  # names in one annotation

_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,252}")
_CONTROLLER = Text("a domain/path", 253, re.compile(r"[a-z0-9.-]+/[A-Za-z0-9/\-._~%!$&'()*+,;=:]+"))
_PROTOCOL = Text("a protocol", 255, re.compile(r"[A-Za-z0-9./-]+"))


def read_gateway_class(document: Reader, meta: Meta) -> GatewayClass:
    spec = document.child("spec")
    spec.skip("description")
    return GatewayClass(meta, spec.text("controllerName", _CONTROLLER))


def read_gateway(document: Reader, meta: Meta) -> Gateway:
    """A listener that can not be served as it is written is dropped with a rejection; the others are served."""
    spec = document.child("spec")
    readers = spec.children("listeners", most=64, least=1)
    # Whoever asks for clients' certificates does not want clients without.
    frontend = spec.child("tls").get("frontend") is not None
    listeners = [listener for reader in readers if (listener := _read_listener(reader, meta, frontend=frontend))]
    names = [reader.text("name", NAME) for reader in readers]
    if len(set(names)) < len(names):
        raise spec.error("listeners", "expected names that differ")
    if len({(each.port, each.hostname) for each in listeners}) < len(listeners):
        raise spec.error("listeners", "expected combinations of port, protocol and hostname that differ")
    return Gateway(meta, spec.text("gatewayClassName", OBJECT_NAME), tuple(listeners), _read_groups(document, meta))


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


def _read_listener(reader: Reader, meta: Meta, *, frontend: bool) -> Listener | None:
    name = reader.text("name", NAME)
    port = reader.port("port")
    protocol = reader.text("protocol", _PROTOCOL)
    certificates: tuple[ObjectRef, ...] | None = ()
    if protocol not in ("HTTP", "HTTPS"):
        reader.skip()
        message = f"expected HTTP or HTTPS, found {describe(protocol)}; listener {name} is not served"
        reader.reject("protocol", message, "UnsupportedProtocol")
        return None
    if protocol == "HTTPS":
        certificates = _read_certificates(reader, name, meta.ref.namespace, frontend=frontend)
    elif reader.get("tls") is not None:
        raise reader.error("tls", "expected no TLS on an HTTP listener")
    hostname, allowed = reader.text("hostname", HOSTNAME, ""), _read_allowed(reader.child("allowedRoutes"))
    if certificates is None:
        return None
    field = reader.at("tls.certificateRefs") if certificates else ""
    return Listener(name, port, protocol, hostname, allowed, certificates, field)


def _read_certificates(reader: Reader, name: str, namespace: str, *, frontend: bool) -> tuple[ObjectRef, ...] | None:
    """The Secrets of an HTTPS listener; None, with a rejection noted, for one that asks for what is not served."""
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
        tls.reject("mode", f"expected Terminate, found Passthrough; listener {name} is not served", "UnsupportedValue")
        return None
    if frontend or tls.get("frontendValidation") is not None:
        message = f"clients' certificates are not validated here; listener {name} is not served"
        tls.reject("frontendValidation", message, "UnsupportedValue")
        return None
    if not refs:
        message = f"expected at least one Secret; listener {name} is not served"
        tls.reject("certificateRefs", message, "InvalidCertificateRef")
        return None
    return refs


def _read_allowed(reader: Reader) -> AllowedRoutes:
    namespaces = reader.child("namespaces")
    allowed = namespaces.choice("from", ("All", "Selector", "Same", "None"), "Same")
    selector = namespaces.child("selector")
    labels = selector.texts_by_key("matchLabels", 64, LABEL_VALUE)
    kinds = tuple((kind.text("group", GROUP, GATEWAY), kind.text("kind", KIND)) for kind in reader.children("kinds", 8))
    if allowed == "Selector" and selector.get("matchExpressions"):
        # Without its expressions the selector would let more namespaces in than its author wrote.
        selector.reject("matchExpressions", "not supported; no route is allowed", "UnsupportedValue")
        allowed = "None"
    return AllowedRoutes(allowed, labels, kinds)


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
