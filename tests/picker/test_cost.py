"""picker/cost.py: where a prompt is cheapest."""

from collections import Counter
from dataclasses import replace
from math import exp, log
from random import Random
from typing import Any

import mmh3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.cost import (
    ADAPTER_FULL,
    ADAPTER_LOAD,
    ADAPTER_WAITS,
    CN,
    DEFAULT_COSTS,
    DOUBT,
    LEAK,
    MAX_ADAPTERS,
    PREFILL_RATE,
    STALE,
    UNKNOWN_CHUNKS,
    USUAL,
    USUAL_SHARE,
    Costs,
    PodLoad,
    Pool,
    PoolLoad,
)
from picker.memory import Memory, keys

MANY = 1 << 20  # chunks: no bound in these tests
SESSION = b"session."  # a hint's hash
POD = PodLoad("a", kv_tokens=500_000, prefill_rate=10_000.0, start_time=1.0)


def path(name: str, chunks: int) -> list[bytes]:
    """Chained hashes of a prompt of `chunks` chunks."""
    return [mmh3.mmh3_x64_128_digest(f"{name}-{i}".encode())[:8] for i in range(chunks)]


def pool(*pods: PodLoad, pickers: int = 1, now: float = 0.0) -> Pool:
    """A pool with one report, read at `now`."""
    made = Pool(Random(1).random, pickers)
    made.update(PoolLoad("p", pods), MANY, now)
    return made


def pods(names: str, **fields: Any) -> list[PodLoad]:
    return [replace(POD, hash_key=name, **fields) for name in names]


def send(to: Pool, hashes: list[bytes], now: float = 0.0, *, tokens: int = 0, primary: str | None = None) -> str | None:
    return to.pick(hashes, tokens or 512 * len(hashes) + 100, None, primary, now)


def test_the_pod_that_has_seen_the_prefix_wins() -> None:
    """Among equal idle pods a conversation stays where it began, and another may begin elsewhere."""
    fleet = pool(*pods("abcd"))
    first = send(fleet, path("x", 10), 0.0)
    fleet.update(PoolLoad("p", tuple(pods("abcd"))), MANY, 2.0)
    assert send(fleet, path("x", 12), 2.0) == first


def test_an_overloaded_owner_loses() -> None:
    """A prefix is worth its tokens: with enough running on the owner another pod is cheaper, with fewer it is not."""
    for running, stays in ((1.0, True), (200.0, False)):
        fleet = pool(*pods("ab"))
        owner = send(fleet, path("x", 10), 0.0)
        loads = tuple(replace(pod, running=running if pod.hash_key == owner else 0.0) for pod in pods("ab"))
        fleet.update(PoolLoad("p", loads), MANY, 2.0)
        assert (send(fleet, path("x", 10), 2.0) == owner) is stays


@pytest.mark.parametrize(
    ("other", "cheaper"),
    [
        # what a has: 1 running, a prompt of 1,000 tokens -> C = 1000 * 1.15 + 100 = 1,250
        ({"running": 1.0}, None),  # a tie
        ({"waiting": 1.0}, "a"),  # counts as running does, and has to be prefilled first
        ({"running": 2.0}, "a"),
        ({"running": 0.0}, "b"),
        ({"running": 0.0, "kv_usage": 0.95, "kv_tokens": 10_000}, "a"),  # all beyond: 1000 + 2 * 1200 = 3,400
        ({"running": 0.0, "kv_usage": 0.80, "kv_tokens": 10_000}, "b"),  # 8000 + 1200 fits into 9,500
        ({"running": 0.0, "kv_usage": 0.82, "kv_tokens": 10_000}, "b"),  # 8200 + 1200 fits just so
        ({"running": 0.0, "kv_usage": 0.86, "kv_tokens": 10_000}, "a"),  # 300 beyond: 1000 + 2 * 300 = 1,600
        ({"running": 0.0, "kv_usage": 0.838, "kv_tokens": 10_000}, "b"),  # 80 beyond: 1,160
        ({"running": 0.0, "kv_usage": 1.0, "kv_tokens": 0}, "b"),  # capacity unknown: no penalty
    ],
)
def test_the_formula(other: dict[str, Any], cheaper: str | None) -> None:
    """C in round numbers, each term on its own; a tie is broken at random."""
    picks = set()
    for seed in range(20):
        made = Pool(Random(seed).random)
        fields = {"waiting": 0.0, "running": 0.0} | other
        made.update(PoolLoad("p", (replace(POD, running=1.0), replace(POD, hash_key="b", **fields))), MANY, 0.0)
        picks.add(made.pick([], 1000, None, None, 0.0))
    assert picks == ({cheaper} if cheaper else {"a", "b"})


def test_a_pick_is_a_load_at_once() -> None:
    """Before any new report the next request sees the last one's tokens (B) and its place in the batch (n)."""
    fleet = pool(*pods("abcd"))
    assert Counter(send(fleet, [], tokens=1000) for _ in range(40)) == Counter(dict.fromkeys("abcd", 10))


def test_a_pick_fills_the_cache_at_once() -> None:
    """The tokens of a pick count against the pod's KV cache before the next report."""
    fleet = pool(
        *(replace(POD, hash_key=name, kv_usage=0.8, kv_tokens=10_000, running=n) for name, n in (("a", 0), ("b", 5)))
    )
    # b costs 1000 * 1.75 + 500 = 2,250; a 1,000 at first, then 1000 + 1150 + 100, and 2 * 900 beyond its cache
    assert [send(fleet, [], tokens=1000) for _ in range(2)] == ["a", "b"]


def test_the_backlog_leaks_at_the_prefill_rate() -> None:
    """B is gone after tokens / (LEAK * rate) seconds, and not before. The rate is at least the one that is set."""
    for rate, used in ((0.0, PREFILL_RATE), (2000.0, PREFILL_RATE), (16_000.0, 16_000.0)):
        gone = 10_000 / (LEAK * used)
        for after, expected in ((gone * 0.9, "b"), (gone * 1.01, "a")):
            loads = (replace(POD, prefill_rate=rate), replace(POD, hash_key="b", prefill_rate=rate, running=10.0))
            fleet = pool(*loads)
            assert fleet.pick([], 10_000, None, None, 0.0) == "a"
            fleet.update(PoolLoad("p", (loads[0], replace(loads[1], running=1.0))), MANY, after)
            assert fleet.pick([], 1, None, None, after) == expected


RATE = LEAK * POD.prefill_rate  # tokens/s


@pytest.mark.parametrize(
    ("after", "left"),
    [
        (0.0, 100_000.0),
        (DOUBT, 100_000.0 * exp(-1.0)),
        (DOUBT * log(100_000.0 / RATE / DOUBT), DOUBT * RATE),
        (DOUBT * log(100_000.0 / RATE / DOUBT) + 1.0, (DOUBT - 1.0) * RATE),
    ],
)
def test_a_long_backlog_is_doubted(after: float, left: float) -> None:
    """All of it counts at once; what is beyond DOUBT seconds' worth is forgotten by its size, the rest at the rate."""
    for share, picked in ((0.999, "b"), (1.001, "a")):
        fleet = pool(POD, replace(POD, hash_key="b", running=1e6))
        assert fleet.pick([], 100_000, 0, None, 0.0) == "a"
        fleet.update(PoolLoad("p", (POD, replace(POD, hash_key="b", running=left * share / CN))), MANY, after)
        assert fleet.pick([], 0, 0, None, after) == picked


@pytest.mark.parametrize(
    ("picks", "usual"), [(0, USUAL), (1, USUAL + USUAL_SHARE * (5000 - USUAL)), (1000, pytest.approx(5000))]
)
def test_what_waits_has_to_be_prefilled_first(picks: int, usual: Any) -> None:
    """Each request that waits counts as a usual one: the mean of the last picks' tokens, before any USUAL."""
    for share, picked in ((0.995, "b"), (1.005, "a")):
        fleet = pool(POD)
        for _ in range(picks):
            fleet.pick([], 5000, 0, None, 0.0)
        assert fleet._usual == usual
        others = 2 * fleet._usual + 2 * CN
        loads = (replace(POD, waiting=2.0), replace(POD, hash_key="b", running=others * share / CN))
        fleet.update(PoolLoad("p", loads), MANY, 100.0)
        assert fleet.pick([], 0, 0, None, 100.0) == picked


def test_a_new_pod_is_not_flooded() -> None:
    """However much more than their rate others were sent over an hour, one that joins gets a share like theirs."""
    fleet = pool(*pods("abc", prefill_rate=0.0))
    fleet.costs = Costs(prefill_rate=500.0)
    now = 0.0
    for _ in range(1800):
        now += 2.0
        fleet.update(PoolLoad("p", tuple(pods("abc", running=2.0, prefill_rate=0.0))), MANY, now)
        for _ in range(3):
            fleet.pick([], 5000, None, None, now)
    fleet.update(PoolLoad("p", tuple(pods("abcd", running=2.0, prefill_rate=0.0))), MANY, now)
    picks = Counter(fleet.pick([], 5000, None, None, now + i / 10) for i in range(20))
    assert 5 <= picks["d"] <= 10


def test_sends_the_report_does_not_know_are_kept() -> None:
    """A page read before a request was sent cannot show it; one read after it does, and it is not counted twice."""
    for age, first in ((1.5, "b"), (0.5, "a")):
        fleet = pool(POD, replace(POD, hash_key="b", running=1.0))
        assert fleet.pick([], 100, None, None, 1.0) == "a"
        fleet.update(
            PoolLoad("p", (replace(POD, age=age), replace(POD, hash_key="b", running=0.5, age=age))), MANY, 2.0
        )
        assert fleet.pick([], 100, None, None, 2.0) == first


def test_with_several_pickers_own_sends_count_for_all() -> None:
    """E pickers are taken to send what this one sends: after one send the pod is E requests fuller."""
    for pickers, second in ((1, "a"), (4, "b")):
        fleet = pool(POD, replace(POD, hash_key="b", running=2.0), pickers=pickers)
        picked = [fleet.pick([], 1, None, None, now) for now in (0.0, 1.0)]
        assert picked == ["a", second]


def test_the_primary_is_preferred_not_obeyed() -> None:
    """PRIOR waives four fifths of the tokens among several pickers: new prefixes start on their primary."""
    for running, picked in ((2.0, "a"), (30.0, "b")):
        fleet = pool(replace(POD, running=running), replace(POD, hash_key="b"), pickers=3)
        assert send(fleet, [], tokens=1000, primary="a") == picked


def test_one_picker_needs_no_primary() -> None:
    """Alone it knows where everything is: the primary is as good as any other."""
    picks = {Pool(Random(seed).random) for seed in range(20)}
    for made in picks:
        made.update(PoolLoad("p", tuple(pods("abcd"))), MANY, 0.0)
    assert {send(made, path("x", 4), primary="c") for made in picks} == set("abcd")


def test_a_removed_pod_is_never_picked() -> None:
    """Not even by its own conversation; coming back it has seen nothing."""
    fleet = pool(*pods("ab"))
    owner = send(fleet, path("x", 10)) or ""
    other = "b" if owner == "a" else "a"
    fleet.update(PoolLoad("p", tuple(pods(other))), MANY, 1.0)
    assert {send(fleet, path("x", 10), 1.0) for _ in range(20)} == {other}
    fleet.update(PoolLoad("p", tuple(pods("ab"))), MANY, 100.0)
    assert fleet.chunks == 10
    assert send(fleet, path("x", 10), 100.0) == other


@pytest.mark.parametrize("change", [{"start_time": 2.0}, {"address": "10.0.0.9:8000"}])
def test_a_restart_forgets(change: dict[str, Any]) -> None:
    """A new start time, or a new address under the old name, is an empty cache and an empty queue."""
    pod = replace(POD, age=1.0)  # read before what is sent below
    fleet = pool(pod)
    send(fleet, path("x", 10))
    fleet.update(PoolLoad("p", (replace(pod, start_time=0.0),)), MANY, 0.0)
    assert fleet.chunks == 10  # a page without a start time says nothing
    fleet.update(PoolLoad("p", (pod,)), MANY, 0.0)
    assert fleet.chunks == 10
    fleet.update(PoolLoad("p", (replace(pod, **change), replace(pod, hash_key="b", running=0.1))), MANY, 0.0)
    assert fleet.chunks == 0
    assert send(fleet, path("x", 10)) == "a"  # no backlog, no sends: cheaper than b


@pytest.mark.parametrize(
    ("loads", "saturated"),
    [
        ([(5.0, 0.0)], True),
        ([(4.9, 0.79)], False),
        ([(0.0, 0.8)], True),
        ([(0.0, 0.8), (5.0, 0.1)], True),  # the larger of the two, each
        ([(10.0, 0.0), (0.0, 0.0)], True),  # the average: 2 and 0
        ([(9.0, 0.0), (0.0, 0.0)], False),
        ([(0.0, 1.0)] * 3 + [(0.0, 0.2)], True),  # 3 * 1.25 + 0.25 of 4
        ([(0.0, 1.0)] * 3 + [(0.0, 0.1)], False),
        ([], False),
    ],
)
def test_a_saturated_pool(loads: list[tuple[float, float]], saturated: bool) -> None:
    """The average over the pods of max(waiting / 5, KV use / 0.8), from 1 on."""
    fleet = pool(*(replace(POD, hash_key=str(i), waiting=w, kv_usage=kv) for i, (w, kv) in enumerate(loads)))
    assert fleet.saturated(5.0, 0.8, 0.0) is saturated


def test_what_is_not_known_saturates_no_pool() -> None:
    """A pod without a fresh report counts as idle: with all of them stale, or never read, nobody is refused."""
    full = [replace(POD, hash_key=name, waiting=50.0) for name in "abc"]
    assert pool(*full).saturated(5.0, 0.8, STALE)
    assert not pool(*full).saturated(5.0, 0.8, STALE + 0.1)
    assert not pool(*(replace(pod, age=-1.0) for pod in full)).saturated(5.0, 0.8, 0.0)
    half = [replace(full[0], waiting=9.0), replace(full[1], age=STALE + 1)]
    assert not pool(*half).saturated(5.0, 0.8, 0.0)  # 1.8 and unknown: 0.9
    assert pool(replace(half[0], waiting=10.0), half[1]).saturated(5.0, 0.8, 0.0)


def test_no_fresh_report_no_pick() -> None:
    """Older than STALE, never read, or no pods at all: the caller falls back."""
    assert send(pool(POD), [], STALE) == "a"
    assert send(pool(POD), [], STALE + 0.1) is None
    assert send(pool(replace(POD, age=STALE + 1)), [], 0.0) is None
    assert send(pool(replace(POD, age=-1.0)), [], 0.0) is None
    assert send(pool(), [], 0.0) is None
    assert pool().read_at == float("-inf")
    assert pool(replace(POD, age=3.0), replace(POD, hash_key="b", age=2.0), now=10.0).read_at == 8.0


def test_a_blind_pod_takes_a_mean_share() -> None:
    """One pod's unreadable page neither starves nor floods it."""
    busy = [replace(pod, running=20.0) for pod in pods("abc")]
    fleet = pool(*busy, replace(POD, hash_key="d", age=-1.0))
    picks = Counter(send(fleet, [], tokens=500) for _ in range(20))
    assert 3 <= picks["d"] <= 7


def test_a_blind_pod_is_taken_to_have_a_mean_queue() -> None:
    """It costs what the only other pod costs, where requests wait: either is picked, and not always the blind one."""
    loads = PoolLoad("p", (replace(POD, waiting=2.0), replace(POD, hash_key="b", age=-1.0)))
    picks = set()
    for seed in range(20):
        made = Pool(Random(seed).random)
        made.update(loads, MANY, 0.0)
        picks.add(made.pick([], 100, None, None, 0.0))
    assert picks == {"a", "b"}


def test_what_a_pod_has_seen_is_bounded_by_its_cache() -> None:
    """The KV capacity over the chunk's tokens; a default when unknown; and the caller's bound."""
    for kv_tokens, bound, held in ((51_200, MANY, 100), (0, MANY, UNKNOWN_CHUNKS), (1 << 62, 50, 50)):
        fleet = pool(replace(POD, kv_tokens=kv_tokens))
        fleet.update(PoolLoad("p", (replace(POD, kv_tokens=kv_tokens),)), bound, 0.0)
        for i in range(20):
            send(fleet, path(f"{i}-", 64))
        assert fleet.chunks == held


def test_a_short_answer_needs_less_room() -> None:
    """max_tokens below the usual answer is believed, above it is not."""
    for max_tokens, picked in ((1, "a"), (100_000, "b"), (None, "b")):
        nearly_full = replace(POD, kv_usage=0.95, kv_tokens=100_000)  # each token beyond this one costs 2
        fleet = pool(nearly_full, replace(POD, hash_key="b", running=2.0))
        assert fleet.pick([], 10, max_tokens, None, 0.0) == picked


def adapted(names: str = "ab", **fields: Any) -> list[PodLoad]:
    """Pods for two adapters at a time, on which nothing runs."""
    return pods(names, max_lora=2, **fields)


@pytest.mark.parametrize(
    ("load", "cost"),
    [
        ({"running_adapters": ("x",)}, 0.0),
        ({"running_adapters": ("x", "y")}, 0.0),
        ({}, ADAPTER_LOAD),
        ({"running_adapters": ("y",)}, ADAPTER_LOAD),
        ({"max_lora": 0}, ADAPTER_LOAD),  # its page says nothing of adapters
        ({"waiting_adapters": ("x",)}, ADAPTER_WAITS),
        ({"running_adapters": ("y", "z"), "waiting_adapters": ("x",)}, ADAPTER_WAITS),
        ({"running_adapters": ("y", "z")}, ADAPTER_FULL),
    ],
)
def test_what_an_adapter_costs(load: dict[str, Any], cost: float) -> None:
    """Loaded, room, waited for, full: A of each, against a pod that holds it and is busier by just more or less."""
    assert 0 < ADAPTER_LOAD < ADAPTER_WAITS < ADAPTER_FULL
    pod = replace(*adapted("a"), **load)
    for tokens, picked in ((cost + 1, "a"), (cost - 1, "b")):
        busier = replace(*adapted("b"), running=1.0 + tokens / CN, running_adapters=("x",))
        assert pool(replace(pod, running=1.0), busier).pick([], 0, None, None, 0.0, None, "x") == picked


def test_a_model_nobody_reports_as_an_adapter_is_none() -> None:
    """The base model costs the same wherever it is asked for; so does the first request for an adapter."""
    loads = (*adapted("a", running=1.0), *adapted("b", running_adapters=("y", "z")))
    for model in ("base", "x", ""):
        assert pool(*loads).pick([], 0, None, None, 0.0, None, model) == "b"
    loads = (loads[0], replace(loads[1], waiting_adapters=("y", "x")))
    assert pool(*loads).pick([], 0, None, None, 0.0, None, "x") == "a"


def test_a_burst_that_no_page_shows_counts() -> None:
    """Requests that Envoys have in flight to a pod, and what was sent there since they said so, are there although its
    page is older and shows none; without such reports the page is all there is."""
    idle, busy = PodLoad("a", running=3.0), PodLoad("b", in_flight=9)
    for age, picked in ((None, "b"), (0.5, "a")):
        fleet = pool()
        fleet.update(PoolLoad("p", (idle, busy), age), MANY, 0.0)
        assert fleet.pick([], 0, None, None, 0.0) == picked


def test_in_flight_is_what_is_fresher() -> None:
    """What was sent before the Envoys' report is in it, what was sent since comes on top; a page with more counts."""
    fleet = pool(PodLoad("a"))
    pod = fleet._pods["a"]
    for now in (1.0, 2.0, 3.0):
        assert fleet.pick([], 0, None, None, now) == "a"

    def busyness(in_flight: int, age: float | None, running: float = 0.0) -> float:
        load = PodLoad("a", age=4.0, running=running, in_flight=in_flight)
        fleet.update(PoolLoad("p", (load,), age), MANY, 4.0)
        return pod.busyness(1)[0]

    assert busyness(0, None) == 3  # sent since the page
    assert busyness(7, 1.5) == 8  # one of them since the report
    assert busyness(7, 0.0) == 7
    assert busyness(1, 0.5) == 3  # an Envoy that does not report has some too
    assert busyness(7, 1.5, running=10.0) == 13


def test_a_pod_holds_the_adapters_it_was_sent_last() -> None:
    """Also those that no report shows running: as many as it has places, and none after a restart."""
    loads = tuple(adapted(waiting_adapters=("x", "y", "z")))
    fleet = pool(*loads)
    fleet.update(PoolLoad("p", tuple(adapted())), MANY, 0.0)
    pod = fleet._pods[fleet.pick([], 0, None, None, 0.0, None, "x") or ""]
    assert pod.adapter_cost("x") == 0.0
    for adapter, held in (("y", "xy"), ("x", "xy"), ("z", "xz")):
        pod.send([], adapter, 0.0, 0.0, 0.0, DEFAULT_COSTS)
        assert [name for name in "xyz" if not pod.adapter_cost(name)] == list(held)
    pod.report(replace(pod.load, running_adapters=("y",)), MANY, 1.0)
    assert [name for name in "xyz" if not pod.adapter_cost(name)] == ["y", "z"]
    pod.report(replace(pod.load, start_time=9.0, running_adapters=()), MANY, 1.0)
    assert [name for name in "xyz" if not pod.adapter_cost(name)] == []


def test_adapters_known_are_bounded() -> None:
    """However many names pods make up."""
    fleet = pool()
    for i in range(0, 2 * MAX_ADAPTERS, 512):
        names = tuple(str(n) for n in range(i, i + 512))
        fleet.update(PoolLoad("p", (PodLoad("a", running_adapters=names),)), MANY, 0.0)
    assert len(fleet._adapters) == MAX_ADAPTERS


@pytest.mark.parametrize(
    ("costs", "picked"),
    [
        (Costs(), "b"),  # 1000 * 1.15 + 100 against 1000
        (Costs(request_cost=0.0), "b"),
        (Costs(output_tokens=2000.0), "a"),  # 1000 beyond b's cache, at 2 each
        (Costs(prefill_rate=1e6), "b"),
    ],
)
def test_what_an_operator_sets_counts(costs: Costs, picked: str) -> None:
    """The usual answer's length decides whether it fits; the other two on their own below."""
    fleet = pool(replace(POD, running=1.0), replace(POD, hash_key="b", kv_usage=0.8, kv_tokens=10_000))
    fleet.costs = costs
    assert fleet.pick([], 1000, None, None, 0.0) == picked


def test_the_cost_of_a_running_request_can_be_set() -> None:
    """At 0 an empty prompt costs as much where more run, as it does nowhere else."""
    for cost, model, picked in ((0.0, "x", "a"), (CN, "x", "b"), (0.0, "y", "b")):
        fleet = pool(*adapted("a", running=5.0, running_adapters=("x",)), *adapted("b", running_adapters=("y",)))
        fleet.costs = Costs(request_cost=cost)
        assert fleet.pick([], 0, None, None, 0.0, None, model) == picked


def test_the_least_prefill_rate_can_be_set() -> None:
    """A backlog leaks at LEAK of it, or of the pod's own rate where that is more."""
    for rate, least, picked in ((0.0, 50_000, "a"), (1000.0, 50_000, "a"), (50_000.0, 1000, "a"), (1000.0, 1000, "b")):
        fleet = pool(replace(POD, prefill_rate=rate), replace(POD, hash_key="b", running=1.0))
        fleet.costs = Costs(prefill_rate=least)
        assert fleet.pick([], 7000, None, None, 0.0) == "a"
        fleet.update(
            PoolLoad("p", (replace(POD, prefill_rate=rate), replace(POD, hash_key="b", running=1.0))), MANY, 0.3
        )
        assert fleet.pick([], 1, None, None, 0.3) == picked


@pytest.mark.parametrize(("busier", "stays"), [(4.0, True), (6.0, False)])
def test_a_hint_keeps_a_short_prompt(busier: float, stays: bool) -> None:
    """Below one chunk a session stays for what its tokens are worth: 500 of them, five running requests."""
    fleet = pool(POD, replace(POD, hash_key="b", running=9.0))
    assert fleet.pick([], 500, None, None, 0.0, SESSION) == "a"
    fleet.update(PoolLoad("p", (replace(POD, running=busier), replace(POD, hash_key="b"))), MANY, 2.0)
    assert (fleet.pick([], 500, None, None, 2.0, SESSION) == "a") is stays


def test_a_hint_is_worth_one_chunk() -> None:
    """It says no more than that, whatever the prompt's length, and nothing where a chunk of the text was seen."""
    for tokens, cached in ((100, 100), (512, 512), (5000, 512)):
        fleet = pool(replace(POD, hash_key="a"))
        fleet.pick([], tokens, None, None, 0.0, SESSION)
        pod = fleet._pods["a"]
        assert pod.cached([], keys([SESSION]), tokens) == cached
        assert pod.cached(keys([b"new one."]), keys([SESSION]), tokens) == cached
        assert pod.cached([], keys([b"another."]), tokens) == pod.cached([], [], tokens) == 0
    fleet = pool(replace(POD, hash_key="a"))
    fleet.pick(path("x", 3), 2000, None, None, 0.0, SESSION)
    assert fleet._pods["a"].cached(keys(path("x", 9)), keys([SESSION]), 5000) == 3 * 512


@given(
    st.lists(
        st.tuples(st.floats(0, 300), st.floats(0, 1), st.integers(0, 10**6), st.floats(-1, 30)), min_size=1, max_size=6
    ),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8), st.floats(0, 3)), max_size=30),
    st.integers(1, 4),
)
def test_a_pick_is_always_a_known_pod(
    loads: list[tuple[float, float, int, float]], requests: list[tuple[int, int, float]], pickers: int
) -> None:
    """Whatever the loads and the order of things: one of the pods, or None exactly when none is fresh."""
    report = PoolLoad(
        "p", tuple(PodLoad(str(i), "", age, n, 0.0, kv, cap) for i, (n, kv, cap, age) in enumerate(loads))
    )
    fleet = pool(*report.pods, pickers=pickers)
    now = 0.0
    for family, chunks, pause in requests:
        now += pause
        picked = send(fleet, path(str(family), chunks), now)
        fresh = any(pod.age >= 0 and now + pod.age <= STALE for pod in report.pods)
        assert picked in {pod.hash_key for pod in report.pods} if fresh else picked is None


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.floats(0, 1), st.booleans()), min_size=1, max_size=40)
)
def test_workers_that_share_their_memory_pick_as_one(events: list[tuple[int, int, float, bool]]) -> None:
    """Whoever of three gets which request: each pick is the one a lone picker would have made, load reports between."""
    alone = Pool(Random(1).random)
    memory, random = Memory(), Random(1)
    workers = [Pool(random.random, 1, memory, "p") for _ in range(3)]
    now = 0.0
    report = PoolLoad("p", tuple(pods("abcd")))
    for each in (alone, *workers):
        each.update(report, MANY, now)
    for turn, (family, chunks, pause, reported) in enumerate(events):
        now += pause
        if reported:
            report = PoolLoad("p", tuple(pods("abcd", running=float(turn), prefill_rate=1000.0 * (turn + 1))))
            for each in (alone, *workers):
                each.update(report, MANY, now)
        asked = path(str(family), chunks)
        assert send(workers[(turn * 7 + family) % 3], asked, now) == send(alone, asked, now)
    assert workers[0].chunks == workers[1].chunks == alone.chunks


def test_what_others_sent_between_two_looks_is_shared_out() -> None:
    """Of ten requests that another worker sent in the second before a report that is half a second old, five count."""
    memory = Memory()
    mine, other = (Pool(Random(1).random, 1, memory, "p") for _ in range(2))
    for each in (mine, other):
        each.update(PoolLoad("p", (POD,)), MANY, 10.0)
    for tenth in range(1, 11):
        send(other, [], 10.0 + tenth / 10)
    mine.update(PoolLoad("p", (replace(POD, running=3.0, age=0.5),)), MANY, 11.0)
    other.update(PoolLoad("p", (replace(POD, running=3.0, age=0.5),)), MANY, 11.0)
    assert [each._pods["a"].busyness(1)[0] for each in (mine, other)] == [8.0, 8.0]
    assert [each._pods["a"].busyness(4)[0] for each in (mine, other)] == [23.0, 23.0]
