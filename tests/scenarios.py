"""The protocol's rules as scenarios: each is played by both variants, over the pure objects (tests/test_stream.py) and
over gRPC (tests/test_server.py), and ends with "and nothing more is sent". Those of OF_ONE_TYPE are also played on the
service for that type alone (CDS, EDS, RDS).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from tests.ads_client import FULL_STATE, DeltaPeer, SotwPeer, resource, revision_of
from xds.snapshot import CLUSTER, ENDPOINT, LISTENER, ROUTE, SECRET, Snapshot


class Link(ABC):
    """A client connected to a server. `publish` and `send` act, `expect` and `quiet` say what the server sent."""

    peer: Any  # a SotwPeer or a DeltaPeer: every scenario says the same to both

    @property
    def delta(self) -> bool:
        return isinstance(self.peer, DeltaPeer)

    @abstractmethod
    async def publish(self, snapshot: Snapshot) -> None: ...

    @abstractmethod
    async def send(self, *requests: Any) -> None: ...

    @abstractmethod
    async def receive(self) -> Any: ...

    @abstractmethod
    async def quiet(self) -> None:
        """Fail if anything more has been sent; all requests before it have been taken."""

    @abstractmethod
    async def reconnect(self) -> None:
        """Break the stream, and say on the next one what the peer holds."""

    async def expect(
        self, type_url: str, changed: Mapping[str, str] | None = None, removed: Iterable[str] = (), *, ack: bool = True
    ) -> Any:
        """Take one response of this type, with these changes (name -> revision), and accept it.

        In SotW it has to carry all that the peer then holds for listeners and clusters, else the changed ones alone.
        """
        response = await self.receive()
        changed, removed = dict(changed or {}), set(removed)
        assert response.type_url == type_url
        got = {name: revision_of(body) for name, body in self.peer.updates(response).items()}
        if self.delta:
            assert (got, set(response.removed_resources)) == (changed, removed)
        elif type_url in FULL_STATE:
            world = self.peer.revisions(type_url) | changed
            assert got == {name: revision for name, revision in world.items() if name not in removed}
        else:
            assert got == changed
        if ack:
            await self.send(self.peer.ack(response))
        return response

    async def expect_removed(self, type_url: str, *removed: str) -> None:
        """Take one response that only removes; SotW can say that of listeners and clusters alone."""
        if self.delta or type_url in FULL_STATE:
            await self.expect(type_url, removed=removed)


def snapshot(**revisions: Mapping[str, str]) -> Snapshot:
    """A snapshot of `cds=`, `eds=`, `lds=`, `rds=`, `sds=`: name -> revision. A cluster refers to its endpoints."""
    types = {"cds": CLUSTER, "eds": ENDPOINT, "lds": LISTENER, "rds": ROUTE, "sds": SECRET}
    return Snapshot.of(
        {
            types[kind]: [
                resource(types[kind], name, revision, [(ENDPOINT, name)] if kind == "cds" else ())
                for name, revision in given.items()
            ]
            for kind, given in revisions.items()
        }
    )


FULL = {"cds": {"a": "1", "b": "1"}, "eds": {"a": "1", "b": "1"}, "lds": {"l": "1"}, "rds": {"r": "1"}}


async def _start(link: Link) -> None:
    """Do what Envoy does at its start, on a snapshot of FULL."""
    await link.publish(snapshot(**FULL))
    await link.send(link.peer.subscribe(CLUSTER))
    clusters = await link.expect(CLUSTER, {"a": "1", "b": "1"}, ack=False)
    await link.send(link.peer.subscribe(ENDPOINT, "a", "b"))
    await link.expect(ENDPOINT, {"a": "1", "b": "1"})
    await link.send(link.peer.ack(clusters))
    await link.send(link.peer.subscribe(LISTENER))
    await link.expect(LISTENER, {"l": "1"})
    await link.send(link.peer.subscribe(ROUTE, "r"))
    await link.expect(ROUTE, {"r": "1"})
    await link.quiet()


async def start_up(link: Link) -> None:
    """Envoy's own start: endpoints do not wait for the ACK of the clusters."""
    await _start(link)


async def nothing_before_first_snapshot(link: Link) -> None:
    """Requests wait for the first snapshot; then the answer is complete."""
    await link.send(link.peer.subscribe(CLUSTER), link.peer.subscribe(LISTENER))
    await link.quiet()
    await link.publish(snapshot(cds={"a": "1"}))
    clusters = await link.expect(CLUSTER, {"a": "1"}, ack=False)
    await link.quiet()  # the empty listeners wait for the new cluster
    await link.send(link.peer.ack(clusters))
    await link.expect(LISTENER)
    await link.quiet()


async def empty_world_is_answered(link: Link) -> None:
    """A first wildcard request is answered although there is nothing: Envoy starts only then."""
    await link.publish(snapshot())
    await link.send(link.peer.subscribe(CLUSTER))
    await link.expect(CLUSTER)
    await link.quiet()


async def wildcard_beside_names(link: Link) -> None:
    """A wildcard, then a name beside it (sent again, as asked for), then the name alone, then nothing at all."""
    await link.publish(snapshot(cds={"a": "1", "b": "1"}))
    await link.send(link.peer.subscribe(CLUSTER, "*"))
    await link.expect(CLUSTER, {"a": "1", "b": "1"})
    await link.send(link.peer.subscribe(CLUSTER, "a"))
    await link.expect(CLUSTER, {"a": "1"})
    await link.send(link.peer.unsubscribe(CLUSTER, "*"))
    link.peer.held[CLUSTER].pop("b")
    await link.quiet()
    await link.publish(snapshot(cds={"a": "2", "b": "2"}))
    await link.expect(CLUSTER, {"a": "2"})
    await link.send(link.peer.unsubscribe(CLUSTER, "a"))
    await link.quiet()
    await link.publish(snapshot(cds={"a": "3", "b": "3"}))
    await link.quiet()


async def legacy_wildcard_ends_with_a_name(link: Link) -> None:
    """An empty first list is a wildcard; in SotW the first name ends it, and an empty list then means none."""
    await link.publish(snapshot(cds={"a": "1", "b": "1"}))
    await link.send(link.peer.subscribe(CLUSTER))
    await link.expect(CLUSTER, {"a": "1", "b": "1"})
    if not link.delta:
        link.peer.held[CLUSTER].clear()
    await link.send(link.peer.subscribe(CLUSTER, "a"))
    await link.expect(CLUSTER, {"a": "1"})
    await link.send(link.peer.unsubscribe(CLUSTER, *(("*", "a") if link.delta else ("a",))))
    await link.quiet()
    await link.publish(snapshot(cds={"a": "2", "b": "2"}))
    await link.quiet()


async def unsubscribed_name_under_wildcard(link: Link) -> None:
    """Delta: who drops a name beside a wildcard is told whether the wildcard has it."""
    await link.publish(snapshot(cds={"a": "1"}))
    await link.send(link.peer.subscribe(CLUSTER, "*", "a", "ghost"))
    await link.expect(CLUSTER, {"a": "1"}, {"ghost"})
    if link.delta:
        await link.send(link.peer.unsubscribe(CLUSTER, "a", "ghost"))
        await link.expect(CLUSTER, {"a": "1"}, {"ghost"})
    await link.quiet()


async def names_one_after_another(link: Link) -> None:
    """A new name is answered with its resource alone; a repeated request with nothing."""
    await link.publish(snapshot(eds={"a": "1", "b": "1", "c": "1"}))
    await link.send(link.peer.subscribe(ENDPOINT, "a"))
    await link.expect(ENDPOINT, {"a": "1"})
    await link.send(link.peer.subscribe(ENDPOINT, "b"))
    await link.expect(ENDPOINT, {"b": "1"})
    await link.send(link.peer.repeat(ENDPOINT))
    await link.quiet()


async def told_of_absence_then_of_appearance(link: Link) -> None:
    """A name that does not exist: delta says so, SotW for clusters by an empty world; it is sent when it appears."""
    await link.publish(snapshot(cds={"x": "1"}, eds={"x": "1"}))
    await link.send(link.peer.subscribe(ENDPOINT, "a"))
    await link.expect_removed(ENDPOINT, "a")
    await link.send(link.peer.subscribe(CLUSTER, "a"))
    await link.expect_removed(CLUSTER, "a")
    await link.quiet()
    await link.publish(snapshot(cds={"a": "1", "x": "1"}, eds={"a": "1", "x": "1"}))
    await link.expect(CLUSTER, {"a": "1"})
    await link.expect(ENDPOINT, {"a": "1"})
    await link.quiet()


async def unsubscribed_names_are_silent(link: Link) -> None:
    """What is no longer wanted is not sent; wanted again, it is sent although it has not changed."""
    await link.publish(snapshot(eds={"a": "1", "b": "1"}))
    await link.send(link.peer.subscribe(ENDPOINT, "a", "b"))
    await link.expect(ENDPOINT, {"a": "1", "b": "1"})
    await link.send(link.peer.unsubscribe(ENDPOINT, "a"))
    await link.quiet()
    await link.publish(snapshot(eds={"a": "2", "b": "2"}))
    await link.expect(ENDPOINT, {"b": "2"})
    await link.send(link.peer.unsubscribe(ENDPOINT, "b"))
    await link.quiet()
    await link.publish(snapshot(eds={"a": "3", "b": "3"}))
    await link.send(link.peer.subscribe(ENDPOINT, "b"))
    await link.expect(ENDPOINT, {"b": "3"})
    await link.quiet()


async def dropped_and_wanted_again_in_one_breath(link: Link) -> None:
    """A name dropped and taken up again is sent again: the client has forgotten it."""
    await link.publish(snapshot(eds={"a": "1"}))
    await link.send(link.peer.subscribe(ENDPOINT, "a"))
    await link.expect(ENDPOINT, {"a": "1"})
    await link.send(link.peer.unsubscribe(ENDPOINT, "a"), link.peer.subscribe(ENDPOINT, "a"))
    await link.expect(ENDPOINT, {"a": "1"})
    await link.quiet()


async def only_what_changed(link: Link) -> None:
    """A change of one type touches no other, and of endpoints and (in delta) clusters only the changed are sent."""
    await _start(link)
    await link.publish(snapshot(**FULL | {"eds": {"a": "2", "b": "1"}}))
    await link.expect(ENDPOINT, {"a": "2"})
    await link.quiet()
    await link.publish(snapshot(**FULL | {"eds": {"a": "2", "b": "1"}, "rds": {"r": "2"}}))
    await link.expect(ROUTE, {"r": "2"})
    await link.quiet()
    await link.publish(snapshot(**FULL | {"eds": {"a": "2", "b": "1"}, "rds": {"r": "2"}}))  # equal content
    await link.quiet()


async def updates_coalesce(link: Link) -> None:
    """While a response is unanswered nothing more of its type is sent; then only the newest."""
    await _start(link)
    await link.publish(snapshot(**FULL | {"eds": {"a": "2", "b": "1"}}))
    response = await link.expect(ENDPOINT, {"a": "2"}, ack=False)
    for revision in "34":
        await link.publish(snapshot(**FULL | {"eds": {"a": revision, "b": "1"}}))
    await link.quiet()
    await link.send(link.peer.ack(response))
    await link.expect(ENDPOINT, {"a": "4"})
    await link.quiet()


async def stale_nonce(link: Link) -> None:
    """A request that answers an older response: SotW ignores it, delta takes its names but not its ACK."""
    await link.publish(snapshot(eds={"a": "1", "b": "1"}))
    await link.send(link.peer.subscribe(ENDPOINT, "a"))
    first = await link.expect(ENDPOINT, {"a": "1"})
    await link.quiet()
    await link.publish(snapshot(eds={"a": "2", "b": "1"}))
    second = await link.expect(ENDPOINT, {"a": "2"}, ack=False)
    stale = link.peer.subscribe(ENDPOINT, "b")
    stale.response_nonce = first.nonce
    await link.send(stale)
    await link.quiet()
    await link.send(link.peer.ack(second))  # in SotW it carries both names
    await link.expect(ENDPOINT, {"b": "1"})
    await link.quiet()


async def refused_is_not_repeated(link: Link) -> None:
    """A refused resource is not sent again, whatever else changes, until it changes itself."""
    await _start(link)
    await link.publish(snapshot(**FULL | {"eds": {"a": "bad", "b": "1"}}))
    await link.send(link.peer.nack(await link.expect(ENDPOINT, {"a": "bad"}, ack=False)))
    await link.quiet()
    await link.publish(snapshot(**FULL | {"eds": {"a": "bad", "b": "2"}}))
    await link.expect(ENDPOINT, {"b": "2"})
    await link.quiet()
    await link.publish(snapshot(**FULL | {"eds": {"a": "3", "b": "2"}}))
    await link.expect(ENDPOINT, {"a": "3"})
    await link.quiet()


async def refused_cluster_stays_as_accepted(link: Link) -> None:
    """In SotW a world sent after a refusal has the refused cluster as the client last accepted it."""
    await _start(link)
    await link.publish(snapshot(**FULL | {"cds": {"a": "bad", "b": "1"}}))
    await link.send(link.peer.nack(await link.expect(CLUSTER, {"a": "bad"}, ack=False)))
    await link.expect(ENDPOINT, {"a": "1"})
    await link.quiet()
    await link.publish(snapshot(**FULL | {"cds": {"a": "bad", "b": "2"}}))
    await link.expect(CLUSTER, {"b": "2"})
    await link.expect(ENDPOINT, {"b": "1"})
    await link.quiet()


async def bad_one_among_good_ones(link: Link) -> None:
    """A refused response is tried in halves: the good resources arrive, the bad one is found and given up."""
    await link.publish(snapshot(eds=dict.fromkeys("abcd", "1")))
    await link.send(link.peer.subscribe(ENDPOINT, *"abcd"))
    await link.expect(ENDPOINT, dict.fromkeys("abcd", "1"))
    await link.publish(snapshot(eds={"a": "2", "b": "bad", "c": "2", "d": "2"}))
    sent = []
    while link.peer.revisions(ENDPOINT) != {"a": "2", "b": "1", "c": "2", "d": "2"}:
        response = await link.receive()
        revisions = {name: revision_of(body) for name, body in link.peer.updates(response).items()}
        assert revisions not in sent
        sent.append(revisions)
        await link.send(link.peer.nack(response) if "bad" in revisions.values() else link.peer.ack(response))
    await link.quiet()
    assert {"b": "bad"} in sent


async def refused_at_start(link: Link) -> None:
    """The same for a world of clusters, of which the client holds none yet."""
    await link.publish(snapshot(cds={"a": "1", "b": "bad", "c": "1"}))
    await link.send(link.peer.subscribe(CLUSTER))
    while link.peer.revisions(CLUSTER) != {"a": "1", "c": "1"}:
        response = await link.receive()
        bad = "bad" in map(revision_of, link.peer.updates(response).values())
        await link.send(link.peer.nack(response) if bad else link.peer.ack(response))
    await link.quiet()


async def reconnect_up_to_date(link: Link) -> None:
    """A client that holds everything: delta is sent empty answers, SotW nothing but what it asks for by name."""
    await _start(link)
    await link.reconnect()
    if link.delta:
        for type_url in (CLUSTER, ENDPOINT, LISTENER, ROUTE):
            await link.expect(type_url)
    else:
        await link.expect(ENDPOINT, FULL["eds"])
        await link.expect(ROUTE, FULL["rds"])
    await link.quiet()


async def reconnect_after_a_change(link: Link) -> None:
    """A client that comes back is sent the difference: what changed, and (SotW: by what is missing) what is gone."""
    await _start(link)
    await link.publish(snapshot(**FULL | {"lds": {"m": "1"}, "rds": {"r": "2"}}))
    for type_url in (LISTENER, ROUTE):
        response = await link.receive()
        assert response.type_url == type_url  # lost: never answered
    await link.reconnect()
    if link.delta:
        await link.expect(CLUSTER)
    await link.expect(ENDPOINT, {} if link.delta else FULL["eds"])
    await link.expect(LISTENER, {"m": "1"}, {"l"})
    await link.expect(ROUTE, {"r": "2"})
    await link.quiet()


async def reconnect_takes_clusters_away_last(link: Link) -> None:
    """On a new stream, too, a cluster goes only when the routes that used it are replaced. In SotW this server may not
    know it: it is among those the client wants endpoints of, and the first world has a stand-in for it.
    """
    await _start(link)
    link.peer.names[ENDPOINT].add("gone")
    link.peer.held[CLUSTER]["gone"] = b""
    if link.delta:
        link.peer.versions[CLUSTER]["gone"] = "0"
    else:
        link.peer.versions[CLUSTER] = "of another server"
    await link.publish(snapshot(**FULL | {"rds": {"r": "2"}}))
    assert (await link.receive()).type_url == ROUTE  # lost
    await link.reconnect()
    if link.delta:
        await link.expect(CLUSTER)
        await link.expect(ENDPOINT, removed={"gone"})
        await link.expect(LISTENER)
    else:
        clusters = await link.receive()
        assert link.peer.updates(clusters).keys() == {"a", "b", "gone"}
        await link.expect(ENDPOINT, FULL["eds"])
        await link.quiet()
        await link.send(link.peer.ack(clusters))
    await link.expect(ROUTE, {"r": "2"})
    await link.expect_removed(CLUSTER, "gone")
    await link.quiet()


async def reconnect_with_clusters_still_warming(link: Link) -> None:
    """Who asks for endpoints but not yet for clusters has some to warm: routes wait until it asks for clusters."""
    await _start(link)
    await link.publish(snapshot(**FULL | {"rds": {"r": "2"}}))
    assert (await link.receive()).type_url == ROUTE  # lost
    clusters = link.peer.names.pop(CLUSTER)
    await link.reconnect()
    await link.expect(ENDPOINT, {} if link.delta else FULL["eds"])
    await link.quiet()
    link.peer.names[CLUSTER] = clusters
    await link.send(link.peer.resume(CLUSTER))
    if link.delta:
        await link.expect(CLUSTER)
        await link.expect(LISTENER)
    await link.expect(ROUTE, {"r": "2"})
    await link.quiet()


async def reconnect_and_refuse(link: Link) -> None:
    """A SotW client that comes back with an unknown world and refuses the new one keeps its own: no part is sent."""
    await _start(link)
    await link.publish(snapshot(**FULL | {"lds": {"l": "bad", "m": "1"}}))
    assert (await link.receive()).type_url == LISTENER  # lost
    await link.reconnect()
    if link.delta:
        await link.expect(CLUSTER)
        await link.expect(ENDPOINT)
        response = await link.expect(LISTENER, {"l": "bad", "m": "1"}, ack=False)
        await link.expect(ROUTE)
        await link.send(link.peer.nack(response))
        await link.send(link.peer.nack(await link.expect(LISTENER, {"l": "bad"}, ack=False)))
        await link.expect(LISTENER, {"m": "1"})
    else:
        await link.expect(ENDPOINT, FULL["eds"])
        response = await link.expect(LISTENER, {"l": "bad", "m": "1"}, ack=False)
        await link.expect(ROUTE, FULL["rds"])
        await link.send(link.peer.nack(response))
    await link.quiet()
    await link.publish(snapshot(**FULL | {"lds": {"l": "2", "m": "1"}}))
    await link.expect(LISTENER, {"l": "2"} if link.delta else {"l": "2", "m": "1"})
    await link.quiet()


async def changed_cluster_brings_its_endpoints(link: Link) -> None:
    """The endpoints of a changed cluster follow it although they are the same: without them it would not warm."""
    await _start(link)
    await link.publish(snapshot(**FULL | {"cds": {"a": "2", "b": "1"}}))
    clusters = await link.expect(CLUSTER, {"a": "2"}, ack=False)
    if not link.delta:
        await link.send(link.peer.repeat(ENDPOINT))  # what a SotW Envoy does at this point
    await link.expect(ENDPOINT, {"a": "1"})
    await link.send(link.peer.ack(clusters))
    await link.quiet()


async def routes_wait_for_new_clusters(link: Link) -> None:
    """Make: a route to a new cluster is sent only when the client has accepted the cluster."""
    await _start(link)
    await link.publish(
        snapshot(cds={"a": "1", "b": "1", "c": "1"}, eds={"a": "1", "b": "1", "c": "1"}, lds={"l": "2"}, rds={"r": "2"})
    )
    clusters = await link.expect(CLUSTER, {"c": "1"}, ack=False)
    await link.send(link.peer.subscribe(ENDPOINT, "c"))
    await link.expect(ENDPOINT, {"c": "1"})
    await link.quiet()
    await link.send(link.peer.ack(clusters))
    await link.expect(LISTENER, {"l": "2"})
    await link.expect(ROUTE, {"r": "2"})
    await link.quiet()


async def removals_come_last(link: Link) -> None:
    """Break: a cluster renamed in one change; the old one stays until the routes to the new one are accepted."""
    await _start(link)
    await link.publish(snapshot(cds={"a": "1", "c": "1"}, eds={"a": "1", "c": "1"}, lds={"l": "1"}, rds={"r": "2"}))
    await link.expect(CLUSTER, {"c": "1"})
    await link.send(link.peer.subscribe(ENDPOINT, "c"))
    responses = {response.type_url: response for response in [await link.receive(), await link.receive()]}
    assert set(responses) == {ENDPOINT, ROUTE}
    await link.send(link.peer.ack(responses[ENDPOINT]))
    await link.quiet()
    await link.send(link.peer.ack(responses[ROUTE]))
    await link.expect_removed(CLUSTER, "b")
    await link.expect_removed(ENDPOINT, "b")
    await link.quiet()
    assert link.peer.revisions(CLUSTER) == {"a": "1", "c": "1"}


async def refused_route_keeps_its_clusters(link: Link) -> None:
    """A client that refuses a route still uses the old one: its clusters stay, until a good route is accepted."""
    await _start(link)
    await link.publish(snapshot(cds={"a": "1"}, eds={"a": "1"}, lds={"l": "1"}, rds={"r": "bad"}))
    await link.send(link.peer.nack(await link.expect(ROUTE, {"r": "bad"}, ack=False)))
    await link.quiet()
    await link.publish(snapshot(cds={"a": "1"}, eds={"a": "1"}, lds={"l": "1"}, rds={"r": "3"}))
    await link.expect(ROUTE, {"r": "3"})
    await link.expect_removed(CLUSTER, "b")
    await link.expect_removed(ENDPOINT, "b")
    await link.quiet()


async def refused_route_taken_back(link: Link) -> None:
    """When the refused route is replaced by the one the client has, what waited for it is removed."""
    await _start(link)
    await link.publish(snapshot(**FULL | {"rds": {"r": "bad"}}))
    await link.send(link.peer.nack(await link.expect(ROUTE, {"r": "bad"}, ack=False)))
    await link.quiet()
    await link.publish(snapshot(**FULL | {"cds": {"a": "1"}, "eds": {"a": "1"}}))
    await link.expect_removed(CLUSTER, "b")
    await link.expect_removed(ENDPOINT, "b")
    await link.quiet()


async def weights_wait_for_nothing(link: Link) -> None:
    """New endpoints are sent while clusters, listeners and routes are unanswered."""
    await _start(link)
    await link.publish(snapshot(**FULL | {"cds": {"a": "1", "b": "1", "c": "1"}, "rds": {"r": "2"}}))
    clusters = await link.expect(CLUSTER, {"c": "1"}, ack=False)
    await link.publish(
        snapshot(cds={"a": "1", "b": "1", "c": "1"}, eds={"a": "2", "b": "2"}, lds={"l": "1"}, rds={"r": "2"})
    )
    await link.expect(ENDPOINT, {"a": "2", "b": "2"})
    await link.quiet()
    await link.send(link.peer.ack(clusters))
    await link.expect(ROUTE, {"r": "2"})
    await link.quiet()


async def secrets_follow_their_content(link: Link) -> None:
    """A secret is sent by name, again when it changes, and told to be gone where the variant can say so."""
    await link.publish(snapshot(sds={"s": "1", "t": "1"}))
    await link.send(link.peer.subscribe(SECRET, "s"))
    await link.expect(SECRET, {"s": "1"})
    await link.publish(snapshot(sds={"s": "2", "t": "2"}))
    await link.expect(SECRET, {"s": "2"})
    await link.publish(snapshot(sds={"t": "2"}))
    await link.expect_removed(SECRET, "s")
    await link.quiet()


async def unknown_type_is_ignored(link: Link) -> None:
    """A type this server does not serve gets no answer and does no harm."""
    await link.publish(snapshot(cds={"a": "1"}))
    await link.send(link.peer.subscribe("type.googleapis.com/envoy.service.runtime.v3.Runtime", "s"))
    await link.quiet()
    await link.send(link.peer.subscribe(CLUSTER))
    await link.expect(CLUSTER, {"a": "1"})
    await link.quiet()


SCENARIOS: tuple[Callable[[Link], Awaitable[None]], ...] = (
    start_up,
    nothing_before_first_snapshot,
    empty_world_is_answered,
    wildcard_beside_names,
    legacy_wildcard_ends_with_a_name,
    unsubscribed_name_under_wildcard,
    names_one_after_another,
    told_of_absence_then_of_appearance,
    unsubscribed_names_are_silent,
    dropped_and_wanted_again_in_one_breath,
    only_what_changed,
    updates_coalesce,
    stale_nonce,
    refused_is_not_repeated,
    refused_cluster_stays_as_accepted,
    bad_one_among_good_ones,
    refused_at_start,
    reconnect_up_to_date,
    reconnect_after_a_change,
    reconnect_takes_clusters_away_last,
    reconnect_with_clusters_still_warming,
    reconnect_and_refuse,
    changed_cluster_brings_its_endpoints,
    routes_wait_for_new_clusters,
    removals_come_last,
    refused_route_keeps_its_clusters,
    refused_route_taken_back,
    weights_wait_for_nothing,
    secrets_follow_their_content,
    unknown_type_is_ignored,
)


async def type_is_implied(link: Link) -> None:
    """On a service for one type a request need not name it, and another type gets no answer there."""
    await link.publish(snapshot(cds={"a": "1"}, rds={"r": "1"}))
    request = link.peer.subscribe(ROUTE, "r")
    request.type_url = ""
    await link.send(request)
    await link.expect(ROUTE, {"r": "1"})
    await link.send(link.peer.subscribe(CLUSTER))
    await link.quiet()
    link.peer.names.pop(CLUSTER)
    await link.reconnect()
    await link.expect(ROUTE, {} if link.delta else {"r": "1"})
    await link.quiet()


OF_ONE_TYPE: tuple[tuple[Callable[[Link], Awaitable[None]], str], ...] = (
    (empty_world_is_answered, CLUSTER),
    (wildcard_beside_names, CLUSTER),
    (legacy_wildcard_ends_with_a_name, CLUSTER),
    (unsubscribed_name_under_wildcard, CLUSTER),
    (names_one_after_another, ENDPOINT),
    (unsubscribed_names_are_silent, ENDPOINT),
    (dropped_and_wanted_again_in_one_breath, ENDPOINT),
    (secrets_follow_their_content, SECRET),
    (stale_nonce, ENDPOINT),
    (bad_one_among_good_ones, ENDPOINT),
    (refused_at_start, CLUSTER),
    (type_is_implied, ROUTE),
)
PEERS: tuple[type[SotwPeer | DeltaPeer], ...] = (SotwPeer, DeltaPeer)
