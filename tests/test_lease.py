"""The elector: what it asks for in each state, and that no two ever hold the Lease at once."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xds.api_wire import Failure
from xds.lease import (
    ANSWER,
    DURATION,
    RETRY,
    TENURE,
    Elector,
    Read,
    Record,
    Wait,
    Write,
    micro_time,
    read_record,
)

UTC_NOW = datetime(2026, 3, 1, 12, 30, 5, 123456, UTC)


def elector(name: str = "a", now: float = 0.0) -> Elector:
    return Elector(name, lambda: 0.0, now)


def held(by: str, version: str = "1", duration: int = DURATION) -> Record:
    return Record(version, {"holderIdentity": by, "leaseDurationSeconds": duration, "renewTime": version})


def leading(now: float = 0.0) -> Elector:
    """One that has just taken a Lease that was not there."""
    mine = elector(now=now)
    assert mine.next(now, UTC_NOW) == Read()
    mine.found(None, now)
    step = mine.next(now, UTC_NOW)
    assert isinstance(step, Write)
    mine.written(Record("1", step.spec), now)
    return mine


# --- what it does -----------------------------------------------------------------------------------------------------


def test_a_lease_that_is_not_there_is_created() -> None:
    """With the times as client-go writes them; until the answer has come this replica may not write."""
    mine = elector()
    assert mine.next(0.0, UTC_NOW) == Read()
    mine.found(None, 0.5)
    step = mine.next(1.0, UTC_NOW.astimezone(timezone(timedelta(hours=8))))
    time = "2026-03-01T12:30:05.123456Z"
    assert step == Write(
        "",
        {
            "holderIdentity": "a",
            "leaseDurationSeconds": 15,
            "renewTime": time,
            "acquireTime": time,
            "leaseTransitions": 0,
        },
    )
    assert not mine.leads(1.4)
    mine.written(Record("7", step.spec), 1.5)
    assert (mine.holder, mine.leads(1.5)) == ("a", True)


def test_the_right_to_write_ends_by_itself() -> None:
    """Ten seconds after the renewal that was acknowledged was sent, not after its answer."""
    mine = elector()
    mine.found(None, 0.0)
    step = mine.next(3.0, UTC_NOW)
    assert isinstance(step, Write)
    mine.written(Record("1", step.spec), 5.0)
    assert mine.leads(3.0 + TENURE - 0.01)
    assert not mine.leads(3.0 + TENURE)


def test_a_holder_renews() -> None:
    """Every two seconds, what it acquired stays acquired, and others' fields stay."""
    mine = leading()
    assert isinstance(mine.next(0.1, UTC_NOW), Wait)
    later = UTC_NOW + timedelta(seconds=2)
    step = mine.next(RETRY, later)
    assert isinstance(step, Write)
    assert step.version == "1"
    assert step.spec["renewTime"] == micro_time(later)
    assert step.spec["acquireTime"] == micro_time(UTC_NOW)
    assert step.spec["leaseTransitions"] == 0
    mine.written(Record("2", {**step.spec, "strategy": "x"}), RETRY)
    step = mine.next(2 * RETRY, later)
    assert isinstance(step, Write)
    assert step.spec["strategy"] == "x"


def test_a_failure_does_not_prolong_the_right_nor_end_it_early() -> None:
    """It is tried again before its time is over, and what was lost on the way is looked up first."""
    mine = leading()
    mine.next(RETRY, UTC_NOW)
    mine.failed(RETRY + ANSWER)
    assert mine.leads(TENURE - 0.1)
    assert not mine.leads(TENURE)
    at = RETRY + ANSWER + RETRY
    assert at < TENURE
    assert mine.next(at, UTC_NOW) == Read()
    mine.found(held("a", "2"), at)
    step = mine.next(at, UTC_NOW)
    assert isinstance(step, Write)
    assert step.version == "2"


def test_anothers_lease_is_waited_out() -> None:
    """From when this record was first seen, for the duration it says; each change of it begins the wait anew."""
    mine = elector()
    mine.found(held("b", "1", 20), 0.0)
    assert (mine.holder, mine.leads(0.0)) == ("b", False)
    for now in (5.0, 10.0, 19.9):
        assert mine.next(now, UTC_NOW) == Read()
        mine.found(held("b", "1", 20), now)
    changed = held("b", "2", 20)
    mine.next(23.0, UTC_NOW)
    mine.found(changed, 23.0)
    assert mine.next(42.9, UTC_NOW) == Read()
    mine.found(changed, 42.9)
    mine.next(46.0, UTC_NOW)
    step = mine.next(46.0, UTC_NOW)
    assert isinstance(step, Write)
    assert (step.version, step.spec["leaseTransitions"], step.spec["holderIdentity"]) == ("2", 1, "a")


def test_a_change_that_is_not_the_records_does_not_prolong_it() -> None:
    """A label on the Lease is another version of it, and no word of its holder."""
    mine = elector()
    mine.found(held("b"), 0.0)
    mine.next(5.0, UTC_NOW)
    mine.found(Record("9", held("b").spec), 5.0)
    step = mine.next(DURATION + 3, UTC_NOW)
    assert isinstance(step, Write)
    assert step.version == "9"


@pytest.mark.parametrize("spec", [{}, {"holderIdentity": ""}, {"holderIdentity": None}, {"holderIdentity": 1}])
def test_a_free_lease_is_taken_at_once(spec: Mapping[str, object]) -> None:
    """Given back by its holder, or never held."""
    mine = elector()
    mine.found(Record("1", spec), 0.0)
    assert isinstance(mine.next(0.0, UTC_NOW), Write)


def test_who_comes_too_late_looks_again() -> None:
    """Of two that take a Lease at once, one is told that there is a newer version."""
    mine = elector()
    mine.found(None, 0.0)
    assert isinstance(mine.next(0.0, UTC_NOW), Write)
    mine.failed(0.1)
    assert not mine.leads(0.1)
    assert mine.next(0.1 + RETRY, UTC_NOW) == Read()


def test_a_holder_that_finds_another_stops_at_once() -> None:
    """Whoever has given it away: a person with kubectl may."""
    mine = leading()
    mine.next(RETRY, UTC_NOW)
    mine.failed(RETRY)
    mine.next(2 * RETRY, UTC_NOW)
    mine.found(held("b", "9"), 2 * RETRY)
    assert not mine.leads(2 * RETRY)


def test_an_earlier_process_of_the_same_pod_is_another() -> None:
    """Its Lease is waited out like anybody's."""
    mine = elector("pod_2")
    mine.found(held("pod_1"), 0.0)
    assert not mine.leads(0.0)
    assert isinstance(mine.next(0.0, UTC_NOW), Wait)


def test_release() -> None:
    """The record loses its holder, and the replica its right, before it is sent; who holds nothing sends nothing."""
    mine = leading()
    step = mine.release(UTC_NOW)
    assert step is not None
    assert (step.version, step.spec["holderIdentity"], step.spec["leaseDurationSeconds"]) == ("1", "", 1)
    assert not mine.leads(0.0)
    other = elector("b")
    other.found(Record("2", step.spec), 1.0)
    assert isinstance(other.next(1.0, UTC_NOW), Write)
    assert other.release(UTC_NOW) is None


@pytest.mark.parametrize("duration", [None, 0, -1, True, "15", 10**9])
def test_a_nonsensical_duration(duration: object) -> None:
    """The usual one is waited for, and never longer than an hour."""
    record = Record("1", {"holderIdentity": "b", "leaseDurationSeconds": duration})
    assert record.duration == (3600 if duration == 10**9 else DURATION)


def test_reading() -> None:
    """A Lease as an API server has it, one without a spec, and what is none."""
    assert read_record({"metadata": {"resourceVersion": "1"}, "spec": {"holderIdentity": "b"}}) == Record(
        "1", {"holderIdentity": "b"}
    )
    assert read_record({"metadata": {"resourceVersion": "1"}}) == Record("1", {})
    broken: list[object] = [None, [], {}, {"metadata": {"resourceVersion": ""}}, {"metadata": {}}]
    for document in broken:
        assert isinstance(read_record(document), Failure)


# --- no two -----------------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """The one Lease: of several writes for one version the first to arrive is taken."""

    record: Record | None = None
    versions: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def write(self, step: Write) -> Record | None:
        """None: a conflict."""
        if (self.record.version if self.record else "") != step.version:
            return None
        self.record = Record(str(next(self.versions)), step.spec)
        return self.record


@dataclass(frozen=True)
class Phase:
    """For how long (true seconds) exchanges take `there` and `back`, infinite for lost; or the process stands still."""

    seconds: float
    there: float = 0.01
    back: float = 0.01
    stopped: bool = False


class Replica:
    """An elector whose clock runs `rate` seconds for each true one, from anywhere, through its phases over and over."""

    def __init__(self, name: str, rate: float, offset: float, jitter: float, phases: list[Phase]) -> None:
        self.elector = Elector(name, lambda: jitter, offset)
        self.rate, self.offset, self.phases = rate, offset, phases
        self.terms: list[tuple[float, float]] = []  # true times at which it has the right to write

    def local(self, true: float) -> float:
        return true * self.rate + self.offset

    def true(self, local: float) -> float:
        return (local - self.offset) / self.rate

    def phase(self, now: float) -> tuple[Phase, float]:
        """The one of now, and when it is over."""
        at = now % sum(each.seconds for each in self.phases)
        for each in self.phases:
            if at < each.seconds:
                return each, now + each.seconds - at
            at -= each.seconds
        raise AssertionError(now)

    def awake(self, now: float) -> float:
        """When the process can do what is due at `now`."""
        for _ in self.phases:
            phase, end = self.phase(now)
            if not phase.stopped:
                break
            now = end + 1e-6
        return now

    def note(self, now: float) -> None:
        """It may write from now on until its own clock says no, unless it hears otherwise."""
        if self.elector.leads(self.local(now)):
            self.terms.append((now, self.true(self.elector.until)))
        elif self.terms and self.terms[-1][1] > now:
            self.terms[-1] = (self.terms[-1][0], now)


class World:
    """True time, one event after the other: what each replica does, what reaches the server, what comes back."""

    def __init__(self) -> None:
        self.server = Server()
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[float], None]]] = []

    def at(self, when: float, do: Callable[[float], None]) -> None:
        if when < math.inf:
            heapq.heappush(self._events, (when, next(self._order), do))

    def play(self, replicas: list[Replica], end: float) -> None:
        for replica in replicas:
            self.at(replica.awake(0.0), partial(self.step, replica))
        while self._events and self._events[0][0] < end:
            now, _, do = heapq.heappop(self._events)
            do(now)

    def step(self, replica: Replica, now: float) -> None:
        local = replica.local(now)
        todo = replica.elector.next(local, UTC_NOW + timedelta(seconds=now * 7))
        if isinstance(todo, Wait):
            self.at(replica.awake(now + todo.seconds / replica.rate), partial(self.step, replica))
            return
        waiting = [True]
        phase, _ = replica.phase(now)
        # Of what a stopped process finds when it goes on, the answer comes first: that is the more dangerous order.
        self.at(replica.awake(replica.true(local + ANSWER)) + 1e-6, partial(self.give_up, replica, waiting))
        self.at(now + phase.there, partial(self.arrive, replica, todo, waiting, phase.back))

    def arrive(self, replica: Replica, todo: Read | Write, waiting: list[bool], back: float, now: float) -> None:
        answer = self.server.write(todo) if isinstance(todo, Write) else self.server.record
        if back < math.inf:
            self.at(replica.awake(now + back), partial(self.hear, replica, todo, waiting, answer))

    def hear(
        self, replica: Replica, todo: Read | Write, waiting: list[bool], answer: Record | None, now: float
    ) -> None:
        if not waiting[0]:
            return
        waiting[0] = False
        local = replica.local(now)
        if isinstance(todo, Read):
            replica.elector.found(answer, local)
        elif answer is None:
            replica.elector.failed(local)
        else:
            replica.elector.written(answer, local)
        replica.note(now)
        self.at(now, partial(self.step, replica))

    def give_up(self, replica: Replica, waiting: list[bool], now: float) -> None:
        if waiting[0]:
            waiting[0] = False
            replica.elector.failed(replica.local(now))
            replica.note(now)
            self.at(now, partial(self.step, replica))


SECONDS = st.sampled_from([3.0, 8.0, 14.0, 21.0, 40.0])
DELAYS = st.sampled_from([0.01, 0.01, 0.3, 2.0, 2.8, 9.0, 25.0, math.inf])
PHASES = st.one_of(
    st.builds(Phase, SECONDS),
    st.builds(Phase, SECONDS, DELAYS, DELAYS),
    st.builds(Phase, SECONDS, stopped=st.just(True)),
)
REPLICAS = st.builds(
    Replica,
    st.uuids().map(str),
    st.sampled_from([0.82, 0.9, 1.0, 1.1, 1.2]),
    st.sampled_from([0.0, -1e6, 1e9]),
    st.floats(0, 1),
    st.lists(PHASES, max_size=6).map(lambda phases: [*phases, Phase(5.0)]),
)


@settings(max_examples=250)
@given(st.lists(REPLICAS, min_size=2, max_size=3))
def test_no_two_may_write_at_once(replicas: list[Replica]) -> None:
    """Whatever is late or lost, wherever a process stands still, however far its clock is off and how fast it runs."""
    World().play(replicas, 400.0)
    terms = sorted((begin, end, i) for i, replica in enumerate(replicas) for begin, end in replica.terms)
    latest = [-math.inf] * len(replicas)
    for begin, end, i in terms:
        assert all(latest[other] <= begin + 1e-6 for other in range(len(replicas)) if other != i)
        latest[i] = max(latest[i], end)


def test_the_lease_finds_a_holder_and_goes_over() -> None:
    """Where nothing is lost one of them writes all the time; when that one is cut off, another does soon after."""
    replicas = [Replica(f"r{i}", 1.0, 0.0, 0.5, [Phase(100.0)]) for i in range(3)]
    World().play(replicas, 100.0)
    (holder,) = [replica for replica in replicas if replica.terms]
    assert holder.terms[0][0] < 1.0
    assert all(later[0] < earlier[1] for earlier, later in itertools.pairwise(holder.terms))
    cut = [Phase(20.0), Phase(1000.0, math.inf)]
    replicas = [Replica(f"r{i}", 1.0, 0.0, 0.5, cut if i == 0 else [Phase(100.0)]) for i in range(3)]
    World().play(replicas, 100.0)
    first, second = (replica for replica in replicas if replica.terms)
    assert 20.0 < first.terms[-1][1] < second.terms[0][0] < 20.0 + DURATION + 3 * RETRY
