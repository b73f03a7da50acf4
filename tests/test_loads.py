"""PoolLoad: what the picker learns of a pool."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.cost import PoolLoad
from picker.loads import LOAD as LOAD_TYPE
from picker.loads import decode
from tests.test_exposition import VLLM, servers
from xds.exposition import Unreadable, parse_page
from xds.in_flight import Reported
from xds.loads import pool_load
from xds.model import Cluster, Endpoint, Load
from xds.weights import Pool, Sample, weigh
from xds.wire import discovery_pb2 as discovery
from xds.wire import load_pb2 as pb

A = Endpoint("10.0.0.2", 8000, "default/a")
B = Endpoint("10.0.0.1", 8000, "default/b")
LEAVING = Endpoint("10.0.0.3", 8000, "default/c", draining=True)
LOAD = Load(running=3, waiting=2, kv_usage=0.5, kv_tokens=4096, start_time=1_700_000_000.5,
            max_lora=2, running_adapters=("a", "b"), waiting_adapters=("c",))  # fmt: skip


def read(*endpoints: Endpoint, loads: dict[str, Load], now: float = 10.0, at: float = 10.0) -> pb.PoolLoad:
    """The message after one round at `at`, written at `now`."""
    samples = [Sample(e.hash_key, loads.get(e.hash_key), at, e.draining) for e in endpoints]
    pool, _ = weigh(Pool("pool/default/llm"), samples, at, 2.0)
    return pb.PoolLoad.FromString(pool_load(Cluster("pool/default/llm", endpoints), pool, now, 7))


def test_a_pool_is_named_and_its_reports_are_numbered() -> None:
    """Each round is a new version, so that silence is staleness."""
    message = read(A, loads={})
    assert (message.name, message.round) == ("pool/default/llm", 7)


def test_endpoints_are_sorted_by_hash_key_and_none_drains() -> None:
    """Every endpoint Envoy may send to, in an order that does not depend on addresses."""
    message = read(B, LEAVING, A, loads={"default/c": LOAD})
    assert [(e.hash_key, e.address) for e in message.endpoints] == [
        ("default/a", "10.0.0.2:8000"),
        ("default/b", "10.0.0.1:8000"),
    ]


def test_a_reading_is_passed_on_with_its_age() -> None:
    """Gauges as they were read; the age is from reading the page to writing this."""
    (entry,) = read(A, loads={"default/a": LOAD}, at=10.0, now=11.5).endpoints
    assert entry.age == pytest.approx(1.5)
    assert (entry.running, entry.waiting, entry.kv_usage, entry.kv_tokens) == (3, 2, 0.5, 4096)
    assert entry.start_time == 1_700_000_000.5
    assert entry.prefill_rate == 0
    assert (entry.max_lora, list(entry.running_adapters), list(entry.waiting_adapters)) == (2, ["a", "b"], ["c"])


def test_an_endpoint_never_read_has_a_negative_age_and_no_load() -> None:
    """So the picker can tell "nothing known" from "idle"; also where the pool has not been weighed yet."""
    unread = [*read(A, loads={}).endpoints]
    unread += pb.PoolLoad.FromString(pool_load(Cluster("p", (A,)), Pool("p"), 10.0, 1)).endpoints
    for entry in unread:
        assert entry == pb.EndpointLoad(hash_key="default/a", address="10.0.0.2:8000", age=-1)


def test_a_clock_behind_the_reading_is_age_zero() -> None:
    """A reading that began after the round was dated is fresh, and not "never read"."""
    (entry,) = read(A, loads={"default/a": LOAD}, at=10.0, now=9.0).endpoints
    assert entry.age == 0


def test_the_prefill_rate_is_tokens_a_second() -> None:
    """From the counters of two readings: 1,000 tokens in half a second of prefill."""
    pool = Pool("p")
    for now, load in ((0.0, Load()), (10.0, Load(prefill_tokens=1000, prefill_seconds=0.5))):
        pool, _ = weigh(pool, [Sample("default/a", load, now)], now, 2.0)
    (entry,) = pb.PoolLoad.FromString(pool_load(Cluster("p", (A,)), pool, 10.0, 1)).endpoints
    assert entry.prefill_rate == pytest.approx(2000)


def test_restarts_are_counted_where_the_page_has_no_start_time() -> None:
    """By counters that went back: the number of starts takes the start time's place, which only has to change."""
    pool, counts = Pool("p"), []
    for now, tokens in ((0.0, 500.0), (2.0, 900.0), (4.0, 10.0), (6.0, 20.0), (8.0, 5.0)):
        pool, _ = weigh(pool, [Sample("default/a", Load(prompt_tokens=tokens), now)], now, 2.0)
        (entry,) = pb.PoolLoad.FromString(pool_load(Cluster("p", (A,)), pool, now, 1)).endpoints
        counts.append(entry.start_time)
    assert counts == [1, 1, 2, 2, 3]


def test_an_ipv6_address_is_told_from_its_port() -> None:
    """Brackets, as in a URL."""
    (entry,) = read(Endpoint("fd00::1", 8000, "default/a"), loads={}).endpoints
    assert entry.address == "[fd00::1]:8000"


def test_what_is_in_flight_is_passed_on() -> None:
    """By endpoint, with the age of the oldest report; where no Envoy reports, nothing is said of it."""
    cluster, pool = Cluster("p", (A, B)), Pool("p")
    reported = Reported({"10.0.0.2:8000": 7}, at=8.5)
    message = pb.PoolLoad.FromString(pool_load(cluster, pool, 10.0, 1, reported))
    assert message.in_flight.age == pytest.approx(1.5)
    assert [(e.hash_key, e.in_flight) for e in message.endpoints] == [("default/a", 7), ("default/b", 0)]
    assert not pb.PoolLoad.FromString(pool_load(cluster, pool, 10.0, 1)).HasField("in_flight")


@settings(deadline=None, max_examples=50)
@given(st.lists(servers(), min_size=1, max_size=4))
def test_whatever_pages_say_the_picker_takes_the_report(answers: list[VLLM]) -> None:
    """NaN, infinite, negative and huge values, counters that go back: the picker never refuses the pool's report, which
    would cost it the pod's neighbours, too."""
    pool = Pool("p")
    load: Load | None = None
    for turn, server in enumerate(answers):
        page = parse_page(server.page())
        load = load if isinstance(page, Unreadable) else page
        pool, _ = weigh(pool, [Sample("default/a", load, 10.0 * turn)], 10.0 * turn, 2.0)
        body = pool_load(Cluster("p", (A,)), pool, 10.0 * turn, turn)
        report = decode(discovery.Resource(name="p", resource=discovery.Any(type_url=LOAD_TYPE, value=body)), LOAD_TYPE)
        assert isinstance(report, PoolLoad)
        (pod,) = report.pods
        assert (pod.age < 0) is (load is None)
        assert math.isfinite(pod.running + pod.waiting + pod.kv_usage + pod.prefill_rate)
