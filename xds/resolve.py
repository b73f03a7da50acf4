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

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from xds.attach import (
    ANY_HOST,
    Attachment,
    Certificates,
    Findings,
    Owned,
    attachments,
    covers,
    distinct_listeners,
    key_of,
    our_gateways,
    overlapping,
    specificity,
)
from xds.backends import Backends
from xds.conditions import statuses
from xds.model import (
    BackendTrafficPolicy,
    Cluster,
    ConditionType,
    Config,
    Filters,
    Forward,
    Gateway,
    HTTPRoute,
    Listener,
    MatchType,
    ObjectRef,
    PortListener,
    Problem,
    RequestRedirect,
    Respond,
    Route,
    RouteMatch,
    RouteRule,
    Strategy,
    TlsChain,
    Topology,
    VirtualHost,
)
from xds.models import pool_models

# Controller names whose GatewayClasses are served: our own, and the one self-managed Envoys are usually declared with.
CONTROLLER_NAMES = ("vllm-xds.dev/gateway-controller", "gateway.envoyproxy.io/gatewayclass-controller")

MAX_GROUPS = 100  # groups of Envoys: some milliseconds of each change for each one


@dataclass(frozen=True, slots=True)
class _Attached:
    """One rule of one route on one listener, under one hostname."""

    hostname: str
    listener: Listener
    gateway: Gateway
    route: HTTPRoute
    rule: RouteRule
    index: int


def resolve(config: Config, controller_names: Iterable[str] = CONTROLLER_NAMES) -> Topology:
    """What Envoy shall do for this Config, every reason why a part of it is not done, and what statuses say of it."""
    controllers = frozenset(controller_names)
    models, conflicts = pool_models(config)
    findings = Findings(rejections=list(conflicts))
    gateways = list(our_gateways(config, controllers, findings))
    groups = _groups(gateways, findings)
    attached = attachments(config, gateways, findings)
    backends = Backends(config, models)
    actions = _Actions(config, backends, findings)
    certificates = Certificates(config, findings)
    listeners: list[PortListener] = []
    for group in ("", *groups):
        members = [gateway for gateway in gateways if not gateway.groups or group in gateway.groups]
        listeners += _ports(group, members, attached, actions, certificates, findings)
    clusters = tuple(backends.clusters[name] for name in sorted(backends.clusters))
    return Topology(
        tuple(listeners),
        clusters,
        tuple(dict.fromkeys(findings.rejections)),
        groups,
        certificates.used(),
        statuses(config, controllers, gateways, attached, backends, findings, conflicts),
    )


# --- gateways and listeners -------------------------------------------------------------------------------------------


def _groups(gateways: list[Gateway], findings: Findings) -> tuple[str, ...]:
    """The groups of Envoys that Gateways name; each costs a resolution of its own, so there is a bound."""
    names = sorted({name for gateway in gateways for name in gateway.groups})
    for gateway in gateways:
        for name in gateway.groups:
            if name in names[MAX_GROUPS:]:
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
) -> Iterator[PortListener]:
    """The ports of one group of Envoys. An HTTPS listener without any valid certificate is none."""
    distinct = distinct_listeners(gateways, findings)
    owned = {key_of(pair): pair for pair in distinct if pair[1].protocol == "HTTP" or certificates.of(pair)}
    findings.served |= owned.keys()
    ports: dict[int, list[Owned]] = {}
    for pair in owned.values():
        ports.setdefault(pair[1].port, []).append(pair)
    of_port = {port: [listener for _, listener in pairs] for port, pairs in ports.items()}
    attached: dict[int, list[_Attached]] = {port: [] for port in ports}
    for attachment in attachments:
        for listener, hosts in attachment.listeners:
            if (attachment.gateway.meta.ref, listener.name) in owned:
                attached[listener.port] += _on_listener(attachment, listener, hosts, of_port[listener.port])
    for port in sorted(ports):
        owners = tuple({gateway.meta.ref: None for gateway, _ in ports[port]})
        if of_port[port][0].protocol == "HTTP":
            yield PortListener(port, tuple(_virtual_hosts(of_port[port], attached[port], actions)), group, owners)
        else:
            _note_overlaps(ports[port], findings)
            chains = [_chain(pair, ports[port], attached[port], actions, certificates) for pair in ports[port]]
            yield PortListener(port, (), group, owners, tuple(sorted(chains, key=lambda chain: chain.hostname)))


def _on_listener(
    attachment: Attachment, listener: Listener, hosts: Iterable[str], of_port: list[Listener]
) -> Iterator[_Attached]:
    """The rules that a listener gets. Listener isolation: a hostname belongs to the most specific one of its port."""
    for host in hosts:
        if _most_specific(of_port, host) is listener:
            for index, rule in enumerate(attachment.route.rules):
                yield _Attached(host, listener, attachment.gateway, attachment.route, rule, index)


def _note_overlaps(owned: list[Owned], findings: Findings) -> None:
    """A client may use a connection that it has for one hostname for another: GEP-3567 wants it to be seen."""
    for pair, (gateway, other) in overlapping(owned):
        message = f"its hostname overlaps with that of {gateway.meta.ref} listener {other.name}"
        findings.blame(pair, Problem(ConditionType.OVERLAPPING_TLS, "OverlappingHostnames", message))


def _chain(
    pair: Owned,
    of_port: list[Owned],
    attached: list[_Attached],
    actions: _Actions,
    certificates: Certificates,
) -> TlsChain:
    """What an HTTPS listener serves to those who ask for its name by SNI: its own hosts.

    What a client asks of the port's other listeners on such a connection is answered with 421 Misdirected Request
    (RFC 9110, section 15.5.20).
    """
    listener = pair[1]
    own = [each for each in attached if each.listener is listener]
    hosts = {host.hostname: host for host in _virtual_hosts([listener], own, actions)}
    for _, other in of_port:
        hostname = other.hostname or ANY_HOST
        if other is not listener and hostname not in hosts and not covers(hostname, listener.hostname or ANY_HOST):
            hosts[hostname] = VirtualHost(hostname, (Route("misdirected", RouteMatch(), Respond(421)),))
    ordered = tuple(hosts[hostname] for hostname in sorted(hosts))
    return TlsChain(listener.hostname or ANY_HOST, certificates.of(pair), ordered)


def _most_specific(listeners: Iterable[Listener], hostname: str) -> Listener:
    """Of the listeners of one port, the one that takes the requests for `hostname`; one of them has to cover it."""
    covering = [listener for listener in listeners if covers(listener.hostname or ANY_HOST, hostname)]
    return max(covering, key=lambda listener: specificity(listener.hostname or ANY_HOST))


# --- virtual hosts and precedence -------------------------------------------------------------------------------------


def _virtual_hosts(listeners: list[Listener], attached: list[_Attached], actions: _Actions) -> Iterator[VirtualHost]:
    """One for each hostname of a port; it also holds the rules of every wider hostname of its listener, after its own.

    Envoy looks into one virtual host only, where Gateway API lets a request that no rule of the more specific route
    matches go on to the less specific one, but never to another listener: a listener's own hostname has a virtual host
    even where no route has it, which answers 404 instead of a wider listener.
    """
    hostnames = {a.hostname for a in attached} | {listener.hostname for listener in listeners if listener.hostname}
    for hostname in sorted(hostnames):
        owner = _most_specific(listeners, hostname)
        candidates = [
            (specificity(a.hostname), a, match, j)
            for a in attached
            if a.listener is owner and covers(a.hostname, hostname)
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


def _precedence(host: tuple[bool, int], attached: _Attached, match: RouteMatch, index: int) -> tuple[object, ...]:
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

    def of(self, attached: _Attached) -> Forward | RequestRedirect | Respond:
        key = (attached.route.meta.ref, attached.index, attached.gateway.meta.ref, attached.listener.name)
        if key not in self._decided:
            self._decided[key] = self._decide(attached)
        return self._decided[key]

    def _decide(self, attached: _Attached) -> Forward | RequestRedirect | Respond:
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

    def _shares(self, attached: _Attached, policies: list[BackendTrafficPolicy]) -> Iterator[tuple[str, int, Filters]]:
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
