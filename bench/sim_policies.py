"""The policies that are compared: who decides, and what of Envoy carries it out. Pure; seeded.

The picker is the product's own (picker/), given real bodies and the product's own load reports; what stands between it
and Envoy, ext_proc and gRPC, is left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import cycle

from bench.sim_envoy import Host, LeastRequest, RingHash, RoundRobin
from bench.sim_epp import BLOCK as EPP_BLOCK
from bench.sim_epp import BLOCKS, REFRESH, EndpointPicker
from bench.sim_fleet import POOL, VLLM_BLOCK, Pod, Policy
from bench.sim_requests import Turn
from picker.cost import PoolLoad
from picker.pick import Picker
from xds.clusters import RING_SIZE
from xds.model import PoolSettings

FIRST_BLOCK = 2048  # bytes of a prompt that the fixed prefix hash takes for its key
FIXED_BALANCE_FACTOR = 125  # percent: KubeAI's default


class _Blind:
    """What needs no loads."""

    def report(self, _loads: PoolLoad, _now: float) -> None:
        pass


class RoundRobinPolicy(_Blind):
    """A Service behind Envoy's round_robin."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw

    def members(self, pods: Sequence[Pod]) -> None:
        self._balancer = RoundRobin([pod.host for pod in pods], self._draw)

    def choose(self, _turn: Turn, _now: float) -> Host:
        return self._balancer.choose()


class LeastRequestPolicy(_Blind):
    """Envoy's least_request; `full_scan` and `weighted` are what a DEFAULT pool has."""

    def __init__(self, draw: random.Random, *, full_scan: bool, weighted: bool) -> None:
        self._draw = draw
        self._full_scan = full_scan
        self._weighted = weighted

    def members(self, pods: Sequence[Pod]) -> None:
        hosts = [pod.host for pod in pods]
        if not self._weighted:
            for host in hosts:
                host.weight = 1
        self._balancer = LeastRequest(hosts, self._draw, full_scan=self._full_scan)

    def choose(self, _turn: Turn, _now: float) -> Host:
        return self._balancer.choose()


class FirstBlockPolicy(_Blind):
    """A hash of the prompt's first block, with bounded load."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw

    def members(self, pods: Sequence[Pod]) -> None:
        for pod in pods:
            pod.host.weight = 1
        self._balancer = RingHash([pod.host for pod in pods], self._draw, FIXED_BALANCE_FACTOR)

    def choose(self, turn: Turn, _now: float) -> Host:
        return self._balancer.choose(turn.text(FIRST_BLOCK)[:FIRST_BLOCK].decode())


class EndpointPickerPolicy(_Blind):
    """The default profile of the Gateway API Inference Extension; its pick is where the request goes."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._picker: EndpointPicker
        self._pods: dict[str, Pod] = {}

    def members(self, pods: Sequence[Pod]) -> None:
        if not self._pods:
            config = pods[0].engine.config
            self._picker = EndpointPicker(config.num_gpu_blocks * config.block_size // VLLM_BLOCK, self._draw)
        members = {pod.host.hash_key: pod for pod in pods}
        for gone in self._pods.keys() - members.keys():
            self._picker.forget(gone)
        self._pods = members

    def choose(self, turn: Turn, now: float) -> Host:
        seen = now // REFRESH * REFRESH
        gauges = {name: pod.gauges(seen) for name, pod in self._pods.items()}
        return self._pods[self._picker.pick(turn.text(BLOCKS * EPP_BLOCK), gauges)].host


class PickedPolicy:
    """A PREFIX_CACHE pool: `pickers` independent pickers in turn, the addressed hash, bounded load."""

    def __init__(self, draw: random.Random, pickers: int = 1, *, told: bool = True) -> None:
        self._draw = draw
        self._pickers = [Picker(draw.random, pickers) for _ in range(pickers)]
        self._turns = cycle(self._pickers)
        self._told = told

    def members(self, pods: Sequence[Pod]) -> None:
        hosts = [pod.host for pod in pods]
        if not self._told:
            for host in hosts:
                host.weight = 100
        self._balancer = RingHash(hosts, self._draw, PoolSettings().hash_balance_factor, RING_SIZE)

    def report(self, loads: PoolLoad, now: float) -> None:
        for picker in self._pickers if self._told else ():
            picker.update(loads, now)

    def choose(self, turn: Turn, now: float) -> Host:
        return self._balancer.choose(next(self._turns).pick(POOL, turn.body(), now).key)


POLICIES: dict[str, Callable[[random.Random], Policy]] = {
    "round robin": RoundRobinPolicy,
    "least request, P2C": lambda draw: LeastRequestPolicy(draw, full_scan=False, weighted=False),
    "DEFAULT": lambda draw: LeastRequestPolicy(draw, full_scan=True, weighted=True),
    "first-block hash": FirstBlockPolicy,
    "EPP": EndpointPickerPolicy,
    "PREFIX_CACHE": PickedPolicy,
    "2 pickers": lambda draw: PickedPolicy(draw, 2),
    "4 pickers": lambda draw: PickedPolicy(draw, 4),
    "stateless": lambda draw: PickedPolicy(draw, told=False),
}
