"""Config -> Topology: Gateway API's rules of attachment, precedence and failure (pure).

    Gateways  -> groups of Envoys            (the annotation vllm-xds/nodes; what follows is done for each group)
    Gateways  -> ports and their hostnames   (same port: listeners merge, told apart by hostname)
    Secrets   -> certificates of HTTPS listeners
    HTTPRoutes -> attach to listeners        (sectionName, port, allowedRoutes, hostname intersection)
    matches   -> order within a virtual host (Gateway API precedence)
    backends  -> clusters and their endpoints (xds/backends.py)

What can not be served as written becomes a Rejection and, where the API says so, an answer: 500 for an invalid
backendRef, 404 for no match. https://gateway-api.sigs.k8s.io/reference/spec/#httproute
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from xds.backends import Backends, granted, is_granted
from xds.hostnames import ANY_HOST, Attached, Port, Room, covers, specificity
from xds.index import MAX_REJECTIONS, TOO_MANY
from xds.model import (
    CORE,
    GATEWAY,
    BackendTrafficPolicy,
    Cluster,
    Config,
    Filters,
    Forward,
    Gateway,
    HTTPRoute,
    Level,
    Listener,
    MatchType,
    Namespace,
    ObjectRef,
    ParentRef,
    PortListener,
    Rejection,
    RequestRedirect,
    Respond,
    Route,
    RouteMatch,
    Secret,
    Strategy,
    TlsChain,
    Topology,
    VirtualHost,
)
from xds.models import pool_models

# Controller names whose GatewayClasses are served: our own, and the one self-managed Envoys are usually declared with.
CONTROLLER_NAMES = ("vllm-xds.dev/gateway-controller", "gateway.envoyproxy.io/gatewayclass-controller")

MAX_GROUPS = 100  # groups of Envoys: some milliseconds of each change for each one
# Routes of all virtual hosts together: a millisecond each to translate, kilobytes each in Envoy. A rule is there once
# for each match, listener and hostname, and again in each virtual host its hostname covers: few objects make millions.
MAX_ROUTES = 50_000


class _Rejections:
    """Each once, in the order they were found, up to a bound (mutable)."""

    def __init__(self, rejections: Iterable[Rejection]) -> None:
        self._found: dict[Rejection, None] = {}
        for rejection in rejections:
            self.append(rejection)

    def append(self, rejection: Rejection) -> None:
        if len(self._found) < MAX_REJECTIONS:
            self._found[rejection] = None
        elif rejection not in self._found:
            self._found[TOO_MANY] = None

    def all(self) -> tuple[Rejection, ...]:
        return tuple(self._found)


def resolve(config: Config, controller_names: Iterable[str] = CONTROLLER_NAMES) -> Topology:
    """What Envoy shall do for this Config, with every reason why a part of it is not done."""
    models, conflicts = pool_models(config)
    rejections = _Rejections(conflicts)
    gateways = list(_our_gateways(config, frozenset(controller_names), rejections))
    groups = _groups(gateways, rejections)
    backends = Backends(config, models)
    actions = _Actions(config, backends, rejections)
    certificates = _Certificates(config, rejections)
    room = Room(MAX_ROUTES)
    listeners: list[PortListener] = []
    for group in ("", *groups):
        members = [gateway for gateway in gateways if not gateway.groups or group in gateway.groups]
        listeners += _ports(group, members, config, actions, certificates, rejections, room)
    clusters = tuple(backends.clusters[name] for name in sorted(backends.clusters))
    return Topology(tuple(listeners), clusters, rejections.all(), groups, certificates.used())


# --- gateways and listeners -------------------------------------------------------------------------------------------


def _groups(gateways: list[Gateway], rejections: _Rejections) -> tuple[str, ...]:
    """The groups of Envoys that Gateways name; each costs a resolution of its own, so there is a bound."""
    names = sorted({name for gateway in gateways for name in gateway.groups})
    beyond = set(names[MAX_GROUPS:])
    for gateway in gateways:
        for name in gateway.groups:
            if name in beyond:
                message = f"there are more than {MAX_GROUPS} groups of Envoys: {name} is not served"
                rejections.append(_about(gateway, "TooManyGroups", message, "metadata.annotations"))
    return tuple(names[:MAX_GROUPS])


def _ports(
    group: str,
    gateways: list[Gateway],
    config: Config,
    actions: _Actions,
    certificates: _Certificates,
    rejections: _Rejections,
    room: Room,
) -> Iterator[PortListener]:
    """The ports of one group of Envoys. An HTTPS listener without any valid certificate is none."""
    by_gateway: defaultdict[ObjectRef, list[tuple[Gateway, Listener]]] = defaultdict(list)
    by_port: defaultdict[int, list[tuple[Gateway, Listener]]] = defaultdict(list)
    for gateway, listener in _distinct_listeners(gateways, rejections):
        here = by_port[listener.port]
        if listener.protocol == "HTTP" or (
            certificates.of(gateway, listener) and _has_room(gateway, listener, here, rejections, room)
        ):
            by_gateway[gateway.meta.ref].append((gateway, listener))
            here.append((gateway, listener))
    ports = {number: Port(listener for _, listener in here) for number, here in sorted(by_port.items()) if here}
    known = {gateway.meta.ref for gateway in config.gateways}
    namespaces = {namespace.meta.ref.name: namespace for namespace in config.namespaces}
    for route in config.http_routes:  # the oldest first, so that of too many the newest are left out
        for each in _attach(route, by_gateway, ports, known, namespaces, rejections):
            if not ports[each.listener.port].add(each, room):
                message = f"there are more than {MAX_ROUTES} routes, hostnames times matches: this rule is not served"
                rejections.append(_about(each.route, "TooManyRoutes", message, f"spec.rules[{each.index}]"))
    for number, port in ports.items():
        owners = tuple({gateway.meta.ref: None for gateway, _ in by_port[number]})
        hosts = {host.hostname: host for host in _virtual_hosts(port, actions)}
        if by_port[number][0][1].protocol == "HTTP":
            yield PortListener(number, tuple(hosts.values()), group, owners)
        else:
            chains = [_chain(pair, by_port[number], port, hosts, certificates) for pair in by_port[number]]
            yield PortListener(number, (), group, owners, tuple(sorted(chains, key=lambda chain: chain.hostname)))


def _has_room(
    gateway: Gateway,
    listener: Listener,
    of_port: list[tuple[Gateway, Listener]],
    rejections: _Rejections,
    room: Room,
) -> bool:
    """Whether there is room for what an HTTPS listener and the port's other ones answer to each other's hostnames."""
    answers = 2 * len(of_port)
    if answers > room.routes:
        message = f"there are more than {MAX_ROUTES} routes with those of its port: {listener.name} is not served"
        rejections.append(_about(gateway, "TooManyRoutes", message, "spec.listeners"))
        return False
    room.routes -= answers
    return True


def _chain(
    pair: tuple[Gateway, Listener],
    of_port: list[tuple[Gateway, Listener]],
    port: Port,
    of_all: Mapping[str, VirtualHost],
    certificates: _Certificates,
) -> TlsChain:
    """What an HTTPS listener serves to those who ask for its name by SNI: its own hosts.

    What a client asks of the port's other listeners on such a connection is answered with 421 Misdirected Request
    (RFC 9110, section 15.5.20).
    """
    listener = pair[1]
    hosts = {hostname: of_all[hostname] for hostname in port.hostnames_of(listener)}
    for _, other in of_port:
        hostname = other.hostname or ANY_HOST
        if other is not listener and hostname not in hosts and not covers(hostname, listener.hostname or ANY_HOST):
            hosts[hostname] = VirtualHost(hostname, (Route("misdirected", RouteMatch(), Respond(421)),))
    ordered = tuple(hosts[hostname] for hostname in sorted(hosts))
    return TlsChain(listener.hostname or ANY_HOST, certificates.of(*pair), ordered)


def _our_gateways(config: Config, controllers: frozenset[str], rejections: _Rejections) -> Iterator[Gateway]:
    classes = {c.meta.ref.name: c.controller_name for c in config.gateway_classes}
    for gateway in config.gateways:
        controller = classes.get(gateway.class_name)
        if controller in controllers:
            yield gateway
        elif controller is None:
            message = f"GatewayClass {gateway.class_name} does not exist"
            rejections.append(_about(gateway, "GatewayClassNotFound", message, "spec.gatewayClassName"))
        else:
            message = f"GatewayClass {gateway.class_name} belongs to the controller {controller}: left to it"
            rejections.append(_about(gateway, "OtherController", message, "spec.gatewayClassName", Level.WARNING))


def _distinct_listeners(gateways: list[Gateway], rejections: _Rejections) -> Iterator[tuple[Gateway, Listener]]:
    """Listeners in order of age; one that repeats an older one's port and hostname (HostnameConflict), or asks for
    another protocol there (ProtocolConflict), is left out."""
    taken: dict[tuple[int, str], str] = {}
    protocols: dict[int, str] = {}
    for gateway in gateways:
        for i, listener in enumerate(gateway.listeners):
            name = f"{gateway.meta.ref} listener {listener.name}"
            protocol = protocols.setdefault(listener.port, listener.protocol)
            if protocol != listener.protocol:
                message = f"port {listener.port} is one of {protocol} already"
                rejections.append(_about(gateway, "ProtocolConflict", message, f"spec.listeners[{i}].protocol"))
                continue
            owner = taken.setdefault((listener.port, listener.hostname), name)
            if owner == name:
                yield gateway, listener
            else:
                host = listener.hostname or "any hostname"
                message = f"port {listener.port} for {host} is served by {owner} already"
                rejections.append(_about(gateway, "HostnameConflict", message, f"spec.listeners[{i}]"))


class _Certificates:
    """The Secrets of HTTPS listeners; each listener's are looked for once."""

    def __init__(self, config: Config, rejections: _Rejections) -> None:
        self._secrets = {secret.meta.ref: secret for secret in config.secrets}
        self._grants = granted(config)
        self._rejections = rejections
        self._found: dict[tuple[ObjectRef, str], tuple[ObjectRef, ...]] = {}

    def of(self, gateway: Gateway, listener: Listener) -> tuple[ObjectRef, ...]:
        """Those that exist and may be used; for each other one there is a rejection."""
        key = gateway.meta.ref, listener.name
        if key not in self._found:
            self._found[key] = tuple(self._valid(gateway, listener))
        return self._found[key]

    def _valid(self, gateway: Gateway, listener: Listener) -> Iterator[ObjectRef]:
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
            self._rejections.append(_about(gateway, reason, message, f"{listener.field}[{i}]"))

    def used(self) -> tuple[Secret, ...]:
        """The Secrets of all listeners that were asked for, sorted."""
        refs = {ref for found in self._found.values() for ref in found}
        return tuple(self._secrets[ref] for ref in sorted(refs))


# --- routes to listeners ----------------------------------------------------------------------------------------------


def _attach(
    route: HTTPRoute,
    listeners: Mapping[ObjectRef, list[tuple[Gateway, Listener]]],
    ports: Mapping[int, Port],
    known: set[ObjectRef],
    namespaces: Mapping[str, Namespace],
    rejections: _Rejections,
) -> Iterator[Attached]:
    """`listeners` by Gateway; `known` are all Gateways, of other controllers and groups too; `namespaces` by name."""
    for i, parent in enumerate(route.parents):
        where = f"spec.parentRefs[{i}]"
        is_gateway = (parent.ref.group, parent.ref.kind) == (GATEWAY, "Gateway")
        if not is_gateway or (parent.ref in known and parent.ref not in listeners):
            continue  # another controller's, or rejected as a Gateway already
        if parent.ref not in known:
            rejections.append(_about(route, "NoMatchingParent", f"{parent.ref} does not exist", where))
            continue
        named = [pair for pair in listeners[parent.ref] if _named(parent, pair[1])]
        allowed = [pair for pair in named if _allows(pair[0], pair[1], route, namespaces)]
        reached = [(pair, host) for pair in allowed for host in _hostnames(pair[1], route)]
        if not named:
            section = f" listener {parent.section}" if parent.section else ""
            port = f" port {parent.port}" if parent.port else ""
            rejections.append(_about(route, "NoMatchingParent", f"{parent.ref} has no{section}{port}", where))
        elif not allowed:
            message = f"allowedRoutes of {parent.ref} admit no HTTPRoute of namespace {route.meta.ref.namespace}"
            rejections.append(_about(route, "NotAllowedByListeners", message, where))
        elif not reached:
            message = f"no hostname of the route ({', '.join(route.hostnames)}) is one of {parent.ref}'s listeners"
            rejections.append(_about(route, "NoMatchingListenerHostname", message, "spec.hostnames"))
        for (gateway, listener), host in reached:
            # Listener isolation: a hostname belongs to the most specific listener of its port, and to that alone.
            if ports[listener.port].owner(host) is listener:
                for index, rule in enumerate(route.rules):
                    yield Attached(host, listener, gateway, route, rule, index)


def _named(parent: ParentRef, listener: Listener) -> bool:
    return parent.section in ("", listener.name) and parent.port in (0, listener.port)


def _allows(gateway: Gateway, listener: Listener, route: HTTPRoute, namespaces: Mapping[str, Namespace]) -> bool:
    allowed = listener.allowed
    kind = (route.meta.ref.group, route.meta.ref.kind)
    if allowed.kinds and kind not in allowed.kinds:
        return False
    namespace = route.meta.ref.namespace
    match allowed.namespaces_from:
        case "All":
            return True
        case "Same":
            return namespace == gateway.meta.ref.namespace
        case "Selector":
            labels = namespaces[namespace].meta.labels if namespace in namespaces else {}
            name = {"kubernetes.io/metadata.name": namespace}  # a label that every namespace has, told or not
            return bool(allowed.selector) and allowed.selector.items() <= {**labels, **name}.items()
        case _:
            return False


def _hostnames(listener: Listener, route: HTTPRoute) -> Iterator[str]:
    """The intersection of the listener's hostname with the route's, each as specific as both."""
    if not route.hostnames:
        yield listener.hostname or ANY_HOST
    for hostname in route.hostnames:
        if not listener.hostname or covers(listener.hostname, hostname):
            yield hostname
        elif covers(hostname, listener.hostname):
            yield listener.hostname


# --- virtual hosts and precedence -------------------------------------------------------------------------------------


def _virtual_hosts(port: Port, actions: _Actions) -> Iterator[VirtualHost]:
    """One for each hostname of a port; it also holds the rules of every wider hostname of its listener, after its own.

    Envoy looks into one virtual host only, where Gateway API lets a request that no rule of the more specific route
    matches go on to the less specific one, but never to another listener: a listener's own hostname has a virtual host
    even where no route has it, which answers 404 instead of a wider listener.
    """
    for hostname in sorted(port.hostnames):
        candidates = [
            (specificity(a.hostname), a, match, j)
            for a in port.rules(hostname)
            for j, match in enumerate(a.rule.matches)
        ]
        candidates.sort(key=lambda c: _precedence(*c))
        routes = [
            Route(
                name=f"{a.route.meta.ref.namespace}/{a.route.meta.ref.name}/{a.index}/{j}",
                match=match,
                action=actions.of(a),
                filters=a.rule.filters,
            )
            for _, a, match, j in candidates
        ]
        yield VirtualHost(hostname, tuple(dict.fromkeys(routes)))


def _precedence(host: tuple[bool, int], attached: Attached, match: RouteMatch, index: int) -> tuple[object, ...]:
    """Gateway API's order (HTTPRouteRule.matches): hostname, then exact path, longer prefix, method, headers, query.

    A regular expression, whose place the API leaves open, comes between exact and prefix. Ties: the older route,
    then its name, then the order within it.
    """
    kinds = {MatchType.EXACT: 0, MatchType.REGEX: 1, MatchType.PREFIX: 2}
    return (
        (not host[0], -host[1]),
        kinds[match.path.type],
        -len(match.path.value.rstrip("/")),
        not match.method,
        -len(match.headers),
        -len(match.query),
        attached.route.meta.age_key,
        attached.index,
        index,
    )


# --- actions ----------------------------------------------------------------------------------------------------------


class _Actions:
    """What a rule does with a request; each rule is decided once for each listener it is attached to."""

    def __init__(self, config: Config, backends: Backends, rejections: _Rejections) -> None:
        self._backends = backends
        self._rejections = rejections
        self._policies: dict[tuple[ObjectRef, str], BackendTrafficPolicy] = {}
        for policy in config.traffic_policies:  # oldest first, and the oldest wins
            for target in policy.targets:
                self._policies.setdefault(target, policy)
        self._decided: dict[tuple[ObjectRef, int, ObjectRef, str], Forward | RequestRedirect | Respond] = {}

    def of(self, attached: Attached) -> Forward | RequestRedirect | Respond:
        key = (attached.route.meta.ref, attached.index, attached.gateway.meta.ref, attached.listener.name)
        if key not in self._decided:
            self._decided[key] = self._decide(attached)
        return self._decided[key]

    def _decide(self, attached: Attached) -> Forward | RequestRedirect | Respond:
        rule = attached.rule
        if rule.filters.redirect is not None:
            return rule.filters.redirect
        gateway = attached.gateway.meta.ref
        targets = ((attached.route.meta.ref, ""), (gateway, attached.listener.name), (gateway, ""))
        policies = [self._policies[target] for target in targets if target in self._policies]
        shares = list(self._shares(attached, policies))
        clusters = [self._backends.clusters[name] for name, _, _ in shares if name]
        if not clusters:
            return Respond(500)
        picked = [cluster for cluster in clusters if cluster.strategy is Strategy.PREFIX_CACHE]
        asked = bool(picked) or any(cluster.models.needs_picker for cluster in clusters)
        models = [cluster.models for cluster in clusters] if asked else []
        timeouts = (rule.timeout, *(policy.request_timeout for policy in policies))
        return Forward(
            clusters=tuple(shares),
            rewrite=rule.filters.rewrite,
            llm=any(cluster.strategy is not None for cluster in clusters),
            picked=bool(picked),
            asked=asked,
            objectives=any(each.objectives for each in models),
            refuses=any(each.closed or each.sheds for each in models),
            renames=tuple(dict.fromkeys(each.renames for each in models if each.renames is not None)),
            session_headers=tuple(sorted({cluster.settings.session_header for cluster in picked} - {""})),
            timeout=_first(timeouts),
            backend_timeout=rule.backend_timeout,
            idle_timeout=_first(policy.stream_idle_timeout for policy in policies),
        )

    def _shares(self, attached: Attached, policies: list[BackendTrafficPolicy]) -> Iterator[tuple[str, int, Filters]]:
        """(cluster name or "" for an invalid reference, weight above 0, filters) of each backendRef."""
        connect = _first(policy.connect_timeout for policy in policies)
        idle = _first(policy.connection_idle_timeout for policy in policies)
        for backend in attached.rule.backends:
            if not backend.weight:
                continue
            found = self._backends.resolve(backend, attached.route.meta.ref.namespace, connect, idle)
            if isinstance(found, Cluster):
                yield found.name, backend.weight, backend.filters
            else:
                reason, message = found
                self._rejections.append(_about(attached.route, reason, message, backend.field))
                yield "", backend.weight, backend.filters


def _first(values: Iterable[float | None]) -> float | None:
    return next((value for value in values if value is not None), None)


def _about(owner: Gateway | HTTPRoute, reason: str, message: str, field: str, level: Level = Level.ERROR) -> Rejection:
    return Rejection(owner.meta.ref, reason, message, field, owner.meta.source, level)
