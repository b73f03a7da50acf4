"""What `bench.live` sends, to what pods, and how much of it at a time. Seeded; no I/O.

As in `vllm bench serve --max-concurrency`, a fixed number of requests is under way and each answer is followed by the
next request. That number is found by the engine itself, in virtual time: `in_flight` of one pod.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from bench import vllm_api as api
from bench.kv_cache import block_hashes
from bench.load import text, vocabulary
from bench.vllm_engine import Engine, EngineConfig, EngineRequest
from bench.vllm_server import MODEL

WARM, SPAN = 20.0, 60.0  # virtual seconds: to a steady state, and then measured
MOST = 4  # times what fits into a pod's KV cache when nothing is shared: with so many requests it does all it can
ZIPF = 0.9  # popularity of system prompts, as measured of shared prefixes


@dataclass(frozen=True, slots=True)
class Shape:
    """Prompts of `question` tokens (least, most), answers of `output`, on pods of `config`.

    With `systems` (a pod) each prompt begins with one of so many system prompts, of `system` tokens.
    """

    name: str
    config: EngineConfig
    question: tuple[int, int]
    output: tuple[int, int]
    systems: int = 0
    system: tuple[int, int] = (0, 0)

    @property
    def tokens(self) -> float:
        """A request's share of a KV cache when nothing is shared, on average over its time."""
        return (sum(self.question) + sum(self.system) + sum(self.output) / 2) / 2


# The stress test `vllm bench serve --random-input-len 1550 --random-output-len 1800 --random-range-ratio 0.2
# --random-prefix-len 10` at a fifth of its lengths, so that a request takes 7 s and not half a minute; the KV cache is
# as much smaller, so that it holds about 20 of them.
RANDOM = Shape("random", EngineConfig(speed=0.4, num_gpu_blocks=625), question=(248, 372), output=(288, 432))
# The demo's: instructions with tools and examples, of 12 to 24 KB, in all several times what a pod's cache holds.
SHARED = Shape(
    "shared-prefix",
    EngineConfig(speed=0.5, num_gpu_blocks=3000),
    question=(40, 160),
    output=(80, 120),
    systems=6,
    system=(3000, 6000),
)
SHAPES = (RANDOM, SHARED)


def bodies(shape: Shape, pods: int, seed: int) -> Iterator[bytes]:
    """Chat completions without end; the same ones for the same arguments."""
    rng = random.Random(seed)
    words = vocabulary(rng)
    systems = [text(rng, words, rng.randint(*shape.system)) for _ in range(shape.systems * pods)]
    popularity = list(accumulate((k + 1) ** -ZIPF for k in range(len(systems))))
    while True:
        messages = [{"role": "user", "content": text(rng, words, rng.randint(*shape.question))}]
        if systems:
            messages.insert(0, {"role": "system", "content": rng.choices(systems, cum_weights=popularity)[0]})
        request = {
            "model": MODEL,
            "messages": messages,
            "max_completion_tokens": rng.randint(*shape.output),
            "ignore_eos": True,  # as the stress test: the length is the request's
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        yield json.dumps(request).encode()


def in_flight(shape: Shape, pods: int, load: float, seed: int) -> int:
    """The least requests under way on one pod with which it answers `load` (0..1) of the most it ever can.

    The pod gets what every pod gets of round robin: each prompt as often as all pods together, so of the system
    prompts those that it is asked for most are in its cache.
    """
    most = max(1, round(MOST * shape.config.context_tokens / shape.tokens))
    wanted = load * throughput(shape, pods, most, seed)
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if throughput(shape, pods, middle, seed) >= wanted:
            high = middle
        else:
            low = middle + 1
    return low


def throughput(shape: Shape, pods: int, count: int, seed: int) -> float:
    """Output tokens a second of one pod with `count` requests always under way, in virtual time."""
    engine, sent = Engine(shape.config), _engine_requests(shape, pods, seed)
    now, tokens = 0.0, 0
    for _ in range(count):
        engine.submit(next(sent), now)
    while now < WARM + SPAN:
        now += engine.schedule(now)
        produced = engine.finish_step(now)
        tokens += len(produced) if now >= WARM else 0
        for sequence in produced:
            if sequence.finished:
                engine.submit(next(sent), now)
    return tokens / SPAN


def _engine_requests(shape: Shape, pods: int, seed: int) -> Iterator[EngineRequest]:
    """The requests of `bodies` as a pod's engine gets them."""
    for index, body in enumerate(bodies(shape, pods, seed)):
        request = api.parse(body, chat=True)
        assert isinstance(request, api.ApiRequest)  # noqa: S101 - of our own making
        prompt, output = request.prompts[0], request.max_tokens or 0
        hashes = block_hashes(prompt + api.filler(output), shape.config.block_size)
        yield EngineRequest(str(index), api.token_count(prompt), output, hashes)
