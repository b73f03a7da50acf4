"""What following an API server costs: `python -m bench.api_scale`, from a checkout (the API server is the tests' own).

`vllm-xds serve --kubernetes` as a process before 10,000 pods, 50 of which change each second: time and memory until it
is ready, CPU afterwards. And where the time of one change goes, in one thread.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import aiohttp
import yaml
from prometheus_client.parser import text_string_to_metric_families

from bench.child import end, with_parent
from bench.envoy import free_port
from bench.page_cost import ROUNDS, fastest
from bench.report import Table, cpu_seconds, millis, number, progress, show
from xds.envoy import Options
from xds.index import LiveIndex
from xds.parse import parse
from xds.resolve import resolve
from xds.translate import translate

# Pods, how many of them the pool has, and HTTPRoutes with a hostname each.
CASES = ((1_000, 1_000, 10), (10_000, 1_000, 10), (10_000, 1_000, 500), (10_000, 10_000, 10))
RATE = 50.0  # pods a second that change
SECONDS = 20.0  # of watching
READY = 120.0  # seconds
POLL = 0.05  # seconds between two looks at what is not ready


async def follow(pods: int, pool: int, routes: int, seconds: float = SECONDS) -> tuple[str, ...]:
    """One row: until ready, and then while RATE pods a second change."""
    progress(_name(pods, pool, routes))
    async with AsyncExitStack() as stack:
        kubeconfig = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-xds-bench-"))) / "kubeconfig"
        counts = ("--pods", str(pods), "--pool", str(pool), "--routes", str(routes), "--rate", str(RATE))
        api = await _start(stack, "tests.apiserver_scale", *counts, "--kubeconfig", str(kubeconfig), stdout=True)
        assert api.stdout is not None  # noqa: S101 - a pipe was asked for
        await api.stdout.readline()
        status = f"127.0.0.1:{free_port()}"
        began = time.monotonic()
        options = ("--kubeconfig", str(kubeconfig), "--listen", f"127.0.0.1:{free_port()}", "--status", status)
        server = await _start(stack, "xds", "serve", "--kubernetes", *options, "--log-level", "warning")
        session = await stack.enter_async_context(aiohttp.ClientSession())
        async with asyncio.timeout(READY):
            while not await _is_ready(session, status):  # noqa: ASYNC110 - another process sets no event here
                await asyncio.sleep(POLL)
        ready, start_cpu = time.monotonic() - began, cpu_seconds(server.pid)
        cpu, api_cpu, configs = cpu_seconds(server.pid), cpu_seconds(api.pid), await _configs(session, status)
        await asyncio.sleep(seconds)
        cpu, api_cpu = cpu_seconds(server.pid) - cpu, cpu_seconds(api.pid) - api_cpu
        configs = await _configs(session, status) - configs
        return (
            _name(pods, pool, routes),
            number(ready),
            number(start_cpu),
            number(_resident(server.pid) / 2**20),
            number(cpu / seconds * 100),
            number(configs / seconds),
            number(api_cpu / seconds * 100),
        )


def change(pods: int, pool: int, routes: int, rounds: int = ROUNDS) -> tuple[str, ...]:
    """One row: what a change of one pod costs on its way to a snapshot; the best of `rounds` counts."""
    from tests.apiserver_scale import GATEWAY, ROUTE, pod  # noqa: PLC0415 - not in the wheel

    index = LiveIndex()

    def put(value: object) -> None:
        parsed = parse(value)
        assert parsed.ref is not None  # noqa: S101 - ours
        index.put(parsed.ref, parsed)

    for value in yaml.safe_load_all(GATEWAY):
        put(value)
    for i in range(routes):
        put(yaml.safe_load(ROUTE.format(index=i)))
    for i in range(pods):
        put(pod(i, "vllm" if i < pool else "other"))
    states = [pod(0, "vllm", ready) for ready in (True, False)]

    def alternate() -> None:
        for value in states:
            put(value)

    def configs() -> None:
        for value in states:
            put(value)
            index.config()

    parsing = fastest(alternate, rounds) / 2
    indexing = max(0.0, fastest(configs, rounds) / 2 - parsing)
    config = index.config()
    topology = resolve(config)
    weights = {each.name: {e.hash_key: 100 for e in each.endpoints} for each in topology.clusters}
    resolving = fastest(partial(resolve, config), rounds)
    translating = fastest(partial(translate, topology, Options(), weights), rounds)
    return (_name(pods, pool, routes), *map(millis, (parsing, indexing, resolving, translating)))


def _name(pods: int, pool: int, routes: int) -> str:
    return f"{pods:,} pods, {pool:,} in the pool, {routes} routes"


async def _start(stack: AsyncExitStack, *arguments: str, stdout: bool = False) -> asyncio.subprocess.Process:
    out = asyncio.subprocess.PIPE if stdout else asyncio.subprocess.DEVNULL
    command = with_parent(sys.executable, "-m", *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdout=out)
    stack.push_async_callback(end, process)
    return process


async def _is_ready(session: aiohttp.ClientSession, status: str) -> bool:
    try:
        async with session.get(f"http://{status}/readyz") as response:
            return response.status == 200
    except aiohttp.ClientConnectionError:
        return False


async def _configs(session: aiohttp.ClientSession, status: str) -> float:
    """How many Configs it has made so far."""
    async with session.get(f"http://{status}/metrics") as response:
        families = text_string_to_metric_families(await response.text())
        return sum(s.value for family in families for s in family.samples if s.name == "vllm_xds_config_loads_total")


def _resident(pid: int) -> int:
    """Bytes of memory (proc_pid_status(5): VmRSS)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def main(cases: Sequence[tuple[int, int, int]] = CASES, seconds: float = SECONDS) -> None:
    columns = (
        "cluster",
        "ready s",
        "CPU until then s",
        "memory MiB",
        "CPU %",
        "Configs a second",
        "API server's CPU %",
    )
    rows = tuple(asyncio.run(follow(*case, seconds)) for case in cases)
    title = f"Following an API server, {RATE:g} pods changing a second"
    parts = ("cluster", "parse, index ms", "Config ms", "resolve ms", "translate ms")
    changes = tuple(change(*case) for case in cases)
    show([Table(title, columns, rows), Table("One change of one pod", parts, changes)])


if __name__ == "__main__":
    main()
