"""The protocol without I/O: every scenario, the holds with their clock, convergence whatever the order of events."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tests.ads_client import FULL_STATE, DeltaPeer, SotwPeer, resource, revision_of
from tests.scenarios import FULL, OF_ONE_TYPE, PEERS, SCENARIOS, Link, snapshot, start_up
from xds.snapshot import CLUSTER, ENDPOINT, LISTENER, POOL_LOAD, ROUTE, Snapshot, make_resource
from xds.stream import (
    GATHER,
    HOLD,
    LINGER,
    MAX_MESSAGE,
    MAX_NAME,
    MAX_NAMES,
    MAX_STAND_INS,
    DeltaStream,
    Kind,
    Received,
    Refusal,
    SotwStream,
)
from xds.wire import discovery_pb2 as wire


def stand_in(name: str) -> bytes:
    return wire.Node(id=name, cluster="stand-in").SerializeToString()


class MemoryLink(Link):
    """A peer and a stream joined in memory; `now` is the stream's clock. `only`: the service for this type alone.

    What is gone is taken away at once unless `linger` says otherwise.
    """

    def __init__(self, peer: SotwPeer | DeltaPeer, only: str = "", linger: float = 0.0) -> None:
        self.peer = peer
        self.only = only
        self.linger = linger
        self.now = 0.0
        self.snapshot: Snapshot | None = None
        self.stream: Any = self._open()
        self.responses: deque[Any] = deque()

    def _open(self) -> SotwStream | DeltaStream:
        if isinstance(self.peer, DeltaPeer):
            return DeltaStream("test", self.only, self.linger)
        return SotwStream(stand_in, "test", self.only, self.linger)

    def advance(self) -> None:
        sent = self.stream.advance(self.snapshot, self.now)
        self.responses.extend(self.peer.response.FromString(each.encode()) for each in sent)

    async def publish(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.advance()

    async def send(self, *requests: Any) -> None:
        for request in requests:
            self.stream.receive(request)
            self.advance()

    async def receive(self) -> Any:
        assert self.responses, "nothing was sent"
        return self.responses.popleft()

    async def quiet(self) -> None:
        assert not self.responses

    async def reconnect(self) -> None:
        self.stream = self._open()
        self.responses.clear()
        await self.send(*self.peer.reconnect())


@pytest.fixture(params=PEERS, ids=["sotw", "delta"])
def link(request: pytest.FixtureRequest) -> MemoryLink:
    return MemoryLink(request.param())


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_scenario(link: MemoryLink, scenario: Any) -> None:
    """Each rule of the protocol holds in both variants over the pure objects; the scenario says which."""
    await scenario(link)


@pytest.mark.parametrize("peer", PEERS, ids=["sotw", "delta"])
@pytest.mark.parametrize(("scenario", "only"), OF_ONE_TYPE, ids=lambda value: getattr(value, "__name__", ""))
async def test_scenario_of_one_type(peer: Any, scenario: Any, only: str) -> None:
    """On a stream for one type alone the same rules hold for it."""
    await scenario(MemoryLink(peer(), only))


async def test_routes_are_held_for_a_bounded_time(link: MemoryLink) -> None:
    """A client that never answers about its clusters gets its routes HOLD seconds later, and not before."""
    await start_up(link)
    await link.publish(snapshot(**FULL | {"cds": {"a": "1", "b": "1", "c": "1"}, "rds": {"r": "2"}}))
    await link.expect(CLUSTER, {"c": "1"}, ack=False)
    assert link.stream.deadline(link.now) == HOLD
    link.now = HOLD - 0.1
    link.advance()
    await link.quiet()
    link.now = HOLD
    link.advance()
    await link.expect(ROUTE, {"r": "2"})
    await link.quiet()
    assert link.stream.deadline(link.now) is None


async def test_removals_are_held_for_a_bounded_time(link: MemoryLink) -> None:
    """A client that never answers about its routes loses the old clusters HOLD seconds later, and not before."""
    await start_up(link)
    await link.publish(snapshot(cds={"a": "1"}, eds={"a": "1"}, lds={"l": "1"}, rds={"r": "2"}))
    await link.expect(ROUTE, {"r": "2"}, ack=False)
    link.now = HOLD - 0.1
    link.advance()
    await link.quiet()
    link.now = HOLD
    link.advance()
    await link.expect_removed(CLUSTER, "b")
    await link.expect_removed(ENDPOINT, "b")
    await link.quiet()


@pytest.mark.parametrize("peer", PEERS, ids=["sotw", "delta"])
async def test_what_is_gone_lingers(peer: type[SotwPeer | DeltaPeer]) -> None:
    """A cluster is told to be gone LINGER after its last route was replaced: a request may still be on its way there.

    Meanwhile the client counts as settled, a change of another cluster takes nothing away, and a new stream waits anew
    (in SotW with a stand-in for what is gone).
    """
    link = MemoryLink(peer(), linger=LINGER)
    await start_up(link)
    link.now = 100.0
    await link.publish(snapshot(cds={"a": "1"}, eds={"a": "1"}, lds={"l": "1"}, rds={"r": "2"}))
    link.now = 103.0
    await link.expect(ROUTE, {"r": "2"})
    await link.quiet()
    assert link.stream.settled(link.snapshot)
    assert link.stream.deadline(link.now) == 103.0 + LINGER
    link.now += LINGER - 0.1
    await link.publish(snapshot(cds={"a": "2"}, eds={"a": "1"}, lds={"l": "1"}, rds={"r": "2"}))
    await link.expect(CLUSTER, {"a": "2"})
    await link.expect(ENDPOINT, {"a": "1"})
    await link.quiet()

    await link.reconnect()
    while link.responses:
        response = await link.receive()
        assert not link.delta or not response.removed_resources
        await link.send(link.peer.ack(response))
    assert set(link.peer.revisions(CLUSTER)) == {"a", "b"}
    link.now += LINGER - 0.1
    link.advance()
    await link.quiet()
    link.now += 0.1
    link.advance()
    await link.expect_removed(CLUSTER, "b")
    await link.expect_removed(ENDPOINT, "b")
    await link.quiet()
    assert link.peer.revisions(CLUSTER) == {"a": "2"}
    assert link.stream.settled(link.snapshot)
    assert link.stream.deadline(link.now) is None


@pytest.mark.parametrize("peer", PEERS, ids=["sotw", "delta"])
async def test_each_lingers_by_itself(peer: type[SotwPeer | DeltaPeer]) -> None:
    """Route after route is replaced: what is gone goes LINGER after its own route, though a later one is unanswered.

    What comes back before that was never away.
    """
    link = MemoryLink(peer(), linger=LINGER)
    await start_up(link)
    await link.publish(snapshot(cds={"a": "1"}, eds={"a": "1"}, lds={"l": "1"}, rds={"r": "2"}))
    await link.expect(ROUTE, {"r": "2"})
    link.now = LINGER - 1
    await link.publish(snapshot(lds={"l": "1"}, rds={"r": "3"}))
    response = await link.expect(ROUTE, {"r": "3"}, ack=False)
    await link.quiet()
    link.now = LINGER
    link.advance()
    await link.expect_removed(CLUSTER, "b")
    await link.expect_removed(ENDPOINT, "b")
    await link.quiet()
    await link.send(link.peer.ack(response))
    await link.publish(snapshot(cds={"a": "1"}, eds={"a": "1"}, lds={"l": "1"}, rds={"r": "3"}))
    if not link.delta:
        await link.expect(ENDPOINT, {"a": "1"})  # SotW cannot tell that they are gone, so they may be
    link.now = 3 * LINGER
    link.advance()
    await link.quiet()


async def test_warming_clusters_are_waited_for_a_bounded_time(link: MemoryLink) -> None:
    """A client that comes back and never asks for clusters gets its routes HOLD seconds later, and not before."""
    await start_up(link)
    link.peer.names.pop(CLUSTER)
    link.now = 100.0
    await link.reconnect()
    await link.publish(snapshot(**FULL | {"rds": {"r": "2"}}))
    await link.expect(ENDPOINT, {} if link.delta else FULL["eds"])
    assert link.stream.deadline(link.now) == 100.0 + HOLD
    link.now += HOLD - 0.1
    link.advance()
    await link.quiet()
    link.now += 0.1
    link.advance()
    if link.delta:
        await link.expect(LISTENER)
    await link.expect(ROUTE, {"r": "2"})
    await link.quiet()
    assert link.stream.deadline(link.now) is None


async def test_names_of_endpoints_are_waited_for_a_bounded_time() -> None:
    """A SotW client that comes back with an unknown world and asks for no endpoints gets the new one after GATHER."""
    link = MemoryLink(SotwPeer())
    await start_up(link)
    link.peer.names = {CLUSTER: set()}
    link.now = 100.0
    link.snapshot = snapshot(cds={"a": "2"})
    await link.reconnect()
    assert link.stream.deadline(link.now) == 100.0 + GATHER
    link.now += GATHER - 0.1
    link.advance()
    await link.quiet()
    link.now += 0.1
    link.advance()
    await link.expect(CLUSTER, {"a": "2"}, {"b"})
    await link.quiet()
    assert link.stream.deadline(link.now) is None


async def test_stand_ins_are_bounded() -> None:
    """A client that comes back with any number of names costs no more than MAX_STAND_INS clusters."""
    link = MemoryLink(SotwPeer())
    await start_up(link)
    link.peer.names[ENDPOINT].update(f"gone-{index}" for index in range(2 * MAX_STAND_INS))
    link.snapshot = snapshot(cds={"a": "2"})
    await link.reconnect()
    assert len((await link.receive()).resources) == 1 + MAX_STAND_INS


async def test_pool_load_takes_no_part_in_the_order(link: MemoryLink) -> None:
    """Loads are sent to a subscriber at once, whatever else is unanswered; what is gone is removed at once."""
    loads = {POOL_LOAD: [resource(POOL_LOAD, "pool/a")]}
    await link.publish(snapshot(**FULL).replace(loads))
    await link.send(link.peer.subscribe(CLUSTER), link.peer.subscribe(POOL_LOAD, "*"))
    await link.expect(CLUSTER, {"a": "1", "b": "1"}, ack=False)
    await link.expect(POOL_LOAD, {"pool/a": "1"})
    await link.publish(snapshot(**FULL))
    assert [response.type_url for response in link.responses] == [POOL_LOAD]


@pytest.mark.parametrize("peer", PEERS)
def test_kinds(peer: type[SotwPeer | DeltaPeer]) -> None:
    """Each request is what it is: the classifier names every kind."""
    link = MemoryLink(peer())
    client: Any = link.peer
    link.snapshot = snapshot(eds={"a": "1", "b": "1"})

    def kind(request: Any) -> Kind:
        received = link.stream.receive(request)
        link.advance()
        assert isinstance(received, Received)
        return received.kind

    assert kind(client.subscribe(ENDPOINT, "a")) is Kind.FIRST
    first = link.responses.popleft()
    assert kind(client.ack(first)) is Kind.ACK
    assert kind(client.repeat(ENDPOINT)) is Kind.REPEAT
    assert kind(client.subscribe(ENDPOINT, "b")) is Kind.NAMES
    assert kind(client.nack(first)) is Kind.STALE_NONCE
    assert kind(client.nack(link.responses.popleft())) is Kind.NACK
    assert kind(client.subscribe("type.googleapis.com/no.such.Type", "x")) is Kind.UNKNOWN_TYPE
    assert kind(client.subscribe(ENDPOINT, *map(str, range(MAX_NAMES + 1)))) is Kind.EXCESS
    if peer is DeltaPeer:
        claim = dict.fromkeys(map(str, range(MAX_NAMES + 1)), "1")
        assert kind(wire.DeltaDiscoveryRequest(type_url=CLUSTER, initial_resource_versions=claim)) is Kind.EXCESS
    client.names = {ENDPOINT: {"b"}}
    assert kind(client.subscribe(ENDPOINT, "x" * MAX_NAME)) is Kind.NAMES
    assert kind(client.subscribe(ENDPOINT, "x" * (MAX_NAME + 1))) is Kind.EXCESS
    client.names = {ENDPOINT: {"a"}}
    link.stream = link._open()
    assert kind(client.reconnect()[0] if peer is DeltaPeer else client.repeat(ENDPOINT)) is Kind.RECONNECT


async def test_refusal_says_what_was_refused(link: MemoryLink) -> None:
    """A NACK becomes an event with version, nonce, the resources and the client's message, cut to a bounded length."""
    published = snapshot(eds={"a": "1"})
    await link.publish(published)
    await link.send(link.peer.subscribe(ENDPOINT, "a"))
    response = await link.expect(ENDPOINT, {"a": "1"}, ack=False)
    refusal = link.stream.receive(link.peer.nack(response, "x" * 1_000_000)).refusal
    versions = {"a": published.resources[ENDPOINT]["a"].version}
    assert refusal == Refusal(ENDPOINT, published.versions[ENDPOINT], response.nonce, versions, "x" * MAX_MESSAGE)
    assert link.stream.subscriptions[ENDPOINT].last_nack == "x" * MAX_MESSAGE
    await link.quiet()


@pytest.mark.parametrize("held", [{str(n): "1" for n in range(MAX_NAMES + 1)}, {"x" * (MAX_NAME + 1): "1"}])
def test_what_a_client_says_it_holds_is_bounded(held: dict[str, str]) -> None:
    """A delta client that comes back with more or longer names than any server gave it is cut off as well."""
    request = wire.DeltaDiscoveryRequest(type_url=CLUSTER, initial_resource_versions=held)
    stream = DeltaStream()
    assert stream.receive(request).kind is Kind.EXCESS
    assert not stream.subscriptions[CLUSTER].held


async def test_a_version_stands_for_what_the_client_holds(link: MemoryLink) -> None:
    """All clusters have the snapshot's version; in SotW some of them have one of their own, so a reconnect is exact."""
    published = snapshot(cds={"a": "1", "b": "1"})
    await link.publish(published)
    await link.send(link.peer.subscribe(CLUSTER, "a"))
    await link.expect(CLUSTER, {"a": "1"})
    sub = link.stream.subscriptions[CLUSTER]
    assert (sub.version_acked == published.versions[CLUSTER]) is link.delta
    await link.send(link.peer.subscribe(CLUSTER, "b"))
    await link.expect(CLUSTER, {"b": "1"})
    assert sub.version_acked == published.versions[CLUSTER]


async def test_a_broken_rule_is_not_lost_behind_the_quoted_resource(link: MemoryLink) -> None:
    """Envoy's message begins with the resource, however long; what is kept is the rule behind it, if Envoy kept it."""
    await link.publish(snapshot(eds={"a": "1"}))
    await link.send(link.peer.subscribe(ENDPOINT, "a"))
    response = await link.expect(ENDPOINT, {"a": "1"}, ack=False)
    rule = "Proto constraint validation failed (ClusterLoadAssignmentValidationError.Endpoints[0]: ...)"
    refusal = link.stream.receive(link.peer.nack(response, "x" * 1_000_000 + rule)).refusal
    assert refusal.message == rule
    await link.quiet()
    await link.publish(snapshot(eds={"a": "2"}))
    response = await link.expect(ENDPOINT, {"a": "2"}, ack=False)
    refusal = link.stream.receive(link.peer.nack(response, "x" * 4096 + "...(truncated)")).refusal
    assert refusal.message.startswith("Proto constraint validation failed, it seems")
    assert refusal.message.endswith(": " + "x" * 200)


async def test_an_answer_says_what_the_client_has_taken(link: MemoryLink) -> None:
    """An ACK stands for the versions that were sent, a delta client that comes back names those it has; a request for
    names alone, or a NACK, says nothing of that kind."""
    published = snapshot(eds={"a": "1", "b": "1"})
    version = published.resources[ENDPOINT]["a"].version
    await link.publish(published)

    def taken(request: Any) -> dict[str, str]:
        received = link.stream.receive(request)
        link.advance()
        return dict(received.accepted)

    assert taken(link.peer.subscribe(ENDPOINT, "a")) == {}
    assert taken(link.peer.ack(await link.receive())) == {"a": version}
    assert taken(link.peer.subscribe(ENDPOINT, "b")) == {}
    assert taken(link.peer.nack(await link.receive())) == {}
    link.stream = link._open()
    assert taken(link.peer.reconnect()[0]) == ({"a": version} if link.delta else {})


@pytest.mark.parametrize("peer", PEERS)
async def test_what_many_clients_are_sent_is_encoded_once(peer: type[SotwPeer | DeltaPeer]) -> None:
    """Clients that need the same resources share their bytes, whatever else differs; others have bytes of their own."""
    published = snapshot(cds={"a": "1", "b": "1"})
    links = [MemoryLink(peer()) for _ in range(3)]
    links[1].snapshot = snapshot()
    await links[1].send(links[1].peer.subscribe(LISTENER))  # its next nonce is another
    sent = []
    for link, names in zip(links, ((), (), ("a",)), strict=True):
        link.stream.receive(link.peer.subscribe(CLUSTER, *names))
        sent.extend(link.stream.advance(published, 0.0))
    one, two, other = (each for each in sent if each.type_url == CLUSTER)
    assert one.resources is two.resources
    assert one.nonce != two.nonce
    assert (one.count, other.count) == (2, 1)
    decoded = [links[0].peer.response.FromString(each.encode()) for each in (one, two)]
    assert [(each.nonce, len(each.resources)) for each in decoded] == [(one.nonce, 2), (two.nonce, 2)]
    assert other.resources not in (b"", one.resources)


async def test_only_what_is_asked_for_concerns_a_client(link: MemoryLink) -> None:
    """A snapshot that differs in other types alone gives a client nothing to do; the first one always may."""
    first = snapshot(**FULL)
    await link.publish(first)
    await link.send(link.peer.subscribe(ENDPOINT, "a"))
    assert link.stream.concerned(None, first)
    assert not link.stream.concerned(None, None)
    loads = first.replace({POOL_LOAD: [resource(POOL_LOAD, "pool/a")]})
    assert not link.stream.concerned(first, loads)
    endpoints = loads.replace({ENDPOINT: [resource(ENDPOINT, "b")]})
    assert link.stream.concerned(loads, endpoints)
    assert link.stream.concerned(first, endpoints)


REVISIONS = st.sampled_from(["1", "2", "3", "bad"])
WORLDS = st.fixed_dictionaries(
    {kind: st.dictionaries(st.sampled_from("abcd"), REVISIONS) for kind in ("cds", "eds", "lds", "rds")}
)
BY_NAME = st.sampled_from([ENDPOINT, ROUTE])


class Conversation(RuleBasedStateMachine):
    """A client and a server with both directions delayed; the client refuses what has revision `bad` in it."""

    peer_type: type[SotwPeer | DeltaPeer]

    def __init__(self) -> None:
        super().__init__()
        self.peer: Any = self.peer_type()
        self.delta = self.peer_type is DeltaPeer
        self.stream: Any = DeltaStream() if self.delta else SotwStream(stand_in)
        self.snapshot: Snapshot | None = None
        self.now = 0.0
        self.requests: deque[Any] = deque()
        self.responses: deque[Any] = deque()
        self.refused: dict[str, list[bytes]] = {}
        self.accepted: dict[tuple[str, str], bytes] = {}  # on this stream: all that a SotW server can know
        # Types whose next response may repeat what the peer holds, and those on their way that may.
        self.excused: set[str] = set()
        self.may_repeat: set[tuple[str, str]] = set()  # (type, nonce)
        self.asked_again: set[tuple[str, str]] = set()  # (type, name): was in such a response, which the peer refused

    @rule(world=WORLDS, anew=st.booleans())
    def publish(self, world: dict[str, dict[str, str]], anew: bool) -> None:
        self._publish(world, anew)

    def _publish(self, world: dict[str, dict[str, str]], anew: bool = False) -> None:
        """Publish a snapshot that follows from the one before, or one made `anew`."""
        made = snapshot(**world)
        if anew or self.snapshot is None:
            self.snapshot = made
        else:
            self.snapshot = self.snapshot.replace({kind: all_.values() for kind, all_ in made.resources.items()})
        self.refused.clear()
        self.forget_what_is_gone()
        self.advance()

    @rule(type_url=st.sampled_from([CLUSTER, LISTENER]))
    def subscribe_all(self, type_url: str) -> None:
        if type_url not in self.peer.names:
            self.requests.append(self.peer.subscribe(type_url))

    @rule(type_url=BY_NAME, name=st.sampled_from("abcd"))
    def subscribe(self, type_url: str, name: str) -> None:
        self.requests.append(self.peer.subscribe(type_url, name))

    @rule(type_url=BY_NAME, name=st.sampled_from("abcd"))
    def unsubscribe(self, type_url: str, name: str) -> None:
        if name in self.peer.names.get(type_url, ()):
            self.requests.append(self.peer.unsubscribe(type_url, name))
            self.refused.pop(type_url, None)  # who subscribes again is told again

    @rule()
    def server_takes_a_request(self) -> None:
        if self.requests:
            received = self.stream.receive(self.requests.popleft())
            if received.kind not in (Kind.ACK, Kind.REPEAT):
                self.excused.add(received.type_url)
            self.advance()

    @rule()
    def client_takes_a_response(self) -> None:
        if self.responses:
            self.take(self.responses.popleft())

    @rule(seconds=st.sampled_from([1.0, HOLD]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.advance()

    @rule()
    def reconnect(self) -> None:
        self.stream = DeltaStream() if self.delta else SotwStream(stand_in)
        self.requests = deque(self.peer.reconnect())
        self.responses.clear()
        self.refused.clear()
        self.accepted.clear()
        self.excused.clear()
        self.may_repeat.clear()
        self.asked_again.clear()

    def advance(self) -> None:
        self.check_steps()
        for each in self.stream.advance(self.snapshot, self.now):
            response = self.peer.response.FromString(each.encode())
            if response.type_url in self.excused:
                self.excused.discard(response.type_url)
                self.may_repeat.add((response.type_url, response.nonce))
            if response.type_url == CLUSTER:
                self.excused.add(ENDPOINT)  # sent again for the clusters that are new or changed
            self.responses.append(response)
        per_type = [response.type_url for response in self.responses]
        assert len(per_type) == len(set(per_type)), "two unanswered responses of a type"
        self.check_steps()

    def check_steps(self) -> None:
        """What is found by looking only at what the last step changed is what is found by looking at everything."""
        if self.snapshot is None:
            return
        for type_url, sub in self.stream.subscriptions.items():
            resources, step = self.snapshot.resources[type_url], self.snapshot.steps.get(type_url)
            known = sub._clean
            quick = sub.changes(resources, step)
            sub._clean = None
            assert quick == sub.changes(resources)
            sub._clean = known

    def take(self, response: Any) -> None:
        type_url, updates = response.type_url, self.peer.updates(response)
        assert list(response.resources) != self.refused.get(type_url), "a refused response is repeated"
        held = {
            n: body for n, body in self.peer.held.get(type_url, {}).items() if (type_url, n) not in self.asked_again
        }
        may_repeat = (type_url, response.nonce) in self.may_repeat
        assert may_repeat or self.news(type_url, held, updates, response), "nothing new in the response"
        named = {(type_url, name) for name in updates}
        is_bad = "bad" in map(revision_of, updates.values())
        self.asked_again = self.asked_again | named if is_bad and may_repeat else self.asked_again - named
        if is_bad:
            self.refused[type_url] = list(response.resources)
            self.requests.append(self.peer.nack(response))
        else:
            self.refused.pop(type_url, None)
            self.accepted.update({(type_url, name): body for name, body in updates.items()})
            self.forget_what_is_gone()
            self.requests.append(self.peer.ack(response))

    def forget_what_is_gone(self) -> None:
        """SotW cannot say that endpoints or a route are gone; back again, they are sent again, changed or not."""
        assert self.snapshot is not None
        for type_url, name in list(self.accepted):
            if name not in self.snapshot.resources[type_url]:
                del self.accepted[type_url, name]

    def news(self, type_url: str, held: dict[str, bytes], updates: dict[str, bytes], response: Any) -> bool:
        if self.delta:
            unknown = set(response.removed_resources) - self.peer.absent.get(type_url, set())
            return all(held.get(name) != body for name, body in updates.items()) and bool(
                updates or unknown or type_url not in self.peer.held
            )
        if type_url in FULL_STATE:
            return type_url not in self.peer.held or updates != held
        again = self.asked_again
        return all(self.accepted.get(named := (type_url, n)) != body or named in again for n, body in updates.items())

    def drain(self) -> None:
        for _ in range(1_000):
            if self.requests:
                self.server_takes_a_request()
            elif self.responses:
                self.client_takes_a_response()
            elif self.stream.deadline(self.now) is not None:
                self.wait(HOLD)
            else:
                return
        raise AssertionError("client and server never come to rest")

    def teardown(self) -> None:
        self.drain()
        if self.snapshot is None:
            assert not self.peer.held
            return
        for type_url, sub in self.stream.subscriptions.items():
            if sub.opened and sub.base_known:
                self.check(type_url, sub.refused)
        self._publish({kind: {"a": "4", "b": "4"} for kind in ("cds", "eds", "lds", "rds")})
        self.drain()
        assert self.stream.settled(self.snapshot)
        for type_url in self.peer.names:
            self.check(type_url, {})
        self.advance()
        assert not self.responses

    def check(self, type_url: str, refused: dict[str, str]) -> None:
        """The client holds everything it wants as it is published, except what it refuses, and nothing else."""
        assert self.snapshot is not None
        published = self.snapshot.resources[type_url]
        wildcard = type_url in FULL_STATE
        want = {name for name in published if wildcard or name in self.peer.names[type_url]}
        held = {name: make_resource(type_url, name, body) for name, body in self.peer.held.get(type_url, {}).items()}
        for name in want - refused.keys():
            assert held[name].version == published[name].version
        for name in refused.keys() & held.keys():
            assert held[name].version != refused[name]
        if self.delta or wildcard:
            routes_refused = any(
                self.stream.subscriptions[kind].refuses(self.snapshot.resources[kind]) for kind in (LISTENER, ROUTE)
            )
            assert routes_refused or held.keys() <= want


class SotwConversation(Conversation):
    peer_type = SotwPeer


class DeltaConversation(Conversation):
    peer_type = DeltaPeer


TestSotwConversation = SotwConversation.TestCase
TestDeltaConversation = DeltaConversation.TestCase
TestSotwConversation.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestDeltaConversation.settings = TestSotwConversation.settings
