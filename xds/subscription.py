"""Subscription: what one client wants of one type, what it holds, and what it has to be sent. Both variants share it.

The core is one difference: `changes` compares a snapshot's resources with what the client holds. Delta sends that
difference as it is. State of the world sends either the changed resources (endpoints, routes) or all that the client
holds once the change is applied (listeners, clusters): see xds/stream.py.

A client may refuse (NACK) a response. One bad resource then must not keep the others from it, and nothing may be sent
twice in vain, so a refused response of several resources is tried again in halves, until the bad one is alone. That one
resource is refused: it is not sent again until it changes, and the client stays on the version it last accepted.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice

from xds.snapshot import Resource, Step, version_of

WILDCARD = "*"


@dataclass(frozen=True, slots=True)
class Change:
    """What would bring a client up to date; for `remove`, the client is told that these do not exist."""

    update: Mapping[str, Resource]
    remove: frozenset[str]

    def __bool__(self) -> bool:
        return bool(self.update or self.remove)


NO_CHANGE = Change({}, frozenset())


@dataclass(frozen=True, slots=True)
class Flight:
    """A response that the client has not answered yet. `sent` in seconds, on the stream's clock."""

    nonce: str
    version: str
    change: Change
    sent: float


@dataclass(slots=True)
class Subscription:
    """One type on one stream; mutable. Only the stream that owns it calls it.

    `tells_absence`: this variant can say of this type that a resource does not exist.
    `empty_is_wildcard`: a client that never named a resource wants them all (the protocol's legacy rule).
    `full_state`: each response says all that the client is to hold, and takes away what it leaves out.
    """

    tells_absence: bool
    empty_is_wildcard: bool
    full_state: bool = False

    opened: bool = False  # a request for this type has come
    resumed: bool = False  # and it said what the client holds from an earlier stream
    wildcard: bool = False
    names: set[str] = field(default_factory=set)  # asked for by name
    # What the client has accepted. None: it has been told that the resource does not exist.
    held: dict[str, Resource | None] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # name -> version
    owed: set[str] = field(default_factory=set)  # to be sent again although the client holds it
    unanswered: bool = False  # the first request waits for an answer, an empty one if need be
    flight: Flight | None = None
    nonce: str = ""  # of the last response
    version_sent: str = ""
    version_acked: str = ""
    last_nack: str = ""

    # False after a SotW reconnect at a version we do not know: the client holds more than `held` says, so leaving a
    # resource out of a full state may delete it. Until the client accepts a response, everything is sent or nothing.
    base_known: bool = True

    _named: bool = False  # has ever asked for something by name
    _claim: str = ""  # the version a reconnecting SotW client says it holds
    _limit: int | None = None  # resources in one response, while a refusal is being narrowed down
    _refused_whole: Mapping[str, Resource] | None = None
    # Nothing differs from these: saves comparing again, and leaves to compare only what a step from here changes.
    _clean: Mapping[str, Resource] | None = None
    _next_clean: Mapping[str, Resource] | None = None  # the same, once the client has accepted the response in flight

    # --- what the client asks for ---

    def open(self, *, names: Iterable[str], claim: str = "", held: Mapping[str, str] | None = None) -> None:
        """Take the first request for this type.

        `claim` is SotW's version_info, `held` delta's initial_resource_versions (name -> version).
        """
        self.opened = True
        self.resumed = bool(claim or held)
        self.set_names(names)
        self._claim = claim
        for name, version in (held or {}).items():
            if self.wants(name):
                self.held[name] = Resource(name, version, b"", b"")
        self.unanswered = self.tells_absence and (self.wildcard or bool(self.names))

    def set_names(self, names: Iterable[str]) -> None:
        """Take the full list of names that a SotW request carries."""
        self._named = self._named or bool(names)
        self.wildcard, new = self._asked(names)
        added, self.names = new - self.names, new
        self._owe_again(added)
        self._forget_unwanted()

    def differs(self, names: Iterable[str]) -> bool:
        """Whether this full list of names asks for something else than the client has asked for so far."""
        return self._asked(names) != (self.wildcard, self.names)

    def _asked(self, names: Iterable[str]) -> tuple[bool, set[str]]:
        asked = set(names)
        return WILDCARD in asked or (self.empty_is_wildcard and not self._named and not asked), asked - {WILDCARD}

    def subscribe(self, names: Iterable[str]) -> None:
        """Take delta's resource_names_subscribe. A name that is subscribed already is to be sent again:

        "the client may have 'forgotten' those resources despite apparently remaining subscribed".
        """
        for name in names:
            self._named = True
            if name == WILDCARD:
                self.wildcard = True
            else:
                self.names.add(name)
                self._owe_again((name,))
            self._compare_all()

    def unsubscribe(self, names: Sequence[str]) -> None:
        """Take delta's resource_names_unsubscribe; names that are not subscribed are ignored.

        With a wildcard beside it the client cannot know whether to keep the resource, so it is owed an answer.
        """
        if not names:
            return
        for name in names:
            if name == WILDCARD:
                self.wildcard = False
            elif name in self.names:
                self.names.discard(name)
                if self.wildcard:
                    self.owed.add(name)
        self._forget_unwanted()

    def wants(self, name: str) -> bool:
        """Whether the client is subscribed to this name, by wildcard or explicitly."""
        return self.wildcard or name in self.names

    def owe(self, names: Iterable[str]) -> None:
        """Have these sent with the next response, changed or not."""
        self.owed.update(names)
        self._compare_all()

    def _owe_again(self, names: Iterable[str]) -> None:
        sent = self.flight.change if self.flight else NO_CHANGE
        self.owe(name for name in names if name in self.held or name in sent.update or name in sent.remove)

    def _forget_unwanted(self) -> None:
        self._compare_all()
        # Beside a wildcard too, or a client could have any number of names told to be absent.
        for name in [name for name, resource in self.held.items() if resource is None and name not in self.names]:
            del self.held[name]
        for memory in (self.held, self.refused):
            for name in [name for name in memory if not self.wants(name)]:
                del memory[name]

    # --- what it is to be sent ---

    def wanted(self, resources: Mapping[str, Resource]) -> Mapping[str, Resource]:
        """Return those of `resources` the client is subscribed to, sorted by name."""
        if self.wildcard:
            return resources
        return {name: resources[name] for name in sorted(self.names) if name in resources}

    def changes(self, resources: Mapping[str, Resource], step: Step | None = None) -> Change:
        """Return how `resources` differ from what the client has accepted; refused versions do not count.

        A response in flight is not accepted yet: its resources are part of the difference. `step` led to `resources`.
        """
        if self._clean is resources:
            return NO_CHANGE
        if step is not None and step.before is self._clean:
            change = self._compare(step.names, resources)
        else:
            asked = resources.keys() if self.wildcard else self.names
            change = self._compare(asked | self.names | self.held.keys() | self.owed, resources)
        if not change:
            self._clean = resources
        return change

    def _compare(self, names: Set[str], resources: Mapping[str, Resource]) -> Change:
        there = sorted(names & resources.keys())
        update = {name: resources[name] for name in there if self.wants(name) and self._due(resources[name])}
        return Change(update, frozenset(name for name in names - resources.keys() if self._misses(name)))

    def _compare_all(self) -> None:
        """Forget what is known not to differ: what the client wants or holds is another."""
        self._clean = self._next_clean = None

    def _misses(self, name: str) -> bool:
        """Whether the client has to be told that this resource does not exist."""
        if name in self.held:
            return self.held[name] is not None or (name in self.owed and self.wants(name))
        return name in self.names or (name in self.owed and self.wants(name))

    def _due(self, resource: Resource) -> bool:
        if self.refused.get(resource.name) == resource.version:
            return False
        return resource.name in self.owed or not self._holds(resource)

    def _holds(self, resource: Resource) -> bool:
        held = self.held.get(resource.name)
        return held is not None and held.version == resource.version

    def refuses(self, resources: Mapping[str, Resource]) -> bool:
        """Whether the client has refused any of these, as they are now."""
        if not self.refused and self._refused_whole is None:
            return False
        self.refused = {n: v for n, v in self.refused.items() if n in resources and resources[n].version == v}
        return bool(self.refused) or self._refused_whole == self.wanted(resources)

    def plan(
        self, resources: Mapping[str, Resource], step: Step | None = None, kept: Container[str] = ()
    ) -> Change | None:
        """Return what to send now, None for nothing. At most one response is in flight: what comes meanwhile coalesces.

        `kept`: names that the client is to keep if it holds them, even if the snapshot no longer has them.
        """
        if self.flight is not None or not self.opened:
            return None
        if self._claim:
            self._check_claim(self.wanted(resources))
        if self.refuses(resources) and not self.base_known:
            return None
        change = self.changes(resources, step)
        self.owed.intersection_update(change.update)  # a name the client does not want is owed to nobody
        if not change.update:
            self._limit = None
        remove = change.remove
        if not self.tells_absence:
            self._drop(remove)
            remove = frozenset()
        else:
            remove = frozenset(name for name in remove if self.held.get(name) is None or name not in kept)
        update = dict(islice(change.update.items(), self._limit))
        whole = len(update) == len(change.update) and (not self.tells_absence or len(remove) == len(change.remove))
        if update or remove or self.unanswered:
            self._next_clean = resources if whole else None
            return Change(update, remove)
        if whole:
            self._clean = resources
        return None

    def assume(self, resources: Iterable[Resource]) -> None:
        """Take it that the client holds these, whatever it says."""
        self.held.update({resource.name: resource for resource in resources})
        self._compare_all()

    def claims_other(self, resources: Mapping[str, Resource]) -> bool:
        """Whether a SotW client that wants all of these says it holds another version, and is not answered yet."""
        return bool(self._claim) and self.wildcard and not self._believed(self.wanted(resources))

    def _believed(self, wanted: Mapping[str, Resource]) -> bool:
        return self.wildcard and not self.names and self._claim == version_of(wanted)

    def _check_claim(self, wanted: Mapping[str, Resource]) -> None:
        """Compare what a reconnecting SotW client says it holds with what it would be sent.

        Only a wildcard's version is believed. A client may have dropped a name and taken it up again since it was sent
        that version: it then waits for a resource that, going by the version, it has.
        """
        if self._believed(wanted):
            self.held.update(wanted)
            self.unanswered = False
            self.version_acked = self._claim
        elif self.tells_absence:
            self.base_known = False
        self._claim = ""

    def after(self, change: Change) -> dict[str, Resource]:
        """Return all that the client holds once it has accepted `change`, sorted by name."""
        world = {name: resource for name, resource in self.held.items() if resource is not None}
        world.update(change.update)
        return {name: world[name] for name in sorted(world.keys() - change.remove)}

    # --- what became of it ---

    def sent(self, flight: Flight) -> None:
        """Note that this response is on its way."""
        self.flight = flight
        self.nonce = flight.nonce
        self.version_sent = flight.version
        self.unanswered = False
        self.owed.difference_update(flight.change.update)

    def acked(self) -> None:
        """Note that the client has accepted the response in flight."""
        if self.flight is None:
            return
        change, self.version_acked = self.flight.change, self.flight.version
        self.flight = None
        self.base_known = True
        self.held.update({name: resource for name, resource in change.update.items() if self.wants(name)})
        self._drop(change.remove)
        self._clean, self._next_clean = self._next_clean, None
        if self._limit is not None:
            self._limit *= 2

    def nacked(self, message: str) -> None:
        """Note that the client has refused the response in flight; `message` is its reason."""
        if self.flight is None:
            return
        change, self.flight = self.flight.change, None
        self.last_nack = message
        self._compare_all()
        # What the client holds is in every full state, owed or not: to send it again says nothing more.
        new = {name: r for name, r in change.update.items() if not (self.full_state and self._holds(r))}
        if not self.base_known:
            self._refused_whole = change.update
        elif len(new) > 1:
            self._limit = len(change.update) // 2
            self.owe(name for name, resource in change.update.items() if self._holds(resource))
        elif new:
            self.refused.update({name: resource.version for name, resource in new.items()})
            self.owe(change.update.keys() - new.keys())
        else:
            self._drop(change.remove)  # to refuse a removal means nothing: the resource is not served any more

    def _drop(self, names: Iterable[str]) -> None:
        self._clean = None
        for name in names:
            if name in self.names:
                self.held[name] = None
            else:
                self.held.pop(name, None)
