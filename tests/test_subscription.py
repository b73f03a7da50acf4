"""What one client wants and holds of one type. The scenarios (tests/test_stream.py) play it from the outside."""

from __future__ import annotations

from tests.ads_client import resource
from xds.snapshot import CLUSTER, Resource, version_of
from xds.subscription import Change, Flight, Subscription


def world(**revisions: str) -> dict[str, Resource]:
    return {name: resource(CLUSTER, name, revision) for name, revision in sorted(revisions.items())}


def opened(
    *names: str, tells_absence: bool = True, full_state: bool = False, claim: str = "", **held: str
) -> Subscription:
    sub = Subscription(tells_absence=tells_absence, empty_is_wildcard=True, full_state=full_state)
    sub.open(names=names, claim=claim, held={name: made.version for name, made in world(**held).items()})
    return sub


def send(sub: Subscription, resources: dict[str, Resource], *kept: str) -> Change | None:
    """Plan a response and take it as sent."""
    change = sub.plan(resources, kept=kept)
    if change is not None:
        sub.sent(Flight("1", "v", change, 0.0))
    return change


def test_nothing_before_the_first_request() -> None:
    """A type nobody asked for is not sent."""
    assert send(Subscription(tells_absence=True, empty_is_wildcard=True), world(a="1")) is None


def test_one_response_in_flight() -> None:
    """While one is unanswered there is no plan; its resources count as different until they are accepted."""
    sub = opened()
    assert send(sub, world(a="1")) == Change(world(a="1"), frozenset())
    assert send(sub, world(a="2")) is None
    assert sub.changes(world(a="1")).update == world(a="1")
    sub.acked()
    assert not sub.changes(world(a="1"))
    assert send(sub, world(a="2")) == Change(world(a="2"), frozenset())


def test_taken_back_during_a_flight() -> None:
    """What is gone from the snapshot before the client accepts it is removed after that."""
    sub = opened()
    send(sub, world(a="1"))
    nothing = world()
    assert not sub.changes(nothing)
    sub.acked()
    assert send(sub, nothing) == Change({}, frozenset("a"))


def test_initial_versions_leave_the_difference() -> None:
    """Delta's initial_resource_versions: equal ones are not sent, vanished ones are removed, others updated."""
    sub = opened(a="1", b="1", c="1")
    assert send(sub, world(a="1", b="2", d="1")) == Change(world(b="2", d="1"), frozenset("c"))


def test_removed_resources_can_be_kept() -> None:
    """What is `kept` and held is not told to be gone; what is not held is all the same, and so is the rest."""
    sub = opened("a", "b", "ghost", a="1", b="1")
    assert send(sub, {}, "a", "ghost") == Change({}, frozenset({"b", "ghost"}))
    sub.acked()
    assert send(sub, {}, "a", "ghost") is None
    assert send(sub, {}) == Change({}, frozenset("a"))


def test_claim_of_the_same_version_is_believed() -> None:
    """A SotW wildcard at the version of what it would be sent is up to date; at another, or by name, it gets it all."""
    resources = world(a="1", b="1")
    assert send(opened(claim=version_of(resources)), resources) is None
    assert send(opened("a", claim=version_of(world(a="1"))), resources) == Change(world(a="1"), frozenset())
    assert send(opened(claim="older"), resources) == Change(resources, frozenset())


def test_refusal_is_narrowed_down_in_halves() -> None:
    """Responses halve on refusal and double on acceptance; only the bad resource is refused, the rest arrives."""
    sub, resources, sizes = opened(), world(**dict.fromkeys("abcdefgh", "1")), []
    while (change := send(sub, resources)) is not None:
        sizes.append(len(change.update))
        if "c" in change.update:
            sub.nacked("bad")
        else:
            sub.acked()
    assert sizes == [8, 4, 2, 4, 2, 1, 1, 2, 2]
    assert set(sub.refused) == {"c"}
    assert set(sub.held) == set("abdefgh")
    assert send(sub, resources | world(c="2")) == Change(world(c="2"), frozenset())


def test_refused_and_gone_is_not_mentioned_again() -> None:
    """What the client refused, and never held, needs no removal when it is gone."""
    sub = opened()
    send(sub, world(a="1", b="bad"))
    sub.nacked("bad")
    assert send(sub, world(a="1", b="bad")) == Change(world(a="1"), frozenset())
    sub.acked()
    assert send(sub, world(a="1")) is None


def test_refused_and_taken_back_is_not_sent_again() -> None:
    """When the snapshot returns to what the client holds, a refusal of what was between leaves nothing to send."""
    sub = opened(a="1", b="1")
    send(sub, world(a="2", b="bad"))
    sub.nacked("bad")
    assert send(sub, world(a="1", b="1")) is None


def test_refusal_is_forgotten_when_the_resource_changes() -> None:
    """What was refused, replaced and brought back may be right by now: it is sent again."""
    sub = opened("a")
    send(sub, world(a="bad"))
    sub.nacked("bad")
    assert send(sub, world(a="bad")) is None
    assert sub.refuses(world(a="bad"))
    assert not sub.refuses(world(a="1"))
    assert send(sub, world(a="1")) is not None
    sub.acked()
    assert send(sub, world(a="bad")) is not None


def test_refused_removal_is_not_repeated() -> None:
    """A client cannot keep what is not served any more by refusing its removal."""
    sub = opened(a="1")
    assert send(sub, {}) == Change({}, frozenset("a"))
    sub.nacked("no")
    assert send(sub, {}) is None


def test_absent_names_are_forgotten_with_their_subscription() -> None:
    """Beside a wildcard they are still wanted, but what does not exist is remembered only for who asks for it."""
    sub = opened("*", "a", "gone", full_state=True)
    send(sub, world(a="1"))
    sub.acked()
    assert sub.held == {**world(a="1"), "gone": None}
    for name in ("b", "c"):
        sub.set_names(["*", "a", name])
        assert send(sub, world(a="1")) == Change({}, frozenset({name}))
        sub.acked()
    assert sub.held == {**world(a="1"), "c": None}
    sub.set_names(["*", "c"])
    assert send(sub, world(a="1")) is None


def test_refused_full_state_is_not_repeated() -> None:
    """It says what the client holds whether that was owed or not: refused with no more in it, it has said it all."""
    sub, resources = opened("a", full_state=True), world(a="1")
    send(sub, resources)
    sub.acked()
    sub.set_names(["a", "gone"])
    sub.owe("a")
    assert send(sub, resources) == Change(resources, frozenset({"gone"}))
    sub.nacked("no")
    assert send(sub, resources) is None


def test_refused_full_state_with_one_new_resource_refuses_that() -> None:
    """What was owed beside it is sent without it, and then nothing more."""
    sub, resources = opened("a", full_state=True), world(a="1", b="bad")
    send(sub, world(a="1"))
    sub.acked()
    sub.set_names(["a", "b"])
    sub.owe("a")
    assert send(sub, resources) == Change(resources, frozenset())
    sub.nacked("no")
    assert send(sub, resources) == Change(world(a="1"), frozenset())
    assert list(sub.after(Change(world(a="1"), frozenset()))) == ["a"]
    sub.nacked("no")
    assert send(sub, resources) is None


def test_unknown_base_is_replaced_as_a_whole_or_not_at_all() -> None:
    """After a SotW reconnect at an unknown version no part is tried: what it leaves out might be deleted."""
    sub = opened(claim="unknown")
    assert send(sub, world(a="bad", b="1")) == Change(world(a="bad", b="1"), frozenset())
    sub.nacked("bad")
    assert send(sub, world(a="bad", b="1")) is None
    assert sub.refuses(world(a="bad", b="1"))
    assert send(sub, world(a="2", b="1")) == Change(world(a="2", b="1"), frozenset())
    sub.acked()
    assert send(sub, world(a="3", b="1")) == Change(world(a="3"), frozenset())


def test_answer_to_nothing_changes_nothing() -> None:
    """An ACK or a NACK without a response in flight has no effect."""
    sub = opened(a="1")
    sub.acked()
    sub.nacked("what?")
    assert (sub.last_nack, sub.version_acked, set(sub.held)) == ("", "", {"a"})


def test_name_forgotten_during_a_flight_is_sent_after_it() -> None:
    """A name subscribed again while a response with it is unanswered is owed once more; dropped, it is not held."""
    sub = opened("a", "b")
    send(sub, world(a="1", b="1"))
    sub.unsubscribe(["b"])
    sub.subscribe(["a"])
    sub.acked()
    assert set(sub.held) == {"a"}
    assert send(sub, world(a="1", b="1")) == Change(world(a="1"), frozenset())
    sub.acked()
    assert send(sub, world(a="1", b="1")) is None
