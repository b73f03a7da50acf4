"""The scraper against pods on loopback that answer well, badly, slowly or not at all."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from statistics import median

import pytest
from structlog.testing import capture_logs

from xds.metrics import Metrics
from xds.model import Cluster, Endpoint, Load
from xds.scrape import MAX_PAGE, SPREAD, Failure, Reading, Scraper, Target, fetch, open_session

PAGE = (
    b'# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc{engine="0"} 0.25\nvllm:num_requests_running 3\n'
)
LOAD = Load(running=3.0, kv_usage=0.25)
INTERVAL = 0.05  # seconds
POOL = "pool/ns/qwen"

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


def ok(body: bytes = PAGE, head: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return head + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body


class Pods:
    """Many pods on one loopback port, told apart by path: `/a/metrics` is pod `a`'s. Speaks HTTP/1.1 with keep-alive.

    `answers[pod]` is the raw response, or a coroutine that writes it; None hangs. An answer that closes the connection
    is one that ends in `close`.
    """

    def __init__(self) -> None:
        self.answers: dict[str, bytes | Answer | None] = {}
        self.asked: Counter[str] = Counter()
        self.times: dict[str, list[float]] = defaultdict(list)
        self.connections = 0
        self.open = 0
        self.port = 0
        self._event = asyncio.Condition()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[Pods]:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            yield self
            server.close()
            await self.until(lambda: self.open == 0)

    def url(self, pod: str) -> str:
        return f"http://127.0.0.1:{self.port}/{pod}/metrics"

    def cluster(self, *pods: str, name: str = POOL) -> Cluster:
        return Cluster(name, tuple(Endpoint("127.0.0.1", self.port, f"ns/{p}", metrics_url=self.url(p)) for p in pods))

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait for something that a request or a connection makes true."""
        async with asyncio.timeout(20), self._event:
            await self._event.wait_for(true)

    async def more(self, pod: str, requests: int) -> None:
        """Wait for so many requests from now on. What came of the one before the last is in the readings by then."""
        now = self.asked[pod]
        await self.until(lambda: self.asked[pod] >= now + requests)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                assert b"accept-encoding: identity" in head.lower()
                pod = head.split(b"/")[1].decode()
                self.times[pod].append(time.monotonic())
                await self._count(pod)
                answer = self.answers.get(pod, ok())
                if answer is None:
                    await reader.read()  # until the scraper gives up
                    break
                if callable(answer):
                    await answer(writer)
                else:
                    writer.write(answer)
                    await writer.drain()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        self.open -= 1
        await self._count(None)

    async def _count(self, pod: str | None) -> None:
        async with self._event:
            if pod is not None:
                self.asked[pod] += 1
            self._event.notify_all()


@asynccontextmanager
async def scraping(
    pods: Pods, clusters: Iterable[Cluster], interval: float = INTERVAL, metrics: Metrics | None = None
) -> AsyncIterator[Scraper]:
    """A running scraper, cancelled at the end; the pods then see every connection closed."""
    scraper = Scraper(metrics or Metrics(), interval)
    scraper.set_targets(clusters)
    task = asyncio.create_task(scraper.run())
    try:
        yield scraper
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await pods.until(lambda: pods.open == 0)


@pytest.fixture
async def pods() -> AsyncIterator[Pods]:
    async with Pods().serve() as serving:
        yield serving


def count(metrics: Metrics, pool: str, result: str) -> float:
    return metrics.registry.get_sample_value("vllm_xds_scrapes_total", {"pool": pool, "result": result}) or 0.0


async def test_a_page_becomes_a_reading_over_one_connection(pods: Pods) -> None:
    """The load and the time it was asked for are kept, each interval anew, and the connection is used again."""
    metrics = Metrics()
    began = time.monotonic()
    async with scraping(pods, [pods.cluster("a")], metrics=metrics) as scraper:
        await pods.more("a", 2)
        first = scraper.readings()[pods.url("a")]
        await pods.more("a", 3)
        later = scraper.readings()[pods.url("a")]
        assert pods.connections == 1
    assert first.load == later.load == LOAD
    assert (later.failures, later.reason) == (0, "")
    assert began <= first.read_at < later.read_at <= time.monotonic()
    assert later.read_at - first.read_at > INTERVAL / 2
    assert count(metrics, POOL, "ok") >= 4
    asked = pods.asked["a"]
    await asyncio.sleep(0)
    assert pods.asked["a"] == asked  # nothing is left running after `run` was cancelled


async def closing(writer: asyncio.StreamWriter, *parts: bytes) -> None:
    for part in parts:
        writer.write(part)
    await writer.drain()
    writer.close()


CLOSED_HALFWAY = b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\nvllm:kv_cache_usage_perc 0.5\n"
BAD_CHUNK = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nvllm:kv_cache_usage_perc 0.5\r\n0\r\n\r\n"
CHUNK = b"10000\r\n" + 65_536 * b"#" + b"\r\n"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (ok(b"", b"HTTP/1.1 503 Service Unavailable"), "Status"),
        (ok(PAGE, b"HTTP/1.1 404 Not Found"), "Status"),
        (b"HTTP/1.1 302 Found\r\nlocation: /b/metrics\r\ncontent-length: 0\r\n\r\n", "Status"),
        (lambda w: closing(w, CLOSED_HALFWAY), "Protocol"),
        (lambda w: closing(w, b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), "Protocol"),
        (lambda w: closing(w, b"\x00\xff" * 5000), "Protocol"),
        (lambda w: closing(w, b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n"), "Protocol"),
        (BAD_CHUNK, "Protocol"),
        (ok(b"#" * (MAX_PAGE + 1)), "TooLarge"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + CHUNK * 70, "TooLarge"),
        (None, "Timeout"),
    ],
)
async def test_what_is_no_page_has_its_reason(pods: Pods, answer: bytes | Answer | None, reason: str) -> None:
    """Every way a pod can fail to answer is told by name, a redirect is not followed, and nothing raises."""
    pods.answers["a"] = answer
    async with open_session(INTERVAL) as session:
        failure = await fetch(session, pods.url("a"), within=0.5)
    assert isinstance(failure, Failure)
    assert failure.reason == reason
    assert failure.detail
    assert pods.asked["b"] == 0


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/metrics", "http://[::1/metrics", "not a url"])
async def test_an_address_nobody_answers_is_unreachable(url: str) -> None:
    """A closed port and a broken URL are failures like others."""
    async with open_session(INTERVAL) as session:
        failure = await fetch(session, url, within=0.5)
    assert isinstance(failure, Failure)
    assert failure.reason == "Unreachable"


async def test_a_page_that_drips_is_cut_off_by_the_total_time(pods: Pods) -> None:
    """A pod that keeps sending something is not alive forever: the timeout is for the whole page."""

    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n")
        while True:
            writer.write(b"#")
            await writer.drain()
            await asyncio.sleep(0.01)

    pods.answers["a"] = drip
    async with open_session(INTERVAL) as session:
        failure = await fetch(session, pods.url("a"), within=0.2)
    assert failure == Failure("Timeout", "no whole answer in time")


async def test_a_cancelled_fetch_ends_even_as_it_times_out(pods: Pods) -> None:
    """A fetch of a hung pod that is cancelled in the turn in which its timeout fires is cancelled, not a failure."""
    pods.answers["a"] = None
    cancelled = []

    def cancel(task: asyncio.Task[bytes | Failure]) -> None:
        if task.cancel():
            cancelled.append(task)

    async with open_session(INTERVAL) as session:
        fetches = [asyncio.create_task(fetch(session, pods.url("a"), within=0.1)) for _ in range(60)]
        for n, task in enumerate(fetches):
            asyncio.get_running_loop().call_later(0.1 + (n - 30) * 0.0002, cancel, task)
        await asyncio.wait(fetches)
    assert cancelled
    assert all(task.cancelled() for task in cancelled)


async def test_compression_is_not_undone(pods: Pods) -> None:
    """A small answer cannot become a large page: what is called gzip stays what it is."""
    body = gzip.compress(PAGE)
    pods.answers["a"] = ok(body, b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip")
    async with open_session(INTERVAL) as session:
        assert await fetch(session, pods.url("a"), within=5) == body


async def test_a_clock_that_runs_late_costs_no_second_scrape(pods: Pods) -> None:
    """A timer that fires early on the scraper's clock does not make it ask twice an interval."""
    scraper = Scraper(Metrics(), interval=0.1, clock=lambda: time.monotonic() * 0.9)
    scraper.set_targets([pods.cluster("a")])
    task = asyncio.create_task(scraper.run())
    await pods.more("a", 9)
    task.cancel()
    await asyncio.wait([task])
    gaps = [later - earlier for earlier, later in pairwise(pods.times["a"])]
    assert sum(gap < 0.05 for gap in gaps) <= 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [(b"<html>", "NotMetrics"), (gzip.compress(PAGE), "NotMetrics"), (b"\n# TYPE a gauge\na 1\n", "NoKVUsage")],
)
async def test_a_page_that_tells_nothing_is_a_failure(pods: Pods, body: bytes, reason: str) -> None:
    """An answer without a KV gauge is counted and named, and is no load."""
    pods.answers["a"] = ok(body)
    metrics = Metrics()
    async with scraping(pods, [pods.cluster("a")], metrics=metrics) as scraper:
        await pods.more("a", 2)
        reading = scraper.readings()[pods.url("a")]
    assert (reading.load, reading.reason) == (None, reason)
    assert count(metrics, POOL, reason) >= 1
    assert count(metrics, POOL, "ok") == 0


async def test_failing_and_recovering_are_told_once_and_keep_the_last_load(pods: Pods) -> None:
    """However long a pod fails, and for whatever reasons, there is one line when it begins and one when it ends."""
    with capture_logs() as logs:
        async with scraping(pods, [pods.cluster("a")]) as scraper:
            await pods.more("a", 2)
            pods.answers["a"] = ok(b"", b"HTTP/1.1 500 Internal Server Error")
            await pods.more("a", 2)
            before = scraper.readings()[pods.url("a")]
            await pods.more("a", 2)
            pods.answers["a"] = ok(b"<html>")
            await pods.more("a", 3)
            failing = scraper.readings()[pods.url("a")]
            pods.answers["a"] = ok()
            await pods.more("a", 3)
            recovered = scraper.readings()[pods.url("a")]
    assert before.load == failing.load == LOAD
    assert before.read_at == failing.read_at
    assert 0 < before.failures < failing.failures
    assert failing.reason == "NotMetrics"
    assert recovered == Reading(LOAD, recovered.read_at)
    assert recovered.read_at > failing.read_at
    assert [(line["event"], line["endpoint"], line["log_level"]) for line in logs] == [
        ("scrape failed", "ns/a", "warning"),
        ("scrape recovered", "ns/a", "info"),
    ]
    assert (logs[0]["reason"], logs[0]["detail"], logs[0]["pool"]) == ("Status", "HTTP 500", POOL)
    assert logs[1]["failures"] >= failing.failures


async def test_a_hung_pod_delays_no_other(pods: Pods) -> None:
    """While some pods answer nothing at all, the others are read at their pace."""
    hung = [f"hung{n}" for n in range(30)]
    pods.answers |= dict.fromkeys(hung)
    async with scraping(pods, [pods.cluster("a", *hung)], interval=0.4) as scraper:
        await pods.until(lambda: pods.asked["a"] >= 4)
        readings = scraper.readings()
    assert readings[pods.url("a")].load == LOAD
    assert pods.times["a"][3] - pods.times["a"][0] < 30 * 0.4 / 2  # one after the other they would take 30 * 0.4
    assert {readings[pods.url(pod)].reason for pod in hung} == {"Timeout"}


async def test_a_pod_of_two_clusters_is_asked_once(pods: Pods) -> None:
    """One task a URL: two clusters that share a pod cost it one scrape each interval, counted for the first by name."""
    metrics = Metrics()
    clusters = [pods.cluster("a", name="pool/ns/z"), pods.cluster("a", "b", name="pool/ns/y")]
    async with scraping(pods, clusters, metrics=metrics) as scraper:
        await pods.more("b", 6)
        assert set(scraper.readings()) == {pods.url("a"), pods.url("b")}
        assert abs(pods.asked["a"] - pods.asked["b"]) <= 2
    assert count(metrics, "pool/ns/y", "ok") >= 10
    assert count(metrics, "pool/ns/z", "ok") == 0


async def test_a_new_endpoint_is_asked_at_once(pods: Pods) -> None:
    """It does not wait for a round: with 60 s between two scrapes it is asked within the time a test waits."""
    async with scraping(pods, [pods.cluster("a")], interval=60) as scraper:
        await pods.more("a", 1)
        scraper.set_targets([pods.cluster("a", "b", "c")])
        await pods.until(lambda: pods.asked["b"] == pods.asked["c"] == 1)
    assert pods.asked["a"] == 1


async def test_an_endpoint_that_is_gone_is_forgotten_and_asked_no_more(pods: Pods) -> None:
    """Its reading goes with the change itself, its requests end, and with no target at all none is left."""
    async with scraping(pods, [pods.cluster("a")]) as scraper:
        await pods.more("a", 2)
        assert set(scraper.readings()) == {pods.url("a")}
        scraper.set_targets([pods.cluster("b")])
        assert scraper.readings() == {}
        await pods.more("b", 1)
        asked = pods.asked["a"]
        await pods.more("b", 6)
        assert pods.asked["a"] == asked
        assert set(scraper.readings()) == {pods.url("b")}
        scraper.set_targets([])
        assert scraper.readings() == {}


async def test_an_answer_that_comes_after_its_endpoint_is_gone_is_dropped(pods: Pods) -> None:
    """Between the change and the end of the endpoint's task an answer may still arrive: it leaves no reading behind."""
    scraper = Scraper(Metrics(), INTERVAL)
    scraper.set_targets([pods.cluster("a")])

    async def go(writer: asyncio.StreamWriter) -> None:
        scraper.set_targets([])
        writer.write(ok())

    pods.answers["a"] = go
    async with open_session(INTERVAL) as session:
        await scraper._scrape(session, Target(POOL, "ns/a", pods.url("a")))
    assert pods.asked["a"] == 1
    assert scraper.readings() == {}


async def test_an_endpoint_that_stays_is_not_disturbed_by_a_change(pods: Pods) -> None:
    """Setting targets again and again neither asks an unchanged one more often nor loses its reading."""
    async with scraping(pods, [pods.cluster("a")], interval=0.5) as scraper:
        await pods.more("a", 2)
        for n in range(50):
            scraper.set_targets([pods.cluster("a", f"b{n}")])
            await pods.until(lambda n=n: pods.asked[f"b{n}"] == 1)  # type: ignore[misc]
            assert scraper.readings()[pods.url("a")].load == LOAD
        spent = pods.times["a"][-1] - pods.times["a"][0]
        assert pods.asked["a"] <= spent / 0.5 + 2


async def test_another_pod_at_the_same_address_starts_from_nothing(pods: Pods) -> None:
    """The reading of a pod whose address was given to another is not taken for the new one's."""
    async with scraping(pods, [pods.cluster("a")], interval=0.2) as scraper:
        await pods.more("a", 2)
        pods.answers["a"] = ok(PAGE.replace(b"running 3", b"running 9"))
        endpoint = Endpoint("127.0.0.1", pods.port, "ns/other", metrics_url=pods.url("a"))
        scraper.set_targets([Cluster(POOL, (endpoint,))])
        assert scraper.readings() == {}
        await pods.more("a", 2)
        assert scraper.readings()[pods.url("a")].load == Load(running=9.0, kv_usage=0.25)


async def test_draining_endpoints_and_those_without_a_url_are_not_asked(pods: Pods) -> None:
    """Only endpoints that may get new requests are read."""
    draining = Endpoint("127.0.0.1", pods.port, "ns/d", draining=True, metrics_url=pods.url("d"))
    silent = Endpoint("127.0.0.1", pods.port, "ns/s")
    cluster = Cluster(POOL, (draining, silent, *pods.cluster("a").endpoints))
    async with scraping(pods, [cluster]) as scraper:
        await pods.more("a", 3)
        assert set(scraper.readings()) == {pods.url("a")}
    assert set(pods.asked) == {"a"}


async def test_many_new_targets_are_spread_and_keep_their_phase(pods: Pods) -> None:
    """A hundred pods are not asked in one moment, neither in the first round nor in the next."""
    names = [f"p{n:03}" for n in range(100)]
    async with scraping(pods, [pods.cluster(*names)], interval=0.4):
        await pods.until(lambda: min(pods.asked[name] for name in names) >= 2)
    for turn in range(2):
        at = sorted(pods.times[name][turn] for name in names)
        assert at[-1] - at[0] > 99 * SPREAD / 2


async def test_a_stall_leaves_the_phases(pods: Pods) -> None:
    """When the loop has stood still all are asked at once, and after that each at its own time again: spread."""
    names, interval = [f"p{n:02}" for n in range(50)], 0.4
    async with scraping(pods, [pods.cluster(*names)], interval):
        await pods.until(lambda: min(pods.asked[name] for name in names) >= 1)
        before = dict(pods.asked)
        time.sleep(1.25 * interval)  # noqa: ASYNC251 - the stall
        await pods.until(lambda: all(pods.asked[name] >= before[name] + 2 for name in names))
    later = {name: pods.times[name][before[name] + 1] for name in names}
    phases = [(later[name] - pods.times[name][0]) % interval for name in names]
    assert median(min(phase, interval - phase) for phase in phases) < interval / 5
    assert max(later.values()) - min(later.values()) > 49 * SPREAD / 2
