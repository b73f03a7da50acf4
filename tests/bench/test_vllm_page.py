"""bench/vllm_page.py: vLLM's /metrics, as prometheus_client's parser reads it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.utils import floatToGoString

from bench.vllm_engine import Engine, EngineConfig, EngineRequest
from bench.vllm_page import MetricsPage, number
from bench.vllm_stats import EngineStats, HttpStats

# Every family of vLLM 0.32.0's page under load and what the parser calls its type; the `_created` gauges are below.
GAUGES = (
    "python_info",
    "process_virtual_memory_bytes",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_open_fds",
    "process_max_fds",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_waiting_by_reason",
    "vllm:engine_sleep_state",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
)
COUNTERS = (
    "vllm:estimated_flops_per_gpu",
    "vllm:estimated_read_bytes_per_gpu",
    "vllm:estimated_write_bytes_per_gpu",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:external_prefix_cache_queries",
    "vllm:external_prefix_cache_hits",
    "vllm:mm_cache_queries",
    "vllm:mm_cache_hits",
    "vllm:num_preemptions",
    "vllm:prompt_tokens",
    "vllm:prompt_tokens_by_source",
    "vllm:prompt_tokens_cached",
    "vllm:prompt_tokens_cached_by_source",
    "vllm:generation_tokens",
    "vllm:request_success",
    "vllm:admission_rejections",
    "http_requests",
)
BARE_COUNTERS = (
    "python_gc_objects_collected",
    "python_gc_objects_uncollectable",
    "python_gc_collections",
    "process_cpu_seconds",
)
HISTOGRAMS = {  # buckets, +Inf among them
    "vllm:request_prompt_tokens": 12,
    "vllm:request_generation_tokens": 12,
    "vllm:iteration_tokens_total": 14,
    "vllm:request_max_num_generation_tokens": 12,
    "vllm:request_params_n": 6,
    "vllm:request_params_max_tokens": 12,
    "vllm:time_to_first_token_seconds": 23,
    "vllm:inter_token_latency_seconds": 20,
    "vllm:request_time_per_output_token_seconds": 20,
    "vllm:e2e_request_latency_seconds": 22,
    "vllm:request_queue_time_seconds": 22,
    "vllm:request_inference_time_seconds": 22,
    "vllm:request_prefill_time_seconds": 22,
    "vllm:request_decode_time_seconds": 22,
    "vllm:request_num_preemptions": 8,
    "vllm:request_prefill_kv_computed_tokens": 12,
    "http_request_duration_highr_seconds": 22,
    "http_request_duration_seconds": 4,
}
SUMMARIES = ["http_request_size_bytes", "http_response_size_bytes"]

CONFIG = EngineConfig(block_size=32, num_gpu_blocks=512, max_num_seqs=2)
START = 1_795_354_024.41  # unix seconds

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(page: bytes) -> Samples:
    families = text_string_to_metric_families(page.decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def one(page: bytes, name: str, **labels: str) -> float:
    """The value of vLLM's series `name`, with engine 0 and the model `m`."""
    return samples(page)[name, frozenset({"engine": "0", "model_name": "m", **labels}.items())]


def used_http() -> HttpStats:
    http = HttpStats()
    http.observe("/v1/completions", "POST", 200, 300, 0.7)
    return http


def used_engine() -> Engine:
    """Four requests of 64 tokens, the last ones on the first's prefix; two of them are still running."""
    engine = Engine(CONFIG)
    for index in range(4):
        engine.submit(EngineRequest(str(index), 64, 3 if index < 2 else 9, hashes=(7, 8), max_tokens=9), START)
    now = START
    for _ in range(4):
        now += engine.schedule(now)
        engine.finish_step(now)
    return engine


def test_families_and_types_are_vllms() -> None:
    """Nothing is missing, nothing is more, every type is right."""
    page = MetricsPage(CONFIG, "m", START).render(EngineStats(), used_http())
    found = {family.name: family.type for family in text_string_to_metric_families(page.decode())}
    created = (*COUNTERS, *HISTOGRAMS, *SUMMARIES)
    assert found == (
        dict.fromkeys((*GAUGES, *(f"{name}_created" for name in created)), "gauge")
        | dict.fromkeys((*COUNTERS, *BARE_COUNTERS), "counter")
        | dict.fromkeys(HISTOGRAMS, "histogram")
        | dict.fromkeys(SUMMARIES, "summary")
    )


def test_the_page_has_vllms_size() -> None:
    """614 lines under load, 591 idle, near 50 KB: a scraper that is fast on this is fast on the real one."""
    page = MetricsPage(CONFIG, "model/some-name", START)
    idle, load = page.render(EngineStats(), HttpStats()), page.render(EngineStats(), used_http())
    assert (idle.count(b"\n"), load.count(b"\n")) == (591, 614)
    assert 48_000 < len(load) < 56_000


@pytest.mark.parametrize(("name", "buckets"), HISTOGRAMS.items())
def test_histograms_are_cumulative_and_complete(name: str, buckets: int) -> None:
    """Each has vLLM's number of buckets; they rise, and the last equals the count."""
    page = MetricsPage(CONFIG, "m", START).render(used_engine().stats, used_http())
    values = samples(page)
    counts = [value for (sample, _), value in values.items() if sample == f"{name}_bucket"]
    total = [value for (sample, _), value in values.items() if sample == f"{name}_count"]
    assert len(counts) == buckets
    assert counts == sorted(counts)
    assert [counts[-1]] == total
    assert total[0] > 0


def test_a_bucket_includes_its_bound() -> None:
    """`le` is less or equal."""
    stats = EngineStats()
    stats.first_token.observe(0.5)
    page = MetricsPage(CONFIG, "m", START).render(stats, HttpStats())
    name = "vllm:time_to_first_token_seconds_bucket"
    assert [one(page, name, le=le) for le in ("0.25", "0.5", "0.75")] == [0, 1, 1]


def test_live_values() -> None:
    """What the product reads is what the engine did."""
    engine = used_engine()
    page = MetricsPage(CONFIG, "m", START).render(engine.stats, used_http())
    assert one(page, "vllm:num_requests_running") == 2
    assert one(page, "vllm:num_requests_waiting") == 0
    assert one(page, "vllm:kv_cache_usage_perc") == pytest.approx(engine.cache.usage)
    assert one(page, "vllm:kv_cache_usage_perc") == pytest.approx(2 / 511)  # both run on the same two blocks
    assert one(page, "vllm:prefix_cache_queries_total") == 256
    assert one(page, "vllm:prefix_cache_hits_total") == 96
    assert one(page, "vllm:prompt_tokens_by_source_total", source="local_compute") == 160
    assert one(page, "vllm:prompt_tokens_cached_by_source_total", source="device") == 96
    assert one(page, "vllm:generation_tokens_total") == 8
    assert one(page, "vllm:request_success_total", finished_reason="length") == 2
    assert one(page, "vllm:request_prefill_kv_computed_tokens_sum") == 96
    assert one(page, "vllm:inter_token_latency_seconds_count") == 4
    values = samples(page)
    assert values["process_start_time_seconds", frozenset()] == START
    rejected = frozenset({"model_name": "m", "reason": "max_num_queued_reqs"}.items())
    assert values["vllm:admission_rejections_total", rejected] == 0
    (info,) = (dict(labels) for name, labels in values if name == "vllm:cache_config_info")
    assert (info["block_size"], info["num_gpu_blocks"], len(info)) == ("32", "512", 37)


def test_waiting_requests_are_told_with_their_reason() -> None:
    """waiting equals the sum of waiting_by_reason."""
    engine = Engine(CONFIG)
    for index in range(5):
        engine.submit(EngineRequest(str(index), 64, 3), START)
    engine.schedule(START)
    engine.finish_step(START + 1)
    page = MetricsPage(CONFIG, "m", START).render(engine.stats, HttpStats())
    assert one(page, "vllm:num_requests_waiting") == 3
    assert one(page, "vllm:num_requests_waiting_by_reason", reason="capacity") == 3
    assert one(page, "vllm:num_requests_waiting_by_reason", reason="deferred") == 0


def test_the_older_generation() -> None:
    """`legacy` renames the KV-cache gauge and nothing else."""
    now = samples(MetricsPage(CONFIG, "m", START).render(EngineStats(), HttpStats()))
    old = samples(MetricsPage(CONFIG, "m", START, legacy=True).render(EngineStats(), HttpStats()))
    assert {name for name, _ in now} - {name for name, _ in old} == {"vllm:kv_cache_usage_perc"}
    assert {name for name, _ in old} - {name for name, _ in now} == {"vllm:gpu_cache_usage_perc"}


def test_adapters_appear_with_lora_only() -> None:
    """lora_requests_info is there with --lora alone: a series for each set seen, its value the last time."""
    stats = EngineStats()
    stats.lora = {("code", ""): START, ("chat,code", "sql"): START + 1}
    assert b"lora" not in MetricsPage(CONFIG, "m", START).render(stats, HttpStats())
    values = samples(MetricsPage(CONFIG, "m", START, max_lora=3).render(stats, HttpStats()))
    found = {
        (labels["running_lora_adapters"], labels["waiting_lora_adapters"], labels["max_lora"]): value
        for labels, value in ((dict(pairs), value) for (name, pairs), value in values.items() if "lora" in name)
    }
    assert found == {("code", "", "3"): START, ("chat,code", "sql", "3"): START + 1}


def test_any_model_name_survives() -> None:
    """Quotes, backslashes, newlines and percent signs are escaped, and are no part of the template."""
    name = 'a"b\\c\nd%s%e{x}'
    values = samples(MetricsPage(CONFIG, name, START).render(EngineStats(), HttpStats()))
    assert values["vllm:num_requests_running", frozenset({"engine": "0", "model_name": name}.items())] == 0


@settings(deadline=None)
@given(st.floats(min_value=0, allow_infinity=False) | st.integers(0, 10**15))
def test_numbers_are_written_as_prometheus_client_does(value: float) -> None:
    """Go's format, exponents included."""
    assert number(value) == floatToGoString(value)  # type: ignore[no-untyped-call]
