"""What Envoys refuse: fall back to what they accepted, and find the HTTPRoute that is to blame (pure).

A resource passes every check of ours and an Envoy refuses it (NACK) all the same: it breaks a rule we do not know of.
Two things then keep the damage to one object:

1. A refused resource is replaced by the version of it that was accepted last, so that an Envoy that starts now is given
   that one instead of nothing. A version that any Envoy accepts is good: another that refuses it keeps what it has.
2. A RouteConfiguration holds the HTTPRoutes of a whole port, and one must not keep out the others. To blame is the one
   that Envoy's message points at (`VirtualHosts[1]...Routes[3]`), or the only one that differs from what was accepted.
   Otherwise they are tried one at a time: on top of what was accepted or, where nothing was (a server that has just
   started), all but one. No trial does harm: refused it changes nothing, accepted it is better than what was before.
   The one found is withheld until it changes, and its last accepted version is served in its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from envoy_data_plane.envoy.config.route.v3 import RouteConfiguration

from xds.envoy import listener_name, route_tables, secret_name
from xds.model import GATEWAY, HTTPRoute, ObjectRef, PortListener, Refused, Rejection, Route, Topology, VirtualHost
from xds.routes import route_configuration
from xds.snapshot import CLUSTER, LISTENER, ROUTE, SECRET, Resource, Snapshot, label

# Not endpoints: they are other ones seconds later, and their refusal is a log line.
WATCHED = frozenset({CLUSTER, LISTENER, ROUTE, SECRET})
REASON = "RefusedByEnvoy"
ACCEPTED = ""  # the verdict of a version that an Envoy accepted; any other text is why it was refused
MAX_TRIED = 200  # HTTPRoutes tried one at a time: each trial takes a fraction of a second
MAX_VERDICTS = 2 * MAX_TRIED  # versions of one resource whose verdict is remembered: all those of a search

_PLACE = re.compile(r"VirtualHosts\[(\d{1,9})\](?:.*?\bRoutes\[(\d{1,9})\])?", re.DOTALL)

Key = tuple[str, str]  # (type_url, name)


@dataclass(frozen=True, slots=True)
class _Offer:
    """A RouteConfiguration of a port by what each HTTPRoute has in it, and those HTTPRoutes."""

    name: str
    hosts: tuple[VirtualHost, ...]
    port: PortListener
    parts: Mapping[ObjectRef, tuple[Route, ...]]
    objects: Mapping[ObjectRef, HTTPRoute]


@dataclass(frozen=True, slots=True)
class _Withheld:
    """An HTTPRoute as it is refused, in which RouteConfiguration (name, version), and what is served instead."""

    refused: HTTPRoute
    instead: HTTPRoute | None
    where: tuple[str, str]
    rejection: Rejection


@dataclass(slots=True)
class _Search:
    """Whose fault it is that `name` is refused for `reason`. `left` are not tried yet; the first is being tried.

    `good` None: the one tried is left out. Else all of `left` but the one tried are as they are in `good`.
    """

    name: str
    version: str
    reason: str
    left: list[ObjectRef]
    offer: _Offer
    good: _Offer | None


class Quarantine:
    """Mutable, without I/O. For each configuration `admit`, then `offered`; for each answer `answered`.

    When that says so, `review`: while it is true the configuration has to be admitted again, and served.
    """

    def __init__(self) -> None:
        self._snapshot = Snapshot.of({})  # what was offered, without any fallback
        self._offers: dict[str, _Offer] = {}  # what its RouteConfigurations are made of
        self._owners: dict[Key, tuple[ObjectRef, ...]] = {}
        self._verdicts: dict[Key, dict[str, str]] = {}  # version -> verdict
        self._accepted: dict[Key, Resource] = {}  # the last that was
        self._good: dict[str, _Offer] = {}  # the same of RouteConfigurations
        self._withheld: dict[ObjectRef, _Withheld] = {}
        self._search: _Search | None = None
        self._unsolved: set[tuple[str, str]] = set()  # (name, version) of RouteConfigurations nobody was found for

    @property
    def searching(self) -> bool:
        """Whether what is offered is a trial."""
        return self._search is not None

    # --- what is served ---

    def admit(self, routes: Iterable[HTTPRoute]) -> tuple[HTTPRoute, ...]:
        """The HTTPRoutes that may be served, in their order. One that has changed is given another chance."""
        by_ref = {route.meta.ref: route for route in routes}
        self._withheld = {
            ref: each
            for ref, each in self._withheld.items()
            if by_ref.get(ref) == each.refused and not self._is_vindicated(each)
        }
        search = self._search
        if search is not None and any(by_ref.get(ref) != search.offer.objects[ref] for ref in search.left):
            self._search = None
        admitted = (self._served(ref, route) for ref, route in by_ref.items())
        return tuple(route for route in admitted if route is not None)

    def _served(self, ref: ObjectRef, route: HTTPRoute) -> HTTPRoute | None:
        search = self._search
        if ref in self._withheld:
            return self._withheld[ref].instead
        if search is None or ref not in search.left or (ref == search.left[0]) == (search.good is not None):
            return route
        return search.good.objects.get(ref) if search.good is not None else None

    def offered(self, snapshot: Snapshot, topology: Topology, admitted: Iterable[HTTPRoute]) -> None:
        """Take what was made of the admitted HTTPRoutes."""
        objects = {route.meta.ref: route for route in admitted}
        self._snapshot = snapshot
        self._offers = {
            name: _offer(name, hosts, port, objects)
            for port in topology.listeners
            for name, hosts in route_tables(port)
        }
        self._owners = _owners(topology)
        for memory in (self._verdicts, self._accepted):
            for key in [key for key in memory if key[1] not in snapshot.resources[key[0]]]:
                del memory[key]
        self._good = {name: offer for name, offer in self._good.items() if name in self._offers}
        self._unsolved = {(name, version) for name, version in self._unsolved if version == self._version(ROUTE, name)}
        for key in self._verdicts:
            self._remember(key)

    def fall_back(self, snapshot: Snapshot) -> Snapshot:
        """`snapshot`, which differs from what was offered at most in endpoints, with the last accepted version of each
        refused resource in its place, if all that one needs is there."""
        replaced: dict[str, dict[str, Resource]] = {}
        for (type_url, name), accepted in self._accepted.items():
            is_whole = all(target in snapshot.resources[kind] for kind, target in accepted.refs)
            if is_whole and self._refusal((type_url, name)):
                replaced.setdefault(type_url, dict(snapshot.resources[type_url]))[name] = accepted
        return snapshot.replace({type_url: found.values() for type_url, found in replaced.items()})

    def rejections(self) -> tuple[Rejection, ...]:
        """Of the HTTPRoutes that are withheld, and of the objects whose resource is refused as it is now."""
        return (*(each.rejection for each in self._withheld.values()), *self._resources())

    def withheld(self) -> tuple[Refused, ...]:
        """The same HTTPRoutes, for their statuses."""
        return tuple(Refused(each.refused, REASON, each.rejection.message) for each in self._withheld.values())

    def refusals(self) -> Mapping[ObjectRef, str]:
        """The other objects, and why."""
        return {each.ref: each.message for each in self._resources() if each.ref is not None}

    def _resources(self) -> Iterator[Rejection]:
        for key in self._verdicts:
            reason = self._refusal(key)
            if reason and (key[0] != ROUTE or (key[1], self._version(*key)) in self._unsolved):
                message = f"Envoy refuses {label(key[0])} {key[1]}: {reason}"
                owners: tuple[ObjectRef | None, ...] = self._owners.get(key) or (None,)
                for owner in owners:
                    yield Rejection(owner, REASON, message)

    # --- what Envoys say ---

    def answered(self, type_url: str, resources: Mapping[str, str], verdict: str) -> bool:
        """Take an Envoy's answer about these resources (name -> version): ACCEPTED, or its reason not to.

        Returns whether there is something to review.
        """
        if type_url not in WATCHED:
            return False
        worth = [self.note(type_url, name, version, verdict) for name, version in resources.items()]
        return any(worth)

    def note(self, type_url: str, name: str, version: str, verdict: str) -> bool:
        """The same of one resource."""
        if type_url not in WATCHED or name not in self._snapshot.resources[type_url]:
            return False
        key = type_url, name
        verdicts = self._verdicts.setdefault(key, {})
        before = verdicts.get(version)
        if before == ACCEPTED or (before is not None and verdict != ACCEPTED):
            return False
        verdicts[version] = verdict
        if len(verdicts) > MAX_VERDICTS:
            del verdicts[next(iter(verdicts))]
        self._remember(key)
        return verdict != ACCEPTED or before is not None or self._search is not None

    def _remember(self, key: Key) -> None:
        """Keep what is offered, if it is accepted, for the time when its successor is not."""
        resource = self._snapshot.resources[key[0]][key[1]]
        if self._verdicts[key].get(resource.version) == ACCEPTED:
            self._accepted[key] = resource
            if key[0] == ROUTE:
                self._good[key[1]] = self._offers[key[1]]

    def _version(self, type_url: str, name: str) -> str:
        resource = self._snapshot.resources[type_url].get(name)
        return resource.version if resource else ""

    def _refusal(self, key: Key) -> str:
        """Why the resource is refused as it is offered; "" if it is not, or not yet."""
        return self._verdicts.get(key, {}).get(self._version(*key), ACCEPTED)

    # --- whose fault it is ---

    def review(self) -> bool:
        """Draw the conclusions; returns whether other HTTPRoutes are to be admitted, or others are known to be bad."""
        if self._search is not None:
            return self._go_on(self._search)
        for name in self._offers:
            reason = self._refusal((ROUTE, name))
            if reason and (name, self._version(ROUTE, name)) not in self._unsolved:
                self._begin(name, reason)
                return True
        return any(self._is_vindicated(each) for each in self._withheld.values())

    def _is_vindicated(self, each: _Withheld) -> bool:
        """Whether the version it was blamed for has been accepted since, by another Envoy."""
        name, version = each.where
        return self._verdicts.get((ROUTE, name), {}).get(version) == ACCEPTED

    def _begin(self, name: str, reason: str) -> None:
        offer, good, version = self._offers[name], self._good.get(name), self._version(ROUTE, name)
        known = good.parts if good else {}
        differ = [ref for ref, part in offer.parts.items() if known.get(ref) != part]
        pointed_at = _pointed_at(reason, offer)
        suspects = [ref for ref in differ if ref in pointed_at] or differ
        search = _Search(name, version, reason, suspects, offer, good)
        if len(suspects) == 1:
            self._withhold(search, suspects[0], reason)
        elif 0 < len(suspects) <= MAX_TRIED:
            self._search = search
        else:
            self._unsolved.add((name, version))

    def _go_on(self, search: _Search) -> bool:
        """Judge the trial that is offered, if it has been answered, and go on to the next one."""
        if search.name not in self._offers:
            self._search = None
            return True
        verdict = self._verdicts.get((ROUTE, search.name), {}).get(self._version(ROUTE, search.name))
        if verdict is None:
            return False
        tried, is_accepted = search.left.pop(0), verdict == ACCEPTED
        if search.good is not None and not is_accepted:
            self._withhold(search, tried, verdict)
        elif search.good is None and is_accepted:
            self._withhold(search, tried, search.reason)
            search.left.clear()
        elif search.good is None and not search.left:
            self._unsolved.add((search.name, search.version))
        if not search.left:
            self._search = None
        return True

    def _withhold(self, search: _Search, ref: ObjectRef, reason: str) -> None:
        route = search.offer.objects[ref]
        instead = search.good.objects.get(ref) if search.good else None
        served = "its last accepted version is served" if instead else "it is not served"
        rejection = Rejection(ref, REASON, f"Envoy refuses it: {reason}; {served}", source=route.meta.source)
        self._withheld[ref] = _Withheld(route, instead, (search.name, search.version), rejection)


def _offer(
    name: str, hosts: tuple[VirtualHost, ...], port: PortListener, objects: Mapping[ObjectRef, HTTPRoute]
) -> _Offer:
    parts: dict[ObjectRef, list[Route]] = {}
    for host in hosts:
        for route in host.routes:
            if owner := _owner(route.name):
                parts.setdefault(owner, []).append(route)
    return _Offer(name, hosts, port, {ref: tuple(part) for ref, part in parts.items()}, objects)


def _owner(route_name: str) -> ObjectRef | None:
    """The HTTPRoute of a route, by its name `<namespace>/<HTTPRoute>/<rule>/<match>`; None: it has none."""
    namespace, _, rest = route_name.partition("/")
    return ObjectRef(GATEWAY, "HTTPRoute", namespace, rest.partition("/")[0]) if rest else None


def _owners(topology: Topology) -> dict[Key, tuple[ObjectRef, ...]]:
    owners: dict[Key, tuple[ObjectRef, ...]] = {}
    for port in topology.listeners:
        owners[LISTENER, listener_name(port)] = port.gateways
        owners |= {(ROUTE, name): port.gateways for name, _ in route_tables(port)}
    owners |= {(SECRET, secret_name(each.meta.ref)): (each.meta.ref,) for each in topology.secrets}
    return owners | {(CLUSTER, each.name): (each.ref,) for each in topology.clusters if each.ref}


def _pointed_at(reason: str, offer: _Offer) -> frozenset[ObjectRef]:
    """The HTTPRoutes at the place that Envoy's message names by index; empty when it names none."""
    found = _PLACE.search(reason)
    if found is None:
        return frozenset()
    body = route_configuration(offer.name, offer.hosts, offer.port.port, tls=bool(offer.port.chains))
    built = RouteConfiguration.parse(body)
    hosts = built.virtual_hosts[int(found[1]) :][:1]
    routes = [route for host in hosts for route in (host.routes[int(found[2]) :][:1] if found[2] else host.routes)]
    return frozenset(filter(None, (_owner(route.name) for route in routes)))
