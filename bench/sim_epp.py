"""The default profile of the Gateway API Inference Extension's endpoint picker, by its documented rules. Pure.

    score = 2 * queue + 2 * KV cache + 3 * prefix        the highest is picked, of equal ones any

    queue     (most waiting - waiting) / (most - least), 1 when all wait alike
    KV cache  1 - use
    prefix    blocks of the prompt's beginning that were sent there / blocks of that beginning

Blocks are 16 tokens, 64 characters, of the first 4,096 tokens at most. What was sent to a pod is remembered in an LRU
of as many blocks as its KV cache has, first block first; the search ends at the first block that no pod has. Gauges are
read each 50 ms. It does not count what it sent since.
https://gateway-api-inference-extension.sigs.k8s.io/guides/epp-configuration/prefix-aware/
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

QUEUE, KV_CACHE, PREFIX = 2.0, 2.0, 3.0  # weights of the scorers
BLOCK = 64  # characters: vLLM's 16 tokens, at four a token
BLOCKS = 256  # of a prompt: what lies beyond is not looked at
REFRESH = 0.05  # seconds between two looks at the gauges


@dataclass(frozen=True, slots=True)
class Gauges:
    """What a pod's page said last."""

    waiting: float = 0.0
    kv_usage: float = 0.0  # 0..1


class EndpointPicker:
    """Mutable. `capacity` is the number of blocks of a pod's KV cache; hosts are known by their names."""

    def __init__(self, capacity: int, draw: random.Random) -> None:
        self._capacity = capacity
        self._draw = draw
        self._bits: dict[str, int] = {}  # pod -> its bit in `_pods`
        self._sent: dict[str, OrderedDict[int, None]] = {}
        self._pods: dict[int, int] = {}  # block -> bits of the pods it was sent to

    def pick(self, text: bytes, gauges: Mapping[str, Gauges]) -> str:
        """The pod for a prompt that begins with `text`, among those of `gauges`; it is noted as sent there."""
        blocks = block_hashes(text)
        scores = self.scores(blocks, gauges)
        best = max(scores.values())
        pod = self._draw.choice([name for name, score in scores.items() if score == best])
        self._note(pod, blocks)
        return pod

    def scores(self, blocks: Sequence[int], gauges: Mapping[str, Gauges]) -> dict[str, float]:
        """The score of each pod."""
        matched = self._matched(blocks)
        waiting = [each.waiting for each in gauges.values()]
        most, least = max(waiting), min(waiting)
        return {
            pod: QUEUE * ((most - each.waiting) / (most - least) if most > least else 1.0)
            + KV_CACHE * (1 - each.kv_usage)
            + PREFIX * (matched.get(self._bits.get(pod, 0), 0) / len(blocks) if blocks else 0.0)
            for pod, each in gauges.items()
        }

    def forget(self, pod: str) -> None:
        """The pod is gone."""
        for block in self._sent.pop(pod, ()):
            self._clear(block, self._bits[pod])
        self._bits.pop(pod, None)

    def _matched(self, blocks: Sequence[int]) -> Counter[int]:
        """Blocks found, by the bit of the pod."""
        runs: Counter[int] = Counter()
        for block in blocks:
            bits = self._pods.get(block)
            if not bits:
                break
            runs[bits] += 1
        found: Counter[int] = Counter()
        for bits, count in runs.items():
            rest = bits
            while rest:
                bit = rest & -rest
                found[bit] += count
                rest ^= bit
        return found

    def _note(self, pod: str, blocks: Sequence[int]) -> None:
        if pod not in self._bits:
            used = sum(self._bits.values())
            self._bits[pod] = ~used & (used + 1)  # the lowest bit that is free
        bit = self._bits[pod]
        sent = self._sent.setdefault(pod, OrderedDict())
        for block in blocks:
            sent[block] = None
            sent.move_to_end(block)
            self._pods[block] = self._pods.get(block, 0) | bit
        while len(sent) > self._capacity:
            self._clear(sent.popitem(last=False)[0], bit)

    def _clear(self, block: int, bit: int) -> None:
        bits = self._pods[block] & ~bit
        if bits:
            self._pods[block] = bits
        else:
            del self._pods[block]


def block_hashes(text: bytes) -> list[int]:
    """Chained hashes of the whole blocks at the beginning of `text`; equal within one process only."""
    hashes, link = [], 0
    for start in range(0, min(len(text) // BLOCK, BLOCKS) * BLOCK, BLOCK):
        link = hash((link, text[start : start + BLOCK]))
        hashes.append(link)
    return hashes
