"""Discovery: what a client can say in which order, as bytes and as a script, and why Envoys refuse what they do."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from google.protobuf.message import DecodeError

from tests.fuzz.engine import Target
from tests.fuzz.mutate import BYTES, JSON, MESSAGE, decode, encode
from tests.fuzz.script import dump, mapping, number, pure, steps, text, texts
from tests.objects import backend, config, exact, gateway, gateway_class, route, rule, service
from tests.scenarios import FULL
from tests.scenarios import snapshot as snapshot_of
from xds.clusters import stand_in
from xds.envoy import Options
from xds.model import Topology
from xds.quarantine import Quarantine
from xds.resolve import resolve
from xds.snapshot import CLUSTER, ENDPOINT, LISTENER, POOL_LOAD, ROUTE, SECRET, TYPES, Snapshot, missing
from xds.stream import MAX_MESSAGE, DeltaStream, Kind, SotwStream
from xds.translate import translate
from xds.wire import discovery_pb2 as wire

SHORT = {"cds": CLUSTER, "eds": ENDPOINT, "lds": LISTENER, "rds": ROUTE, "sds": SECRET, "pools": POOL_LOAD}
KINDS = ("cds", "eds", "lds", "rds")
CHANGED = FULL | {"cds": {"a": "2", "c": "1"}, "eds": {"a": "2", "c": "1"}, "rds": {"r": "2"}}
STARTED = [
    ["publish", FULL], ["ask", "cds", []], ["ask", "eds", ["a", "b"]], ["ack"], ["ack"],
    ["ask", "lds", []], ["ack"], ["ask", "rds", ["r"]], ["ack"],
]  # fmt: skip
CONVERSATIONS = tuple(
    map(
        dump,
        (
            [*STARTED, ["publish", CHANGED], ["ack"], ["nack", "no"], ["ask", "eds", ["a", "c"]], ["ack", 1], ["ack"]],
            [*STARTED, ["publish", {}], ["ack"], ["ack"], ["publish", FULL], ["nack"], ["wait", 20], ["nack"], ["ack"]],
            [["ask", "cds", ["*"], {"held": {"a": "x"}, "version": "x"}], ["publish", FULL], ["nack", "no"], ["nack"],
             ["ask", "cds", ["a"], {"nonce": "1", "drop": ["*"]}], ["ack"], ["ask", "cds", ["*"], {"nonce": "2"}]],
            [["publish", FULL], ["ask", "eds", ["a", "b", "no"]], ["nack"], ["ask", "eds", ["a"], {"drop": ["b"]}],
             ["ask", "nothing", []], ["ask", "rds", [], {"nonce": "99", "error": "x"}], ["ask", "pools", []], ["ack"]],
        ),
    )
)  # fmt: skip


class Conversation:
    """A hostile client of one stream, and what always holds of the server. Mutable."""

    def __init__(self, delta: bool) -> None:
        self.delta = delta
        self.stream: Any = DeltaStream("test") if delta else SotwStream(stand_in, "test")
        self.snapshot: Snapshot | None = None
        self.now = 0.0
        self.names: dict[str, list[str]] = {}  # as last said of each type
        self.open: dict[str, Any] = {}  # type -> the response that is not answered yet
        self.refused: dict[str, tuple[Any, Any]] = {}  # type -> (snapshot, resources) of a NACK, until something else
        self.ever_refused = self.closed = False
        self.last: dict[str, Kind] = {}
        self.outcomes: set[Hashable] = set()

    def say(self, type_url: str, names: list[str], options: dict[str, Any]) -> None:
        """Send a request; `options` are nonce, version, error, held (delta: name -> version) and drop (delta)."""
        nonce, error = text(options.get("nonce")), options.get("error")
        if self.delta:
            held = {name: text(version) for name, version in mapping(options.get("held")).items()}
            request: Any = wire.DeltaDiscoveryRequest(
                resource_names_subscribe=names,
                resource_names_unsubscribe=texts(options.get("drop")),
                initial_resource_versions=held,
            )
        else:
            request = wire.DiscoveryRequest(resource_names=names, version_info=text(options.get("version")))
        request.type_url, request.response_nonce = type_url, nonce
        if error is not None:
            request.error_detail.message = text(error)
        self.take(request)

    def take(self, request: Any) -> None:
        """Hand over a request."""
        if self.closed:
            return
        type_url = request.type_url if request.type_url in TYPES else "other"
        received = self.stream.receive(request)
        self.closed = received.kind is Kind.EXCESS
        self.outcomes.add((type_url, received.kind, self.last.get(type_url)))
        self.last[type_url] = received.kind
        assert (type_url == "other") is (received.kind is Kind.UNKNOWN_TYPE)
        flight = self.open.get(type_url)
        if flight is not None and flight.nonce == request.response_nonce:
            del self.open[type_url]
        names = [] if self.delta or type_url == "other" else list(request.resource_names)
        self.refused.pop(type_url, None)
        if received.refusal:
            assert received.kind is Kind.NACK
            assert len(received.refusal.message) <= MAX_MESSAGE
            self.ever_refused = True
            if flight is not None and self.names.get(type_url) == names:
                self.refused[type_url] = self.snapshot, list(flight.resources)
        if received.kind is not Kind.STALE_NONCE:
            self.names[type_url] = names
        self.advance()

    def advance(self) -> None:
        """Take what the server sends now."""
        kind: Any = wire.DeltaDiscoveryResponse if self.delta else wire.DiscoveryResponse
        responses = [kind.FromString(each.encode()) for each in self.stream.advance(self.snapshot, self.now)]
        assert not self.stream.advance(self.snapshot, self.now), "a second look at the same state sends more"
        for response in responses:
            type_url = response.type_url
            assert type_url not in self.open, "two unanswered responses of a type"
            if self.delta:
                sent = [wire.Resource.FromString(raw).name for raw in response.resources]
                assert len({*sent, *response.removed_resources}) == len(sent) + len(response.removed_resources)
            snapshot, resources = self.refused.pop(type_url, (None, None))
            if snapshot is self.snapshot and resources:
                assert resources != list(response.resources), "a refused response is repeated"
            self.open[type_url] = response
            sub = self.stream.subscriptions[type_url]
            self.outcomes.add((type_url, len(response.resources), len(sub.names), len(sub.refused), sub.base_known))

    def answer(self, error: str | None, which: int = 0) -> None:
        """Accept, or with `error` refuse, one of the responses that are not answered yet."""
        if self.open:
            type_url = sorted(self.open)[which % len(self.open)]
            names = [] if self.delta else self.names.get(type_url, [])
            self.say(type_url, names, {"nonce": self.open[type_url].nonce, "version": "v", "error": error})

    def come_to_rest(self) -> None:
        """From now on the client answers as it should: it is soon told everything, and then nothing more."""
        for _ in range(200):
            deadline = self.stream.deadline(self.now)
            if self.closed:
                return
            if self.open:
                self.answer(None)
            elif deadline is not None:
                self.now = deadline
                self.advance()
            else:
                break
        else:
            raise AssertionError("client and server never come to rest")
        if self.snapshot and not self.ever_refused:
            assert self.stream.settled(self.snapshot)
            for type_url, sub in self.stream.subscriptions.items():
                assert len(sub.held) <= len(self.snapshot.resources[type_url]) + len(sub.names)


def converse(data: bytes, *, delta: bool) -> Iterable[Hashable]:
    """Anything a client can say and a server can be given, in any order."""
    link = Conversation(delta)
    for word, given in steps(data):
        rest = given[2:] if word == "ask" else given
        match word, given:
            case "publish", [dict(world)]:
                revisions = {kind: {k: text(v) for k, v in mapping(world.get(kind)).items()} for kind in KINDS}
                link.snapshot = snapshot_of(**revisions)
                link.advance()
            case "ask", [str(kind), list(names), *_]:
                link.say(SHORT.get(kind, text(kind)), texts(names), mapping(rest[0]) if rest else {})
            case "ack", _:
                link.answer(None, int(number(rest[0] if rest else 0, 0, 9)))
            case "nack", _:
                link.answer(text(rest[0]) if rest else "no", int(number(rest[1] if len(rest) > 1 else 0, 0, 9)))
            case "wait", [seconds]:
                link.now += number(seconds, 0, 100)
                link.advance()
    link.come_to_rest()
    return link.outcomes


SOTW, DELTA = 1, 2  # field numbers: an input is a message of requests
REQUESTS = (
    *(
        wire.DiscoveryRequest(node=wire.Node(id="envoy", cluster="c"), type_url=CLUSTER),
        wire.DiscoveryRequest(type_url=CLUSTER, response_nonce="1", version_info="v"),
        wire.DiscoveryRequest(type_url=ENDPOINT, resource_names=["a", "b"]),
        wire.DiscoveryRequest(type_url=CLUSTER, response_nonce="1", error_detail=wire.Status(message="no")),
    ),
    *(
        wire.DeltaDiscoveryRequest(type_url=CLUSTER, initial_resource_versions={"a": "1"}),
        wire.DeltaDiscoveryRequest(type_url=ENDPOINT, resource_names_subscribe=["a", "*"]),
        wire.DeltaDiscoveryRequest(type_url=ENDPOINT, resource_names_unsubscribe=["a"], response_nonce="2"),
    ),
)
MESSAGES = encode(
    [(SOTW if isinstance(r, wire.DiscoveryRequest) else DELTA, BYTES, r.SerializeToString()) for r in REQUESTS]
)


def requests(data: bytes) -> Iterable[Hashable]:
    """The bytes of requests on a stream of either variant: each is taken, or is no message and ends the stream."""
    links = {SOTW: Conversation(False), DELTA: Conversation(True)}
    types: dict[int, Any] = {SOTW: wire.DiscoveryRequest, DELTA: wire.DeltaDiscoveryRequest}
    world = snapshot_of(**FULL)
    outcomes: set[Hashable] = set()
    for which, kind, raw in decode(data):
        if which in links and kind == BYTES:
            links[which].snapshot = world
            try:
                request = types[which].FromString(raw)
            except DecodeError:
                outcomes.add("DecodeError")
                continue
            assert text(request.node.id) == request.node.id
            links[which].take(request)
    for link in links.values():
        link.come_to_rest()
        outcomes |= link.outcomes
    return outcomes


NAMES = "abc"
ROUTES = tuple(route(rule(backend(), matches=[exact(f"/{name}")]), name=name) for name in NAMES)
PORT = "http-8080"
POINTS = "RouteConfigurationValidationError.VirtualHosts[0]: embedded message failed: caused by Routes[1]: no"
ANSWERS = (
    dump([["offer", "abc"], ["answer", "no"], ["review"], ["answer", "no"], ["review"], ["answer", ""], ["review"]]),
    dump([["offer", "a"], ["answer", ""], ["offer", "abc"], ["answer", POINTS], ["review"], ["answer", ""], ["review"],
          ["late", 1, ""], ["review"], ["offer", "bc"], ["answer", "no"], ["answer", ""], ["review"]]),
)  # fmt: skip
_made: dict[tuple[str, ...], tuple[Topology, Snapshot]] = {}


def answers(data: bytes) -> Iterable[Hashable]:
    """Whatever Envoys say of routes: a search for who is to blame ends, and what is served is whole."""
    quarantine, routes, outcomes = Quarantine(), ROUTES[:0], set[Hashable]()
    versions: list[str] = []

    def offer() -> None:
        admitted = quarantine.admit(routes)
        key = tuple(each.meta.ref.name for each in admitted)
        if key not in _made:
            topology = resolve(config(gateway_class(), gateway(), service(), *admitted))
            _made[key] = topology, translate(topology, Options(), {})
        topology, snapshot = _made[key]
        quarantine.offered(snapshot, topology, admitted)
        versions.append(snapshot.resources[ROUTE][PORT].version)
        assert not missing(quarantine.fall_back(snapshot))
        outcomes.add((key, len(quarantine.rejections()), quarantine.searching))

    offer()
    for word, given in steps(data):
        match word, given:
            case "offer", [str(names)]:
                routes = tuple(each for each in ROUTES if each.meta.ref.name in names)
                offer()
            case "answer", [verdict]:
                quarantine.note(ROUTE, PORT, versions[-1], text(verdict))
            case "late", [back, verdict]:
                quarantine.note(ROUTE, PORT, versions[-1 - int(number(back, 0, len(versions) - 1))], text(verdict))
            case "note", [kind, name, version, verdict]:
                quarantine.note(SHORT.get(text(kind), ""), text(name), text(version), text(verdict))
            case "review", _:
                for _round in range(20):
                    if not quarantine.review():
                        break
                    offer()
                else:
                    raise AssertionError("the search never ends")
    return outcomes


TARGETS = (
    Target("sotw", pure(lambda data: converse(data, delta=False)), CONVERSATIONS, JSON, seconds_large=10, short=60),
    Target("delta", pure(lambda data: converse(data, delta=True)), CONVERSATIONS, JSON, seconds_large=10, short=60),
    Target("requests", pure(requests), (MESSAGES,), MESSAGE, short=60),
    Target("answers", pure(answers), ANSWERS, JSON, short=60),
)
