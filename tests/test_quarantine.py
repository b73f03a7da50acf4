"""What an Envoy refuses costs the object that is to blame and no other. The Envoy here refuses what it is told to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.objects import config, exact, gateway, gateway_class, listener, parent, pod, route, rule, service
from xds import snapshot as types
from xds.envoy import PICKER_CLUSTER, Options
from xds.model import HTTPRoute, Listener, PortListener, Rejection, Topology
from xds.quarantine import ACCEPTED, MAX_TRIED, REASON, Quarantine
from xds.resolve import resolve
from xds.snapshot import CLUSTER, ENDPOINT, LISTENER, ROUTE, Snapshot
from xds.translate import translate

NAME = "http-8080"
Refuses = Callable[[PortListener], str]  # what Envoy says of the routes of a port, "" = accepted


def named(name: str, path: str = "/1", *, port: int = 0) -> HTTPRoute:
    return route(rule(matches=[exact(f"/{name}{path}")]), name=name, parents=[parent(port=port)])


def bad_paths(*paths: str, points: bool = False) -> Refuses:
    """An Envoy that refuses a port with one of these paths; with `points`, it says where the first one is."""

    def refuses(port: PortListener) -> str:
        for i, host in enumerate(port.virtual_hosts):
            for j, each in enumerate(host.routes):
                if each.match.path.value in paths:
                    place = f"RouteConfigurationValidationError.VirtualHosts[{i}]: caused by Routes[{j}]: no"
                    return place if points else "no such path"
        return ""

    return refuses


class World:
    """A management server's part and one Envoy, which keeps what it has when it refuses what it is offered."""

    def __init__(self, refuses: Refuses = bad_paths("/nothing")) -> None:  # noqa: B008 - it has no state
        self.quarantine = Quarantine()
        self.routes: tuple[HTTPRoute, ...] = ()
        self.refuses = refuses
        self.ports: tuple[Listener, ...] = (listener(),)
        self.held: dict[str, PortListener] = {}  # Envoy's, by RouteConfiguration
        self.trials = 0
        self.served = Snapshot.of({})

    def serve(self, *routes: HTTPRoute) -> World:
        """Offer these instead of those before, and all that follows from Envoy's answers."""
        self.routes = routes
        self.offer()
        self.answer()
        while self.quarantine.review():
            self.trials += 1
            self.offer()
            self.answer()
        assert not self.quarantine.searching
        return self

    def offer(self) -> None:
        admitted = self.quarantine.admit(self.routes)
        objects = (gateway_class(), gateway(*self.ports), service(), pod("a", "10.0.0.1"))
        self.topology = resolve(config(*objects, *admitted))
        self.snapshot = translate(self.topology, Options(), {})
        self.quarantine.offered(self.snapshot, self.topology, admitted)
        self.served = self.quarantine.fall_back(self.snapshot)

    def answer(self) -> bool:
        """Envoy answers; whether that calls for a review."""
        called = False
        for port in self.topology.listeners:
            name = f"http-{port.port}"
            offered, served = (each.resources[ROUTE][name].version for each in (self.snapshot, self.served))
            if served != offered:
                continue  # it has that one
            reason = self.refuses(port)
            if not reason:
                self.held[name] = port
            called |= self.quarantine.note(ROUTE, name, offered, reason)
        return called

    def has(self, port: int = 8080) -> list[str]:
        """The paths that Envoy has."""
        return sorted(r.match.path.value for host in self.held[f"http-{port}"].virtual_hosts for r in host.routes)

    def blamed(self) -> list[tuple[str, str]]:
        """(name, message) of what is rejected."""
        found = self.quarantine.rejections()
        assert {each.reason for each in found} <= {REASON}
        return [(each.ref.name if each.ref else "", each.message) for each in found]


def test_the_only_change_is_to_blame() -> None:
    """One edited route is refused: its last accepted version is served beside the others' new ones, and it is named."""
    world = World(refuses=bad_paths("/b/bad")).serve(named("a"), named("b"))
    assert world.blamed() == []
    world.serve(named("a"), named("b", "/bad"))
    assert world.has() == ["/a/1", "/b/1"]
    assert world.blamed() == [("b", "Envoy refuses it: no such path; its last accepted version is served")]
    assert world.trials == 1
    world.serve(named("a", "/2"), named("b", "/bad"), named("c"))
    assert world.has() == ["/a/2", "/b/1", "/c/1"]
    assert world.trials == 1


def test_a_changed_object_gets_another_chance() -> None:
    """Mended, the object is served as written, and nothing is rejected any more; deleted, it is gone."""
    world = World(refuses=bad_paths("/b/bad")).serve(named("a"), named("b")).serve(named("a"), named("b", "/bad"))
    world.serve(named("a"), named("b", "/2"))
    assert (world.has(), world.blamed()) == (["/a/1", "/b/2"], [])
    world.serve(named("a"), named("b", "/bad"))
    world.serve(named("a"))
    assert (world.has(), world.blamed()) == (["/a/1"], [])


def test_a_new_object_that_is_refused_is_not_served() -> None:
    """It has no accepted version."""
    world = World(refuses=bad_paths("/b/bad")).serve(named("a")).serve(named("a"), named("b", "/bad"))
    assert world.has() == ["/a/1"]
    assert world.blamed() == [("b", "Envoy refuses it: no such path; it is not served")]


@pytest.mark.parametrize("known", [True, False])
def test_envoy_points_at_it(known: bool) -> None:
    """A message with the place of the bad route needs no search, on a server that has just started either."""
    world = World(refuses=bad_paths("/c/bad", points=True))
    if known:
        world.serve(named("a"))
    world.serve(*(named(name) for name in "abd"), named("c", "/bad"))
    assert world.has() == ["/a/1", "/b/1", "/d/1"]
    assert [name for name, _ in world.blamed()] == ["c"]
    assert world.trials == 1


@pytest.mark.parametrize("place", ["VirtualHosts[9]", "VirtualHosts[0]...Routes[99]", "VirtualHosts[" + "9" * 99 + "]"])
def test_a_place_that_is_not_there_is_no_place(place: str) -> None:
    """What a client sends is only ever a hint: then it is searched for."""
    world = World(refuses=lambda port: place if bad_paths("/c/bad")(port) else "")
    world.serve(named("a"), named("b"), named("c", "/bad"))
    assert world.has() == ["/a/1", "/b/1"]
    assert [name for name, _ in world.blamed()] == ["c"]


def test_a_port_that_is_fine_is_left_alone() -> None:
    """A route that only one port refuses is withheld, and the routes of the other port are as they are written."""
    world = World(refuses=bad_paths("/b/bad"))
    world.ports = (listener(), listener("other", 81))
    world.serve(named("a", port=81), named("b", "/bad", port=8080), named("c", port=8080))
    assert (world.has(81), world.has()) == (["/a/1"], ["/c/1"])
    assert [name for name, _ in world.blamed()] == ["b"]


def test_two_bad_ones_and_nothing_accepted_yet_is_said_of_the_gateway() -> None:
    """A server that has just started can not take them apart without harm: Envoy keeps what it has, and the Gateway is
    named. One of the two mended, the other is found."""
    world = World(refuses=bad_paths("/b/bad", "/c/bad"))
    world.serve(named("a"), named("b", "/bad"), named("c", "/bad"))
    assert NAME not in world.held
    assert world.blamed() == [("gw", f"Envoy refuses RouteConfiguration {NAME}: no such path")]
    trials = world.trials
    assert not world.quarantine.review()
    world.serve(named("a"), named("b", "/bad"), named("c", "/bad"))
    assert world.trials == trials
    world.serve(named("a"), named("b", "/2"), named("c", "/bad"))
    assert world.has() == ["/a/1", "/b/2"]
    assert [name for name, _ in world.blamed()] == ["c"]


def test_too_many_to_try_is_said_of_the_gateway() -> None:
    """The number of trials is bounded."""
    world = World(refuses=bad_paths("/0/bad")).serve(named("a"))
    world.serve(named("a"), named("0", "/bad"), *(named(str(i)) for i in range(1, MAX_TRIED + 1)))
    assert (world.has(), world.trials) == (["/a/1"], 1)
    assert [name for name, _ in world.blamed()] == ["gw"]


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["/1", "/2"]), max_size=6),
    st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["/1", "/2", "/bad"]), max_size=6),
)
def test_every_bad_one_is_found_and_no_other(before: dict[str, str], after: dict[str, str]) -> None:
    """From any accepted state, whatever is changed at once: Envoy ends with all that is good, as it is written, and
    with the last accepted version of what is bad; and there are no more trials than changes."""
    world = World(refuses=bad_paths(*(f"/{name}/bad" for name in "abcdef")))
    world.serve(*(named(name, path) for name, path in before.items()))
    world.serve(*(named(name, path) for name, path in after.items()))
    want = {name: before.get(name, "") if path == "/bad" else path for name, path in after.items()}
    assert world.has() == sorted(f"/{name}{path}" for name, path in want.items() if path)
    assert sorted(name for name, _ in world.blamed()) == sorted(name for name, path in after.items() if path == "/bad")
    assert world.trials <= 1 + len([name for name in after if after[name] != before.get(name)])


def test_a_change_in_the_middle_of_a_search() -> None:
    """What is being tried has changed: the search begins anew, with what was found already."""
    world = World(refuses=bad_paths("/a/bad", "/b/bad")).serve(named("c"))
    world.routes = (named("a", "/bad"), named("b", "/bad"), named("c"))
    world.offer()
    assert world.answer()
    assert world.quarantine.review()
    assert world.quarantine.searching
    world.serve(named("a", "/bad"), named("b", "/2"), named("c", "/2"))
    assert world.has() == ["/b/2", "/c/2"]
    assert [name for name, _ in world.blamed()] == ["a"]


def test_an_ack_goes_on_with_the_search() -> None:
    """Each answer to a trial calls for a review, an ACK as well, which says that the one being tried is good."""
    world = World(bad_paths("/b/bad")).serve(named("c"))
    world.routes = (named("a"), named("b", "/bad"), named("c"))
    answers = []
    world.offer()
    while world.answer():
        answers.append(world.has())
        assert world.quarantine.review()
        world.offer()
    assert answers == [["/c/1"], ["/c/1"], ["/a/1", "/c/1"]]  # the longer path is the first in order
    assert [name for name, _ in world.blamed()] == ["b"]


# --- other Envoys, other types ---


def test_another_envoy_accepts_it() -> None:
    """What one Envoy refuses and another accepts is good: it is served as written, and nobody is blamed."""
    world = World(refuses=bad_paths("/b/bad")).serve(named("b")).serve(named("b", "/bad"))
    (version,) = [v for v, verdict in world.quarantine._verdicts[ROUTE, NAME].items() if verdict != ACCEPTED]
    assert world.quarantine.note(ROUTE, NAME, version, ACCEPTED)
    assert world.quarantine.review()
    world.offer()
    assert world.served.resources[ROUTE][NAME].version == version
    assert world.blamed() == []
    for verdict in ("no such path", ACCEPTED):
        assert not world.quarantine.note(ROUTE, NAME, version, verdict)
    assert not world.quarantine.review()


def _changed(world: World, **edits: object) -> Snapshot:
    """The configuration with another cluster of the same name."""
    topology = replace(world.topology, clusters=tuple(replace(c, **edits) for c in world.topology.clusters))  # type: ignore[arg-type]
    snapshot = translate(topology, Options(), {})
    world.quarantine.offered(snapshot, topology, world.routes)
    return snapshot


def test_a_refused_cluster_is_its_services_matter() -> None:
    """The Service is named, those who come later get the cluster as it was accepted, and a change ends it."""
    world = World().serve(named("a"))
    name = "service/default/web/80"
    before = world.snapshot.resources[CLUSTER][name]
    world.quarantine.note(CLUSTER, name, before.version, ACCEPTED)
    after = _changed(world, http2=True)
    bad = after.resources[CLUSTER][name].version
    assert world.quarantine.note(CLUSTER, name, bad, "no h2")
    assert not world.quarantine.review()
    assert world.quarantine.fall_back(after).resources[CLUSTER][name] is before
    assert world.quarantine.rejections() == (
        Rejection(world.topology.clusters[0].ref, REASON, f"Envoy refuses Cluster {name}: no h2"),
    )
    back = _changed(world, connect_timeout=3.0)
    assert world.quarantine.fall_back(back) is not after
    assert world.quarantine.fall_back(back).versions == back.versions
    assert world.quarantine.rejections() == ()


def test_a_refused_listener_is_its_gateways_matter() -> None:
    """A port that can not be bound, say. Nothing was accepted, so there is nothing to fall back to."""
    world = World().serve(named("a"))
    version = world.snapshot.resources[LISTENER][NAME].version
    assert world.quarantine.note(LISTENER, NAME, version, "cannot bind")
    assert world.quarantine.fall_back(world.snapshot).versions == world.snapshot.versions
    assert world.blamed() == [("gw", f"Envoy refuses Listener {NAME}: cannot bind")]


def test_what_is_nobodys_is_reported_too() -> None:
    """The picker's cluster is of no object."""
    world = World().serve(named("a"))
    version = world.snapshot.resources[CLUSTER][PICKER_CLUSTER].version
    world.quarantine.note(CLUSTER, PICKER_CLUSTER, version, "no")
    assert world.blamed() == [("", f"Envoy refuses Cluster {PICKER_CLUSTER}: no")]


def test_no_fallback_to_what_needs_what_is_gone() -> None:
    """Routes to a cluster that is not served any more would be worse than none."""
    world = World(refuses=bad_paths("/a/bad"))
    world.serve(named("a"))
    topology = Topology(world.topology.listeners)
    snapshot = Snapshot.of({ROUTE: [types.make_resource(ROUTE, NAME, b"other")]})
    world.quarantine.offered(snapshot, topology, ())
    world.quarantine.note(ROUTE, NAME, snapshot.resources[ROUTE][NAME].version, "no")
    assert world.quarantine.fall_back(snapshot).versions == snapshot.versions


def test_what_is_not_watched_or_not_served_needs_no_review() -> None:
    """Endpoints are other ones in seconds; a name that is not served is nobody's; nothing is remembered of either."""
    quarantine = World().serve(named("a")).quarantine
    before = dict(quarantine._verdicts)
    assert not quarantine.note(ENDPOINT, "service/default/web/80", "1", "no")
    assert not quarantine.note(ROUTE, "ghost", "1", "no")
    assert not quarantine.note("type.googleapis.com/x.Y", "a", "1", "no")
    assert quarantine._verdicts == before
