"""Read the few series we need out of a vLLM /metrics page: one regular expression, one pass over the raw bytes.

The page is Prometheus text (https://prometheus.io/docs/instrumenting/exposition_formats/): about 50 KB and 600 lines,
of which some fifteen matter, so no line is looked at that is not one of them. Rules:

- A series is `\\n<exact name>[{labels}] <value>`: comments, `_created`, `_bucket` and longer names do not match.
- Of a gauge that decides (running, waiting, KV use) a value that is not a finite number from 0 to MAX_VALUE makes the
  page unreadable: left out, it would make the pod seem idle. Of a counter it is as if its line were not there.
- Several series of one name (engines, served model names) are added up; `kv_usage` is their mean.
- Of the series of `lora_requests_info`, whose labels are what they say, the newest counts: its value is a unix time.
- Two generations of vLLM: `kv_cache_usage_perc`, else `gpu_cache_usage_perc`. A page with neither tells nothing about
  the pod's memory and is unreadable, never "idle".
"""

from __future__ import annotations

import re
from enum import StrEnum
from itertools import islice

from xds.model import Load

MAX_VALUE = 2.0**53  # beyond it a float no longer counts in ones; also keeps every sum finite
MAX_ADAPTERS = 256  # of one page's running, and of its waiting, ones: vLLM's max_loras is a few, seldom dozens
MAX_NAME = 256  # bytes of an adapter's name: the longest an InferenceModel can give
MAX_SERIES = 16_384  # of the wanted names on one page: over a thousand engines; a hostile page holds more

KV_USAGE = b"kv_cache_usage_perc"
KV_USAGE_OLD = b"gpu_cache_usage_perc"
CACHE_CONFIG = b"cache_config_info"
LORA = b"lora_requests_info"
RUNNING = b"num_requests_running"
WAITING = b"num_requests_waiting"
PREFIX_QUERIES = b"prefix_cache_queries_total"
PREFIX_HITS = b"prefix_cache_hits_total"
PREFILL_TOKENS = b"request_prefill_kv_computed_tokens_sum"
PREFILL_SECONDS = b"request_prefill_time_seconds_sum"
TOKEN_COUNT = b"inter_token_latency_seconds_count"
TOKEN_SECONDS = b"inter_token_latency_seconds_sum"
PREEMPTIONS = b"num_preemptions_total"
PROMPT_TOKENS = b"prompt_tokens_total"
GENERATION_TOKENS = b"generation_tokens_total"

_GAUGES = frozenset({RUNNING, WAITING, KV_USAGE, KV_USAGE_OLD})
_SUMMED = (
    RUNNING,
    WAITING,
    KV_USAGE,
    KV_USAGE_OLD,
    PREFIX_QUERIES,
    PREFIX_HITS,
    PREFILL_TOKENS,
    PREFILL_SECONDS,
    TOKEN_COUNT,
    TOKEN_SECONDS,
    PREEMPTIONS,
    PROMPT_TOKENS,
    GENERATION_TOKENS,
)
# A label's value is quoted and may hold `}`, `,` and escaped quotes. Every repeat is possessive: no backtracking, so
# the time is linear in the page. The literal start is what makes the search fast; nothing may be put before it.
_LABELS = rb'\{[^"}\n]*+(?:"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"[^"}\n]*+)*+\}'
_NAMES = b"|".join((*_SUMMED, CACHE_CONFIG, LORA))
_VALUE = rb"([^ \t\r\n]++)"
_SERIES = re.compile(rb"\nvllm:(" + _NAMES + rb")(?:[ \t]*+(" + _LABELS + rb")[ \t]*+|[ \t]++)" + _VALUE)
_START_TIME = re.compile(rb"\nprocess_start_time_seconds(?:[ \t]*+" + _LABELS + rb"[ \t]*+|[ \t]++)" + _VALUE)
# Inside a quoted value a quote is escaped, so `,block_size="32"` cannot occur there.
_BLOCK_SIZE = re.compile(rb'[{,][ \t]*+block_size[ \t]*+=[ \t]*+"([0-9]{1,15})"')
_BLOCKS = re.compile(rb'[{,][ \t]*+num_gpu_blocks[ \t]*+=[ \t]*+"([0-9]{1,15})"')
_MAX_LORA = re.compile(rb'[{,][ \t]*+max_lora[ \t]*+=[ \t]*+"([0-9]{1,9})"')
_ADAPTERS = re.compile(rb'[{,][ \t]*+(running|waiting)_lora_adapters[ \t]*+=[ \t]*+"([^"\\\n]*+(?:\\.[^"\\\n]*+)*+)"')
_ESCAPED = re.compile(rb"\\(.)")


class Unreadable(StrEnum):
    """Why a page gives no Load."""

    NOT_METRICS = "NotMetrics"  # not one `# TYPE` line: some other page
    NO_KV_USAGE = "NoKVUsage"  # an exposition page with neither generation's KV gauge
    BAD_GAUGE = "BadGauge"  # requests running or waiting, or a KV use, that no engine can have: NaN, infinite, negative


def parse_page(page: bytes) -> Load | Unreadable:
    """The page's Load, or why there is none. Never raises, whatever the bytes; time is linear in their number."""
    text = b"\n" + page
    sums = dict.fromkeys(_SUMMED, 0.0)
    counts = dict.fromkeys((KV_USAGE, KV_USAGE_OLD), 0)
    kv_tokens = 0
    lora, lora_time = b"", -1.0
    for match in islice(_SERIES.finditer(text), MAX_SERIES):
        name, labels, number = match.groups()
        if name == CACHE_CONFIG:
            kv_tokens += _capacity(labels or b"")
        elif (value := _value(number)) is not None:
            if name == LORA:
                if value > lora_time:
                    lora, lora_time = labels or b"", value
                continue
            if name in counts:
                counts[name] += 1
                value = min(value, 1.0)
            sums[name] += value
        elif name in _GAUGES:
            return Unreadable.BAD_GAUGE
    usage = KV_USAGE if counts[KV_USAGE] else KV_USAGE_OLD
    if not counts[usage]:
        return Unreadable.NO_KV_USAGE if b"\n# TYPE " in text else Unreadable.NOT_METRICS
    start = _START_TIME.search(text)
    max_lora = _MAX_LORA.search(lora)
    adapters = dict(_ADAPTERS.findall(lora))
    return Load(
        running=sums[RUNNING],
        waiting=sums[WAITING],
        kv_usage=sums[usage] / counts[usage],
        kv_tokens=min(kv_tokens, int(MAX_VALUE)),
        start_time=(start and _value(start[1])) or 0.0,
        prefix_queries=sums[PREFIX_QUERIES],
        prefix_hits=sums[PREFIX_HITS],
        prefill_tokens=sums[PREFILL_TOKENS],
        prefill_seconds=sums[PREFILL_SECONDS],
        token_count=sums[TOKEN_COUNT],
        token_seconds=sums[TOKEN_SECONDS],
        preemptions=sums[PREEMPTIONS],
        prompt_tokens=sums[PROMPT_TOKENS],
        generation_tokens=sums[GENERATION_TOKENS],
        max_lora=int(max_lora[1]) if max_lora else 0,
        running_adapters=_names(adapters.get(b"running", b"")),
        waiting_adapters=_names(adapters.get(b"waiting", b"")),
    )


def _names(value: bytes) -> tuple[str, ...]:
    """The names in a label's value that is a list with commas, sorted."""
    text = _ESCAPED.sub(lambda match: b"\n" if match[1] == b"n" else match[1], value)
    names = {name for name in text.split(b",")[:MAX_ADAPTERS] if 0 < len(name) <= MAX_NAME}
    return tuple(sorted(name.decode("utf-8", "replace") for name in names))


def _value(number: bytes) -> float | None:
    try:
        value = float(number)
    except ValueError:
        return None
    return value if 0.0 <= value <= MAX_VALUE else None  # a NaN fails both


def _capacity(labels: bytes) -> int:
    """Tokens of one engine's KV cache; 0 when the labels do not say (`num_gpu_blocks="None"` before profiling)."""
    size, blocks = _BLOCK_SIZE.search(labels), _BLOCKS.search(labels)
    return int(size[1]) * int(blocks[1]) if size and blocks else 0
