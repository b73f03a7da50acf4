"""From a change to the real Envoy's ACK: `python -m bench.change_ack`.

Weights: from `publish` of a snapshot with new weights of every endpoint to the ACK of its endpoints. Configuration:
from the last byte of a saved YAML file to the ACK of everything that follows from it.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import ip_address
from pathlib import Path

import bootstrap
from bench.envoy import Envoy, free_port
from bench.load import percentile
from bench.page_cost import ROUNDS, fastest
from bench.report import Table, millis, progress, show
from bench.rig import BY_MODEL, PICKED, PLAIN, RigError, manifests, pod_network, start_pods
from xds.control import Control
from xds.directory import DirectorySource
from xds.endpoints import assignment
from xds.envoy import Options
from xds.loads import pool_load
from xds.log import configure
from xds.metrics import Metrics
from xds.model import (
    Cluster,
    Endpoint,
    Filters,
    Forward,
    Load,
    PortListener,
    Route,
    RouteMatch,
    Strategy,
    Topology,
    VirtualHost,
)
from xds.scrape import Scraper
from xds.server import ManagementServer
from xds.translate import Weights, reweigh, translate
from xds.weights import Pool, Sample, weigh

ENDPOINTS = (10, 100, 1_000)
CHANGES = 100  # of weights, each size
SAVES = 20  # of a file
PAUSE = 0.02  # seconds between two changes: each finds an Envoy that has nothing else to do
INTERVAL = 2.0  # seconds between scrapes
BOUND = 30.0  # seconds for an ACK, far above what it takes


@asynccontextmanager
async def envoy_and_server(scratch: Path, server: ManagementServer) -> AsyncIterator[None]:
    """`server`, which has something to serve or will have soon, and an Envoy that is ready."""
    admin = f"127.0.0.1:{free_port()}"
    (port,) = await server.start(["127.0.0.1:0"])
    bootstrap_file = scratch / "envoy.yaml"
    bootstrap_file.write_text(bootstrap.render(f"127.0.0.1:{port}", admin=admin))
    try:
        async with Envoy(bootstrap_file, admin, scratch / "envoy.log") as envoy:
            await envoy.ready(BOUND)
            await settled(server)
            yield
    finally:
        await server.stop(0)


async def settled(server: ManagementServer) -> None:
    async with asyncio.timeout(BOUND):
        await server.wait_settled()


async def weights(endpoints: int, changes: int = CHANGES) -> tuple[str, ...]:
    """One row: publish to ACK, and what the server computes before it can publish."""
    progress(f"new weights for {endpoints:,} endpoints")
    first, pod_port, rng = pod_network(), free_port(), random.Random(1)
    cluster = _pool(first, endpoints, pod_port)
    server = ManagementServer(Metrics())
    snapshot = translate(_topology(cluster), Options(bind="127.0.0.1"), {})
    server.publish(snapshot)
    acks, encodes = [], []
    async with AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-xds-bench-")))
        await start_pods(stack, first, endpoints, pod_port)  # health checks go on, as they do in production
        await stack.enter_async_context(envoy_and_server(scratch, server))
        for _ in range(changes):
            new = _weights(cluster, rng)
            began = time.perf_counter()
            snapshot = reweigh(snapshot, [cluster], new)
            encodes.append(time.perf_counter() - began)
            began = time.perf_counter()
            server.publish(snapshot)
            await settled(server)
            acks.append(time.perf_counter() - began)
            await asyncio.sleep(PAUSE)
        if any(each.refused for client in server.clients() for each in client.types):
            raise RigError("Envoy refused an update")
    acks.sort()
    encodes.sort()
    size = len(assignment(cluster, new[cluster.name]))
    both = (percentile(acks, 50), percentile(acks, 99))
    return (f"{endpoints:,}", str(changes), *map(millis, both), millis(percentile(encodes, 50)), f"{size:,}")


def computing(endpoints: int, rounds: int = ROUNDS) -> tuple[str, ...]:
    """One row: what a round of weights computes for a pool, apart from Envoy; the best of `rounds` counts."""
    cluster = _pool("127.1.0.1", endpoints, 8000)
    samples = [Sample(each.hash_key, Load(running=3.0, kv_usage=0.4), 1.0) for each in cluster.endpoints]
    pool, _ = weigh(Pool(cluster.name), samples, 1.0, INTERVAL)
    weighing = fastest(lambda: weigh(pool, samples, 3.0, INTERVAL), rounds)
    encoding = fastest(lambda: assignment(cluster, {}), rounds)
    load = fastest(lambda: pool_load(cluster, pool, 1.0, 1), rounds)
    return (f"{endpoints:,}", *map(millis, (weighing, encoding, load)))


def _weights(cluster: Cluster, rng: random.Random) -> Weights:
    return {cluster.name: {each.hash_key: rng.randint(10, 100) for each in cluster.endpoints}}


def _pool(first: str, endpoints: int, port: int) -> Cluster:
    pods = (Endpoint(str(ip_address(first) + i), port, f"default/pod-{i}") for i in range(endpoints))
    return Cluster("pool/default/pool", tuple(sorted(pods)), Strategy.PREFIX_CACHE)


def _topology(cluster: Cluster) -> Topology:
    forward = Forward(((cluster.name, 1, Filters()),), llm=True, picked=True)
    host = VirtualHost("*", (Route("default/route/0/0", RouteMatch(), forward),))
    return Topology((PortListener(free_port(), (host,)),), (cluster,))


async def saves(count: int = SAVES, pods: int = 10) -> tuple[str, ...]:
    """One row: a route's YAML is saved, and Envoy has accepted it."""
    progress("saved files")
    metrics, first = Metrics(), pod_network()
    server = ManagementServer(metrics)
    control = Control(server, Scraper(metrics, INTERVAL), metrics, interval=INTERVAL, options=Options(bind="127.0.0.1"))
    ports = {name: free_port() for name in (PLAIN, PICKED, BY_MODEL)}
    text = manifests(ports, free_port(), first, pods)
    times = []
    async with AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-xds-bench-")))
        config = scratch / "config"
        config.mkdir()
        file = config / "gateway.yaml"
        file.write_text(text)
        running = asyncio.create_task(control.run(DirectorySource(config).configs()))
        try:
            await stack.enter_async_context(envoy_and_server(scratch, server))
            for number in range(count):
                before = control.topology
                file.write_text(text.replace("value: ", f"value: {number}"))  # of the header a route matches
                began = time.perf_counter()
                async with asyncio.timeout(BOUND):
                    await control.wait_until(lambda now, before=before: now.topology != before)  # type: ignore[misc]
                await settled(server)
                times.append(time.perf_counter() - began)
                await asyncio.sleep(PAUSE)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    times.sort()
    return (f"{pods} pods", str(count), millis(percentile(times, 50)), millis(times[-1]))


async def measure() -> list[Table]:
    changed = [await weights(endpoints) for endpoints in ENDPOINTS]
    return [
        Table(
            "New weights to Envoy's ACK",
            ("endpoints", "changes", "publish to ACK p50 ms", "p99 ms", "new snapshot before it, ms", "bytes of EDS"),
            tuple(changed),
        ),
        Table(
            "A round of weights",
            ("endpoints", "weigh ms", "encode ClusterLoadAssignment ms", "encode PoolLoad ms"),
            tuple(computing(endpoints) for endpoints in ENDPOINTS),
        ),
        Table("A saved file to Envoy's ACK", ("gateway", "saves", "p50 ms", "worst ms"), (await saves(),)),
    ]


if __name__ == "__main__":
    configure("json", "error")
    show(asyncio.run(measure()))
