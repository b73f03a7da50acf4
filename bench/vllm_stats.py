"""What a vLLM engine and its HTTP front count and measure: plain numbers, written out by `vllm_page`.

Histogram buckets are vLLM 0.32's (vllm/v1/metrics/loggers.py) for a context of a few thousand tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

TOKENS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)
STEP_TOKENS = (1.0, *(float(2**n) for n in range(3, 15)))
PARAMS_N = (1.0, 2.0, 5.0, 10.0, 20.0)
PREEMPTIONS = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)
_SLOW = (0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, *_SLOW, 160.0, 640.0, 2560.0)
NEXT_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, *_SLOW[1:])
_MINUTES = (60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
REQUEST = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, *_MINUTES)
_HALVES = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0, 30.0, 60.0)
HTTP_FINE = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, *_HALVES)
HTTP_COARSE = (0.1, 0.5, 1.0)

FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")


class Histogram:
    """Prometheus's: `counts[i]` of observations in bucket i (not cumulated), the last one above every bound."""

    __slots__ = ("bounds", "count", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.count = 0
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.count += times
        self.sum += value * times


class EngineStats:
    """Counters and histograms since the engine's start. The gauges are what they were when the last step ended.

    `lora` maps (running adapters, waiting adapters), each comma-joined, to the time it was last true.
    """

    def __init__(self) -> None:
        self.running = 0
        self.waiting = 0
        self.kv_usage = 0.0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.preemptions = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.rejections = 0
        self.finished = dict.fromkeys(FINISH_REASONS, 0)
        self.lora: dict[tuple[str, str], float] = {}
        self.request_prompt_tokens = Histogram(TOKENS)
        self.request_generation_tokens = Histogram(TOKENS)
        self.request_max_tokens = Histogram(TOKENS)
        self.request_n = Histogram(PARAMS_N)
        self.computed_tokens = Histogram(TOKENS)
        self.step_tokens = Histogram(STEP_TOKENS)
        self.first_token = Histogram(FIRST_TOKEN)
        self.inter_token = Histogram(NEXT_TOKEN)
        self.time_per_token = Histogram(NEXT_TOKEN)
        self.e2e = Histogram(REQUEST)
        self.queue = Histogram(REQUEST)
        self.inference = Histogram(REQUEST)
        self.prefill = Histogram(REQUEST)
        self.decode = Histogram(REQUEST)
        self.request_preemptions = Histogram(PREEMPTIONS)


class HttpStats:
    """What vLLM's HTTP front counts (prometheus-fastapi-instrumentator), by (handler, method)."""

    __slots__ = ("durations", "fine", "requests", "sizes")

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, str]] = Counter()  # (handler, method, "2xx")
        self.sizes: Counter[str] = Counter()  # handler -> bytes of request bodies
        self.durations: dict[tuple[str, str], Histogram] = {}
        self.fine = Histogram(HTTP_FINE)

    def observe(self, handler: str, method: str, status: int, size: int, seconds: float) -> None:
        self.requests[handler, method, f"{status // 100}xx"] += 1
        self.sizes[handler] += size
        self.durations.setdefault((handler, method), Histogram(HTTP_COARSE)).observe(seconds)
        self.fine.observe(seconds)
