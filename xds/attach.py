"""Which Gateways are ours, which of their listeners an Envoy can have, and which HTTPRoutes attach to them (pure).

    GatewayClasses -> Gateways of ours
    Gateways       -> distinct listeners (among the Gateways of one group of Envoys)
    Secrets        -> certificates of HTTPS listeners
    HTTPRoutes     -> listeners (sectionName, port, allowedRoutes, hostname intersection)

A route attaches to what a Gateway declares, served or not: its status is about the route, the listener's about the
listener. What is found wrong is told to `Findings`, once, for the log as for the statuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from xds.backends import granted, is_granted
from xds.hostnames import ANY_HOST, covers, wider
from xds.index import MAX_REJECTIONS, TOO_MANY
from xds.model import (
    CORE,
    GATEWAY,
    ROUTE_KINDS,
    ConditionType,
    Config,
    Gateway,
    HTTPRoute,
    Level,
    Listener,
    ObjectRef,
    ParentRef,
    Problem,
    Rejection,
    Requirement,
    Secret,
)

# Listeners that routes attach to, and hostnames under which they do, of all routes: some 70 MB. A few megabytes of
# objects can have hundreds of times as many: each parentRef of a route may reach each of a Gateway's listeners.
MAX_ATTACHED = 1_000_000
NAME_LABEL = "kubernetes.io/metadata.name"  # a label that every namespace has, told or not

Owned = tuple[Gateway, Listener]
ListenerKey = tuple[ObjectRef, str]  # Gateway and listener name


def key_of(owned: Owned) -> ListenerKey:
    return owned[0].meta.ref, owned[1].name


@dataclass(slots=True)
class Findings:
    """What was found while one Config is resolved (mutable, one for each resolution).

    `controllers` are those of the Gateways that are ours, by their class. `problems` are those of listeners beside the
    ones they were parsed with, `served` the listeners that some Envoy has, `gateways` the problems of whole Gateways,
    `dropped` of each route the first rule that there was no room for.
    """

    rejections: dict[Rejection, None] = field(default_factory=dict)
    controllers: dict[ObjectRef, str] = field(default_factory=dict)
    gateways: dict[ObjectRef, list[Problem]] = field(default_factory=dict)
    problems: dict[ListenerKey, dict[Problem, None]] = field(default_factory=dict)
    served: set[ListenerKey] = field(default_factory=set)
    dropped: dict[ObjectRef, Problem] = field(default_factory=dict)

    def reject(
        self, owner: Gateway | HTTPRoute, reason: str, message: str, where: str, level: Level = Level.ERROR
    ) -> Rejection:
        """Note why `owner`, or the part of it at the path `where`, is not served as written."""
        rejection = Rejection(owner.meta.ref, reason, message, where, owner.meta.source, level)
        self.note(rejection)
        return rejection

    def note(self, rejection: Rejection) -> None:
        """Each once, in the order they were found, up to a bound."""
        if len(self.rejections) < MAX_REJECTIONS:
            self.rejections[rejection] = None
        elif rejection not in self.rejections:
            self.rejections[TOO_MANY] = None

    def blame(self, owned: Owned, problem: Problem) -> None:
        self.problems.setdefault(key_of(owned), {})[problem] = None


@dataclass(frozen=True, slots=True)
class Attachment:
    """One parentRef of a route that is a Gateway of ours, and the listeners it reaches there, each under hostnames.

    A `problem` is why it reaches none. `controller` is that of the Gateway's class.
    """

    route: HTTPRoute
    parent: ParentRef
    gateway: Gateway
    controller: str
    listeners: tuple[tuple[Listener, tuple[str, ...]], ...] = ()
    problem: Problem | None = None


# --- Gateways and their listeners -------------------------------------------------------------------------------------


def our_gateways(config: Config, controllers: frozenset[str], findings: Findings) -> Iterator[Gateway]:
    """Those of our classes, oldest first."""
    classes = {c.meta.ref.name: c.controller_name for c in config.gateway_classes}
    for gateway in config.gateways:
        controller = classes.get(gateway.class_name)
        if controller in controllers:
            findings.controllers[gateway.meta.ref] = str(controller)
            yield gateway
        elif controller is None:
            message = f"GatewayClass {gateway.class_name} does not exist"
            findings.reject(gateway, "GatewayClassNotFound", message, "spec.gatewayClassName")
        else:
            message = f"GatewayClass {gateway.class_name} belongs to the controller {controller}: left to it"
            findings.reject(gateway, "OtherController", message, "spec.gatewayClassName", Level.WARNING)


def distinct_listeners(gateways: Iterable[Gateway], findings: Findings) -> Iterator[Owned]:
    """The listeners of one group of Envoys that do not conflict.

    Of two Gateways the older keeps what it has: one that repeats its port and hostname (HostnameConflict), or asks for
    another protocol there (ProtocolConflict), is left out. Within a Gateway there is no winner: two protocols on one
    port cost both.
    """
    taken: dict[tuple[int, str], str] = {}
    protocols: dict[int, str] = {}
    for gateway in gateways:
        own: dict[int, set[str]] = {}
        valid = [(i, each) for i, each in enumerate(gateway.listeners) if _is_acceptable(each)]
        for _, listener in valid:
            own.setdefault(listener.port, set()).add(listener.protocol)
        for i, listener in valid:
            where = f"spec.listeners[{i}]"
            host = listener.hostname or "any hostname"
            name = f"{gateway.meta.ref} listener {listener.name}"
            reason, owner = "ProtocolConflict", name
            if len(own[listener.port]) > 1:
                message = f"port {listener.port} is one of {' and '.join(sorted(own[listener.port]))} here"
                where += ".protocol"
            elif (protocol := protocols.setdefault(listener.port, listener.protocol)) != listener.protocol:
                message = f"port {listener.port} is one of {protocol} already"
                where += ".protocol"
            elif (owner := taken.setdefault((listener.port, listener.hostname), name)) == name:
                yield gateway, listener
                continue
            else:
                reason = "HostnameConflict"
                message = f"port {listener.port} for {host} is served by {owner} already"
            rejection = findings.reject(gateway, reason, message, where)
            findings.blame((gateway, listener), Problem.of(ConditionType.CONFLICTED, rejection))


def _is_acceptable(listener: Listener) -> bool:
    return not any(problem.condition is ConditionType.ACCEPTED for problem in listener.problems)


def overlapping(listeners: Iterable[Owned]) -> Iterator[tuple[Owned, Owned]]:
    """Of the HTTPS listeners of one port those whose hostname covers another's or is covered, with one such other."""
    by_host = {listener.hostname or ANY_HOST: (gateway, listener) for gateway, listener in listeners}
    for host, narrow in by_host.items():
        for wide in wider(host):
            if wide != host and wide in by_host:
                yield narrow, by_host[wide]
                yield by_host[wide], narrow


class Certificates:
    """The Secrets of HTTPS listeners; each listener's are looked for once (mutable, one for each resolution)."""

    def __init__(self, config: Config, findings: Findings) -> None:
        self._secrets = {secret.meta.ref: secret for secret in config.secrets}
        self._grants = granted(config)
        self._findings = findings
        self._found: dict[ListenerKey, tuple[ObjectRef, ...]] = {}

    def of(self, owned: Owned) -> tuple[ObjectRef, ...]:
        """Those that exist and may be used; for each other one there is a rejection."""
        key = key_of(owned)
        if key not in self._found:
            self._found[key] = tuple(self._valid(owned))
        return self._found[key]

    def _valid(self, owned: Owned) -> Iterator[ObjectRef]:
        gateway, listener = owned
        for i, ref in enumerate(listener.certificates):
            namespace = gateway.meta.ref.namespace
            reason = "InvalidCertificateRef"
            if (ref.group, ref.kind) != (CORE, "Secret"):
                message = f"{ref.kind} of group {ref.group!r} is not a Secret"
            elif ref.namespace != namespace and not is_granted(self._grants, (GATEWAY, "Gateway", namespace), ref):
                reason = "RefNotPermitted"
                message = f"no ReferenceGrant in {ref.namespace} lets Gateways of {namespace} use {ref}"
            elif ref not in self._secrets:
                message = f"{ref} does not exist, or is no certificate with its key"
            else:
                yield ref
                continue
            rejection = self._findings.reject(gateway, reason, message, f"{listener.field}[{i}]")
            self._findings.blame(owned, Problem.of(ConditionType.RESOLVED_REFS, rejection))

    def used(self) -> tuple[Secret, ...]:
        """The Secrets of all listeners that were asked for, sorted."""
        refs = {ref for found in self._found.values() for ref in found}
        return tuple(self._secrets[ref] for ref in sorted(refs))


# --- routes to listeners ----------------------------------------------------------------------------------------------


def attachments(config: Config, gateways: Iterable[Gateway], findings: Findings) -> list[Attachment]:
    """Every parentRef of every route that is one of these Gateways, in order."""
    ours = {gateway.meta.ref: gateway for gateway in gateways}
    known = {each.meta.ref for each in (*config.gateways, *(refused.object for refused in config.refused))}
    labels = {each.meta.ref.name: each.meta.labels for each in config.namespaces}
    found: list[Attachment] = []
    room = MAX_ATTACHED
    for route in config.http_routes:
        for i, parent in enumerate(route.parents):
            gateway = ours.get(parent.ref)
            if gateway is not None and room <= 0:
                found.append(_no_room(route, i, parent, gateway, findings))
            elif attachment := _attach(route, i, parent, ours, known, labels, findings):
                room -= sum(1 + len(hosts) for _, hosts in attachment.listeners)
                found.append(attachment)
    return found


def _no_room(route: HTTPRoute, index: int, parent: ParentRef, gateway: Gateway, findings: Findings) -> Attachment:
    message = f"other routes attach to {MAX_ATTACHED} listeners and hostnames or more: this one is not attached"
    rejection = findings.reject(route, "TooManyRoutes", message, f"spec.parentRefs[{index}]")
    problem = Problem.of(ConditionType.ACCEPTED, rejection)
    return Attachment(route, parent, gateway, findings.controllers[parent.ref], problem=problem)


def _attach(
    route: HTTPRoute,
    index: int,
    parent: ParentRef,
    ours: Mapping[ObjectRef, Gateway],
    known: set[ObjectRef],
    labels: Mapping[str, Mapping[str, str]],
    findings: Findings,
) -> Attachment | None:
    where = f"spec.parentRefs[{index}]"
    if (parent.ref.group, parent.ref.kind) != (GATEWAY, "Gateway"):
        return None
    gateway = ours.get(parent.ref)
    if gateway is None:
        if parent.ref not in known:  # else it is another controller's, or rejected as a Gateway already
            findings.reject(route, "NoMatchingParent", f"{parent.ref} does not exist", where)
        return None
    named = [each for each in gateway.listeners if _is_named(parent, each)]
    allowed = [each for each in named if _allows(gateway, each, route, labels)]
    reached = [(each, hosts) for each in allowed if (hosts := tuple(_hostnames(each, route)))]
    controller = findings.controllers[parent.ref]
    if reached:
        return Attachment(route, parent, gateway, controller, tuple(reached))
    if not named:
        section = f" listener {parent.section}" if parent.section else ""
        port = f" port {parent.port}" if parent.port else ""
        rejection = findings.reject(route, "NoMatchingParent", f"{parent.ref} has no{section}{port}", where)
    elif not allowed:
        message = f"allowedRoutes of {parent.ref} admit no HTTPRoute of namespace {route.meta.ref.namespace}"
        rejection = findings.reject(route, "NotAllowedByListeners", message, where)
    else:
        message = f"no hostname of the route ({', '.join(route.hostnames)}) is one of {parent.ref}'s listeners"
        rejection = findings.reject(route, "NoMatchingListenerHostname", message, "spec.hostnames")
    return Attachment(route, parent, gateway, controller, problem=Problem.of(ConditionType.ACCEPTED, rejection))


def _is_named(parent: ParentRef, listener: Listener) -> bool:
    return parent.section in ("", listener.name) and parent.port in (0, listener.port)


def supported_kinds(listener: Listener) -> tuple[tuple[str, str], ...]:
    """The (group, kind) of routes that may attach: those it names, of those that its protocol carries."""
    if listener.protocol not in ("HTTP", "HTTPS"):
        return ()
    kinds = listener.allowed.kinds or ROUTE_KINDS
    return tuple(kind for kind in dict.fromkeys(kinds) if kind in ROUTE_KINDS)


def _allows(gateway: Gateway, listener: Listener, route: HTTPRoute, labels: Mapping[str, Mapping[str, str]]) -> bool:
    allowed = listener.allowed
    if (route.meta.ref.group, route.meta.ref.kind) not in supported_kinds(listener):
        return False
    namespace = route.meta.ref.namespace
    match allowed.namespaces_from:
        case "All":
            return True
        case "Same":
            return namespace == gateway.meta.ref.namespace
        case "Selector":
            has = {**labels.get(namespace, {}), NAME_LABEL: namespace}
            if not allowed.selector and not allowed.requirements:
                return False
            return allowed.selector.items() <= has.items() and all(_holds(each, has) for each in allowed.requirements)
        case _:
            return False


def _holds(requirement: Requirement, labels: Mapping[str, str]) -> bool:
    """As Kubernetes has it: NotIn holds too where the label is not there."""
    value = labels.get(requirement.key)
    match requirement.operator:
        case "In":
            return value in requirement.values
        case "NotIn":
            return value not in requirement.values
        case "Exists":
            return value is not None
        case _:
            return value is None


def _hostnames(listener: Listener, route: HTTPRoute) -> Iterator[str]:
    """The intersection of the listener's hostname with the route's, each as specific as both."""
    if not route.hostnames:
        yield listener.hostname or ANY_HOST
    for hostname in route.hostnames:
        if not listener.hostname or covers(listener.hostname, hostname):
            yield hostname
        elif covers(hostname, listener.hostname):
            yield listener.hostname
