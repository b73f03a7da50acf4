"""The families of vLLM 0.32's /metrics page: names, types, labels, and where each value is in `EngineStats`.

In the page's order. What the simulation does not have (multi-modal caches, KV connectors) is a constant 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.vllm_stats import FINISH_REASONS, EngineStats, Histogram

Read = Callable[[EngineStats], float]
ReadHistogram = Callable[[EngineStats], Histogram]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric with the labels engine and model_name. `by` names one label more, `series` its values."""

    name: str
    kind: str  # gauge, counter (the name ends in _total), or histogram
    help: str
    series: Mapping[str, Read]
    by: str = ""
    engine: bool = True  # whether it has the label `engine`
    histogram: ReadHistogram | None = None


def _zero(_: EngineStats) -> float:
    return 0.0


def _gauge(name: str, text: str, read: Read) -> Family:
    return Family(name, "gauge", text, {"": read})


def _counter(name: str, text: str, read: Read = _zero) -> Family:
    return Family(f"{name}_total", "counter", text, {"": read})


def _histogram(name: str, text: str, read: ReadHistogram) -> Family:
    return Family(name, "histogram", text, {}, histogram=read)


def _finished(reason: str) -> Read:
    return lambda s: s.finished[reason]


_FLOPS = "since the start, as estimated for Model FLOPs Utilization; stays 0 unless MFU metrics are enabled."
_WAITING_BY_REASON = (
    "Number of waiting requests by reason: 'capacity' = waiting for scheduling capacity; 'deferred' = held back by a "
    "transient constraint (LoRA budget, KV transfer, blocked status). They add up to vllm:num_requests_waiting."
)
_SLEEP = (
    "Sleep state of the engine: awake = 1 means awake, 0 sleeping; weights_offloaded = 1 means sleep level 1; "
    "discard_all = 1 means sleep level 2."
)
_CONNECTOR = "External prefix cache {} through a KV connector that shares caches across instances, in {} tokens."
_CACHED_BY_SOURCE = (
    "Prompt tokens found in a prefix cache, by the tier that had them: device (HBM), host (offloaded to DRAM), disk, "
    "p2p (from another vLLM instance), or external_unspecified. They add up to the local and external cache hits."
)

FAMILIES = (
    _counter("vllm:estimated_flops_per_gpu", f"Floating point operations per GPU {_FLOPS}"),
    _counter("vllm:estimated_read_bytes_per_gpu", f"Bytes read from memory per GPU {_FLOPS}"),
    _counter("vllm:estimated_write_bytes_per_gpu", f"Bytes written to memory per GPU {_FLOPS}"),
    _gauge("vllm:num_requests_running", "Number of requests in model execution batches.", lambda s: s.running),
    _gauge("vllm:num_requests_waiting", "Number of requests waiting to be processed.", lambda s: s.waiting),
    Family(
        "vllm:num_requests_waiting_by_reason",
        "gauge",
        _WAITING_BY_REASON,
        {"capacity": lambda s: s.waiting, "deferred": _zero},
        by="reason",
    ),
    Family(
        "vllm:engine_sleep_state",
        "gauge",
        _SLEEP,
        {"awake": lambda _: 1.0, "weights_offloaded": _zero, "discard_all": _zero},
        by="sleep_state",
    ),
    _gauge("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", lambda s: s.kv_usage),
    _counter("vllm:prefix_cache_queries", "Prefix cache queries, in queried tokens.", lambda s: s.prefix_queries),
    _counter("vllm:prefix_cache_hits", "Prefix cache hits, in cached tokens.", lambda s: s.prefix_hits),
    _counter("vllm:external_prefix_cache_queries", _CONNECTOR.format("queries", "queried")),
    _counter("vllm:external_prefix_cache_hits", _CONNECTOR.format("hits", "cached")),
    _counter("vllm:mm_cache_queries", "Multi-modal cache queries, in queried items."),
    _counter("vllm:mm_cache_hits", "Multi-modal cache hits, in cached items."),
    _counter("vllm:num_preemptions", "Number of preemptions in the engine.", lambda s: s.preemptions),
    _counter("vllm:prompt_tokens", "Number of prefill tokens processed.", lambda s: s.prompt_tokens),
    Family(
        "vllm:prompt_tokens_by_source_total",
        "counter",
        "Number of prompt tokens by source.",
        {
            "local_compute": lambda s: s.prompt_tokens - s.cached_tokens,
            "local_cache_hit": lambda s: s.cached_tokens,
            "external_kv_transfer": _zero,
        },
        by="source",
    ),
    _counter("vllm:prompt_tokens_cached", "Number of cached prompt tokens.", lambda s: s.cached_tokens),
    Family(
        "vllm:prompt_tokens_cached_by_source_total",
        "counter",
        _CACHED_BY_SOURCE,
        {"device": lambda s: s.prefix_hits} | dict.fromkeys(("host", "p2p", "disk", "external_unspecified"), _zero),
        by="source",
    ),
    _counter("vllm:generation_tokens", "Number of generation tokens processed.", lambda s: s.generation_tokens),
    Family(
        "vllm:request_success_total",
        "counter",
        "Number of requests that ended, by reason.",
        {reason: _finished(reason) for reason in FINISH_REASONS},
        by="finished_reason",
    ),
    Family(
        "vllm:admission_rejections_total",
        "counter",
        "Number of requests refused by a queue limit, by reason.",
        {"max_num_queued_reqs": lambda s: s.rejections, "max_num_queued_tokens": _zero},
        by="reason",
        engine=False,
    ),
    _histogram("vllm:request_prompt_tokens", "Prefill tokens of a request.", lambda s: s.request_prompt_tokens),
    _histogram(
        "vllm:request_generation_tokens", "Generation tokens of a request.", lambda s: s.request_generation_tokens
    ),
    _histogram("vllm:iteration_tokens_total", "Tokens computed in an engine step.", lambda s: s.step_tokens),
    _histogram(
        "vllm:request_max_num_generation_tokens",
        "Most tokens generated by one sequence of a request.",
        lambda s: s.request_generation_tokens,
    ),
    _histogram("vllm:request_params_n", "The request parameter n.", lambda s: s.request_n),
    _histogram("vllm:request_params_max_tokens", "The request parameter max_tokens.", lambda s: s.request_max_tokens),
    _histogram("vllm:time_to_first_token_seconds", "Time to first token in seconds.", lambda s: s.first_token),
    _histogram("vllm:inter_token_latency_seconds", "Time from token to token in seconds.", lambda s: s.inter_token),
    _histogram(
        "vllm:request_time_per_output_token_seconds",
        "Mean time per output token of a request in seconds, without the first.",
        lambda s: s.time_per_token,
    ),
    _histogram("vllm:e2e_request_latency_seconds", "Time of a request from end to end in seconds.", lambda s: s.e2e),
    _histogram("vllm:request_queue_time_seconds", "Time a request was WAITING in seconds.", lambda s: s.queue),
    _histogram("vllm:request_inference_time_seconds", "Time a request was RUNNING in seconds.", lambda s: s.inference),
    _histogram("vllm:request_prefill_time_seconds", "Time a request was in PREFILL in seconds.", lambda s: s.prefill),
    _histogram("vllm:request_decode_time_seconds", "Time a request was in DECODE in seconds.", lambda s: s.decode),
    _histogram("vllm:request_num_preemptions", "Times a request was preempted.", lambda s: s.request_preemptions),
    _histogram(
        "vllm:request_prefill_kv_computed_tokens",
        "KV tokens computed during a request's prefill, without cached ones.",
        lambda s: s.computed_tokens,
    ),
)

# cache_config_info's labels that do not follow from the simulation's options.
CACHE_CONFIG = {
    "_block_size_resolved": "True",
    "cache_dtype": "auto",
    "cache_hit_alignment_tokens": "None",
    "enable_mamba_shared_prefix_checkpoint": "False",
    "enable_prefix_caching": "True",
    "engine": "0",
    "gpu_memory_utilization": "0.92",
    "hash_block_size": "None",
    "is_attention_free": "False",
    "kv_cache_dtype_skip_layers": "[]",
    "kv_cache_layout": "None",
    "kv_cache_memory_bytes": "None",
    "kv_offloading_backend": "native",
    "kv_offloading_size": "None",
    "kv_sharing_fast_prefill": "False",
    "mamba_block_size": "None",
    "mamba_cache_dtype": "auto",
    "mamba_cache_mode": "none",
    "mamba_page_size_padded": "None",
    "mamba_ssm_cache_dtype": "float32",
    "num_cpu_blocks": "None",
    "num_gpu_blocks_override": "None",
    "prefix_cache_retention_interval": "0",
    "prefix_caching_hash_algo": "sha256",
    "prefix_match_unit": "None",
    "replayssm_buffer_len": "16",
    "skip_page_size_padded": "None",
    "sliding_window": "None",
    "swa_bounded_replay": "True",
    "use_kda_recoverssm": "False",
    "use_replayssm": "False",
    "user_specified_block_size": "True",
}
