"""Small objects for tests, as they come out of the parser; `config` puts them in the order the index does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.tls_files import CERTS
from xds.index import Index
from xds.model import (
    CORE,
    DISCOVERY,
    ENVOY_GATEWAY,
    GATEWAY,
    INFERENCE,
    INFERENCE_X,
    LLM_D,
    AllowedRoutes,
    BackendRef,
    BackendTrafficPolicy,
    Config,
    Criticality,
    EndpointSlice,
    Filters,
    Gateway,
    GatewayClass,
    HTTPRoute,
    InferenceModel,
    InferenceModelRewrite,
    InferenceObjective,
    InferencePool,
    Listener,
    MatchType,
    Meta,
    Object,
    ObjectRef,
    ParentRef,
    PathMatch,
    Pod,
    ReferenceGrant,
    RewriteRule,
    RouteMatch,
    RouteRule,
    Secret,
    Service,
    ServicePort,
    SliceEndpoint,
)
from xds.resolve import CONTROLLER_NAMES

GROUPS = {
    "GatewayClass": GATEWAY,
    "Gateway": GATEWAY,
    "HTTPRoute": GATEWAY,
    "ReferenceGrant": GATEWAY,
    "BackendTrafficPolicy": ENVOY_GATEWAY,
    "Service": CORE,
    "Pod": CORE,
    "Secret": CORE,
    "EndpointSlice": DISCOVERY,
    "InferencePool": INFERENCE,
    "InferenceModel": INFERENCE_X,
    "InferenceModelRewrite": LLM_D,
    "InferenceObjective": LLM_D,
}
APP = {"app": "web"}


def config(*objects: Object) -> Config:
    """Every object given, the oldest first."""
    return Index({each.meta.ref: each for each in objects}).config()


def ref(kind: str, name: str, namespace: str = "default", group: str | None = None) -> ObjectRef:
    return ObjectRef(GROUPS[kind] if group is None else group, kind, namespace, name)


def meta(kind: str, name: str, namespace: str = "default", group: str | None = None, **kw: Any) -> Meta:
    return Meta(ref(kind, name, namespace, group), **kw)


# --- Gateway API ---


def gateway_class(name: str = "envoy", controller: str = CONTROLLER_NAMES[0]) -> GatewayClass:
    return GatewayClass(meta("GatewayClass", name, ""), controller)


def listener(
    name: str = "http", port: int = 8080, hostname: str = "", certificates: Sequence[str] = (), **allowed: Any
) -> Listener:
    """HTTPS if there are certificates: names of Secrets, of another namespace as `namespace/name`."""
    refs = tuple(ref("Secret", each.rpartition("/")[2], each.rpartition("/")[0] or "default") for each in certificates)
    field = "spec.listeners[0].tls.certificateRefs" if refs else ""
    return Listener(name, port, "HTTPS" if refs else "HTTP", hostname, AllowedRoutes(**allowed), refs, field)


def gateway(
    *listeners: Listener,
    name: str = "gw",
    namespace: str = "default",
    class_name: str = "envoy",
    created: str = "",
    groups: Sequence[str] = (),
) -> Gateway:
    about = meta("Gateway", name, namespace, created=created)
    return Gateway(about, class_name, listeners or (listener(),), tuple(groups))


def parent(name: str = "gw", section: str = "", port: int = 0, namespace: str = "default") -> ParentRef:
    return ParentRef(ref("Gateway", name, namespace), section, port)


def route(
    *rules: RouteRule,
    name: str = "route",
    namespace: str = "default",
    parents: Sequence[ParentRef] = (parent(),),
    hostnames: Sequence[str] = (),
    created: str = "",
) -> HTTPRoute:
    return HTTPRoute(meta("HTTPRoute", name, namespace, created=created), tuple(parents), tuple(hostnames), rules)


def backend(
    name: str = "web", kind: str = "Service", port: int = 80, weight: int = 1, namespace: str = "default", **kw: Any
) -> BackendRef:
    return BackendRef(
        ref(kind, name, namespace, kw.pop("group", None)), "spec.rules[0].backendRefs[0]", port, weight, **kw
    )


def prefix(path: str = "/", **kw: Any) -> RouteMatch:
    return RouteMatch(PathMatch(MatchType.PREFIX, path), **kw)


def exact(path: str, **kw: Any) -> RouteMatch:
    return RouteMatch(PathMatch(MatchType.EXACT, path), **kw)


def rule(*backends: BackendRef, matches: Sequence[RouteMatch] = (prefix(),), **kw: Any) -> RouteRule:
    """A rule for these backends; with none given, and no redirect among its filters, for Service `web`."""
    if not backends and kw.get("filters", Filters()).redirect is None:
        backends = (backend(),)
    return RouteRule(tuple(matches), backends=backends, **kw)


def grant(
    source_namespace: str, namespace: str, kind: str = "Service", name: str = "", source: str = "HTTPRoute"
) -> ReferenceGrant:
    referrer = (GATEWAY, source, source_namespace)
    return ReferenceGrant(meta("ReferenceGrant", "grant", namespace), (referrer,), ((GROUPS[kind], kind, name),))


def policy(*targets: tuple[ObjectRef, str], name: str = "policy", created: str = "", **kw: Any) -> BackendTrafficPolicy:
    return BackendTrafficPolicy(meta("BackendTrafficPolicy", name, created=created), targets, **kw)


def secret(name: str = "cert", of: str = "first", namespace: str = "default") -> Secret:
    """A Secret with one of the certificates in tests/certs."""
    pair = (CERTS / f"{of}.pem").read_bytes(), (CERTS / f"{of}.key").read_bytes()
    return Secret(meta("Secret", name, namespace), *pair)


# --- backends ---


def service(
    name: str = "web",
    namespace: str = "default",
    selector: Mapping[str, str] | None = None,
    target: int | str = 8000,
    ports: Sequence[ServicePort] = (),
) -> Service:
    chosen = APP if selector is None else selector
    return Service(meta("Service", name, namespace), tuple(ports) or (ServicePort("", 80, target),), chosen)


def pod(
    name: str,
    ip: str,
    namespace: str = "default",
    *,
    ready: bool = True,
    deleting: bool = False,
    ports: Mapping[str, int] | None = None,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> Pod:
    about = meta("Pod", name, namespace, labels=APP if labels is None else labels, annotations=annotations or {})
    return Pod(about, ip, ready, deleting, ports or {})


def pool(
    name: str = "llm",
    namespace: str = "default",
    selector: Mapping[str, str] | None = None,
    ports: Sequence[int] = (8000,),
    group: str = INFERENCE,
    **kw: Any,
) -> InferencePool:
    return InferencePool(
        meta("InferencePool", name, namespace, group), APP if selector is None else selector, tuple(ports), **kw
    )


def inference_model(
    name: str,
    model_name: str = "m",
    *targets: tuple[str, int],
    of: str = "llm",
    criticality: Criticality = Criticality.STANDARD,
    **kw: Any,
) -> InferenceModel:
    about = meta("InferenceModel", name, **kw)
    return InferenceModel(about, model_name, criticality, targets, ref("InferencePool", of, group=INFERENCE_X))


def rewrite(name: str, *rules: RewriteRule, of: str = "llm", **kw: Any) -> InferenceModelRewrite:
    return InferenceModelRewrite(meta("InferenceModelRewrite", name, **kw), rules, ref("InferencePool", of))


def rewrite_rule(*models: str, targets: Sequence[tuple[str, int]] = ()) -> RewriteRule:
    return RewriteRule(models, tuple(targets))


def objective(name: str, priority: int, of: str = "llm", **kw: Any) -> InferenceObjective:
    return InferenceObjective(meta("InferenceObjective", name, **kw), priority, ref("InferencePool", of))


def endpoint_slice(
    *endpoints: SliceEndpoint, name: str = "web-1", of: str = "web", ports: Mapping[str, int] | None = None
) -> EndpointSlice:
    return EndpointSlice(meta("EndpointSlice", name), of, {"": 8000} if ports is None else ports, endpoints)


def entry(*addresses: str, pod: str = "", ready: bool = True, terminating: bool = False) -> SliceEndpoint:
    return SliceEndpoint(addresses, ready, terminating, pod)
