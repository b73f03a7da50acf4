"""The fast reading of a vLLM page against prometheus_client's, and against pages no vLLM would write."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from xds.exposition import MAX_VALUE, Unreadable, parse_page
from xds.model import Load

EXCERPT = b"""\
# HELP process_start_time_seconds Start time of the process since unix epoch in seconds.
# TYPE process_start_time_seconds gauge
process_start_time_seconds 1.79535402441e+09
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 7.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="tiny"} 4.0
# HELP vllm:num_requests_waiting_by_reason Sum of all reasons equals vllm:num_requests_waiting.
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"} 400.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.5342465753424658
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="tiny"} 74450.0
# HELP vllm:prompt_tokens_created Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_created gauge
vllm:prompt_tokens_created{engine="0",model_name="tiny"} 1.7953540566667e+09
# HELP vllm:inter_token_latency_seconds Histogram of inter-token latency in seconds.
# TYPE vllm:inter_token_latency_seconds histogram
vllm:inter_token_latency_seconds_bucket{engine="0",le="0.01",model_name="tiny"} 0.0
vllm:inter_token_latency_seconds_bucket{engine="0",le="+Inf",model_name="tiny"} 3299.0
vllm:inter_token_latency_seconds_count{engine="0",model_name="tiny"} 3299.0
vllm:inter_token_latency_seconds_sum{engine="0",model_name="tiny"} 408.02834673000007
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{_block_size_resolved="True",block_size="32",effective_attention_block_size="8",\
num_gpu_blocks="512",num_gpu_blocks_override="9"} 1.0
"""
EXCERPT_LOAD = Load(
    running=7.0,
    waiting=4.0,
    kv_usage=0.5342465753424658,
    kv_tokens=16384,
    start_time=1795354024.41,
    token_count=3299.0,
    token_seconds=408.02834673000007,
    prompt_tokens=74450.0,
)

# The families of a vLLM page, with what multiplies their series: labels of their own, or histogram buckets.
GAUGES = {
    **dict.fromkeys(("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"), ("",)),
    "num_requests_waiting_by_reason": ("capacity", "deferred"),
    "engine_sleep_state": ("awake", "weights_offloaded", "discard_all"),
}
COUNTERS = {
    **dict.fromkeys(("prompt_tokens", "generation_tokens", "num_preemptions", "prompt_tokens_cached"), ("",)),
    **dict.fromkeys(("prefix_cache_queries", "prefix_cache_hits", "mm_cache_queries", "mm_cache_hits"), ("",)),
    **dict.fromkeys(("external_prefix_cache_queries", "external_prefix_cache_hits"), ("",)),
    "prompt_tokens_by_source": ("local_compute", "local_cache_hit", "external_kv_transfer"),
    "request_success": ("stop", "length", "abort", "error", "repetition"),
}
HISTOGRAMS = {
    **dict.fromkeys(("request_prompt_tokens", "request_generation_tokens", "request_params_max_tokens"), 12),
    **dict.fromkeys(("request_max_num_generation_tokens", "request_prefill_kv_computed_tokens"), 12),
    **dict.fromkeys(("inter_token_latency_seconds", "request_time_per_output_token_seconds"), 20),
    **dict.fromkeys(("time_to_first_token_seconds", "e2e_request_latency_seconds", "iteration_tokens_total"), 22),
    **dict.fromkeys(("request_queue_time_seconds", "request_inference_time_seconds"), 22),
    **dict.fromkeys(("request_prefill_time_seconds", "request_decode_time_seconds"), 22),
}
FIELDS = {  # sample name -> the field of Load it is added to
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:prefix_cache_queries_total": "prefix_queries",
    "vllm:prefix_cache_hits_total": "prefix_hits",
    "vllm:request_prefill_kv_computed_tokens_sum": "prefill_tokens",
    "vllm:request_prefill_time_seconds_sum": "prefill_seconds",
    "vllm:inter_token_latency_seconds_count": "token_count",
    "vllm:inter_token_latency_seconds_sum": "token_seconds",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
}
DECIDING = {
    *("vllm:num_requests_running", "vllm:num_requests_waiting"),
    *("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
}
CREATED = 1.7953540566653607e9


class VLLM(Collector):
    """A vLLM server's families for prometheus_client's own exposition, one series for each engine and model name."""

    def __init__(
        self,
        engines: int = 1,
        model_names: Sequence[str] = ("tiny",),
        values: Mapping[str, Sequence[float]] | None = None,
        kv_gauge: str | None = "kv_cache_usage_perc",
        cache: Sequence[tuple[str, str]] = (("32", "512"),),
    ) -> None:
        """`values` of the series by family (`_count`, `_sum` of a histogram), used in turn; absent ones are 3."""
        self.series = [(str(engine), name) for engine in range(engines) for name in model_names]
        self.values = values or {}
        self.kv_gauge = kv_gauge
        self.cache = cache

    def page(self) -> bytes:
        """The page as vLLM serves it."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """Every family, in the order of the real page."""
        start = GaugeMetricFamily("process_start_time_seconds", "Start time of the process since unix epoch.")
        start.add_metric([], self.values.get("process_start_time_seconds", [3.0])[0])
        yield start
        labels = ["engine", "model_name", "kind"]
        for name, kinds in GAUGES.items():
            shown = self.kv_gauge if name == "kv_cache_usage_perc" else name
            if shown:
                gauge = GaugeMetricFamily(f"vllm:{shown}", f"It says vllm:{name} 5 \\ of \n it.", labels=labels)
                for series, value in zip(self.series, self.of(name), strict=True):
                    for kind in kinds:
                        gauge.add_metric([*series, kind], value)
                yield gauge
        for name, kinds in COUNTERS.items():
            counter = CounterMetricFamily(f"vllm:{name}", f"It counts vllm:{name}_total.", labels=labels)
            for series, value in zip(self.series, self.of(name), strict=True):
                for kind in kinds:
                    counter.add_metric([*series, kind], value, created=CREATED)
            yield counter
        for name, buckets in HISTOGRAMS.items():
            histogram = HistogramMetricFamily(f"vllm:{name}", f"Histogram of {name}.", labels=labels[:2])
            bounds = [*(str(0.01 * 2**n) for n in range(buckets)), "+Inf"]
            counted = zip(self.series, self.of(f"{name}_count"), self.of(f"{name}_sum"), strict=True)
            for series, count, total in counted:
                histogram.add_metric(series, [(bound, count) for bound in bounds], total)
                histogram.add_sample(f"vllm:{name}_created", dict(zip(labels, series, strict=False)), CREATED)
            yield histogram
        settings = [f"cache_setting_{n}" for n in range(30)]
        before, after = ["_block_size_resolved", "block_size"], ["num_gpu_blocks", "num_gpu_blocks_override"]
        info = GaugeMetricFamily("vllm:cache_config_info", "The cache.", labels=[*before, *settings, *after])
        for size, blocks in self.cache:
            info.add_metric(["4", size, *['a,block_size="7"} 8'] * len(settings), blocks, "9"], 1)
        yield info

    def of(self, name: str) -> list[float]:
        """One value for each series."""
        values = self.values.get(name, [3.0])
        return [values[n % len(values)] for n in range(len(self.series))]


def reference(page: bytes) -> Load | None:
    """The same fields as prometheus_client reads them, None without a KV gauge or with one out of range; the rule of
    values as documented."""
    sums: dict[str, Any] = {}
    usages: dict[str, list[float]] = {}
    kv_tokens, start_time, newest = 0, 0.0, 0.0
    for family in text_string_to_metric_families(page.decode()):
        for name, labels, value, *_ in family.samples:
            if name == "vllm:cache_config_info" and labels["num_gpu_blocks"] != "None":
                kv_tokens += int(labels["block_size"]) * int(labels["num_gpu_blocks"])
            if not (math.isfinite(value) and 0 <= value <= MAX_VALUE):
                if name in DECIDING:
                    return None
                continue
            if name == "process_start_time_seconds":
                start_time = value
            if name in ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"):
                usages.setdefault(name, []).append(min(value, 1.0))
            if name == "vllm:lora_requests_info" and value > newest:
                newest = value
                sums["max_lora"] = int(labels["max_lora"])
                for kind in ("running", "waiting"):
                    sums[f"{kind}_adapters"] = tuple(sorted(labels[f"{kind}_lora_adapters"].split(",")))
            if name in FIELDS:
                sums[FIELDS[name]] = sums.get(FIELDS[name], 0.0) + value
    usage = usages.get("vllm:kv_cache_usage_perc") or usages.get("vllm:gpu_cache_usage_perc")
    load = replace(Load(kv_tokens=kv_tokens, start_time=start_time), **sums)
    return replace(load, kv_usage=sum(usage) / len(usage)) if usage else None


def test_the_excerpt_is_read_exactly() -> None:
    """Comments, buckets, `_created`, longer names and the labels `..._block_size...` are not taken for the wanted."""
    assert parse_page(EXCERPT) == EXCERPT_LOAD


LORA = """\
vllm:kv_cache_usage_perc 0.5
vllm:lora_requests_info{max_lora="2",running_lora_adapters="code",waiting_lora_adapters="code"} 1.795355016862629e+09
vllm:lora_requests_info{max_lora="2",running_lora_adapters="code,chat",waiting_lora_adapters="chat,sql"} \
1.7953550182568176e+09
vllm:lora_requests_info{max_lora="2",running_lora_adapters="old",waiting_lora_adapters=""} 1.7953550182e+09
"""


def test_the_newest_adapters_count() -> None:
    """Each set of adapters is a series of its own, whose value is the time it was last true."""
    load = parse_page(LORA.encode())
    assert load == Load(kv_usage=0.5, max_lora=2, running_adapters=("chat", "code"), waiting_adapters=("chat", "sql"))


@pytest.mark.parametrize(
    ("labels", "adapters"),
    [
        ('max_lora="4",running_lora_adapters="",waiting_lora_adapters=""', (4, (), ())),
        ('running_lora_adapters=",a,,a,",waiting_lora_adapters="b"', (0, ("a",), ("b",))),
        (r'a="x,running_lora_adapters=\"no\"",max_lora="1",running_lora_adapters="q\"\\,é}"', (1, ('q"\\', "é}"), ())),
        ('max_lora="many"', (0, (), ())),
        (f'max_lora="1",running_lora_adapters="{"x" * 257},{"y" * 256}"', (1, ("y" * 256,), ())),
        (f'running_lora_adapters="{",".join(map(str, range(1000)))}"', (0, tuple(sorted(map(str, range(256)))), ())),
    ],
)
def test_odd_adapters(labels: str, adapters: tuple[int, tuple[str, ...], tuple[str, ...]]) -> None:
    """Names are unescaped and bounded in number and length; what is no number is none."""
    load = parse_page(f"vllm:kv_cache_usage_perc 0.5\nvllm:lora_requests_info{{{labels}}} 1\n".encode())
    assert isinstance(load, Load)
    assert (load.max_lora, load.running_adapters, load.waiting_adapters) == adapters


def test_a_full_page_is_read_as_prometheus_client_reads_it() -> None:
    """On a page of the real size and families, two engines, every field equals the reference and none is left at 0."""
    names = [*GAUGES, *COUNTERS, *(f"{h}_{part}" for h in HISTOGRAMS for part in ("count", "sum"))]
    values = {name: (1000.0 + 7 * n, 2e6 + n) for n, name in enumerate([*names, "process_start_time_seconds"])}
    values["kv_cache_usage_perc"] = (0.25, 0.75)
    page = VLLM(1, ["Qwen/Qwen2.5-7B-Instruct", "lora"], values, cache=[("16", "4096"), ("16", "4097")]).page()
    page += LORA.partition("\n")[2].encode()
    assert 45_000 < len(page) < 90_000
    load = parse_page(page)
    assert load == reference(page)
    assert isinstance(load, Load)
    assert (load.kv_usage, load.kv_tokens) == (0.5, 16 * 8193)
    assert all(getattr(load, field) for field in Load.__slots__)


@pytest.mark.parametrize("old", [False, True])
def test_both_generations_of_the_kv_gauge_are_read(old: bool) -> None:
    """Older vLLM's gpu_cache_usage_perc counts where the new name is absent, and only there."""
    page = EXCERPT.replace(b"vllm:kv_cache_usage_perc{", b"vllm:gpu_cache_usage_perc{") if old else EXCERPT
    assert parse_page(page) == EXCERPT_LOAD
    assert parse_page(page + b"vllm:kv_cache_usage_perc 0.125\n") == replace(
        EXCERPT_LOAD, kv_usage=0.125 if old else (0.5342465753424658 + 0.125) / 2
    )


NO_COUNTS = ("NaN", "+Inf", "-Inf", "-1", "1e999", "1e300", "seven", "0x7")


@pytest.mark.parametrize("number", NO_COUNTS)
def test_a_counter_that_is_no_count_is_as_if_absent(number: str) -> None:
    """What is not a finite number of sensible size is not added up, and harms no other field."""
    page = EXCERPT.replace(b'total{engine="0",model_name="tiny"} 74450.0', b"total " + number.encode())
    assert parse_page(page) == replace(EXCERPT_LOAD, prompt_tokens=0.0)


@pytest.mark.parametrize("number", NO_COUNTS)
@pytest.mark.parametrize("gauge", sorted(name.removeprefix("vllm:") for name in DECIDING))
def test_a_gauge_that_is_no_count_makes_the_page_unreadable(gauge: str, number: str) -> None:
    """A pod whose gauges are nonsense is never taken for an idle one, be it one engine of two."""
    assert parse_page(EXCERPT + f'vllm:{gauge}{{engine="1"}} {number}\n'.encode()) is Unreadable.BAD_GAUGE
    assert isinstance(parse_page(EXCERPT + f'vllm:{gauge}{{engine="1"}} 0 1795354024410\n'.encode()), Load)


def test_a_line_without_a_value_is_no_series() -> None:
    """As if it were not there, like a comment."""
    page = EXCERPT.replace(b'running{engine="0",model_name="tiny"} 7.0', b"running ")
    assert parse_page(page) == replace(EXCERPT_LOAD, running=0.0)


@pytest.mark.parametrize(("number", "usage"), [("1.5", 1.0), ("0", 0.0), ("1e9", 1.0)])
def test_kv_usage_is_clamped(number: str, usage: float) -> None:
    """A KV use above 1 is 1."""
    assert parse_page(f"vllm:kv_cache_usage_perc {number}".encode()) == Load(kv_usage=usage)


@pytest.mark.parametrize(
    ("page", "why"),
    [
        (b"", Unreadable.NOT_METRICS),
        (b"<html><body>vllm:kv_cache_usage_perc</body></html>", Unreadable.NOT_METRICS),
        (b'{"error": "vllm:kv_cache_usage_perc 0.5"}', Unreadable.NOT_METRICS),
        (EXCERPT.replace(b"vllm:kv_cache_usage_perc{", b"vllm:kv_cache_usage{"), Unreadable.NO_KV_USAGE),
        (b"# TYPE vllm:kv_cache_usage_perc gauge\n# HELP vllm:kv_cache_usage_perc 0.5\n", Unreadable.NO_KV_USAGE),
    ],
)
def test_a_page_without_kv_usage_is_unreadable(page: bytes, why: Unreadable) -> None:
    """A pod whose KV gauge is missing or broken is never taken for an idle one."""
    assert parse_page(page) is why


@pytest.mark.parametrize(
    "labels",
    [
        b'{num_gpu_blocks="512",block_size="32"}',
        b'{ block_size = "32" , num_gpu_blocks = "512" }',
        b'{effective_attention_block_size="8",my_num_gpu_blocks="9",block_size="32",num_gpu_blocks="512"}',
        b'{cache_dtype="a\\",block_size=\\"5\\",} 3",block_size="32",num_gpu_blocks="512"}',
        b'{cache_dtype="x\\\\",block_size="32",num_gpu_blocks="512",z="{,}"}',
    ],
)
def test_the_capacity_is_found_whatever_the_labels(labels: bytes) -> None:
    """Order, spaces, escaped quotes and braces inside values do not hide or forge block_size and num_gpu_blocks."""
    page = b"vllm:kv_cache_usage_perc 0.5\nvllm:cache_config_info" + labels + b" 1.0\n"
    assert parse_page(page) == Load(kv_usage=0.5, kv_tokens=16384)


@pytest.mark.parametrize("labels", [b'{block_size="None",num_gpu_blocks="512"}', b'{block_size="-4"}', b"", b"{}"])
def test_an_unknown_capacity_is_0(labels: bytes) -> None:
    """A cache that has not been sized yet has an unknown capacity, and the page is readable all the same."""
    assert parse_page(b"vllm:kv_cache_usage_perc 0.5\nvllm:cache_config_info" + labels + b" 1\n") == Load(kv_usage=0.5)


def test_a_forged_capacity_stays_within_what_the_wire_can_carry() -> None:
    """Absurd block counts end at MAX_VALUE, far below uint64."""
    line = b'vllm:cache_config_info{block_size="999999999999999",num_gpu_blocks="999999999999999"} 1\n'
    load = parse_page(b"vllm:kv_cache_usage_perc 0.5\n" + 9 * line)
    assert load == Load(kv_usage=0.5, kv_tokens=2**53)


labels = st.text(st.characters(codec="utf-8", exclude_characters="\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"), max_size=12)
numbers = st.one_of(
    st.floats(),
    st.floats(0, 1e12),
    st.integers(0, 10**6).map(float),
    st.sampled_from([0.0, -0.0, 1.0, math.nan, math.inf, -math.inf, MAX_VALUE, 1e308]),
)
counts = st.integers(0, 10**6).map(str)
WANTED = (*(name.removeprefix("vllm:").removesuffix("_total") for name in FIELDS), "kv_cache_usage_perc")


@st.composite
def servers(draw: st.DrawFn) -> VLLM:
    """A vLLM server of up to three engines, with any values."""
    return VLLM(
        engines=draw(st.integers(0, 3)),
        model_names=draw(st.lists(labels, min_size=1, max_size=2, unique=True)),
        values={n: draw(st.lists(numbers, min_size=1, max_size=3)) for n in (*WANTED, "process_start_time_seconds")},
        kv_gauge=draw(st.sampled_from(["kv_cache_usage_perc", "gpu_cache_usage_perc", None])),
        cache=draw(st.lists(st.tuples(counts, counts | st.just("None")), max_size=3)),
    )


@settings(deadline=None, max_examples=60)
@given(servers())
def test_generated_pages_are_read_as_prometheus_client_reads_them(server: VLLM) -> None:
    """Whatever the engines, model names and values, the fast reading equals the full one."""
    page = server.page()
    load = parse_page(page)
    assert (load if isinstance(load, Load) else None) == reference(page)


@given(st.binary(max_size=400) | st.lists(st.sampled_from(EXCERPT.split(b" ")) | st.binary(max_size=4)).map(b" ".join))
def test_any_bytes_give_a_sane_load_or_a_reason(page: bytes) -> None:
    """Nothing raises, and no field leaves its range."""
    load = parse_page(page)
    if isinstance(load, Load):
        assert 0 <= load.kv_usage <= 1
        numbers = [value for field in Load.__slots__ if not isinstance(value := getattr(load, field), tuple)]
        assert all(0 <= number < math.inf for number in numbers)


@given(st.data())
def test_a_damaged_page_gives_a_sane_load_or_a_reason(data: st.DataObject) -> None:
    """A page cut anywhere, with bytes replaced anywhere, neither raises nor gives a NaN."""
    cut = data.draw(st.integers(0, len(EXCERPT)))
    at = data.draw(st.integers(0, cut))
    page = EXCERPT[:at] + data.draw(st.binary(max_size=8)) + EXCERPT[at:cut]
    load = parse_page(page)
    assert isinstance(load, Unreadable) or 0 <= load.kv_usage <= 1


@pytest.mark.parametrize(
    "unit",
    [
        b"\n",
        b"\nvllm:",
        b"\nvllm:num_requests_running 1",
        b"\nvllm:num_requests_running{",
        b'\nvllm:num_requests_running{a="',
        b'\nvllm:cache_config_info{block_size="1",num_gpu_blocks="1"} 1',
        b'\nvllm:cache_config_info{a="\\"',
        b'\nvllm:cache_config_info{block_size="1",',
    ],
)
@pytest.mark.parametrize("repeat", ["whole", "head", "tail"])
def test_a_hostile_page_takes_bounded_time(unit: bytes, repeat: str) -> None:
    """Four MiB made to provoke backtracking or endless sums are done with in well under a second of CPU."""
    size = 4 << 20
    page = {
        "whole": lambda: unit * (size // len(unit)),
        "head": lambda: unit + b" " * size,
        "tail": lambda: unit + unit[-2:] * (size // 2),
    }[repeat]()
    began = time.process_time()
    parse_page(page)
    assert time.process_time() - began < 1.0
