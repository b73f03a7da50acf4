"""Poll every endpoint's /metrics and keep the last reading of each.

    set_targets(clusters) --> one task a metrics_url: fetch --parse_page--> Reading --> readings()

- A URL is asked once each interval, however many clusters it is in; the answer to one never waits for another's.
- A failed scrape keeps the last Load with the time it was read: whether it is too old is for xds/weights.py to say.
- Every task lives in `run`: cancel it and the connections are closed and nothing is left.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

import aiohttp
import structlog

from xds.exposition import Unreadable, parse_page
from xds.metrics import Metrics
from xds.model import Cluster, Load

INTERVAL = 2.0  # seconds: vLLM renews its gauges each engine step; routing gains little from more than one look in 2 s
TIMEOUT = 1.0  # seconds for a whole scrape: a page takes 5-14 ms, so a pod that needs longer is in trouble
CONCURRENCY = 512  # scrapes in flight: what 1,000 hung pods hold (TIMEOUT of each INTERVAL), so they delay no other
MAX_PAGE = 4 << 20  # bytes: a page of one engine has 50 KB, each further engine of a data-parallel pod adds about 40
SPREAD = 0.002  # seconds between the first scrapes of new targets: one begins at once, 1,000 fill one INTERVAL

EXPLAINED = {
    Unreadable.NOT_METRICS: "the answer is not a Prometheus page",
    Unreadable.NO_KV_USAGE: "neither vllm:kv_cache_usage_perc nor vllm:gpu_cache_usage_perc",
    Unreadable.BAD_GAUGE: "requests running or waiting, or a KV use, that are not a finite number of 0 or more",
}

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Reading:
    """What is known of one endpoint. `read_at` is when `load` was asked for, on the scraper's clock (seconds).

    `load` is None until the first page is read; later failures keep the last one. `failures` counts the scrapes that
    failed since then, `reason` says why the last one did ("" = it did not).
    """

    load: Load | None = None
    read_at: float = 0.0
    failures: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a scrape gave no page. `reason` is Unreachable, Timeout, Protocol, Status or TooLarge."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Target:
    """Whom a URL belongs to: another pod at the same address is another target. `cluster` labels its metrics."""

    cluster: str
    hash_key: str
    url: str


class Scraper:
    """Call `set_targets` whenever the endpoints change, before or while `run` runs; look at `readings` at any time.

    Mutable and bound to one event loop.
    """

    def __init__(
        self, metrics: Metrics, interval: float = INTERVAL, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._metrics = metrics
        self._interval = interval
        self._clock = clock
        self._targets: dict[str, Target] = {}
        self._readings: dict[str, Reading] = {}
        self._slots = asyncio.Semaphore(CONCURRENCY)
        self._changed = asyncio.Event()

    def set_targets(self, clusters: Iterable[Cluster]) -> None:
        """Scrape exactly these clusters' endpoints from now on; draining ones and those without a URL are left out."""
        wanted: dict[str, Target] = {}
        for cluster in sorted(clusters, key=lambda c: c.name):
            for endpoint in cluster.endpoints:
                if endpoint.metrics_url and not endpoint.draining:
                    target = Target(cluster.name, endpoint.hash_key, endpoint.metrics_url)
                    wanted.setdefault(endpoint.metrics_url, target)
        self._readings = {url: r for url, r in self._readings.items() if wanted.get(url) == self._targets[url]}
        self._targets = wanted
        self._changed.set()

    def readings(self) -> Mapping[str, Reading]:
        """The last reading of every target asked so far, by metrics_url: a copy."""
        return dict(self._readings)

    async def run(self) -> None:
        """Poll until cancelled."""
        async with (
            open_session(self._interval) as session,
            asyncio.TaskGroup() as group,
        ):
            tasks: dict[Target, asyncio.Task[None]] = {}
            while True:
                wanted = set(self._targets.values())
                for target in tasks.keys() - wanted:
                    tasks.pop(target).cancel()
                for place, target in enumerate(sorted(wanted - tasks.keys(), key=lambda t: t.url)):
                    delay = place * SPREAD % self._interval
                    tasks[target] = group.create_task(self._poll(session, target, delay))
                await self._changed.wait()
                self._changed.clear()

    async def _poll(self, session: aiohttp.ClientSession, target: Target, delay: float) -> None:
        due = self._clock() + delay
        while True:
            await asyncio.sleep(due - self._clock())
            async with self._slots:
                await self._scrape(session, target)
            late = max(0.0, self._clock() - due)  # a timer may fire a little early
            due += self._interval * (1 + late // self._interval)  # what was missed is skipped, the phase stays

    async def _scrape(self, session: aiohttp.ClientSession, target: Target) -> None:
        began = self._clock()
        page = await fetch(session, target.url, min(self._interval, TIMEOUT))
        if self._targets.get(target.url) != target:
            return  # replaced or gone while it was asked, and about to be cancelled
        load = page if isinstance(page, Failure) else parse_page(page)
        before = self._readings.get(target.url, Reading())
        if isinstance(load, Load):
            self._metrics.scrapes.labels(target.cluster, "ok").inc()
            self._metrics.scrape_seconds.labels(target.cluster).observe(self._clock() - began)
            self._readings[target.url] = Reading(load, began)
            if before.reason:
                log.info("scrape recovered", pool=target.cluster, endpoint=target.hash_key, failures=before.failures)
            return
        reason, detail = (load.reason, load.detail) if isinstance(load, Failure) else (str(load), EXPLAINED[load])
        self._metrics.scrapes.labels(target.cluster, reason).inc()
        self._readings[target.url] = Reading(before.load, before.read_at, before.failures + 1, reason)
        if not before.reason:
            log.warning(
                "scrape failed",
                pool=target.cluster,
                endpoint=target.hash_key,
                url=target.url,
                reason=reason,
                detail=detail,
            )


def open_session(interval: float) -> aiohttp.ClientSession:
    """Connections that outlive `interval`.

    Cookies, proxies and compression are off: a pod answers for itself, and its page is as large as it arrives. So are
    aiohttp's timeouts, which can swallow the cancellation of a task that comes in the turn in which one fires
    (https://github.com/aio-libs/aiohttp/issues/5979; seen with 3.14): `run` would never end.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3 * interval),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Accept-Encoding": "identity"},
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        auto_decompress=False,
    )


async def fetch(session: aiohttp.ClientSession, url: str, within: float) -> bytes | Failure:
    """The body of a 200 answer of at most MAX_PAGE bytes, whole `within` so many seconds, or why not."""
    try:
        async with asyncio.timeout(within), session.get(url, allow_redirects=False) as response:
            if response.status != HTTPStatus.OK:
                return Failure("Status", f"HTTP {response.status}")
            page = bytearray()
            async for chunk in response.content.iter_any():
                page += chunk
                if len(page) > MAX_PAGE:
                    return Failure("TooLarge", f"more than {MAX_PAGE} bytes")
            return bytes(page)
    except TimeoutError:
        return Failure("Timeout", "no whole answer in time")
    except (aiohttp.ClientConnectorError, aiohttp.InvalidURL, OSError) as error:
        return Failure("Unreachable", str(error))
    except aiohttp.ClientError as error:
        return Failure("Protocol", str(error))
