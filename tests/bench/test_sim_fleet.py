"""bench/sim_fleet.py, sim_policies.py and sim_run.py: a fleet in virtual time, driven by the product's own code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import count, islice
from random import Random

import pytest

from bench.sim_envoy import Host
from bench.sim_epp import Gauges
from bench.sim_fleet import CONFIG, POOL, Fleet, Pod, load
from bench.sim_policies import POLICIES, PickedPolicy
from bench.sim_requests import GENERATED, Session, Turn, Workload
from bench.sim_run import RESTART, SCALE_UP, SLOW, STEADY, Job, Result, Scenario, capacity, simulate
from bench.vllm_engine import Engine, EngineRequest
from bench.vllm_page import MetricsPage
from bench.vllm_stats import HttpStats
from picker.cost import PoolLoad
from xds.exposition import parse_page
from xds.model import Load
from xds.scrape import INTERVAL

BY_NAME = {workload.name: workload for workload in GENERATED}


def short(name: str, warm: float = 3.0, span: float = 12.0) -> Workload:
    return replace(BY_NAME[name], warm=warm, span=span)


def results(name: str, policies: list[str], rate: float = 6.0, scenario: Scenario = STEADY) -> dict[str, Result]:
    job = Job(short(name), 4, rate, scenario)
    return {result.policy: result for result in simulate(job, policies)}


def test_a_load_is_what_the_metrics_page_says() -> None:
    """Every field that the product reads from a page, read from the engine's numbers directly."""
    engine, now = Engine(CONFIG), 100.0
    turns = [each for session in islice(BY_NAME["chat"].sessions(5.0, 1, 1), 12) for each in session.turns]
    for index, each in enumerate(turns):
        engine.submit(EngineRequest(str(index), each.prompt_tokens, each.output_tokens, each.hashes), now)
        now += engine.schedule(now)
        engine.finish_step(now)
    for _ in range(200):
        now += engine.schedule(now)
        engine.finish_step(now)
    page = MetricsPage(engine.config, "m", 77.0).render(engine.stats, HttpStats())
    parsed = parse_page(page)
    assert isinstance(parsed, Load)
    read = load(engine, 77.0)
    for field in fields(Load):
        assert getattr(read, field.name) == pytest.approx(getattr(parsed, field.name)), field.name
    assert engine.stats.prefill.count > 0
    assert engine.stats.running > 0


class Noting:
    """A policy that sends everything to the first pod, and notes what it is told."""

    def __init__(self) -> None:
        self.members_at: list[list[str]] = []
        self.loads: list[tuple[float, PoolLoad]] = []
        self.sent: list[float] = []

    def members(self, pods: Sequence[Pod]) -> None:
        self.first = pods[0].host
        self.members_at.append([pod.host.hash_key for pod in pods])

    def report(self, loads: PoolLoad, now: float) -> None:
        self.loads.append((now, loads))

    def choose(self, _turn: Turn, now: float) -> Host:
        self.sent.append(now)
        return self.first


def play(sessions: list[Session], policy: Noting, pods: int = 2, until: float = 30.0) -> Fleet:
    fleet = Fleet([Pod(i, CONFIG, 1.0) for i in range(pods)], policy, iter(sessions), (0.0, until))
    fleet.run()
    return fleet


def turn(tokens: int, output: int, pause: float = 0.0, forks: tuple[Session, ...] = ()) -> Turn:
    (piece,) = next(BY_NAME["random"].sessions(1.0, 1, tokens)).turns[0].pieces
    return Turn((replace(piece, tokens=tokens),), tokens, output, (), pause, forks)


def test_a_turn_waits_for_the_answer_before_it() -> None:
    """And for its pause; a fork for the answer it forks from. A lone request's times are its engine steps'."""
    prefill = CONFIG.step_base + 800 * CONFIG.step_per_prefill_token
    decode = CONFIG.step_base + CONFIG.step_per_sequence
    forked = Session(0.25, (turn(800, 1),))
    policy = Noting()
    fleet = play([Session(5.0, (turn(800, 11, forks=(forked,)), turn(800, 1, pause=3.0)))], policy)
    answered = 5.0 + prefill + 10 * decode
    assert policy.sent == pytest.approx([5.0, answered + 0.25, answered + 3.0])
    assert fleet.record.ttft == pytest.approx([prefill] * 3)
    assert (fleet.record.prompt_tokens, fleet.record.cached_tokens) == (2400, 0)
    assert all(pod.host.active == 0 for pod in fleet.pods)


def test_requests_interrupt_what_is_computed_at_once() -> None:
    """One that comes while another decodes is computed after the step that was under way, not after many."""
    policy = Noting()
    sessions = [Session(1.0, (turn(800, 400),)), Session(2.0, (turn(800, 1),))]
    fleet = play(sessions, policy)
    step = CONFIG.step_base + CONFIG.step_per_sequence
    prefill = step + 800 * CONFIG.step_per_prefill_token
    assert prefill <= fleet.record.ttft[1] <= prefill + step


def test_pickers_are_told_each_interval() -> None:
    """The product's own report: every pod that is listed, with what its page said at the last round.

    Between two rounds, what Envoy has in flight.
    """
    policy = Noting()
    fleet = play([Session(0.5, (turn(8000, 400),)), Session(29.0, (turn(800, 1),))], policy)
    assert [at for at, _ in policy.loads[:7]] == [0.0, 0.5, 1.5, INTERVAL, 2.5, 3.5, 2 * INTERVAL]
    assert policy.loads[0][1].in_flight_age is None
    assert [loads.in_flight_age for _, loads in policy.loads[1:5]] == [0.0, 0.0, 0.5, 0.0]
    assert [[pod.in_flight for pod in loads.pods] for _, loads in policy.loads[1:3]] == [[0, 0], [1, 0]]
    assert {loads.name for _, loads in policy.loads} == {POOL}
    names = ("default/pod-0", "default/pod-1")
    assert {tuple(pod.hash_key for pod in loads.pods) for _, loads in policy.loads} == {names}
    _, loads = policy.loads[6]
    busy, idle = loads.pods
    assert (busy.running, idle.running, busy.kv_tokens) == (1, 0, CONFIG.num_gpu_blocks * CONFIG.block_size)
    assert {pod.age for _, told in policy.loads[:3] for pod in told.pods} == {-1.0}
    assert all(0 <= pod.age < 2 * INTERVAL for _, told in policy.loads[3:] for pod in told.pods)
    added = [*fleet.pods, Pod(2, CONFIG, 30.0)]
    fleet.set_pods(added)
    assert len(policy.loads[-1][1].pods) == 3
    assert policy.members_at[-1] == [pod.host.hash_key for pod in added]


def test_gauges_are_as_old_as_they_are_asked_for() -> None:
    """What the last step before that moment wrote; before the first one, nothing waits."""
    pod = Pod(0, CONFIG, 1.0)
    for at in (1.0, 2.0, 3.0):
        pod.history.append((at, Gauges(at, 0.1)))
    assert [pod.gauges(at).waiting for at in (0.5, 1.0, 1.9, 2.5, 9.0)] == [0, 1, 1, 2, 3]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_everyone_the_same_each_time(policy: str) -> None:
    """All requests of the window get a first token, on every pod, and a run repeats itself to the last digit."""
    once, again = (results("chat", [policy], rate=60.0)[policy] for _ in range(2))
    assert once == again
    assert once.requests > 50
    assert all(0 < time < 30 for time in once.quantiles)
    assert once.quantiles == tuple(sorted(once.quantiles))
    assert once.quantiles[0] <= once.p50 <= once.p99 <= once.quantiles[-1]
    assert 0 < once.hit_ratio < 1
    assert all(max(moment.active[pod] for moment in once.timeline) > 0 for pod in range(4))


def test_a_prefix_is_found_where_it_was_sent() -> None:
    """Long shared prompts: the picker and the endpoint picker find most of them, round robin fewer, random none."""
    found = results("prefixes", ["round robin", "EPP", "PREFIX_CACHE"], rate=8.0)
    assert found["PREFIX_CACHE"].hit_ratio > found["round robin"].hit_ratio + 0.05
    assert found["EPP"].hit_ratio > found["round robin"].hit_ratio + 0.05
    assert results("random", ["PREFIX_CACHE"])["PREFIX_CACHE"].hit_ratio == 0


def test_the_picked_pod_is_the_one_that_serves() -> None:
    """The key the picker gives is the pod's address on the ring, as long as nobody is beyond the bound."""
    policy = PickedPolicy(Random(1))
    fleet = Fleet([Pod(i, CONFIG, 1.0) for i in range(4)], policy, iter(()), (0.0, 1.0))
    turns = [each.turns[0] for each in islice(BY_NAME["chat"].sessions(5.0, 4, 1), 20)]
    chosen = [policy.choose(each, 0.0) for each in turns]
    assert {host.hash_key for host in chosen} == {pod.host.hash_key for pod in fleet.pods}
    assert [policy.choose(each, 0.0) for each in turns[:4]] == chosen[:4]


def test_scenarios_change_the_fleet() -> None:
    """A slow pod gets less, a pod that restarts is away and comes back empty, more pods join and are used."""
    slow = results("random", ["PREFIX_CACHE"], 8.0, SLOW)["PREFIX_CACHE"]
    steady = results("random", ["PREFIX_CACHE"], 8.0)["PREFIX_CACHE"]
    assert slow.mean > steady.mean
    job = Job(short("random", span=40.0), 4, 8.0, RESTART)
    (restart,) = simulate(job, ["round robin"])
    assert [len(moment.active) for moment in restart.timeline] == [4] * 8 + [3] * 20 + [4] * 10
    assert restart.timeline[-1].active[1] > 0
    (more,) = simulate(replace(job, scenario=SCALE_UP), ["PREFIX_CACHE"])
    assert {len(moment.active) for moment in more.timeline} == {4, 5}
    assert more.timeline[-1].active[4] > 0


def test_capacity_is_where_the_fleet_no_longer_keeps_up() -> None:
    """Prompts of 800 tokens and one pod, ten to a step: 9.86 a second, found from below and from above."""

    def sessions(rate: float, _pods: int, _seed: int) -> Iterator[Session]:
        return (Session(index / rate, (turn(800, 1),)) for index in count())

    workload = Workload("even", sessions, warm=5.0, span=60.0)
    for guess in (3.0, 20.0):
        assert capacity(workload, 1, guess, "round robin") == pytest.approx(9.86, rel=0.04)
