"""The law of the weights: its reasons one by one, its promises as properties, and a pool it steers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xds.model import Load
from xds.weights import BASE, GRACE, HIGHEST, LOWEST, STALE, STEP, Pool, Sample, WeightChange, weigh

INTERVAL = 2.0
IDLE = Load(start_time=1.8e9)


@dataclass(slots=True)
class Rounds:
    """A pool fed round after round (mutable); `page(key, now)` is what each endpoint's page says then."""

    pool: Pool
    now: float = 0.0
    changes: list[WeightChange] = field(default_factory=list)

    def run(self, page: Mapping[str, Callable[[float], Load | None]], rounds: int) -> dict[str, int]:
        """The weights after so many rounds; `changes` collects what was said on the way."""
        for _ in range(rounds):
            self.now += INTERVAL
            samples = [Sample(key, load(self.now), self.now if load(self.now) else 0.0) for key, load in page.items()]
            self.step(samples)
        return self.weights()

    def step(self, samples: Sequence[Sample]) -> tuple[WeightChange, ...]:
        """One round of these samples at `now`."""
        before = self.weights()
        self.pool, changes = weigh(self.pool, samples, self.now, INTERVAL)
        self.changes += changes
        after = self.weights()
        for key in before.keys() & after.keys():  # the cap, in every round of every test
            assert 0.5 <= after[key] / before[key] <= 1.5
        changed = {key: w for key, w in after.items() if w != before.get(key, BASE)}
        assert {c.endpoint: c.new for c in changes} == changed  # every change is told, and nothing else
        assert all(c.old == before.get(c.endpoint, 0) for c in changes)
        return changes

    def weights(self) -> dict[str, int]:
        return {key: member.weight for key, member in self.pool.members.items()}


def rounds() -> Rounds:
    return Rounds(Pool("pool/ns/qwen"))


def decoding(token_time: float, load: Load = IDLE) -> Callable[[float], Load]:
    """The page of a pod that writes 500 tokens a second, each taking `token_time` seconds."""
    return lambda now: replace(load, token_count=500 * now, token_seconds=500 * now * token_time)


def steady(**fields: float) -> Callable[[float], Load]:
    """The page of a pod whose gauges stay."""
    load = replace(IDLE, **fields)  # type: ignore[arg-type]
    return lambda _: load


def test_equal_pods_have_equal_weights_and_nothing_is_said() -> None:
    """With nothing to tell pods apart, all have the base weight from the first round on."""
    pool = rounds()
    assert pool.run({f"ns/p{n}": decoding(0.02, replace(IDLE, waiting=30, kv_usage=0.99)) for n in range(4)}, 60) == {
        f"ns/p{n}": BASE for n in range(4)
    }
    assert pool.changes == []


# --- reasons ----------------------------------------------------------------------------------------------------------


def test_a_pod_at_half_speed_has_half_the_weight_of_the_others() -> None:
    """Three steps down, in capped moves, for the reason `slow`; the others keep theirs."""
    pool = rounds()
    weights = pool.run({"a": decoding(0.02), "b": decoding(0.02), "c": decoding(0.02), "slow": decoding(0.04)}, 60)
    assert weights == {"a": 100, "b": 100, "c": 100, "slow": 51}
    assert {(c.endpoint, c.reason) for c in pool.changes} == {("slow", "slow")}
    assert pool.changes[-1].speed == pytest.approx(0.5)


def test_a_pod_at_double_speed_has_nearly_double_weight() -> None:
    """The clip is at 2; the grid's next step below is 1.95."""
    pool = rounds()
    weights = pool.run({"a": decoding(0.02), "b": decoding(0.02), "c": decoding(0.02), "fast": decoding(0.005)}, 60)
    assert weights == {"a": 100, "b": 100, "c": 100, "fast": 195}
    assert {c.reason for c in pool.changes} == {"fast"}


def test_a_pod_is_never_taken_for_slower_than_a_quarter() -> None:
    """Beyond the clip the measurement is doubted: a pod at a twentieth of the speed has a quarter of the weight."""
    assert rounds().run({"a": decoding(0.02), "b": decoding(0.02), "slow": decoding(0.4)}, 60)["slow"] == 26


def test_one_pod_alone_is_neither_slow_nor_fast() -> None:
    """Speed is relative: a single pod with tokens to show is not compared with one that has none."""
    assert rounds().run({"a": decoding(0.9), "idle": steady()}, 60) == {"a": 100, "idle": 100}


def test_a_lasting_queue_lowers_a_weight_and_a_burst_does_not() -> None:
    """Waiting beyond the pool's counts once it has lasted several rounds: half a batch of excess, two thirds weight."""
    others = {"a": steady(running=20), "b": steady(running=20)}
    assert rounds().run({**others, "c": steady(running=20, waiting=12)}, 1)["c"] == 100
    pool = rounds()
    assert pool.run({**others, "c": steady(running=20)}, 5)["c"] == 100
    assert pool.run({**others, "c": steady(running=20, waiting=12)}, 2)["c"] == 100
    assert pool.run({**others, "c": steady(running=20)}, 5)["c"] == 100
    assert pool.changes == []
    assert pool.run({**others, "c": steady(running=20, waiting=12)}, 40) == {"a": 100, "b": 100, "c": 64}
    assert {c.reason for c in pool.changes} == {"queue"}
    assert pool.run({**others, "c": steady(running=20)}, 40)["c"] == 100
    assert pool.changes[-1].reason == "equal"


def test_a_pod_near_kv_exhaustion_loses_weight() -> None:
    """KV use counts from 90 % on, relative to the pool, and down to two thirds of the weight."""
    others = {"a": steady(kv_usage=0.4), "b": steady(kv_usage=0.5)}
    assert rounds().run({**others, "c": steady(kv_usage=0.9)}, 60)["c"] == 100
    pool = rounds()
    assert pool.run({**others, "c": steady(kv_usage=1.0)}, 60) == {"a": 100, "b": 100, "c": 64}
    assert {c.reason for c in pool.changes} == {"kv-cache"}


def test_a_new_pod_ramps_up_beside_warm_ones_and_not_in_a_cold_pool() -> None:
    """A pod that joins warm ones begins at a quarter and is equal after a minute; a pool that starts is equal."""
    pool = rounds()
    old = {"a": steady(), "b": steady()}
    assert pool.run(old, 31) == {"a": 100, "b": 100}
    assert pool.changes == []
    assert pool.run({**old, "new": steady()}, 1) == {"a": 100, "b": 100, "new": 26}
    assert (pool.changes[0].old, pool.changes[0].new, pool.changes[0].reason) == (0, 26, "ramp")
    assert pool.run({**old, "new": steady()}, 15)["new"] in (51, 64)
    assert pool.run({**old, "new": steady()}, 15)["new"] == 100
    ramp = [c.new for c in pool.changes]
    assert ramp == sorted(ramp)
    fresh = rounds()
    fresh.run(old, 5)
    assert fresh.run({**old, "new": steady()}, 40)["new"] == 100
    assert fresh.changes == []


@pytest.mark.parametrize(
    "after",
    [Load(start_time=1.8e9 + 500), Load(start_time=0.0)],
    ids=["start time", "counters"],
)
def test_a_restarted_pod_ramps_up_again(after: Load) -> None:
    """A new process has an empty prefix cache: seen by its start time, or by counters that went back."""
    pool = rounds()
    old = {"a": steady(prompt_tokens=9e6), "b": steady(prompt_tokens=9e6)}
    pool.run(old, 40)
    assert pool.run({**old, "b": lambda _: after}, 2) == {"a": 100, "b": 26}
    assert pool.run({**old, "b": lambda _: after}, 40) == {"a": 100, "b": 100}
    alone = rounds()
    alone.run({"b": old["b"]}, 40)
    assert alone.run({"b": lambda _: after}, 2) == {"b": 100}


def test_a_blind_pod_keeps_its_weight_and_then_goes_back_to_equal() -> None:
    """Its old load counts for the grace, moves nobody's median after three intervals, and then stands for nothing."""
    pool = rounds()
    others = {"a": decoding(0.02), "b": decoding(0.02), "c": decoding(0.02)}
    pool.run({**others, "slow": decoding(0.04)}, 60)
    last = pool.pool.members["slow"]
    seen, spoken = pool.now, len(pool.changes)
    while pool.now + INTERVAL <= seen + STALE * INTERVAL + GRACE:
        pool.now += INTERVAL
        fresh = [Sample(key, load(pool.now), pool.now) for key, load in others.items()]
        assert pool.step([*fresh, Sample("slow", last.load, last.read_at)]) == ()
    pool.now += INTERVAL
    (change,) = pool.step([Sample("a"), Sample("b"), Sample("slow", last.load, last.read_at)])
    assert (change.endpoint, change.old, change.new, change.reason) == ("slow", 51, 64, "blind")
    for _ in range(5):
        pool.now += INTERVAL
        pool.step([Sample("a"), Sample("b"), Sample("slow", last.load, last.read_at)])
    assert pool.weights() == {"a": 100, "b": 100, "slow": 100}
    assert len(pool.changes) == spoken + 3


def test_a_blind_pod_moves_nobody_else() -> None:
    """What was last read of it is no longer part of the medians: the pods that are seen are equal among themselves."""
    pool = rounds()
    seen = {"a": decoding(0.02), "b": decoding(0.02)}
    weights = pool.run({**seen, "c": decoding(0.04), "d": decoding(0.04)}, 60)
    assert weights["a"] > weights["c"]
    lost = [Sample(key, pool.pool.members[key].load, pool.now) for key in "cd"]
    for _ in range(STALE + 3):
        pool.now += INTERVAL
        pool.step([*(Sample(key, page(pool.now), pool.now) for key, page in seen.items()), *lost])
    assert pool.weights() == {**weights, "a": 100, "b": 100}


def test_a_pool_nobody_can_read_is_equal() -> None:
    """Never a page: equal weights, no change, however long."""
    pool = rounds()
    assert pool.run({key: lambda _: None for key in "abc"}, 100) == dict.fromkeys("abc", 100)
    assert pool.changes == []


def test_a_draining_pod_keeps_its_weight_and_counts_for_nothing() -> None:
    """Neither its own load nor the others' moves it, nor is it part of the median that moves them."""
    pool = rounds()
    pages = {"a": decoding(0.02), "b": decoding(0.02), "c": decoding(0.04), "d": decoding(0.04)}
    before = pool.run(pages, 60)
    for _ in range(60):
        pool.now += INTERVAL
        full = {key: replace(pages[key](pool.now), waiting=500.0, kv_usage=1.0) for key in "ab"}
        draining = [Sample(key, load, pool.now, draining=True) for key, load in full.items()]
        pool.step([*draining, *(Sample(key, pages[key](pool.now), pool.now) for key in "cd")])
    assert pool.weights() == {**before, "c": 100, "d": 100}


def test_a_pod_that_left_is_forgotten() -> None:
    """The state holds exactly the endpoints of the last round."""
    pool = rounds()
    pool.run({"a": steady(), "b": steady()}, 3)
    pool.run({"b": steady(), "c": steady()}, 1)
    assert list(pool.pool.members) == ["b", "c"]


def test_the_prefill_rate_is_kept_for_the_picker() -> None:
    """Tokens a second of prefill, 0 until a page shows any."""
    pool = rounds()
    pool.run({"a": lambda now: replace(IDLE, prefill_tokens=800 * now, prefill_seconds=0.1 * now), "b": steady()}, 10)
    assert pool.pool.members["a"].prefill_rate == pytest.approx(8000)
    assert pool.pool.members["b"].prefill_rate == 0


# --- promises ---------------------------------------------------------------------------------------------------------

loads = st.builds(
    Load,
    running=st.floats(0, 500),
    waiting=st.floats(0, 5000),
    kv_usage=st.floats(0, 1),
    start_time=st.sampled_from([0.0, 1.8e9, 1.9e9]),
    token_count=st.floats(0, 2.0**53),
    token_seconds=st.floats(0, 2.0**53),
    prefill_tokens=st.floats(0, 2.0**53),
    prefill_seconds=st.floats(0, 2.0**53),
    prompt_tokens=st.floats(0, 2.0**53),
)
keys = st.sampled_from(["a", "b", "c", "d", "e"])
round_of = st.dictionaries(keys, st.tuples(st.none() | loads, st.floats(0, 60), st.booleans()), max_size=5)
histories = st.lists(st.tuples(st.floats(0.01, 90), round_of), max_size=12)


def play(history: list[tuple[float, dict[str, tuple[Load | None, float, bool]]]], order: int = 1) -> Rounds:
    pool = rounds()
    for seconds, endpoints in history:
        pool.now += seconds
        pool.step([Sample(k, load, pool.now - age, d) for k, (load, age, d) in list(endpoints.items())[::order]])
        weights = pool.weights()
        assert all(isinstance(w, int) and w >= 1 and 10 * w >= max(weights.values()) for w in weights.values())
    return pool


@settings(max_examples=200)
@given(histories)
def test_whatever_the_pages_say_the_floor_and_the_cap_hold(
    history: list[tuple[float, dict[str, tuple[Load | None, float, bool]]]],
) -> None:
    """No weight is 0 or below a tenth of the largest, no move is larger than the cap, whatever is read, lost, restarted
    or drained; and the order of the endpoints does not matter."""
    forth, back = play(history), play(history, order=-1)
    assert (forth.pool, forth.changes) == (back.pool, back.changes)


def test_the_grid_itself_keeps_the_floor() -> None:
    """The lowest weight is a tenth of the highest or more, by construction."""
    assert round(BASE * STEP**LOWEST) * 10 >= round(BASE * STEP**HIGHEST)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["waiting", "kv_usage", "token_time"]),
    st.lists(st.floats(0.01, 1), min_size=2, max_size=6, unique=True),
)
def test_a_worse_pod_never_weighs_more(reason: str, badness: list[float]) -> None:
    """Under each reason alone, in every round, the order of weights is the reverse of the order of badness."""
    badness.sort()
    page: dict[str, Callable[[float], Load]] = {}
    for n, bad in enumerate(badness):
        page[str(n)] = (
            decoding(bad) if reason == "token_time" else steady(**{reason: bad * (100 if reason == "waiting" else 1)})
        )
    pool = rounds()
    for _ in range(30):
        weights = list(pool.run(page, 1).values())
        assert weights == sorted(weights, reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_10_percent_does_not_flap(seed: int) -> None:
    """Over 200 rounds in which everything of eight pods is noisy, and one is slow, hardly a weight moves: the slow pod
    finds its level within the first minutes and all rest from then on."""
    noise = random.Random(seed)
    totals = {f"p{n}": [0.0, 0.0] for n in range(8)}

    def page(key: str, token_time: float) -> Load:
        tokens = 1000 * noise.uniform(0.9, 1.1)
        totals[key][0] += tokens
        totals[key][1] += tokens * token_time * noise.uniform(0.9, 1.1)
        return Load(
            running=40 * noise.uniform(0.9, 1.1),
            waiting=10 * noise.uniform(0.9, 1.1),
            kv_usage=min(1.0, 0.95 * noise.uniform(0.9, 1.1)),
            token_count=totals[key][0],
            token_seconds=totals[key][1],
        )

    pool = rounds()
    for turn in range(200):
        pool.now += INTERVAL
        changes = pool.step([Sample(k, page(k, 0.034 if k == "p0" else 0.02), pool.now) for k in totals])
        assert turn < 60 or not changes
    assert len(pool.changes) <= 3
    assert {k: w for k, w in pool.weights().items() if w != 100} == {"p0": pool.weights()["p0"]}
    assert pool.weights()["p0"] in (51, 64)


@pytest.mark.parametrize(
    ("bad", "moves"),
    [({"kv_usage": 0.91}, 8), ({"kv_usage": 0.95}, 8), ({"waiting": 20.0}, 3), ({"waiting": 60.0}, 5), ({}, 0)],
)
@pytest.mark.parametrize("crowd", [{"waiting": 10.0}, {"waiting": 200.0, "kv_usage": 0.95}], ids=["calm", "crowded"])
@pytest.mark.parametrize("seed", range(3))
def test_noise_at_the_border_of_a_reason_moves_a_weight_seldom(
    bad: dict[str, float], moves: int, crowd: dict[str, float], seed: int
) -> None:
    """A pod just past a reason's border moves a few times in 200 noisy rounds, and the others of its pool never."""
    noise = random.Random(seed)
    even = {"running": 40.0, "waiting": 0.0, "kv_usage": 0.5} | crowd
    pool = rounds()
    for _ in range(200):
        pool.now += INTERVAL
        samples = []
        for key in "abcdefgh":
            gauges = {k: v * noise.uniform(0.9, 1.1) for k, v in (even | (bad if key == "a" else {})).items()}
            load = Load(gauges["running"], gauges["waiting"], min(1.0, gauges["kv_usage"]))
            samples.append(Sample(key, load, pool.now))
        pool.step(samples)
    assert {c.endpoint for c in pool.changes} <= {"a"}
    assert len(pool.changes) <= moves


# --- closed loop ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Pod:
    """A pod in a fluid model (mutable): a batch of at most `batch` requests, the rest waits."""

    speed: float = 1.0
    batch: float = 64.0
    requests: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0

    def run(self, arrivals: float, seconds: float) -> None:
        """Requests take 200 tokens; a token takes 20 ms alone and half as much again in a full batch."""
        running = min(self.requests, self.batch)
        token_time = 0.02 * (1 + running / 128) / self.speed
        tokens = running * seconds / token_time
        self.requests = max(0.0, self.requests + arrivals - tokens / 200)
        self.tokens += tokens
        self.seconds += tokens * token_time

    def page(self) -> Load:
        running = min(self.requests, self.batch)
        return Load(
            running=running,
            waiting=self.requests - running,
            kv_usage=min(1.0, self.requests / 70),
            token_count=self.tokens,
            token_seconds=self.seconds,
        )


def steer(pods: dict[str, Pod], arrivals: float, turns: int) -> list[dict[str, int]]:
    """The weights of each round of a pool whose requests are sent in the proportion of its weights."""
    pool, history = rounds(), []
    for _ in range(turns):
        pool.now += INTERVAL
        weights = pool.weights() or dict.fromkeys(pods, BASE)
        for key, pod in pods.items():
            pod.run(arrivals * INTERVAL * weights[key] / sum(weights.values()), INTERVAL)
        pool.step([Sample(key, pod.page(), pool.now) for key, pod in pods.items()])
        history.append(pool.weights())
    return history


@pytest.mark.parametrize("load", [0.3, 0.6, 0.85])
def test_a_pool_with_a_pod_at_half_speed_comes_to_rest(load: float) -> None:
    """The loop through the pod's own queue and batch converges: after five minutes nothing moves any more, the slow pod
    has clearly less than the others, and nothing is left waiting anywhere."""
    pods = {"a": Pod(), "b": Pod(), "c": Pod(), "slow": Pod(speed=0.5)}
    capacity = 3.5 * 64 / (0.02 * 1.5 * 200)  # requests a second with every batch full
    history = steer(pods, load * capacity, 300)
    assert history[150:] == [history[-1]] * 150
    assert [history[-1][key] for key in "abc"] == [100, 100, 100]
    assert 41 <= history[-1]["slow"] <= 64
    assert all(pod.requests <= 64 for pod in pods.values())


def test_a_pool_with_a_pod_of_half_the_batch_comes_to_rest() -> None:
    """A pod that is short of room and not of speed is found by its queue: its weight comes to rest between two
    neighbouring levels, its queue stays bounded, and the others keep theirs."""
    pods = {"a": Pod(), "b": Pod(), "c": Pod(), "small": Pod(batch=24)}
    history = steer(pods, 0.8 * 3.4 * 64 / (0.02 * 1.5 * 200), 600)
    late = [weights["small"] for weights in history[300:]]
    assert len(set(late)) <= 2
    assert max(late) < 100
    assert sum(a != b for a, b in pairwise(late)) <= 12
    assert all(weights[key] == 100 for weights in history for key in "abc")
    assert pods["small"].requests < 64
