"""Rates from counters: how much one counter of a pod's page grows for each unit another grows, smoothed.

Seconds a token (inter_token_latency_seconds_sum over _count) says how fast a pod decodes, tokens a second
(request_prefill_kv_computed_tokens_sum over request_prefill_time_seconds_sum) how fast it prefills.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

STEP = 5.0  # seconds between two samples: at 2 s a page, the change over three pages
ALPHA = 0.1  # share of a new sample: with STEP, two thirds of a change of speed are believed after 50 s


@dataclass(frozen=True, slots=True)
class Rate:
    """EWMA of delta(over)/delta(under). The first samples are averaged evenly, so that no single one is believed.

    `over`, `under` and `at` are the counters, and when they were read (seconds), at the last sample. Counters begin at
    0 with their process, so the first sample is its average until then. `value` is 0 while `samples` is 0.
    """

    over: float = 0.0
    under: float = 0.0
    at: float = -math.inf
    value: float = 0.0
    samples: int = 0

    def follow(self, over: float, under: float, at: float, enough: float) -> Rate:
        """The rate after one more page. No sample is taken before STEP has passed and `under` has grown by `enough`.

        Counters that went back are those of a new process: all that was known is dropped. `enough` is above 0.
        """
        known = self if over >= self.over and under >= self.under else UNKNOWN
        if at - known.at < STEP or under - known.under < enough:
            return known
        sample = (over - known.over) / (under - known.under)
        alpha = max(ALPHA, 1 / (known.samples + 1))
        return Rate(over, under, at, known.value + alpha * (sample - known.value), known.samples + 1)


UNKNOWN = Rate()
