"""Metrics pages and Envoys' load reports, and what is made of them: weights, endpoints, reports to the picker."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable
from typing import Any

from google.protobuf.message import DecodeError

from picker.cost import PoolLoad
from picker.loads import decode
from tests.fuzz.engine import Target
from tests.fuzz.mutate import JSON, MESSAGE, words
from tests.fuzz.script import dump, load, mapping, number, pure
from xds.endpoints import assignment
from xds.exposition import MAX_ADAPTERS, MAX_NAME, parse_page
from xds.in_flight import MAX_ENDPOINTS, InFlight, read_report
from xds.loads import pool_load
from xds.model import Cluster, Endpoint, Load, Strategy
from xds.snapshot import POOL_LOAD
from xds.weights import BASE, MOST_DOWN, MOST_UP, STEP, Pool, Sample, weigh
from xds.wire import discovery_pb2 as wire
from xds.wire import endpoint_pb2, load_stats_pb2

POOL = "pool/default/p"
PAGE = rb"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="/model/qwen"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="a\"b\\c\n}"} 1.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="/model/qwen"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="/model/qwen"} 0.75
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="9000"} 1.0
vllm:prefix_cache_queries_total{engine="0"} 1.5e+06
vllm:prefix_cache_hits_total{engine="0"} 500000.0
vllm:request_prefill_kv_computed_tokens_sum{engine="0"} 90000.0
vllm:request_prefill_time_seconds_sum{engine="0"} 12.5
vllm:inter_token_latency_seconds_bucket{engine="0",le="+Inf"} 4000.0
vllm:inter_token_latency_seconds_count{engine="0"} 4000.0
vllm:inter_token_latency_seconds_sum{engine="0"} 44.0
vllm:num_preemptions_total{engine="0"} 0.0
vllm:prompt_tokens_total{engine="0"} 100000.0
vllm:generation_tokens_total{engine="0"} 4000.0
vllm:lora_requests_info{max_lora="4",running_lora_adapters="a,b",waiting_lora_adapters="c\\,d"} 1.7e+09
process_start_time_seconds 1.7321e+09
"""
OLD_PAGE = b"# TYPE vllm:gpu_cache_usage_perc gauge\nvllm:gpu_cache_usage_perc 0.5\nvllm:num_requests_running 1\n"
SERIES = (*sorted(set(re.findall(rb"vllm:\w+", PAGE))), b'block_size="16"', b'num_gpu_blocks="9000"', b"# TYPE ")


def metrics(data: bytes) -> Iterable[Hashable]:
    """Any bytes are a Load with sane values, or unreadable for a reason; always the same."""
    found = parse_page(data)
    assert found == parse_page(data)
    if not isinstance(found, Load):
        return [str(found)]
    values = {name: getattr(found, name) for name in Load.__slots__ if not name.endswith("adapters")}
    names = (*found.running_adapters, *found.waiting_adapters)
    assert len(names) <= 2 * MAX_ADAPTERS
    assert all(0 < len(name.encode()) <= 3 * MAX_NAME for name in names)
    assert all(math.isfinite(value) and value >= 0 for value in values.values())
    assert found.kv_usage <= 1
    return [
        ("adapters", len(names).bit_length()),
        *((name, math.frexp(value)[1] // 8) for name, value in values.items()),
    ]


def _pod(wait: float) -> dict[str, Any]:
    return {
        "num_requests_running": 3,
        "num_requests_waiting": wait,
        "kv_cache_usage_perc": 0.4,
        "inter_token_latency_seconds_sum": 9.5,
        "inter_token_latency_seconds_count": 900,
        "prompt_tokens_total": 5000,
        "request_prefill_kv_computed_tokens_sum": 4000,
        "request_prefill_time_seconds_sum": 0.9,
        "start": 1e9,
    }


ROUNDS = [
    {"after": 2, "pods": {"a": _pod(0), "b": _pod(9), "c": _pod(40)}},
    {"after": 7, "pods": {"a": _pod(0) | {"kv_cache_usage_perc": 0.97}, "b": {"draining": True}, "c": _pod(90)}},
    {"after": 60, "pods": {"a": {"kv_cache_usage_perc": "NaN"}, "b": _pod(1) | {"start": 2e9}, "d": _pod(2**53)}},
]


def weights(data: bytes) -> Iterable[Hashable]:
    """Whatever the pages of a pool say over time: weights within the law, and reports that the picker takes."""
    rounds = load(data)
    pool, now = Pool(POOL), 0.0
    last: dict[str, tuple[Load, float]] = {}
    outcomes: set[Hashable] = set()
    for each in rounds if isinstance(rounds, list) else ():
        now += number(mapping(each).get("after"), 0, 4000)
        pods = {key: mapping(page) for key, page in mapping(mapping(each).get("pods")).items() if key}
        for key, page in pods.items():
            lines = "".join(f"\nvllm:{name} {value}" for name, value in page.items())
            read = parse_page(f"{lines}\nprocess_start_time_seconds {page.get('start', 0)}".encode(errors="replace"))
            if isinstance(read, Load):
                last[key] = read, now
        samples = []
        for key, page in pods.items():
            known, read_at = last.get(key, (None, 0.0))
            samples.append(Sample(key, known, read_at, bool(page.get("draining"))))
        before = pool.members
        pool, changes = weigh(pool, samples, now, 2.0)
        given = {key: member.weight for key, member in pool.members.items()}
        assert given.keys() == pods.keys()
        assert not given or 0 < max(given.values()) <= 10 * min(given.values())
        for key, member in before.items():
            assert key not in given or STEP**-MOST_DOWN * 0.95 <= given[key] / member.weight <= STEP**MOST_UP * 1.05
        for change in changes:
            assert change.new == given[change.endpoint] != (change.old or BASE)
            assert all(map(math.isfinite, (change.running, change.waiting, change.kv_usage, change.speed, change.age)))
            outcomes.add((change.reason, change.new))
        _publish(pool, samples, given, now)
    return outcomes


def _publish(pool: Pool, samples: list[Sample], given: dict[str, int], now: float) -> None:
    endpoints = tuple(Endpoint(f"10.0.0.{i}", 80, each.hash_key, each.draining) for i, each in enumerate(samples))
    cluster = Cluster(pool.cluster, endpoints, Strategy.DEFAULT)
    assert assignment(cluster, given)
    report = wire.Resource(name=pool.cluster, version="1")
    report.resource.type_url, report.resource.value = POOL_LOAD, pool_load(cluster, pool, now, 1)
    told = decode(report, POOL_LOAD)
    assert isinstance(told, PoolLoad)
    assert len(told.pods) == sum(not each.draining for each in endpoints)


REPORT = load_stats_pb2.LoadStatsRequest(node=wire.Node(id="envoy"))
for _port in (80, 81):
    _stats = REPORT.cluster_stats.add(cluster_name=POOL).upstream_locality_stats.add().upstream_endpoint_stats.add()
    _socket = endpoint_pb2.SocketAddress(address="10.0.0.0", port_value=_port)
    _stats.address = endpoint_pb2.Address(socket_address=_socket).SerializeToString()
    _stats.total_requests_in_progress = 3


def load_reports(data: bytes) -> Iterable[Hashable]:
    """Any report is counts of a bounded number of endpoints, whose sums fit into what the picker is told."""
    try:
        counts = read_report(load_stats_pb2.LoadStatsRequest.FromString(data), "pool/")
    except DecodeError:
        return ["DecodeError"]
    assert all(name.startswith("pool/") for name in counts)
    assert sum(map(len, counts.values())) <= MAX_ENDPOINTS
    in_flight = InFlight()
    for envoy in range(3):
        in_flight.report(envoy, counts, 1.0)
    cluster = Cluster(POOL, (Endpoint("10.0.0.0", 80, "a"), Endpoint("10.0.0.0", 81, "b")), Strategy.DEFAULT)
    reported = in_flight.of(POOL, 2.0)
    assert reported is not None
    assert pool_load(cluster, Pool(POOL), 2.0, 1, reported)
    of_pool = counts.get(POOL, {})
    most = max(of_pool.values(), default=0)
    return [
        ("clusters", len(counts).bit_length()),
        ("endpoints", len(of_pool).bit_length()),
        ("most", most.bit_length()),
    ]


TARGETS = (
    Target("metrics", pure(metrics), (PAGE, OLD_PAGE), words(*SERIES), seconds_large=0.5, short=300),
    Target("weights", pure(weights), (dump(ROUNDS),), JSON, short=30),
    Target("load_reports", pure(load_reports), (REPORT.SerializeToString(),), MESSAGE, short=100),
)
