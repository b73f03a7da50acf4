"""reflector: whatever pages, events and faults come, in any order, it ends with what the server has."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xds.api_wire import Event, Failure, Item, Key, Page
from xds.reflector import (
    ABSENT_FOR,
    EARLY,
    LONGEST_DELAY,
    NOTHING,
    PROOF,
    REFUSED,
    SILENCE,
    SPACING,
    WATCH,
    Changes,
    List,
    Reflector,
    Wait,
    Watch,
)

PATH = "/api/v1/pods"
EXPIRED = Failure("Expired", "too old resource version: 1 (2)", 410)
UNREACHABLE = Failure("Unreachable", "cannot connect")
INITIALIZING = Failure("TooManyRequests", "storage is (re)initializing", 429, retry_after=1)
FORBIDDEN = Failure("Forbidden", "pods is forbidden", 403)


def item(name: str, version: str, uid: str = "") -> Item:
    return Item(("default", name), uid or f"uid-{name}", version, {"metadata": {"name": name}})


def event(kind: str, name: str, version: str) -> Event:
    return Event(kind, version, item(name, version))


def names(changes: Changes) -> tuple[list[str], list[str]]:
    """What was put, and what is gone."""
    return [each.key[1] for each in changes.put], [key[1] for key in changes.gone]


def begin(now: float = 0.0) -> Reflector:
    """One that knows where its resource is."""
    reflector = Reflector(lambda: 0.5, now)
    reflector.discovered(PATH, now)
    return reflector


def watching(*items: Item, now: float = 0.0) -> Reflector:
    """One that has listed these, at resourceVersion 10, and begun to watch."""
    reflector = begin(now)
    assert reflector.next(now) == List("", "Start")
    reflector.listed(Page(items, "10"), now)
    assert isinstance(reflector.next(now), Watch)
    return reflector


def after_delay(reflector: Reflector, now: float) -> tuple[List | Watch, float]:
    """The next question, and when it is asked."""
    step = reflector.next(now)
    if isinstance(step, Wait):
        assert 0 < step.seconds <= LONGEST_DELAY
        now += step.seconds
        step = reflector.next(now)
    assert isinstance(step, List | Watch)
    return step, now


# --- lists ---


def test_nothing_is_asked_before_discovery() -> None:
    """It waits without end until it is told where the resource is, and is not absent as long as nobody looked."""
    reflector = Reflector(lambda: 0.5, 0.0)
    assert reflector.next(0.0) == Wait(math.inf)
    absent = [reflector.absent]
    reflector.discovered("", 1.0)
    absent.append(reflector.absent)
    assert reflector.next(1.0) == Wait(math.inf)
    reflector.discovered(PATH, 2.0)
    assert [*absent, reflector.absent] == [False, True, False]
    assert reflector.next(2.0) == List("", "Start")


def test_pages_then_a_watch_from_their_version() -> None:
    """Each page counts as it comes; it is synced with the last one, and not before."""
    reflector, synced = begin(), []
    assert names(reflector.listed(Page((item("a", "3"),), "10", "more"), 0)) == (["a"], [])
    synced.append(reflector.synced)
    assert reflector.next(0) == List("more", "Start")
    assert names(reflector.listed(Page((item("b", "4"),), "10"), 0)) == (["b"], [])
    assert [*synced, reflector.synced] == [False, True]
    assert reflector.next(0) == Watch("10", round(WATCH * 1.25))


def test_relist_finds_what_was_missed() -> None:
    """New, changed and recreated objects are put, unchanged ones are not, those no page has are gone."""
    reflector = watching(item("same", "1"), item("changed", "2"), item("deleted", "3"), item("recreated", "4"))
    reflector.failed(EXPIRED, 1)
    step, now = after_delay(reflector, 1)
    assert step == List("", "Expired")
    now_there = (item("same", "1"), item("changed", "9"), item("recreated", "8", "other"), item("new", "7"))
    changes = reflector.listed(Page(now_there[:2], "20", "more"), now)
    assert names(changes) == (["changed"], [])
    changes = reflector.listed(Page(now_there[2:], "20"), now)
    assert names(changes) == (["recreated", "new"], ["deleted"])


def test_a_fault_between_pages_repeats_the_page() -> None:
    """An expired token begins anew; what the first attempt saw does not hide a delete of the second."""
    reflector = begin()
    reflector.listed(Page((item("a", "1"), item("b", "2")), "10", "more"), 0)
    reflector.failed(UNREACHABLE, 0)
    step, now = after_delay(reflector, 0)
    assert step == List("more", "Start")
    reflector.failed(EXPIRED, now)
    step, now = after_delay(reflector, now)
    assert step == List("", "Start")
    assert names(reflector.listed(Page((item("b", "2"),), "12"), now)) == ([], ["a"])


# --- watches ---


def test_events_in_order() -> None:
    """Put, put again, gone; a bookmark moves the version alone, and a delete of what is not known is nothing."""
    reflector = watching(item("a", "1"))
    assert names(reflector.happened(event("ADDED", "b", "11"), 1)) == (["b"], [])
    assert names(reflector.happened(event("MODIFIED", "a", "12"), 2)) == (["a"], [])
    assert reflector.happened(event("MODIFIED", "a", "12"), 2) is NOTHING
    assert names(reflector.happened(event("DELETED", "a", "13"), 3)) == ([], ["a"])
    assert reflector.happened(event("DELETED", "a", "14"), 3) is NOTHING
    assert reflector.happened(Event("BOOKMARK", "50"), 4) is NOTHING
    assert reflector.heard_at == 4
    reflector.ended(40)
    assert reflector.next(40) == Watch("50", round(WATCH * 1.25))
    assert list(reflector.known) == [("default", "b")]


def test_broken_connection_goes_on_from_the_last_version() -> None:
    """Soon, for a short watch; nobody is told of a first fault. Once something is heard, watches are long again."""
    reflector = watching()
    reflector.happened(event("ADDED", "a", "11"), 1)
    reflector.failed(UNREACHABLE, 2)
    assert reflector.trouble is None
    step, now = after_delay(reflector, 2)
    assert step == Watch("11", round(PROOF))
    assert now < 3
    reflector.happened(event("ADDED", "b", "12"), now)
    reflector.ended(now + PROOF)
    assert reflector.next(now + PROOF) == Watch("12", round(WATCH * 1.25))


def test_silence_after_a_fault_is_not_believed() -> None:
    """A resourceVersion of the future gets no event and no error: everything is listed, and read, again."""
    reflector = watching(item("a", "1"))
    reflector.failed(UNREACHABLE, 2)
    _, now = after_delay(reflector, 2)
    reflector.ended(now + PROOF)
    assert reflector.next(now + PROOF) == List("", "Silence")
    assert names(reflector.listed(Page((item("a", "1"),), "5"), now)) == (["a"], [])


def test_silence_without_a_fault_is_believed_for_a_while() -> None:
    """An idle resource of a server that sends no bookmarks goes on watching, and is listed once in SILENCE."""
    reflector = watching()
    now, watches = 0.0, 0
    step: Any = Watch("10", round(WATCH * 1.25))
    while isinstance(step, Watch):
        now += step.seconds
        reflector.ended(now)
        assert reflector.trouble is None
        step, watches = reflector.next(now), watches + 1
    assert step == List("", "Silence")
    assert now - SILENCE <= WATCH * 1.5
    assert watches > 2


def test_a_watch_that_ends_early_and_silent_is_a_fault() -> None:
    """Else a server that closes each at once would be asked without pause; some seconds early is in time."""
    reflector = watching()
    reflector.ended(1.0)
    assert isinstance(reflector.next(1.0), Wait)
    reflector = watching()
    reflector.ended(round(WATCH * 1.25) - EARLY)
    assert isinstance(reflector.next(WATCH * 1.25), Watch)


def test_watches_that_end_after_a_line_are_spaced() -> None:
    """They are in order, but begun at most once in SPACING."""
    reflector = watching()
    reflector.happened(Event("BOOKMARK", "11"), 0.1)
    reflector.ended(0.1)
    assert reflector.next(0.1) == Wait(SPACING - 0.1)
    assert isinstance(reflector.next(SPACING), Watch)


def test_watches_that_never_work_end_in_lists() -> None:
    """Where connections are cut again and again, the state is followed by lists, at a growing distance."""
    reflector, now, lists = watching(), 0.0, 0
    times = []
    for _ in range(20):
        reflector.ended(now)
        step, now = after_delay(reflector, now)
        if isinstance(step, List):
            times.append(now)
            lists += 1
            reflector.listed(Page((), "10"), now)
            assert reflector.trouble is not None
            assert isinstance(reflector.next(now), Watch)
    assert lists > 10
    assert times[-1] - times[-2] >= LONGEST_DELAY / 2


# --- refusals ---


def test_delays_grow_and_are_bounded() -> None:
    """Doubling with each fault of the same kind, begun anew with another kind; Retry-After is the least, if sane."""
    reflector, now, delays = watching(), 0.0, []
    for _ in range(60):
        reflector.failed(UNREACHABLE, now)
        step = reflector.next(now)
        assert isinstance(step, Wait)
        delays.append(step.seconds)
        now += step.seconds
    assert delays[0] < 0.5
    assert delays == sorted(delays)
    assert delays[-1] == delays[-2] <= LONGEST_DELAY
    reflector.failed(INITIALIZING, now)
    assert reflector.next(now) == Wait(1.0)
    reflector.failed(Failure("X", "", 503, retry_after=86400), now)
    assert reflector.next(now) == Wait(LONGEST_DELAY)


@pytest.mark.parametrize("failure", [UNREACHABLE, INITIALIZING, FORBIDDEN, Failure("X", "", 503)])
def test_what_is_waited_out_keeps_its_place(failure: Failure) -> None:
    """A list would only meet it too: the watch is tried again from where it was, however often."""
    reflector, now = watching(item("a", "1")), 0.0
    for _ in range(10):
        reflector.failed(failure, now)
        step, now = after_delay(reflector, now)
        assert step == Watch("10", round(PROOF))
    assert reflector.synced
    assert reflector.known


@pytest.mark.parametrize("failure", [Failure("HTTP", "", 500), Failure("Timeout", "")])
def test_what_is_not_is_listed_after_some_attempts(failure: Failure) -> None:
    """An internal error may be the resourceVersion's fault (a bad one is a 500)."""
    reflector, now, steps = watching(), 0.0, []
    for _ in range(REFUSED):
        reflector.failed(failure, now)
        step, now = after_delay(reflector, now)
        steps.append(step)
    assert steps == [Watch("10", round(PROOF))] * (REFUSED - 1) + [List("", "Refused")]


@pytest.mark.parametrize("failure", [EXPIRED, Failure("Protocol", "no event"), Failure("TooLarge", "")])
def test_what_no_event_will_tell_is_listed_at_once(failure: Failure) -> None:
    """Also when the very next list is refused."""
    reflector = watching()
    reflector.failed(failure, 0)
    assert isinstance(after_delay(reflector, 0)[0], List)
    reflector.failed(INITIALIZING, 1)
    assert isinstance(after_delay(reflector, 1)[0], List)


def test_lists_of_a_server_that_always_answers_410_are_spaced() -> None:
    """A list that works between two of them does not make it a new fault each time."""
    reflector, now = watching(), 0.0
    for _ in range(10):
        reflector.failed(EXPIRED, now)
        _, now = after_delay(reflector, now)
        reflector.listed(Page((), "10"), now)
        reflector.next(now)
    assert now > 60


@pytest.mark.parametrize(
    ("failure", "count", "recoveries"),
    [
        (FORBIDDEN, 1, ("list", "event", "end")),
        (UNREACHABLE, 2, ("list", "event", "end")),
        (Failure("NotFound", "", 404), REFUSED + 1, ("list",)),
    ],
)
def test_trouble_is_told_when_it_is_some(failure: Failure, count: int, recoveries: tuple[str, ...]) -> None:
    """At once where only a person can help, else with the second in a row; over when a list or an event comes."""
    for recover in recoveries:
        reflector, now = watching(), 0.0
        for turn in range(count):
            assert (reflector.trouble is None) == (turn < count)
            reflector.failed(failure, now)
            _, now = after_delay(reflector, now)
        assert reflector.trouble == failure
        if recover == "list":
            reflector.discovered(PATH + "2", now)
            reflector.listed(Page((), "10"), now)
        elif recover == "event":
            reflector.happened(Event("BOOKMARK", "11"), now)
        else:
            reflector.ended(now + PROOF)
        assert reflector.trouble is None


# --- resources that come, go and move ---


def test_a_resource_that_is_gone_is_only_gone_when_that_is_certain() -> None:
    """With objects known, it has to be missing for ABSENT_FOR without a break; it is asked for all the while."""
    reflector = watching(item("a", "1"))
    reflector.failed(Failure("NotFound", "404 page not found", 404), 1)
    assert reflector.discovered("", 2) is NOTHING
    assert reflector.discovered("", 2 + ABSENT_FOR - 1) is NOTHING
    reflector.discovered(PATH, 62)  # it was there after all
    assert reflector.discovered("", 63) is NOTHING
    assert isinstance(after_delay(reflector, 63)[0], Watch)
    assert reflector.known
    changes = reflector.discovered("", 63 + ABSENT_FOR)
    assert names(changes) == ([], ["a"])
    assert reflector.absent
    assert not reflector.synced
    assert reflector.next(200) == Wait(math.inf)
    reflector.discovered(PATH, 300)
    assert reflector.next(300) == List("", "Start")


def test_a_resource_without_objects_is_gone_at_once() -> None:
    """There is nothing to lose; what is still on its way changes nothing any more."""
    reflector = watching()
    assert reflector.discovered("", 1) is NOTHING
    assert reflector.absent
    assert reflector.happened(event("ADDED", "a", "11"), 1) is NOTHING
    assert reflector.listed(Page((item("a", "11"),), "11"), 1) is NOTHING
    assert not reflector.known


def test_another_version_is_read_anew() -> None:
    """The same objects through another path are put again and none is gone; a watch under way counts to its end."""
    reflector = watching(item("a", "1"))
    reflector.discovered("/apis/g/v2/things", 1)
    assert names(reflector.happened(event("ADDED", "b", "11"), 1)) == (["b"], [])
    assert reflector.next(1) == List("", "Moved")
    assert names(reflector.listed(Page((item("a", "1"), item("b", "11")), "12"), 1)) == (["a"], [])


# --- any order of everything ---


class World:
    """A server with its objects, events and continue tokens, and a mirror that believes what a reflector says."""

    def __init__(self) -> None:
        self.revision = 10
        self.objects: dict[str, int] = {}
        self.log: list[Event] = []
        self.floor = 10  # watches from before are refused
        self.now = 0.0
        self.reflector = begin()
        self.mirror: dict[Key, str] = {}
        self.watch: Watch | None = None
        self.sent = 0
        self.pages: dict[str, Page] = {}
        self.tokens = itertools.count()

    def write(self, name: str) -> None:
        self.revision += 1
        kind = "MODIFIED" if name in self.objects else "ADDED"
        self.objects[name] = self.revision
        self.log.append(event(kind, name, str(self.revision)))

    def delete(self, name: str) -> None:
        if self.objects.pop(name, None) is not None:
            self.revision += 1
            self.log.append(event("DELETED", name, str(self.revision)))

    def take(self, changes: Changes) -> None:
        for each in changes.put:
            self.mirror[each.key] = each.version
        for key in changes.gone:
            del self.mirror[key]  # an object is never told to be gone twice

    def list(self, token: str, size: int) -> Page | Failure:
        """A snapshot in pages; a token from before the floor is too old."""
        if token:
            return self.pages.pop(token, EXPIRED)
        items = tuple(item(name, str(version)) for name, version in sorted(self.objects.items()))
        pages = [items[at : at + size] for at in range(0, len(items), size)] or [()]
        version, following = str(self.revision), ""
        for page in reversed(pages):
            last = Page(page, version, following)
            following = str(next(self.tokens))
            self.pages[following] = last
        return self.pages.pop(following)

    def step(self, size: int = 2, events: int = 1) -> None:
        """What a server that works answers to the reflector's next question, or sends on its watch."""
        if self.watch is not None:
            start = int(self.watch.version)
            due = [each for each in self.log if int(each.version) > start][self.sent :]
            for each in due[:events]:
                self.take(self.reflector.happened(each, self.now))
                self.sent += 1
            return
        step = self.reflector.next(self.now)
        match step:
            case Wait(seconds):
                assert seconds <= LONGEST_DELAY
                self.now += seconds
            case List(token):
                page = self.list(token, size)
                if isinstance(page, Failure):
                    self.reflector.failed(page, self.now)
                else:
                    self.take(self.reflector.listed(page, self.now))
            case Watch(version):
                if int(version) < self.floor:
                    self.reflector.failed(EXPIRED, self.now)
                else:
                    self.watch, self.sent = step, 0

    def fault(self, failure: Failure | None) -> None:
        """What a broken server does to the question, or to the watch."""
        if self.watch is None and not isinstance(self.reflector.next(self.now), List | Watch):
            return
        self.watch = None
        if failure is None:
            self.reflector.ended(self.now)
        else:
            self.reflector.failed(failure, self.now)

    def restart(self) -> None:
        self.fault(UNREACHABLE)
        self.floor, self.log = self.revision, []
        self.pages.clear()

    def time_out(self) -> None:
        """The watch's time is over, in order; a real server has sent all it had."""
        if self.watch is not None:
            self.step(events=len(self.log))
            self.now += self.watch.seconds
            self.watch = None
            self.reflector.ended(self.now)

    def calm(self) -> None:
        """No fault and no change any more: two watches and some lists later it has to know everything."""
        for _ in range(200):
            self.step(events=len(self.log))
        self.time_out()
        for _ in range(200):
            self.step(events=len(self.log))


FAILURES = (UNREACHABLE, INITIALIZING, EXPIRED, FORBIDDEN, Failure("HTTP", "", 500), Failure("Protocol", ""), None)
OPERATIONS = st.one_of(
    st.tuples(st.just("write"), st.sampled_from("abcde")),
    st.tuples(st.just("delete"), st.sampled_from("abcde")),
    st.tuples(st.just("step"), st.integers(1, 3)),
    st.tuples(st.just("fault"), st.sampled_from(FAILURES)),
    st.tuples(st.just("restart")),
    st.tuples(st.just("time_out")),
)


@settings(max_examples=300)
@given(st.lists(OPERATIONS, max_size=60))
def test_any_order_of_pages_events_and_faults_converges(operations: list[tuple[Any, ...]]) -> None:
    """No lost delete, no lost change, nothing invented; and once synced, it stays so whatever happens."""
    world = World()
    synced = False
    for name, *arguments in operations:
        getattr(world, name)(*arguments)
        synced = synced or world.reflector.synced
        assert world.reflector.synced == synced
        assert world.mirror.keys() == world.reflector.known.keys()
    world.calm()
    assert world.mirror == {("default", name): str(version) for name, version in world.objects.items()}


@pytest.mark.parametrize("steps", range(9))
def test_a_delete_at_any_moment_of_a_list_is_seen(steps: int) -> None:
    """Between any two pages, and with a restart right after it, which takes its event away."""
    world = World()
    for name in "abcde":
        world.write(name)
    for _ in range(steps):
        world.step(size=1)
    world.delete("c")
    world.restart()
    world.calm()
    assert sorted(key[1] for key in world.mirror) == ["a", "b", "d", "e"]
