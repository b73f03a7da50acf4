"""Time to read a metrics page: `python -m bench.parse_bench [PAGE...]`; without a file, the simulated pod's page."""

from __future__ import annotations

import sys
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from bench.vllm_engine import EngineConfig
from bench.vllm_page import MetricsPage
from bench.vllm_stats import EngineStats, HttpStats
from xds.exposition import parse_page

PODS, INTERVAL = 1_000, 2.0  # the fleet the figures are stated for: pods, seconds between two pages of one pod


def main(paths: Sequence[str]) -> None:
    """Print the time of one page, and the share of a core that PODS each INTERVAL take, for both parsers."""
    pages = {path: Path(path).read_bytes() for path in paths}
    if not pages:
        pages["simulated pod"] = MetricsPage(EngineConfig(), "model", 1.8e9).render(EngineStats(), HttpStats())
    for name, page in pages.items():
        print(f"{name}: {len(page):,} bytes, {len(page.splitlines())} lines")
        report("xds.exposition", partial(parse_page, page))
        report("prometheus_client", partial(read_all, page))


def read_all(page: bytes) -> int:
    """What prometheus_client has to do before the same values can be picked out."""
    return len(list(text_string_to_metric_families(page.decode())))


def report(parser: str, parse: Callable[[], object]) -> None:
    """The best of five rounds: what the work takes when nothing else has the core."""
    timer = timeit.Timer(parse)
    number, _ = timer.autorange()
    seconds = min(timer.repeat(5, number)) / number
    print(f"  {parser:18} {seconds * 1e6:9.1f} us a page {seconds * PODS / INTERVAL:9.3f} of a core for {PODS:,} pods")


if __name__ == "__main__":
    main(sys.argv[1:])
