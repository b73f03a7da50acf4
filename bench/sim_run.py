"""One simulation from its description to its figures, and the search for a fleet's capacity. Pure; seeded.

A job is all policies under one workload, one fleet, one load: they get the very same sessions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from statistics import fmean

from bench.load import percentile
from bench.sim_fleet import CONFIG, Change, Fleet, Moment, Pod, Record
from bench.sim_policies import POLICIES
from bench.sim_requests import Session, Workload
from bench.vllm_engine import EngineConfig

TAIL = 30.0  # seconds that traffic goes on after the last request that is measured was sent
POINTS = 200  # of a distribution that are kept
GROWTH = 0.01  # of the requests that may be left over at the end of a run: beyond it a fleet does not keep up
EXACT = 1.05  # ratio of a rate that is kept up with and one that is not, at which the search for capacity ends
DOWN = 20.0  # seconds a pod is away while it restarts


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is special about a fleet: `speed` of its first pod, and what happens when a fifth of the window is over."""

    name: str
    speed: float = 1.0
    restarts: bool = False  # the second pod leaves, ends what it has, and is back empty after DOWN seconds
    joins: int = 0  # pods that are added, for each four there are


STEADY = Scenario("steady")
SLOW = Scenario("one pod at half speed", speed=0.5)
RESTART = Scenario("a pod restarts", restarts=True)
SCALE_UP = Scenario("a quarter more pods", joins=1)
SCENARIOS = (SLOW, RESTART, SCALE_UP)


@dataclass(frozen=True, slots=True)
class Result:
    """Figures of one policy in one job. Times in seconds.

    `mean`, `p50`, `p99` and `quantiles` (POINTS + 1 of them) are the TTFT's; `hit_ratio` is of prompt tokens.
    `busiest` is the mean over time of the most requests in flight at a pod over the mean of all pods; `growth` the
    share of the requests that the fleet was left with.
    """

    policy: str
    requests: int
    mean: float
    p50: float
    p99: float
    hit_ratio: float
    busiest: float
    growth: float
    quantiles: tuple[float, ...]
    timeline: tuple[Moment, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """`rate` is in requests a second of the whole fleet."""

    workload: Workload
    pods: int
    rate: float
    scenario: Scenario = STEADY
    config: EngineConfig = CONFIG
    seed: int = 1


def prepare(job: Job) -> tuple[list[Session], tuple[float, float]]:
    """The sessions every policy of the job gets, and the times between which requests are measured."""
    workload = job.workload
    sessions = workload.sessions(job.rate, job.pods, job.seed)
    if workload.trace:
        whole = list(sessions)
        return whole, (workload.warm * whole[-1].start, workload.span * whole[-1].start)
    return list(takewhile(lambda each: each.start < workload.span + TAIL, sessions)), (workload.warm, workload.span)


def simulate(job: Job, policies: Sequence[str], tell: Callable[[str], None] = lambda _: None) -> Iterator[Result]:
    """Each policy in turn; `tell` is given the name of the one under way."""
    sessions, window = prepare(job)
    for policy in policies:
        tell(policy)
        record = _fleet(job, policy, sessions, window).run()
        yield _result(policy, record, window)


def capacity(workload: Workload, pods: int, guess: float, policy: str, config: EngineConfig = CONFIG) -> float:
    """The most requests a second and pod that a fleet under `policy` keeps up with, to a few percent; from `guess`.

    It keeps up when at the end of a run no more requests are in flight than at its beginning, but for GROWTH of those
    that came.
    """

    def keeps_up(rate: float) -> bool:
        job = Job(workload, pods, rate * pods, config=config)
        return next(iter(simulate(job, [policy]))).growth <= GROWTH

    low, high = guess, guess
    if keeps_up(guess):
        while keeps_up(high := high * 1.5):
            low = high
    else:
        while not keeps_up(low := low / 1.5):
            high = low
    while high / low > EXACT:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if keeps_up(middle) else (low, middle)
    return low


def _fleet(job: Job, policy: str, sessions: Sequence[Session], window: tuple[float, float]) -> Fleet:
    scenario = job.scenario
    slow = replace(job.config, speed=job.config.speed * scenario.speed)
    pods = [Pod(number, slow if number == 0 else job.config, number + 1.0) for number in range(job.pods)]
    at = window[0] + 0.2 * (window[1] - window[0])
    changes = []
    if scenario.restarts:
        old = pods[1]
        changes = [
            Change(at, lambda fleet: fleet.set_pods([pod for pod in fleet.pods if pod is not old])),
            Change(at + DOWN, lambda fleet: fleet.set_pods([pods[0], Pod(1, job.config, at + DOWN), *pods[2:]])),
        ]
    if scenario.joins:
        more = [Pod(job.pods + i, job.config, at) for i in range(scenario.joins * job.pods // 4)]
        changes = [Change(at, lambda fleet: fleet.set_pods([*fleet.pods, *more]))]
    return Fleet(pods, POLICIES[policy](random.Random(job.seed)), iter(sessions), window, changes)


def _result(policy: str, record: Record, window: tuple[float, float]) -> Result:
    times = sorted(record.ttft)
    timeline = [sample for sample in record.samples if window[0] <= sample.at <= window[1]]
    flight = [sum(sample.active) for sample in timeline]
    quarter = max(1, len(flight) // 4)
    return Result(
        policy=policy,
        requests=len(times),
        mean=fmean(times),
        p50=percentile(times, 50),
        p99=percentile(times, 99),
        hit_ratio=record.cached_tokens / record.prompt_tokens,
        busiest=fmean(max(s.active) * len(s.active) / max(1, sum(s.active)) for s in timeline),
        growth=(sum(flight[-quarter:]) - sum(flight[:quarter])) / quarter / len(times),
        quantiles=tuple(times[round(i * (len(times) - 1) / POINTS)] for i in range(POINTS + 1)),
        timeline=tuple(timeline),
    )
