"""Config -> Topology: Gateway API's rules of attachment, precedence and failure (pure).

    Gateways  -> groups of Envoys            (the annotation vllm-xds/nodes; what follows is done for each group)
    Gateways  -> ports and their hostnames   (same port: listeners merge, told apart by hostname; xds/attach.py)
    HTTPRoutes -> attach to listeners        (xds/attach.py)
    matches   -> order within a virtual host (Gateway API precedence)
    backends  -> clusters and their endpoints (xds/backends.py)
    all of it -> statuses                    (xds/conditions.py)

What can not be served as written becomes a Rejection and, where the API says so, an answer: 500 for an invalid
backendRef, 404 for no match. https://gateway-api.sigs.k8s.io/reference/spec/#httproute
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from xds.attach import (
    Attachment,
    Certificates,
    Findings,
    ListenerKey,
    Owned,
    attachments,
    distinct_listeners,
    key_of,
    our_gateways,
    overlapping,
)
from xds.backends import Backends
from xds.conditions import statuses
from xds.hostnames import ANY_HOST, Attached, Port, Room, covers, specificity
from xds.model import (
    BackendTrafficPolicy,
    Cluster,
    ConditionType,
    Config,
    Filters,
    Forward,
    Gateway,
    Listener,
    MatchType,
    ObjectRef,
    PortListener,
    Problem,
    RequestRedirect,
    Respond,
    Route,
    RouteMatch,
    Strategy,
    TlsChain,
    Topology,
    VirtualHost,
)
from xds.models import pool_models

# Controller names whose GatewayClasses are served of a directory: our own, and the one that self-managed Envoys are
# usually declared with. In a cluster that one may be at work itself.
CONTROLLER_NAME = "vllm-xds.dev/gateway-controller"
CONTROLLER_NAMES = (CONTROLLER_NAME, "gateway.envoyproxy.io/gatewayclass-controller")

MAX_GROUPS = 100  # groups of Envoys: some milliseconds of each change for each one
# Routes of all virtual hosts together: a millisecond each to translate, kilobytes each in Envoy. A rule is there once
# for each match, listener and hostname, and again in each virtual host its hostname covers: few objects make millions.
MAX_ROUTES = 50_000


def resolve(config: Config, controller_names: Iterable[str] = CONTROLLER_NAMES) -> Topology:
    """What Envoy shall do for this Config, every reason why a part of it is not done, and what statuses say of it."""
    controllers = frozenset(controller_names)
    models, conflicts = pool_models(config)
    findings = Findings()
    for conflict in conflicts:
        findings.note(conflict)
    gateways = list(our_gateways(config, controllers, findings))
    groups = _groups(gateways, findings)
    attached = attachments(config, gateways, findings)
    backends = Backends(config, models)
    actions = _Actions(config, backends, findings)
    certificates = Certificates(config, findings)
    room = Room(MAX_ROUTES)
    listeners: list[PortListener] = []
    for group in ("", *groups):
        members = [gateway for gateway in gateways if not gateway.groups or group in gateway.groups]
        listeners += _ports(group, members, attached, actions, certificates, findings, room)
    clusters = tuple(backends.clusters[name] for name in sorted(backends.clusters))
    return Topology(
        tuple(listeners),
        clusters,
        tuple(findings.rejections),
        groups,
        certificates.used(),
        statuses(config, controllers, gateways, attached, backends, findings, conflicts),
    )


# --- gateways and listeners -------------------------------------------------------------------------------------------


def _groups(gateways: list[Gateway], findings: Findings) -> tuple[str, ...]:
    """The groups of Envoys that Gateways name; each costs a resolution of its own, so there is a bound."""
    names = sorted({name for gateway in gateways for name in gateway.groups})
    beyond = set(names[MAX_GROUPS:])
    for gateway in gateways:
        for name in gateway.groups:
            if name in beyond:
                message = f"there are more than {MAX_GROUPS} groups of Envoys: {name} is not served"
                rejection = findings.reject(gateway, "TooManyGroups", message, "metadata.annotations")
                problem = Problem.of(ConditionType.PROGRAMMED, rejection)
                findings.gateways.setdefault(gateway.meta.ref, []).append(problem)
    return tuple(names[:MAX_GROUPS])


def _ports(
    group: str,
    gateways: list[Gateway],
    attachments: list[Attachment],
    actions: _Actions,
    certificates: Certificates,
    findings: Findings,
    room: Room,
) -> Iterator[PortListener]:
    """The ports of one group of Envoys. An HTTPS listener without any valid certificate is none."""
    by_port: defaultdict[int, list[Owned]] = defaultdict(list)
    served: set[ListenerKey] = set()
    for pair in distinct_listeners(gateways, findings):
        here = by_port[pair[1].port]
        if pair[1].protocol == "HTTP" or (certificates.of(pair) and _has_room(pair, here, findings, room)):
            here.append(pair)
            served.add(key_of(pair))
    findings.served |= served
    ports = {number: Port(listener for _, listener in here) for number, here in sorted(by_port.items()) if here}
    for attachment in attachments:  # the oldest routes first, so that of too many the newest are left out
        for listener, hosts in attachment.listeners:
            if (attachment.gateway.meta.ref, listener.name) in served:
                _fill(ports[listener.port], attachment, listener, hosts, findings, room)
    for number, port in ports.items():
        owners = tuple({gateway.meta.ref: None for gateway, _ in by_port[number]})
        virtual_hosts = {host.hostname: host for host in _virtual_hosts(port, actions)}
        if by_port[number][0][1].protocol == "HTTP":
            yield PortListener(number, tuple(virtual_hosts.values()), group, owners)
        else:
            _note_overlaps(by_port[number], findings)
            chains = [_chain(pair, by_port[number], port, virtual_hosts, certificates) for pair in by_port[number]]
            yield PortListener(number, (), group, owners, tuple(sorted(chains, key=lambda chain: chain.hostname)))


def _has_room(pair: Owned, of_port: list[Owned], findings: Findings, room: Room) -> bool:
    """Whether there is room for what an HTTPS listener and the port's other ones answer to each other's hostnames."""
    gateway, listener = pair
    answers = 2 * len(of_port)
    if answers > room.routes:
        message = f"there are more than {MAX_ROUTES} routes with those of its port: {listener.name} is not served"
        rejection = findings.reject(gateway, "TooManyRoutes", message, "spec.listeners")
        findings.blame(pair, Problem.of(ConditionType.PROGRAMMED, rejection))
        return False
    room.routes -= answers
    return True


def _fill(
    port: Port, attachment: Attachment, listener: Listener, hosts: Iterable[str], findings: Findings, room: Room
) -> None:
    """The rules that a listener gets. Listener isolation: a hostname belongs to the most specific one of its port."""
    route = attachment.route
    for host in hosts:
        if port.owner(host) is not listener:
            continue
        for index, rule in enumerate(route.rules):
            if not port.add(Attached(host, listener, attachment.gateway, route, rule, index), room):
                message = f"there are more than {MAX_ROUTES} routes, hostnames times matches: this rule is not served"
                rejection = findings.reject(route, "TooManyRoutes", message, f"spec.rules[{index}]")
                findings.dropped.setdefault(route.meta.ref, Problem.of(ConditionType.PARTIALLY_INVALID, rejection))


def _note_overlaps(owned: list[Owned], findings: Findings) -> None:
    """A client may use a connection that it has for one hostname for another: GEP-3567 wants it to be seen."""
    for pair, (gateway, other) in overlapping(owned):
        message = f"its hostname overlaps with that of {gateway.meta.ref} listener {other.name}"
        findings.blame(pair, Problem(ConditionType.OVERLAPPING_TLS, "OverlappingHostnames", message))


def _chain(
    pair: Owned,
    of_port: list[Owned],
    port: Port,
    of_all: Mapping[str, VirtualHost],
    certificates: Certificates,
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
    return TlsChain(listener.hostname or ANY_HOST, certificates.of(pair), ordered)


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

    def __init__(self, config: Config, backends: Backends, findings: Findings) -> None:
        self._backends = backends
        self._findings = findings
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
                self._findings.reject(attached.route, reason, message, backend.field)
                yield "", backend.weight, backend.filters


def _first(values: Iterable[float | None]) -> float | None:
    return next((value for value in values if value is not None), None)
