"""One management server, up to 1,000 Envoys, new weights each 2 s: `python -m bench.many_clients`, four minutes.

The server is a process of its own (bench.weights_server); the clients (bench.xds_clients) live in this one, cheap
enough to leave the server a core. Its CPU time is the figure that does not depend on who else uses the machine.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import uvloop

from bench.child import end, with_parent
from bench.load import percentile
from bench.report import Table, cpu_seconds, micros, millis, number, progress, show
from bench.rig import RigError
from bench.weights_server import INTERVAL, topology
from bench.xds_clients import BAD, GOOD, Fleet, Manner, XdsClient
from xds.envoy import Options
from xds.log import configure
from xds.serve import raise_file_limit
from xds.snapshot import CLUSTER, ENDPOINT, LISTENER, ROUTE
from xds.stream import DeltaStream
from xds.translate import translate
from xds.wire import discovery_pb2 as wire
from xds.wire import endpoint_pb2, load_stats_pb2

CLIENTS = (10, 100, 1_000)
AT_ONCE = (1_000, 3_000)
ENDPOINTS = (100, 1_000, 10_000)
USUAL, POOLS = 2_000, 20  # endpoints, where clients are varied; pools
SOME = 100  # clients, where endpoints are varied, and of each kind whose memory is measured
REPORTED = (1, 10)  # endpoints of each pool that every client reports requests in flight to
BAD_EACH = 50  # among the good ones
ROUNDS = 4  # publications watched, after one to come to rest
FAST = 0.5  # seconds between publications where memory is watched
WARM = 24  # publications until what the server keeps for all clients is there: xds.stream.KEPT and a few
READY = 60.0  # seconds for clients to have everything, far above what it takes
KIB = 1024

COLUMNS = (
    "cores",
    "CPU us a client and change",
    "ACK p50 ms",
    "p99 ms",
    "last ACK p50 ms",
    "worst ms",
    "MB sent a change",
    "RSS MB",
    "peak MB",
)


@dataclass(frozen=True, slots=True)
class Watched:
    """What was seen of some rounds. Seconds, sorted: `acks` from each publication to each client's ACK, `last` to the
    last client's. `cpu` in seconds, the server's; `sent` in bytes; memory in KiB."""

    rounds: int
    elapsed: float
    cpu: float
    acks: Sequence[float]
    last: Sequence[float]
    sent: int
    rss: int
    peak: int

    def cells(self, clients: int) -> tuple[str, ...]:
        """The cells of COLUMNS; no times where nothing was sent."""
        times: tuple[str, ...] = ("",) * 4
        if self.last:
            ack, last = self.acks, self.last
            times = tuple(map(millis, (percentile(ack, 50), percentile(ack, 99), percentile(last, 50), last[-1])))
        return (
            number(self.cpu / self.elapsed),
            micros(self.cpu / clients / self.rounds),
            *times,
            number(self.sent / self.rounds / 1e6),
            number(self.rss / KIB),
            number(self.peak / KIB),
        )


class Server:
    """bench.weights_server as a child, `async with`: `published` has when each version of the endpoints was."""

    def __init__(self, endpoints: int = USUAL, pools: int = POOLS, interval: float = INTERVAL) -> None:
        self.endpoints = endpoints
        self.pools = pools
        self.interval = interval
        self.published: dict[str, float] = {}
        self.rounds = 0  # published so far
        self._round = asyncio.Event()
        self._arguments = ("--endpoints", endpoints, "--pools", pools, "--interval", interval)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        command = with_parent(sys.executable, "-m", "bench.weights_server", *map(str, self._arguments))
        pipe = subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        self._stack.push_async_callback(end, self._process)
        assert self._process.stdout is not None  # noqa: S101 - a pipe was asked for
        port = await self._process.stdout.readline()
        if not port:
            raise RigError("the server ended before it listened")
        self.address = f"127.0.0.1:{int(port)}"
        following = asyncio.create_task(self._follow(self._process.stdout))
        self._stack.callback(following.cancel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _follow(self, lines: asyncio.StreamReader) -> None:
        while line := await lines.readline():
            version, at = line.split()
            self.published.setdefault(version.decode(), float(at))
            self.rounds += 1
            self._round.set()
            self._round = asyncio.Event()

    async def pass_rounds(self, count: int) -> None:
        """Wait for so many publications from now on, and half an interval more: the ACKs are in, as a rule."""
        for _ in range(count):
            async with asyncio.timeout(2 * self.interval + READY):
                await self._round.wait()
        await asyncio.sleep(self.interval / 2)

    def change(self, pools: int) -> None:
        """Give this many pools new weights from now on."""
        assert self._process.stdin is not None  # noqa: S101 - a pipe was asked for
        self._process.stdin.write(b"%d\n" % pools)

    async def watch(self, clients: Sequence[XdsClient], rounds: int = ROUNDS) -> Watched:
        """Look on for so many rounds, after one to come to rest."""
        await self.pass_rounds(1)
        self._forget_peak()
        before, began, from_round = self.cpu(), time.monotonic(), self.rounds
        sent = sum(client.received for client in clients)
        await self.pass_rounds(rounds)
        cpu, elapsed = self.cpu() - before, time.monotonic() - began
        sent = sum(client.received for client in clients) - sent
        rounds_at = {version: at for version, at in self.published.items() if at >= began}
        taken = [accepted(client.acks, tuple(rounds_at)) for client in clients]
        acks = sorted(each[version] - at for each in taken for version, at in rounds_at.items() if version in each)
        last = sorted(
            max(each[version] for each in taken) - at
            for version, at in rounds_at.items()
            if all(version in each for each in taken)
        )
        if sent and not last:
            raise RigError("no change was accepted by all clients")
        rss, peak = self.memory()
        return Watched(self.rounds - from_round, elapsed, cpu, acks, last, sent, rss, peak)

    def cpu(self) -> float:
        return cpu_seconds(self._process.pid)

    def memory(self) -> tuple[int, int]:
        """Resident KiB: now, and the most since it was last forgotten."""
        status = dict(line.split(":", 1) for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines())
        return int(status["VmRSS"].split()[0]), int(status["VmHWM"].split()[0])

    def _forget_peak(self) -> None:
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")


def accepted(acks: Mapping[str, float], versions: Sequence[str]) -> dict[str, float]:
    """When each of these versions, in the order of publication, or a later one in its place, was accepted."""
    found: dict[str, float] = {}
    latest = None
    for version in reversed(versions):
        latest = acks.get(version, latest)
        if latest is not None:
            found[version] = latest
    return found


async def join(fleet: Fleet, count: int, *, delta: bool = True, manner: Manner = GOOD) -> tuple[XdsClient, ...]:
    async with asyncio.timeout(READY):
        return await fleet.join(count, delta=delta, manner=manner)


async def at_once(counts: Sequence[int] = AT_ONCE, rounds: int = ROUNDS) -> Table:
    """So many delta clients that all come in one moment, as when a server is back after a while, and then stay."""
    rows = []
    for count in counts:
        progress(f"{count:,} clients at once")
        async with Server() as running, Fleet(running.address) as fleet:
            running.change(0)
            await running.pass_rounds(1)
            began, cpu = time.monotonic(), running.cpu()
            clients = await join(fleet, count)
            ready, cpu = time.monotonic() - began, running.cpu() - cpu
            running.change(running.pools)
            watched = await running.watch(clients, rounds)
            rows.append((f"{count:,}", number(ready), number(cpu), *watched.cells(count)))
    return Table("All at once", ("clients", "all ready after s", "CPU until then s", *COLUMNS), tuple(rows))


async def growth(
    counts: Sequence[int] = CLIENTS,
    rounds: int = ROUNDS,
    bad_each: int = BAD_EACH,
    start: Callable[[], Server] = Server,
) -> list[Table]:
    """Delta clients by number; the most of them among others that misbehave, and when less changes; SotW clients."""
    most = counts[-1]
    async with start() as running, Fleet(running.address) as fleet:
        seen: dict[str, Watched] = {}
        good: tuple[XdsClient, ...] = ()
        for count in counts:
            progress(f"{count:,} clients")
            good += await join(fleet, count - len(good))
            seen[f"{count:,} delta"] = await running.watch(good, rounds)
        by_number = [(what, *watched.cells(count)) for count, (what, watched) in zip(counts, seen.items(), strict=True)]
        alone = seen[f"{most:,} delta"]

        progress("bad clients")
        bad = [client for manner in BAD for client in await join(fleet, bad_each, manner=manner)]
        among = await running.watch(good, rounds)
        await fleet.leave(bad)
        phases = {"alone": alone, f"with {len(bad)} bad ones": among, "alone again": await running.watch(good, rounds)}

        less = {f"weights of all {running.pools} pools, loads": alone}
        for pools, what in ((1, "weights of 1 pool, loads"), (0, "loads alone")):
            progress(what)
            running.change(pools)
            less[what] = await running.watch(good, rounds)
        for each in REPORTED:
            what = f"loads alone; {each * running.pools} endpoints reported in flight by each"
            progress(what)
            async with fleet.reporting(good, load_report(running, each)):
                less[what] = await running.watch(good, rounds)
    async with start() as running, Fleet(running.address) as fleet:
        progress(f"{most:,} SotW clients")
        good = await join(fleet, most, delta=False)
        by_number.append((f"{most:,} SotW", *(await running.watch(good, rounds)).cells(most)))

    def table(title: str, column: str, rows: dict[str, Watched]) -> Table:
        return Table(title, (column, *COLUMNS), tuple((what, *watched.cells(most)) for what, watched in rows.items()))

    return [
        Table("By the number of clients", ("clients", *COLUMNS), tuple(by_number)),
        table(f"By what changes, {most:,} delta clients", "what changes", less),
        table(f"{most:,} delta clients among bad ones", "phase", phases),
    ]


def load_report(running: Server, each: int) -> bytes:
    """What an Envoy reports that has a request under way to so many endpoints of each pool."""
    report = load_stats_pb2.LoadStatsRequest()
    for cluster in topology(running.endpoints, running.pools).clusters:
        stats = report.cluster_stats.add(cluster_name=cluster.name).upstream_locality_stats.add()
        for endpoint in cluster.endpoints[:each]:
            socket = endpoint_pb2.SocketAddress(address=endpoint.address, port_value=endpoint.port)
            address = endpoint_pb2.Address(socket_address=socket).SerializeToString()
            stats.upstream_endpoint_stats.add(address=address, total_requests_in_progress=1)
    return report.SerializeToString()


async def sizes(endpoints: Sequence[int] = ENDPOINTS, clients: int = SOME, rounds: int = ROUNDS) -> Table:
    """The same number of clients, and more and more endpoints."""
    rows = []
    for count in endpoints:
        progress(f"{count:,} endpoints")
        async with Server(count) as running, Fleet(running.address) as fleet:
            watched = await running.watch(await join(fleet, clients), rounds)
            rows.append((f"{count:,}", *watched.cells(clients)))
    return Table(f"Endpoints in {POOLS} pools, {clients:,} delta clients", ("endpoints", *COLUMNS), tuple(rows))


async def memory(count: int = SOME, interval: float = FAST) -> Table:
    """What a client of each kind holds in the server, after a few changes and after many more."""
    progress("memory")
    kinds = [("good, delta", True, GOOD), ("good, SotW", False, GOOD), *((bad.name, True, bad) for bad in BAD)]
    rows = await asyncio.gather(*(_memory(kind, count, interval) for kind in kinds))  # nothing here is timed
    state = ("of a good one, the protocol's state", *[number(state_bytes() / KIB)] * 2)
    return Table("Memory a client", ("client", "KB after 4 changes", "KB after 20"), (*rows, state))


async def _memory(kind: tuple[str, bool, Manner], count: int, interval: float) -> tuple[str, ...]:
    name, delta, manner = kind
    async with Server(interval=interval) as running, Fleet(running.address) as fleet:
        await join(fleet, 1, delta=delta)
        await running.pass_rounds(WARM)
        base, _ = running.memory()
        await join(fleet, count, delta=delta, manner=manner)
        held = []
        for rounds in (4, 16):
            await running.pass_rounds(rounds)
            held.append(number((running.memory()[0] - base) / count))
    return (name, *held)


def state_bytes(endpoints: int = USUAL, pools: int = POOLS, count: int = 20) -> float:
    """Bytes of a delta client's stream object, with all it refers to but the snapshot, when it has everything."""
    snapshot = translate(topology(endpoints, pools), Options(), {})
    named = {ENDPOINT: tuple(snapshot.resources[ENDPOINT]), ROUTE: tuple(snapshot.resources[ROUTE])}

    def settled() -> DeltaStream:
        stream = DeltaStream("bench")
        for type_url in (CLUSTER, ENDPOINT, LISTENER, ROUTE):
            names = [f"{name}" for name in named.get(type_url, ())]
            ask = wire.DeltaDiscoveryRequest(type_url=type_url, resource_names_subscribe=names)
            stream.receive(wire.DeltaDiscoveryRequest.FromString(ask.SerializeToString()))
        while responses := stream.advance(snapshot, 0.0):
            for each in responses:
                stream.receive(wire.DeltaDiscoveryRequest(type_url=each.type_url, response_nonce=each.nonce))
        if not stream.settled(snapshot):
            raise RigError("the stream does not come to rest")
        return stream

    settled()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    streams = [settled() for _ in range(count)]
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (after - before) / len(streams)


async def measure() -> list[Table]:
    return [*await growth(), await at_once(), await sizes(), await memory()]


if __name__ == "__main__":
    configure("json", "error")
    raise_file_limit()
    show(uvloop.run(measure()))
