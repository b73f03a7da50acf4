"""The order and pace of writes: coalesced, bounded, and backing off."""

from __future__ import annotations

import pytest

from tests.objects import ref
from xds.api_wire import Failure
from xds.model import ObjectRef
from xds.write_queue import FIRST_DELAY, LONGEST_DELAY, LONGEST_SPACING, PACE, SPACING, WriteQueue

A, B = ref("Gateway", "a"), ref("Gateway", "b")
CONFLICT = Failure("Conflict", "modified", 409)


def queue() -> WriteQueue:
    return WriteQueue(lambda: 1.0, 0.0)


def due(of: WriteQueue, now: float) -> ObjectRef:
    found = of.next(now)
    assert isinstance(found, ObjectRef)
    return found


def test_many_changes_are_one_write() -> None:
    """An object that waits is there once; while it is written it is kept, and is due again when that has ended."""
    of = queue()
    for _ in range(10):
        of.add(A, 0.0)
    assert len(of) == 1
    assert due(of, 0.0) == A
    assert of.next(0.0) is None
    of.add(A, 0.1)
    assert of.next(0.1) is None
    of.written(A, 0.2, undone=False)
    assert of.next(0.2) == pytest.approx(SPACING)
    assert due(of, 0.2 + SPACING) == A
    of.written(A, 2.0, undone=False)
    assert (of.next(9.0), len(of)) == (None, 0)


def test_what_is_unchanged_costs_no_time() -> None:
    """A thousand objects that say already what they should are looked at at once."""
    of = queue()
    refs = [ref("HTTPRoute", f"r{i}") for i in range(1000)]
    for each in refs:
        of.add(each, 0.0)
    for _ in refs:
        of.unchanged(due(of, 0.0), 0.0)
    assert of.next(0.0) is None


def test_writes_are_paced() -> None:
    """One after the other, so many a second, the oldest first."""
    of = queue()
    of.add(B, 0.0)
    of.add(A, 0.5)
    assert due(of, 1.0) == B
    of.sending(1.0)
    assert of.next(1.0) == pytest.approx(PACE)
    assert due(of, 1.0 + PACE) == A


def test_a_conflict_waits_for_its_object_alone() -> None:
    """Longer each time, up to a minute; a newer version of the object ends the wait, a write the count."""
    of = queue()
    of.add(A, 0.0)
    delays, now = [], 0.0
    for _ in range(12):
        of.failed(due(of, now), CONFLICT, now)
        found = of.next(now)
        assert isinstance(found, float)
        delays.append(found)
        now += found + 1e-6
    assert delays[:3] == pytest.approx([FIRST_DELAY, 2 * FIRST_DELAY, 4 * FIRST_DELAY])
    assert delays[-1] == LONGEST_DELAY
    of.add(B, now)
    assert due(of, now) in (A, B)
    of = queue()
    of.add(A, 0.0)
    of.failed(due(of, 0.0), CONFLICT, 0.0)
    of.add(B, 0.0)
    assert due(of, 0.0) == B
    of.add(A, 0.01)
    assert due(of, 0.01) == A


def test_a_right_that_is_missing_stops_nothing_else() -> None:
    """An object that may not be written is tried once a minute, and one of another kind is written meanwhile."""
    of = queue()
    of.add(A, 0.0)
    of.failed(due(of, 0.0), Failure("Forbidden", "no", 403), 0.0)
    assert of.next(0.0) == LONGEST_DELAY
    of.add(B, 0.0)
    assert due(of, 0.0) == B


@pytest.mark.parametrize(
    "failure",
    [
        Failure("Unreachable", "no"),
        Failure("Unauthorized", "no", 401),
        Failure("TooManyRequests", "later", 429),
        Failure("InternalError", "boom", 500),
    ],
)
def test_what_is_about_all_stops_all(failure: Failure) -> None:
    """Longer each time; an object that comes meanwhile waits too, and the next success ends it."""
    of = queue()
    of.add(A, 0.0)
    of.failed(due(of, 0.0), failure, 0.0)
    of.add(B, 0.0)
    assert of.next(0.0) == pytest.approx(FIRST_DELAY)
    of.failed(due(of, 1.0), failure, 1.0)
    assert of.next(1.0) == pytest.approx(2 * FIRST_DELAY)
    of.written(due(of, 2.0), 2.0, undone=False)
    assert isinstance(of.next(2.0), ObjectRef)


def test_a_server_that_says_when_is_heard() -> None:
    """Retry-After counts, up to a minute."""
    for after, waits in ((7.0, 7.0), (1e6, LONGEST_DELAY)):
        of = queue()
        of.add(A, 0.0)
        of.failed(due(of, 0.0), Failure("TooManyRequests", "", 429, after), 0.0)
        assert of.next(0.0) == waits


def test_a_war_is_not_joined() -> None:
    """What somebody else undoes each time is written ever more seldom; other objects do not wait for it."""
    of, now, spacings = queue(), 0.0, []
    for _ in range(15):
        of.add(A, now)
        found = of.next(now)
        if isinstance(found, float):
            spacings.append(found)
            now += found
            assert due(of, now) == A
        of.written(A, now, undone=True)
    assert spacings[:3] == [2 * SPACING, 4 * SPACING, 8 * SPACING]
    assert spacings[-1] == LONGEST_SPACING
    assert of.contested(A) == 15
    of.add(A, now)
    of.add(B, now)
    assert due(of, now) == B
    of.written(due(of, now + LONGEST_SPACING), now, undone=False)
    assert of.contested(A) == 0


def test_an_object_that_is_gone_is_forgotten() -> None:
    """One with its name begins anew."""
    of = queue()
    of.add(A, 0.0)
    of.written(due(of, 0.0), 0.0, undone=True)
    of.add(A, 0.0)
    of.gone(due(of, 100.0), 100.0)
    assert (len(of), of.contested(A)) == (0, 0)
    of.add(A, 100.0)
    assert due(of, 100.0) == A
