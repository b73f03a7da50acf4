"""The hostnames of one port: which listener has each, which rules count for it, and how many routes that makes (pure).

A hostname belongs to the most specific listener that covers it, and to that alone (listener isolation). Its virtual
host has the rules of every wider hostname of that listener too: each rule is there once for each hostname it covers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from xds.model import Gateway, HTTPRoute, Listener, RouteRule

ANY_HOST = "*"


@dataclass(frozen=True, slots=True)
class Attached:
    """One rule of one route on one listener, under one hostname."""

    hostname: str
    listener: Listener
    gateway: Gateway
    route: HTTPRoute
    rule: RouteRule
    index: int


@dataclass(slots=True)
class Room:
    """How many routes there may be yet; mutable."""

    routes: int


def covers(wide: str, narrow: str) -> bool:
    """Whether every name `narrow` stands for is one of `wide`'s: equal, or under `*.suffix`, or `*`."""
    return wide in (narrow, ANY_HOST) or (wide.startswith("*.") and narrow.removeprefix("*").endswith(wide[1:]))


def specificity(hostname: str) -> tuple[bool, int]:
    """Exact before wildcard, then the longer."""
    return (not hostname.startswith("*"), len(hostname))


def wider(hostname: str) -> Iterator[str]:
    """The hostname and each that covers it, the most specific first."""
    yield hostname
    labels = hostname.removeprefix("*.").split(".")
    for i in range(1, len(labels)):
        yield "*." + ".".join(labels[i:])
    if hostname != ANY_HOST:
        yield ANY_HOST


class Port:
    """The listeners of one port, whose hostnames differ, and the rules that are attached to them (mutable)."""

    def __init__(self, listeners: Iterable[Listener]) -> None:
        self._listeners = {listener.hostname or ANY_HOST: listener for listener in listeners}
        self.hostnames: set[str] = set()
        self._owned: defaultdict[str, list[str]] = defaultdict(list)
        self._rules: defaultdict[str, list[Attached]] = defaultdict(list)
        self._matches: Counter[str] = Counter()  # of the rules of a hostname
        self._covered: Counter[str] = Counter()  # virtual hosts that have the rules of a hostname
        for hostname in self._listeners.keys() - {ANY_HOST}:
            self._appear(hostname)

    def owner(self, hostname: str) -> Listener:
        """The most specific listener, which takes the requests for `hostname`; one of them has to cover it."""
        return next(self._listeners[wide] for wide in wider(hostname) if wide in self._listeners)

    def add(self, attached: Attached, room: Room) -> bool:
        """Attach a rule, if there is room for the routes that adds: its own, and those its hostname inherits."""
        hostname, matches = attached.hostname, len(attached.rule.matches)
        is_new = hostname not in self.hostnames
        added = matches * (self._covered[hostname] + is_new)
        if is_new:
            added += sum(self._matches[wide] for wide in self._served_by(hostname))
        if added > room.routes:
            return False
        room.routes -= added
        if is_new:
            self._appear(hostname)
        self._matches[hostname] += matches
        self._rules[hostname].append(attached)
        return True

    def rules(self, hostname: str) -> Iterator[Attached]:
        """Those of the hostname, and of every wider one of its listener."""
        for wide in self._served_by(hostname):
            yield from self._rules.get(wide, ())

    def hostnames_of(self, listener: Listener) -> list[str]:
        """Those of the virtual hosts that are a listener's own."""
        return self._owned[listener.hostname or ANY_HOST]

    def _appear(self, hostname: str) -> None:
        self.hostnames.add(hostname)
        self._owned[self.owner(hostname).hostname or ANY_HOST].append(hostname)
        for wide in self._served_by(hostname):
            self._covered[wide] += 1

    def _served_by(self, hostname: str) -> Iterator[str]:
        for wide in wider(hostname):
            yield wide
            if wide in self._listeners:
                return
