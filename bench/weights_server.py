"""A management server in a process of its own whose weights change each interval: what bench.many_clients measures.

`python -m bench.weights_server --endpoints 2000 --pools 20` prints its port, then a line for each publication: the
version of its endpoints, and when it was published, on the clock all processes of a machine share. A number on standard
input is how many pools get new weights from then on, at random for each endpoint. Every pool's load is new each time,
and each second where clients report what they have in flight, as xds/control.py has it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Mapping
from ipaddress import ip_address

import uvloop

from xds.envoy import Options
from xds.in_flight import INTERVAL as REPORT_INTERVAL
from xds.in_flight import InFlight
from xds.load_reports import LoadReports
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
from xds.quarantine import Quarantine
from xds.serve import calm_collector, raise_file_limit
from xds.server import ManagementServer
from xds.snapshot import ENDPOINT, Snapshot
from xds.translate import reweigh, translate, with_loads
from xds.weights import Pool, Sample, weigh

INTERVAL = 2.0  # seconds between two publications, as of the scrape interval


def topology(endpoints: int, pools: int) -> Topology:
    """So many endpoints in PREFIX_CACHE pools of equal size, with a route to each pool on one port."""
    each = endpoints // pools
    first = ip_address("127.1.0.1")  # nobody connects to them
    clusters = []
    for pool in range(pools):
        pods = (
            Endpoint(str(first + pool * each + pod), 8000, f"default/pool-{pool:04}-pod-{pod:05}")
            for pod in range(each)
        )
        clusters.append(Cluster(f"pool/default/pool-{pool:04}", tuple(sorted(pods)), Strategy.PREFIX_CACHE))
    routes = (
        Route(f"default/{c.name}/0/0", RouteMatch(), Forward(((c.name, 1, Filters()),), llm=True, picked=True))
        for c in clusters
    )
    return Topology((PortListener(8080, (VirtualHost("*", tuple(routes)),)),), tuple(clusters))


class Weights:
    """The snapshots to be published, one after another."""

    def __init__(self, served: Topology, in_flight: InFlight) -> None:
        self._clusters = served.clusters
        self._in_flight = in_flight
        self._pools = {}
        for cluster in served.clusters:
            samples = [Sample(e.hash_key, Load(running=3.0, kv_usage=0.4), 1.0) for e in cluster.endpoints]
            self._pools[cluster.name], _ = weigh(Pool(cluster.name), samples, 1.0, INTERVAL)
        self._rng = random.Random(1)
        self._round = 0
        self.snapshot = translate(served, Options(), {})

    def next(self, changing: int) -> Snapshot:
        """New weights for the endpoints of so many pools, and the next load report of each."""
        self._round += 1
        now = time.monotonic()
        loads = {
            c.name: pool_load(c, self._pools[c.name], now, self._round, self._in_flight.of(c.name, now))
            for c in self._clusters
        }
        self.snapshot = with_loads(self.snapshot, loads)
        changed = self._clusters[:changing]
        if changed:
            weights = {c.name: {e.hash_key: self._rng.randint(10, 100) for e in c.endpoints} for c in changed}
            self.snapshot = reweigh(self.snapshot, changed, weights)
        return self.snapshot


async def serve(endpoints: int, pools: int, interval: float) -> None:
    """Until cancelled, or until standard input ends."""
    served, metrics = topology(endpoints, pools), Metrics()
    reports = LoadReports(metrics)
    weights = Weights(served, reports.in_flight)
    quarantine = Quarantine()
    quarantine.offered(weights.snapshot, served, ())
    server = ManagementServer(metrics)

    def note(type_url: str, resources: Mapping[str, str], verdict: str) -> None:
        quarantine.answered(type_url, resources, verdict)

    server.follow_answers(note)
    server.publish(weights.snapshot)
    (port,) = await server.start(["127.0.0.1:0"], beside=[reports.handler()])
    calm_collector()
    print(port, flush=True)

    changing = pools
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)

    async def publish() -> None:
        due = time.monotonic()
        while True:
            due += interval
            await asyncio.sleep(due - time.monotonic())
            snapshot = weights.next(changing)
            print(snapshot.versions[ENDPOINT], time.monotonic(), flush=True)
            server.publish(snapshot)

    async def refresh_loads() -> None:
        while True:
            await asyncio.sleep(REPORT_INTERVAL)
            if reports.in_flight.is_reported(time.monotonic()):
                server.publish(weights.next(0))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(publish()), group.create_task(refresh_loads())]
        while order := await orders.readline():
            changing = int(order)
        for task in tasks:
            task.cancel()
    await server.stop(0)


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.weights_server", description=__doc__)
    parser.add_argument("--endpoints", type=int, default=2000, metavar="N", help="in all pools (default %(default)s)")
    parser.add_argument("--pools", type=int, default=20, metavar="N", help="of equal size (default %(default)s)")
    parser.add_argument("--interval", type=float, default=INTERVAL, metavar="SECONDS", help="default %(default)s")
    args = parser.parse_args()
    configure("json", "error")
    raise_file_limit()
    uvloop.run(serve(args.endpoints, args.pools, args.interval))


if __name__ == "__main__":
    main()
