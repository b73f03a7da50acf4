"""What reading metrics pages costs: `python -m bench.page_cost [PAGE...]`.

Parsing alone, ours and prometheus_client's, for pages in files or the simulated pod's; then the whole scraper with a
pod at each of 1,000 addresses, all good ones at first, then some that hang, are slow, or have pages of 4 MB.
"""

from __future__ import annotations

import asyncio
import sys
import time
import timeit
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import uvloop
from prometheus_client.parser import text_string_to_metric_families

from bench.envoy import free_port
from bench.instant_pod import vllm_page
from bench.load import percentile
from bench.report import Table, micros, number, progress, show
from bench.rig import RigError, pod_network, start_pods
from xds.exposition import parse_page
from xds.log import configure
from xds.metrics import Metrics
from xds.model import Cluster, Endpoint, Strategy
from xds.scrape import INTERVAL, Scraper

PODS = 1_000  # of the fleet the figures are stated for
BAD = {"hung": 100, "slow": 25, "large": 25}  # of PODS
LOOKS = 20  # each interval at the readings' ages
ROUNDS = 5  # of each parser, of which the best counts; intervals the whole scraper is watched


def parsers(pages: Mapping[str, bytes], rounds: int = ROUNDS) -> Table:
    """Time of one page for both parsers, and the share of a core that PODS pages each INTERVAL take."""
    rows = []
    for name, page in pages.items():
        progress(f"parsing: {name}")
        for parser, parse in (("xds.exposition", partial(parse_page, page)), ("prometheus_client", _all(page))):
            seconds = fastest(parse, rounds)
            size = f"{name}, {len(page):,} bytes, {len(page.splitlines())} lines"
            rows.append((size, parser, micros(seconds), number(seconds * PODS / INTERVAL)))
    columns = ("page", "parser", "us a page", f"cores for {PODS:,} pods each {INTERVAL:g} s")
    return Table("Parsing a metrics page", columns, tuple(rows))


def _all(page: bytes) -> Callable[[], object]:
    """What prometheus_client has to do before the same values can be picked out."""
    return lambda: list(text_string_to_metric_families(page.decode()))


def fastest(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Seconds of the best round: what the work takes when nothing else has the core."""
    timer = timeit.Timer(work)
    number_of, _ = timer.autorange()
    return min(timer.repeat(rounds, number_of)) / number_of


async def scraper(pods: int = PODS, interval: float = INTERVAL, rounds: int = ROUNDS, **bad: int) -> tuple[str, ...]:
    """One row: this process's CPU while the product's scraper reads `pods` pages each `interval` seconds over HTTP, and
    how old the readings of the good pods get. `bad`: how many of the pods are of each bad kind."""
    kinds = "".join(f", {number} {kind}" for kind, number in bad.items())
    progress(f"scraping {pods:,} pods each {interval:g} s{kinds}")
    port, first = free_port(), pod_network()
    async with AsyncExitStack() as stack:
        await start_pods(stack, first, pods, port, **bad)
        metrics = Metrics()
        scraper = Scraper(metrics, interval)
        fleet = _fleet(first, pods, port)
        good = [f"http://{ip_address(first) + index}:{port}/metrics" for index in range(pods - sum(bad.values()))]
        scraper.set_targets([fleet])
        running, started = asyncio.create_task(scraper.run()), time.monotonic()
        await asyncio.sleep(2 * interval)  # connections are opened in the first
        before, began, read = time.process_time(), time.perf_counter(), _pages(metrics)
        ages: list[float] = []
        for _ in range(rounds * LOOKS):
            await asyncio.sleep(interval / LOOKS)
            readings, now = scraper.readings(), time.monotonic()
            ages += (now - max(readings[url].read_at, started) for url in good)
        cpu, elapsed, read = time.process_time() - before, time.perf_counter() - began, _pages(metrics) - read
        failing = sum(reading.failures > 0 for reading in scraper.readings().values())
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    if not read:
        raise RigError("not one page was read")
    ages.sort()
    age = (number(percentile(ages, 50)), number(ages[-1]))
    return (f"{pods:,}{kinds}", f"{read:,}", str(failing), micros(cpu / read), number(cpu / elapsed), *age)


def _fleet(first: str, pods: int, port: int) -> Cluster:
    addresses = [str(ip_address(first) + index) for index in range(pods)]
    endpoints = (
        Endpoint(each, port, f"default/{each}", metrics_url=f"http://{each}:{port}/metrics") for each in addresses
    )
    return Cluster("pool", tuple(sorted(endpoints)), Strategy.DEFAULT)


def _pages(metrics: Metrics) -> int:
    return round(metrics.registry.get_sample_value("vllm_xds_scrapes_total", {"pool": "pool", "result": "ok"}) or 0)


async def measure(pages: Mapping[str, bytes]) -> list[Table]:
    columns = ("pods", "pages read", "pods failing", "us a page, fetched and parsed", "cores", "age p50 s", "oldest s")
    rows = (await scraper(), await scraper(**BAD))
    return [parsers(pages), Table(f"Scraping over HTTP each {INTERVAL:g} s", columns, rows)]


def main(paths: list[str]) -> None:
    pages = {path: Path(path).read_bytes() for path in paths} or {"simulated pod": vllm_page()}
    configure("json", "error")
    show(uvloop.run(measure(pages)))  # the loop the server runs on


if __name__ == "__main__":
    main(sys.argv[1:])
