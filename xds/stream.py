"""The xDS protocol without I/O: requests in, responses out, time as an argument. One object for each stream.

After https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol; where it leaves a choice, the rule here:

1. Before the first snapshot nothing is answered: an empty answer would make a running Envoy delete all it has.
2. Each type has at most one unanswered response; snapshots published meanwhile coalesce into the next one.
3. Only what differs from what the client accepted is sent. Delta: the changed resources and `removed_resources`. State
   of the world (SotW): all listeners and clusters, but only the changed endpoints and routes. A first request is
   answered even with nothing, where the variant can say so: Envoy starts only then.
4. A client that reconnects says what it holds and is sent the difference. Delta gives a version for each resource; the
   one version SotW gives counts for a wildcard alone, where it stands for exactly the set that was sent.
5. A refused (NACKed) response is never repeated; how the good part of it still arrives: xds/subscription.py.
6. A SotW request with a stale nonce is ignored; in delta its subscriptions count, its ACK does not.

Make before break, for each client (https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol#eventual-consistency-considerations):

7. Clusters, endpoints and secrets go first and wait for nothing. Endpoints must not wait for the ACK of the clusters:
   Envoy withholds it until the clusters have warmed, and they warm by their endpoints. For that reason the endpoints of
   every cluster just sent are sent too, changed or not: for a changed cluster a delta Envoy does not ask again.
8. Listeners and routes wait while the client has yet to accept a new cluster: until it answers, or for HOLD.
9. What clusters, endpoints, secrets and routes are gone is told last: LINGER after the listeners and routes that used
   them have been accepted, or for HOLD unanswered. While the client refuses a listener or a route it still uses the old
   one, so nothing is taken away. Until then SotW sends the union of old and new clusters. On a new stream LINGER begins
   anew.
10. Who comes back may still be warming clusters of the stream before: Envoy then asks for endpoints, and for clusters
   only when all are warm. Listeners and routes wait for that request, or for HOLD.
11. A SotW client that comes back may hold clusters which this server, restarted after a change, has never known, and
   loses those a world of clusters does not name. But it asks for their endpoints: each such name that is not served
   gets a stand-in in the first world, and goes as in rule 9. A cluster that is replaced stays in use until the new one
   is warm, which the stand-in is without an answer: xds/clusters.py.

A change of weights is a change of endpoints alone, so it is sent at once. PoolConfig and PoolLoad take no part in the
order.

A stream of a service for one type (LDS, RDS, CDS, EDS, SDS instead of ADS) is `only` that type, which its requests need
not name. Rules 7 to 9 order what is on one stream, so between such streams nothing is ordered: that is what ADS is for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Generic, TypeVar

from xds.snapshot import CLUSTER, ENDPOINT, LISTENER, ROUTE, SECRET, TYPES, Snapshot, make_resource, version_of
from xds.subscription import Change, Flight, Subscription
from xds.wire import discovery_pb2 as wire

# Envoy asks for these by name, never for all of them: an empty list of names is none. SotW sends only the changed ones.
BY_NAME = frozenset({ENDPOINT, ROUTE, SECRET})
USED_BY_ROUTES = frozenset({CLUSTER, ENDPOINT, ROUTE, SECRET})  # what a listener or route in use may need

# Seconds to wait for an answer before the next step of make-before-break is taken all the same. Envoy answers within
# its initial_fetch_timeout (15 s) even if a cluster never warms; a client that is silent for longer is stuck.
HOLD = 20.0

# Seconds that a client keeps what is gone when no route needs it any more. A request keeps the route it came by while
# its body arrives and the picker is asked, and fails if that cluster is gone by then. The largest body, 32 MiB, takes
# as long at 9 Mbit/s.
LINGER = 30.0

# Seconds a SotW client that comes back has for naming the endpoints it uses: Envoy sends all its requests at once.
GATHER = 1.0
MAX_STAND_INS = 1_000  # clusters that were removed while a client was away: a client can name any number of them

# Names one subscription may hold, and a client may say it holds: 30 MB. A request of 4 MiB (the server's limit) names
# about as many; without a bound a client could add as many with each request.
MAX_NAMES = 100_000
MAX_NAME = 512  # characters of a name: the longest of ours, of a pool with the longest names, has 330

MAX_MESSAGE = 2_000  # characters kept of a client's reason

QUOTED = 200  # characters of a resource that are enough to know it
CUT = "...(truncated)"  # the end of a message that Envoy has cut
BROKEN_RULE = "Proto constraint validation failed"  # how Envoy says which rule of the proto a resource breaks

# Lists of resources kept encoded: what clients that are up to date are sent at one time, one of each type and variant,
# and as many again for clients that are behind.
KEPT = 20


class Kind(StrEnum):
    """What a request is; the first that fits, in this order."""

    UNKNOWN_TYPE = "unknown_type"  # not a type of this server: ignored
    EXCESS = "excess"  # names more than MAX_NAMES, or one longer than MAX_NAME: the stream has to be closed
    FIRST = "first"  # first of its type on this stream
    RECONNECT = "reconnect"  # the same, and the client says what it holds from an earlier stream
    STALE_NONCE = "stale_nonce"  # answers a response that a later one has overtaken
    NACK = "nack"
    NAMES = "names"  # asks for other names than before; may be an ACK as well
    ACK = "ack"
    REPEAT = "repeat"  # nothing new


@dataclass(frozen=True, slots=True)
class Refusal:
    """A client's NACK: of which response, which changed resources (name -> version) were in it, and its reason."""

    type_url: str
    version: str
    nonce: str
    resources: Mapping[str, str]
    message: str


@dataclass(frozen=True, slots=True)
class Received:
    """What a request was; `refusal` if it is a NACK; `accepted` (name -> version) is what the client has taken."""

    kind: Kind
    type_url: str
    refusal: Refusal | None = None
    accepted: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Response:
    """What to send, encoded in two parts: two encoded protobufs, one after the other, are both merged.

    `message` has all but the resources, `resources` are these: the same object for all clients that are sent the same.
    """

    type_url: str
    nonce: str
    message: bytes
    resources: bytes
    count: int  # of resources

    def encode(self) -> bytes:
        """Return the bytes of the DiscoveryResponse or DeltaDiscoveryResponse."""
        return self.message + self.resources


@lru_cache(KEPT)
def encode_resources(resources: tuple[bytes, ...]) -> bytes:
    """Return the field `resources` of a response in either variant: it has the same number in both."""
    encoded: bytes = wire.DiscoveryResponse(resources=resources).SerializeToString()
    return encoded


def classify(sub: Subscription, *, claims: bool, stale: bool, error: bool, new_names: bool, answers: bool) -> Kind:
    """Say what a request is. `claims`: it says what it holds; `answers`: it has the nonce of the response in flight."""
    if not sub.opened:
        return Kind.RECONNECT if claims else Kind.FIRST
    if stale:
        return Kind.STALE_NONCE
    if answers and error:
        return Kind.NACK
    if new_names:
        return Kind.NAMES
    if answers:
        return Kind.ACK
    return Kind.REPEAT


def _is_excess(names: Iterable[str], count: int) -> bool:
    return count > MAX_NAMES or any(len(name) > MAX_NAME for name in names)


def _reason(message: str) -> str:
    """What is kept of a client's error message: where a rule is broken, Envoy quotes the whole resource before it.

    Of more than 4,096 bytes Envoy keeps the beginning, which then is the resource alone.
    """
    place = message.rfind(BROKEN_RULE)
    if place < 0 and message.endswith(CUT):
        return f"{BROKEN_RULE}, it seems; Envoy's message ends before it says how: {message[:QUOTED]}"
    return message[max(place, 0) :][:MAX_MESSAGE]


RequestT = TypeVar("RequestT")


class Stream(ABC, Generic[RequestT]):
    """What both variants share: the order of sending, and what an answer means. Mutable, one for each gRPC stream."""

    def __init__(self, subscriptions: Mapping[str, Subscription], identifier: str, only: str, linger: float) -> None:
        self.subscriptions = subscriptions
        self._only = only
        self._linger = linger
        self._control_plane = wire.ControlPlane(identifier=identifier)
        self._nonces = 0
        self.stand_ins: tuple[str, ...] = ()  # clusters that rule 11 was applied to
        self._began = math.inf  # when there was something to answer for the first time
        # What is gone, by type and name: since when no route of the client needs it; inf: one may.
        self._gone: dict[str, dict[str, float]] = {type_url: {} for type_url in USED_BY_ROUTES}

    def _asked(self, type_url: str) -> tuple[str, Subscription | None]:
        """The type a request is for, and its subscription; None for a type that is not served here.

        "This is implicit in requests made via singleton xDS APIs such as CDS, LDS, etc. but is required for ADS."
        """
        type_url = type_url or self._only
        return type_url, self.subscriptions.get(type_url) if self._only in ("", type_url) else None

    @abstractmethod
    def receive(self, request: RequestT) -> Received:
        """Take a request. What it makes necessary to send comes with the next `advance`."""

    @abstractmethod
    def _encode(self, type_url: str, change: Change, snapshot: Snapshot, nonce: str) -> tuple[str, Response]:
        """Return the version and the response that say `change` in this variant."""

    def advance(self, snapshot: Snapshot | None, now: float) -> list[Response]:
        """Return what to send now, in order, and take it as sent; `snapshot` is the newest, None before the first.

        Call it after every request, after every new snapshot, and at `deadline`. `now` in seconds on any steady clock.
        """
        if snapshot is None:
            return []
        self._began = min(self._began, now)
        self._note_gone(snapshot, math.inf if self._routes_pending(snapshot, now) else now)
        responses = []
        for type_url in TYPES:
            if type_url in (LISTENER, ROUTE) and self._clusters_pending(snapshot, now):
                continue
            response = self._push(type_url, snapshot, now)
            if response is not None:
                responses.append(response)
        return responses

    def _push(self, type_url: str, snapshot: Snapshot, now: float) -> Response | None:
        sub = self.subscriptions[type_url]
        kept: Container[str] = {
            name for name, since in self._gone.get(type_url, {}).items() if now < since + self._linger
        }
        if type_url in USED_BY_ROUTES and sub.unanswered:
            kept = sub.held  # a first answer takes nothing away: requests for other types may still be on their way
        change = sub.plan(snapshot.resources[type_url], snapshot.steps.get(type_url), kept)
        if change is None:
            return None
        self._nonces += 1
        nonce = str(self._nonces)
        version, response = self._encode(type_url, change, snapshot, nonce)
        sub.sent(Flight(nonce, version, change, now))
        if type_url == CLUSTER:
            refs = (ref for resource in change.update.values() for ref in resource.refs)
            self.subscriptions[ENDPOINT].owe(name for ref_type, name in refs if ref_type == ENDPOINT)
        return response

    def _note_gone(self, snapshot: Snapshot, now: float) -> None:
        """Rule 9: note what the client holds and the snapshot has no more. `now` is inf while a route may need it."""
        for type_url, before in self._gone.items():
            sub = self.subscriptions[type_url]
            gone = sub.changes(snapshot.resources[type_url], snapshot.steps.get(type_url)).remove if sub.opened else ()
            self._gone[type_url] = {
                name: min(before.get(name, now), now) for name in gone if sub.held.get(name) is not None
            }

    def _clusters_pending(self, snapshot: Snapshot, now: float) -> bool:
        """Rules 8 and 10: a cluster that the client does not have is on its way, or one that it has is not warm."""
        clusters = self.subscriptions[CLUSTER]
        if self._warming():
            return now < self._began + HOLD
        if clusters.flight is None or now >= clusters.flight.sent + HOLD:
            return False
        return any(clusters.held.get(name) is None for name in clusters.changes(snapshot.resources[CLUSTER]).update)

    def _warming(self) -> bool:
        """Rule 10: it has come back, and asks for endpoints, listeners and routes but not for clusters."""
        subs = self.subscriptions
        resumed = subs[LISTENER].resumed or subs[ROUTE].resumed
        return resumed and subs[ENDPOINT].opened and not subs[CLUSTER].opened

    def _routes_pending(self, snapshot: Snapshot, now: float) -> bool:
        """Rule 9: a listener or route that may still use what is gone is not replaced yet."""
        for type_url in (LISTENER, ROUTE):
            sub = self.subscriptions[type_url]
            resources = snapshot.resources[type_url]
            if sub.refuses(resources):
                return True
            if sub.flight is not None:
                if now < sub.flight.sent + HOLD:
                    return True
            elif sub.opened:
                change = sub.changes(resources)
                if change.update or (type_url == LISTENER and change.remove):
                    return True
        return False

    def concerned(self, before: Snapshot | None, after: Snapshot | None) -> bool:
        """Whether a type that the client has asked for differs; if not, `advance` has nothing more to send."""
        if before is None or after is None:
            return before is not after
        return any(
            sub.opened and before.resources[type_url] is not after.resources[type_url]
            for type_url, sub in self.subscriptions.items()
        )

    def deadline(self, now: float) -> float | None:
        """Return when `advance` has to be called even if nothing happens; None = no need."""
        flights = (self.subscriptions[type_url].flight for type_url in (CLUSTER, LISTENER, ROUTE))
        held = [flight.sent + HOLD for flight in flights if flight is not None]
        held += [since + self._linger for gone in self._gone.values() for since in gone.values()]
        if self._warming():
            held.append(self._began + HOLD)
        return min((until for until in held if now < until < math.inf), default=None)

    def settled(self, snapshot: Snapshot) -> bool:
        """Whether the client has accepted all of this snapshot that it subscribes to and does not refuse.

        What is gone, and lingers, does not count.
        """
        for type_url, sub in self.subscriptions.items():
            if sub.opened:
                change = sub.changes(snapshot.resources[type_url])
                gone = change.remove - self._gone.get(type_url, {}).keys()
                if sub.flight is not None or sub.unanswered or change.update or gone:
                    return False
        return True

    def _answer(
        self, kind: Kind, type_url: str, sub: Subscription, flight: Flight, error: wire.Status | None
    ) -> Received:
        """Take the answer to the response in flight: an ACK, or with `error` a NACK."""
        resources = {name: resource.version for name, resource in flight.change.update.items()}
        if error is None:
            sub.acked()
            return Received(kind, type_url, accepted=resources)
        message = _reason(error.message)
        sub.nacked(message)
        return Received(kind, type_url, Refusal(type_url, flight.version, flight.nonce, resources, message))


class SotwStream(Stream[wire.DiscoveryRequest]):
    """State of the world: each request carries all names, and listeners and clusters are sent as a whole.

    `stand_in` makes the encoded cluster of rule 11 for a name.
    """

    def __init__(
        self, stand_in: Callable[[str], bytes], identifier: str = "", only: str = "", linger: float = LINGER
    ) -> None:
        subscriptions = {
            type_url: Subscription(
                tells_absence=type_url not in BY_NAME,
                empty_is_wildcard=type_url not in BY_NAME,
                full_state=type_url not in BY_NAME,
            )
            for type_url in TYPES
        }
        super().__init__(subscriptions, identifier, only, linger)
        self._stand_in = stand_in

    def receive(self, request: wire.DiscoveryRequest) -> Received:
        type_url, sub = self._asked(request.type_url)
        if sub is None:
            return Received(Kind.UNKNOWN_TYPE, type_url)
        names = request.resource_names
        new_names = sub.differs(names)
        if new_names and _is_excess(names, len(names)):
            return Received(Kind.EXCESS, type_url)
        error = request.error_detail if request.HasField("error_detail") else None
        flight = sub.flight if sub.flight is not None and request.response_nonce == sub.flight.nonce else None
        kind = classify(
            sub,
            claims=bool(request.version_info),
            stale=request.response_nonce != sub.nonce,
            error=error is not None,
            new_names=new_names,
            answers=flight is not None,
        )
        received = Received(kind, type_url)
        if kind in (Kind.FIRST, Kind.RECONNECT):
            sub.open(names=names, claim=request.version_info)
        elif kind is not Kind.STALE_NONCE:
            if flight is not None:
                received = self._answer(kind, type_url, sub, flight, error)
            if new_names:
                sub.set_names(names)
        return received

    def _push(self, type_url: str, snapshot: Snapshot, now: float) -> Response | None:
        clusters = self.subscriptions[CLUSTER]
        if type_url == CLUSTER and clusters.claims_other(snapshot.resources[CLUSTER]):
            if self._gathering() and now < self._began + GATHER:
                return None
            gone = sorted(self.subscriptions[ENDPOINT].names - snapshot.resources[CLUSTER].keys())
            self.stand_ins = tuple(gone[:MAX_STAND_INS])
            clusters.assume(make_resource(CLUSTER, name, self._stand_in(name)) for name in self.stand_ins)
        return super()._push(type_url, snapshot, now)

    def _gathering(self) -> bool:
        """Rule 11: it has come back, and has not asked for endpoints yet."""
        subs = self.subscriptions
        return subs[CLUSTER].resumed and not subs[ENDPOINT].opened and not self._only

    def deadline(self, now: float) -> float | None:
        deadline, gathered = super().deadline(now), self._began + GATHER
        if self._gathering() and gathered > now:
            return gathered if deadline is None else min(deadline, gathered)
        return deadline

    def _encode(self, type_url: str, change: Change, snapshot: Snapshot, nonce: str) -> tuple[str, Response]:
        resources, version = change.update, snapshot.versions[type_url]
        if type_url not in BY_NAME:
            resources = self.subscriptions[type_url].after(change)
            if resources != snapshot.resources[type_url]:
                version = version_of(resources)
        message = wire.DiscoveryResponse(
            version_info=version, type_url=type_url, nonce=nonce, control_plane=self._control_plane
        )
        return version, _response(message, (resource.any for resource in resources.values()))


class DeltaStream(Stream[wire.DeltaDiscoveryRequest]):
    """Incremental: requests change the set of names, responses carry only what changed."""

    def __init__(self, identifier: str = "", only: str = "", linger: float = LINGER) -> None:
        subscriptions = {
            type_url: Subscription(tells_absence=True, empty_is_wildcard=type_url not in BY_NAME) for type_url in TYPES
        }
        super().__init__(subscriptions, identifier, only, linger)

    def receive(self, request: wire.DeltaDiscoveryRequest) -> Received:
        type_url, sub = self._asked(request.type_url)
        if sub is None:
            return Received(Kind.UNKNOWN_TYPE, type_url)
        new, held = request.resource_names_subscribe, request.initial_resource_versions
        if _is_excess(new, len(sub.names) + len(new)) or _is_excess(held, len(held)):
            return Received(Kind.EXCESS, type_url)
        error = request.error_detail if request.HasField("error_detail") else None
        flight = sub.flight if sub.flight is not None and request.response_nonce == sub.flight.nonce else None
        kind = classify(
            sub,
            claims=bool(held),
            stale=request.response_nonce not in ("", sub.nonce),
            error=error is not None,
            new_names=bool(new or request.resource_names_unsubscribe),
            answers=flight is not None,
        )
        received = Received(kind, type_url)
        if kind in (Kind.FIRST, Kind.RECONNECT):
            sub.open(names=new, held=held)
            received = Received(kind, type_url, accepted=dict(held))
        else:
            if flight is not None:
                received = self._answer(kind, type_url, sub, flight, error)
            sub.subscribe(new)
            sub.unsubscribe(request.resource_names_unsubscribe)
        return received

    def _encode(self, type_url: str, change: Change, snapshot: Snapshot, nonce: str) -> tuple[str, Response]:
        version = snapshot.versions[type_url]
        message = wire.DeltaDiscoveryResponse(
            system_version_info=version,
            type_url=type_url,
            nonce=nonce,
            removed_resources=sorted(change.remove),
            control_plane=self._control_plane,
        )
        return version, _response(message, (resource.entry for resource in change.update.values()))


def _response(message: wire.DiscoveryResponse | wire.DeltaDiscoveryResponse, resources: Iterable[bytes]) -> Response:
    given = tuple(resources)
    return Response(message.type_url, message.nonce, message.SerializeToString(), encode_resources(given), len(given))
