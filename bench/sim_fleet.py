"""A fleet of simulated pods in virtual time: requests come, a policy places them, engines compute them. Pure; seeded.

    sessions --request--> policy --host--> pod (engine) --answer--> the session's next request
                            ^                 |
                            '--- each 2 s ----'  metrics -> weights and PoolLoad, by the product's own code
                            '--- each 1 s ----   what Envoy has in flight -> PoolLoad

Everything happens at its time in one queue of events. The time the gateway itself takes is not in it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Protocol

from bench.sim_envoy import Host
from bench.sim_epp import Gauges
from bench.sim_requests import BLOCK, LONGEST, Session, Turn
from bench.vllm_engine import Engine, EngineConfig, EngineRequest
from bench.vllm_engine import Sequence as Running
from picker.cost import PoolLoad
from picker.loads import LOAD, decode
from xds.in_flight import INTERVAL as IN_FLIGHT_INTERVAL
from xds.in_flight import Reported
from xds.loads import pool_load
from xds.model import Cluster, Endpoint, Load, Strategy, authority
from xds.scrape import INTERVAL
from xds.weights import Pool, Sample, weigh
from xds.wire.discovery_pb2 import Resource

POOL = "pool/default/simulated"
AT_ONCE = 50  # steps that only decode and are computed at once: a second or so, in which no gauge is written
SAMPLE = 1.0  # seconds between two samples of how even the load is
VLLM_BLOCK = 16  # tokens
CONFIG = EngineConfig(  # a 32B model in fp8 on one H100
    block_size=BLOCK,
    num_gpu_blocks=300_000 // BLOCK,  # 39 GB at 128 KiB a token
    max_model_len=LONGEST + 1,
    step_base=0.015,  # seconds: 33 GB of weights read once, and what else a step takes
    step_per_prefill_token=0.000_125,  # seconds: 8,000 tokens/s
    step_per_sequence=0.000_1,  # seconds
)
SMALL = replace(  # bench/vllm_engine.py's own: an 8B model in bf16 on one H100
    EngineConfig(),
    block_size=BLOCK,
    num_gpu_blocks=EngineConfig().num_gpu_blocks * EngineConfig().block_size // BLOCK,
    max_model_len=LONGEST + 1,
)


class Pod:
    """One engine, its host in Envoy, and what a scrape finds. Mutable."""

    def __init__(self, number: int, config: EngineConfig, started: float) -> None:
        self.host = Host(f"default/pod-{number}")
        self.endpoint = Endpoint("10.0.0.1", 8000 + number, self.host.hash_key)
        self.engine = Engine(config)
        self.started = started
        self.began, self.seconds, self.ends = 0.0, 0.0, 0.0  # of the step or steps under way; 0 seconds: of none
        self.history: deque[tuple[float, Gauges]] = deque(maxlen=64)
        self.reading: Load | None = None
        self.read_at = 0.0

    def scrape(self, now: float) -> None:
        self.reading, self.read_at = load(self.engine, self.started), now

    def gauges(self, at: float) -> Gauges:
        """The gauges as they were at `at`, which never goes back."""
        history = self.history
        while len(history) > 1 and history[1][0] <= at:
            history.popleft()
        return history[0][1] if history and history[0][0] <= at else Gauges()

    def sample(self) -> Sample:
        return Sample(self.host.hash_key, self.reading, self.read_at)


def load(engine: Engine, started: float) -> Load:
    """What parsing the engine's metrics page would give."""
    stats, config = engine.stats, engine.config
    return Load(
        running=stats.running,
        waiting=stats.waiting,
        kv_usage=stats.kv_usage,
        kv_tokens=config.block_size * config.num_gpu_blocks,
        start_time=started,
        prefix_queries=stats.prefix_queries,
        prefix_hits=stats.prefix_hits,
        prefill_tokens=stats.computed_tokens.sum,
        prefill_seconds=stats.prefill.sum,
        token_count=stats.inter_token.count,
        token_seconds=stats.inter_token.sum,
        preemptions=stats.preemptions,
        prompt_tokens=stats.prompt_tokens,
        generation_tokens=stats.generation_tokens,
    )


class Policy(Protocol):
    """How a request finds its pod."""

    def members(self, pods: Sequence[Pod], /) -> None:
        """These are the pods, at the start and whenever they or their weights change."""

    def report(self, loads: PoolLoad, now: float, /) -> None:
        """What the management server tells pickers, with each round of weights and each report of what is in flight."""

    def choose(self, turn: Turn, now: float, /) -> Host:
        """Place a request."""


@dataclass(slots=True)
class Sent:
    """A request under way."""

    turn: Turn
    session: Session
    index: int
    at: float
    pod: Pod


@dataclass(frozen=True, slots=True)
class Moment:
    """One sample of the pods that are listed: requests in flight (Envoy's count), and the share of KV blocks held."""

    at: float
    active: tuple[int, ...]
    kv_usage: tuple[float, ...]


@dataclass(slots=True)
class Record:
    """What was seen; `ttft` (seconds) and tokens of the requests that are measured, in the order of first tokens."""

    ttft: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    samples: list[Moment] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Change:
    """Something happens to the fleet at a time: `act` is given the fleet."""

    at: float
    act: Callable[[Fleet], None]


class Fleet:
    """The simulation. Mutable; made, run once, and thrown away."""

    def __init__(
        self,
        pods: Sequence[Pod],
        policy: Policy,
        sessions: Iterator[Session],
        window: tuple[float, float],
        changes: Sequence[Change] = (),
    ) -> None:
        self.now = 0.0
        self.record = Record()
        self.pods = list(pods)  # those that are listed; a pod that left goes on with what it has
        self._policy = policy
        self._sessions = sessions
        self._window = window
        self._events: list[tuple[float, int, Callable[..., None], Any]] = []
        self._order = count()
        self._ids = count()
        self._by_host: dict[Host, Pod] = {}
        self._pool = Pool(POOL)
        self._weights: dict[Host, int] = {}
        self._round = 0
        self._reported: Reported | None = None
        self._open = 0  # measured requests without a first token
        self.set_pods(self.pods)
        for change in changes:
            self._at(change.at, change.act, self)
        self._at(SAMPLE, self._sample, None)
        self._at(INTERVAL, self._follow, None)
        self._at(IN_FLIGHT_INTERVAL / 2, self._report_in_flight, None)  # no two clocks of a fleet agree
        for place, pod in enumerate(pods):
            self._at(INTERVAL * place / len(pods), self._scrape, pod)
        self._next_session()

    def run(self) -> Record:
        """Until every request that is measured has its first token."""
        events, end = self._events, self._window[1]
        while events:
            self.now, _, act, argument = heapq.heappop(events)
            if self.now > end and not self._open:
                break
            act(argument)
        return self.record

    # --- the fleet

    def set_pods(self, pods: Sequence[Pod]) -> None:
        """These pods are listed from now on; as with the management server, new ones have a weight at once."""
        self.pods = list(pods)
        self._by_host = {pod.host: pod for pod in pods}
        self._weights = {}
        self._manage()

    def _scrape(self, pod: Pod) -> None:
        pod.scrape(self.now)
        self._at(self.now + INTERVAL, self._scrape, pod)

    def _follow(self, _: None) -> None:
        self._manage()
        self._at(self.now + INTERVAL, self._follow, None)

    def _report_in_flight(self, _: None) -> None:
        """Envoy's load report, and what the management server makes of it."""
        requests = {
            authority(pod.endpoint.address, pod.endpoint.port): pod.host.active for pod in self._by_host.values()
        }
        self._reported = Reported(requests, self.now)
        self._tell_pickers()
        self._at(self.now + IN_FLIGHT_INTERVAL, self._report_in_flight, None)

    def _manage(self) -> None:
        """One round of the management server."""
        self._pool, _ = weigh(self._pool, [pod.sample() for pod in self.pods], self.now, INTERVAL)
        weights = {pod.host: self._pool.members[pod.host.hash_key].weight for pod in self.pods}
        if weights != self._weights:
            self._weights = weights
            for host, weight in weights.items():
                host.weight = weight
            self._policy.members(self.pods)
        self._tell_pickers()

    def _tell_pickers(self) -> None:
        self._round += 1
        cluster = Cluster(POOL, tuple(pod.endpoint for pod in self.pods), Strategy.PREFIX_CACHE)
        resource = Resource(name=POOL)
        resource.resource.type_url = LOAD
        resource.resource.value = pool_load(cluster, self._pool, self.now, self._round, self._reported)
        loads = decode(resource, LOAD)
        assert isinstance(loads, PoolLoad)  # noqa: S101 - of type LOAD
        self._policy.report(loads, self.now)

    # --- requests

    def _next_session(self) -> None:
        session = next(self._sessions, None)
        if session is not None:
            self._at(session.start, self._start, session)

    def _start(self, session: Session) -> None:
        self._next_session()
        self._send((session, 0))

    def _send(self, what: tuple[Session, int]) -> None:
        session, index = what
        turn = session.turns[index]
        pod = self._by_host[self._policy.choose(turn, self.now)]
        pod.host.active += 1
        if self._window[0] <= self.now <= self._window[1]:
            self._open += 1
        request = EngineRequest(
            str(next(self._ids)),
            turn.prompt_tokens,
            turn.output_tokens,
            turn.hashes,
            owner=Sent(turn, session, index, self.now, pod),
        )
        pod.engine.submit(request, self.now)
        if pod.seconds:
            self._interrupt(pod)
        else:
            self._step(pod)

    def _step(self, pod: Pod) -> None:
        pod.began, pod.seconds = self.now, pod.engine.schedule(self.now, AT_ONCE)
        if pod.seconds:
            self._end_after(pod, pod.engine.steps)

    def _end_after(self, pod: Pod, steps: int) -> None:
        pod.ends = pod.began + steps * pod.seconds
        self._at(pod.ends, self._stepped, pod)

    def _interrupt(self, pod: Pod) -> None:
        """A request has come: the step under way is the last before the engine sees it."""
        steps = int((self.now - pod.began) / pod.seconds) + 1
        if steps < pod.engine.steps:
            pod.engine.cut(steps)
            self._end_after(pod, steps)

    def _stepped(self, pod: Pod) -> None:
        if self.now != pod.ends:
            return  # it ended earlier
        for sequence in pod.engine.finish_step(self.now):
            if sequence.generated == 1:
                self._first_token(sequence)
            if sequence.finished:
                self._answered(sequence)
        stats = pod.engine.stats
        pod.history.append((self.now, Gauges(stats.waiting, stats.kv_usage)))
        self._step(pod)

    def _first_token(self, sequence: Running) -> None:
        sent: Sent = sequence.request.owner
        if self._window[0] <= sent.at <= self._window[1]:
            self._open -= 1
            self.record.ttft.append(self.now - sent.at)
            self.record.prompt_tokens += sent.turn.prompt_tokens
            self.record.cached_tokens += sequence.cached_tokens

    def _answered(self, sequence: Running) -> None:
        sent: Sent = sequence.request.owner
        sent.pod.host.active -= 1
        for fork in sent.turn.forks:
            self._at(self.now + fork.start, self._send, (fork, 0))
        following = sent.index + 1
        if following < len(sent.session.turns):
            self._at(self.now + sent.session.turns[following].pause, self._send, (sent.session, following))

    # --- measuring

    def _sample(self, _: None) -> None:
        active = tuple(pod.host.active for pod in self.pods)
        usage = tuple(pod.engine.cache.usage for pod in self.pods)
        self.record.samples.append(Moment(self.now, active, usage))
        self._at(self.now + SAMPLE, self._sample, None)

    def _at(self, when: float, act: Callable[..., None], argument: Any) -> None:
        heapq.heappush(self._events, (when, next(self._order), act, argument))
