"""Simulated Envoys: the requests a real one sends, over real gRPC, each on a connection of its own, and some bad ones.

A client asks for all clusters and listeners, for the endpoints of each cluster and the routes of each listener by name,
and accepts whatever it gets. It keeps no resource: many of them have to be cheaper than the server they load.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc

from xds.envoy import PICKER_CLUSTER
from xds.load_reports import SERVICE as LRS
from xds.server import ADS
from xds.snapshot import CLUSTER, ENDPOINT, LISTENER, ROUTE
from xds.wire import discovery_pb2 as wire
from xds.wire import load_stats_pb2 as load_stats

OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # a connection each
    ("grpc.max_receive_message_length", -1),
    ("grpc.http2.lookahead_bytes", 16 << 20),  # Envoy's initial_stream_window_size
)
NAMED_BY = {CLUSTER: ENDPOINT, LISTENER: ROUTE}  # whose resources ask for one of the same name
CHATTER = 0.1  # seconds between two requests of a client that chatters


@dataclass(frozen=True, slots=True)
class Manner:
    """How a client behaves. A good one asks, reads, and answers at once; bad ones change when they have everything."""

    name: str = "good"
    asks: bool = True
    reads_on: bool = True
    answers: float | None = 0.0  # seconds it takes to; None: never does, from the beginning
    chatters: bool = False  # goes on asking for other names


GOOD = Manner()
SLOW = Manner("answers after 5 s", answers=5.0)
MUTE = Manner("reads, never answers", answers=None)
STUCK = Manner("stops reading", reads_on=False)
CHATTY = Manner("stops reading, asks on", reads_on=False, chatters=True)
SILENT = Manner("asks for nothing", asks=False)
BAD = (SLOW, MUTE, STUCK, CHATTY, SILENT)


class XdsClient:
    """One of them. `acks`: when each version of the endpoints was accepted (time.monotonic), `received` in bytes."""

    def __init__(self, address: str, name: str, *, delta: bool = True, manner: Manner = GOOD) -> None:
        self.acks: dict[str, float] = {}
        self.received = 0
        self.ready = asyncio.Event()  # it has everything, or as much as its manners allow
        self._name = name
        self._delta = delta
        self._manner = manner
        self._request: Any = wire.DeltaDiscoveryRequest if delta else wire.DiscoveryRequest
        self._response: Any = wire.DeltaDiscoveryResponse if delta else wire.DiscoveryResponse
        self._names: dict[str, tuple[str, ...]] = {}
        self._channel = grpc.aio.insecure_channel(address, OPTIONS)
        method = "DeltaAggregatedResources" if delta else "StreamAggregatedResources"
        self._call = self._channel.stream_stream(f"/{ADS}/{method}")()

    async def run(self) -> None:
        """Live until cancelled, or until the server ends the stream."""
        if self._manner.asks:
            await self._ask(CLUSTER, node=wire.Node(id=self._name, cluster="bench"))
            await self._ask(LISTENER)
            await self._read()
        else:
            await self._call.wait_for_connection()
            self.ready.set()
        number = 0
        while self._manner.chatters:
            number += 1
            await self._ask(ENDPOINT, (f"other-{number % 1000}",))
            await asyncio.sleep(CHATTER)

    async def report(self, loads: bytes) -> None:
        """Report these loads (an encoded LoadStatsRequest) as often as the server asks for it, until cancelled."""
        call = self._channel.stream_stream(f"/{LRS}/StreamLoadStats")()
        try:
            await call.write(load_stats.LoadStatsRequest(node=wire.Node(id=self._name)).SerializeToString())
            asked = load_stats.LoadStatsResponse.FromString(await call.read())
            while True:
                await asyncio.sleep(asked.load_reporting_interval.ToTimedelta().total_seconds())
                await call.write(loads)
        finally:
            call.cancel()

    async def _read(self) -> None:
        seen: set[str] = set()
        while (raw := await self._call.read()) is not grpc.aio.EOF:
            self.received += len(raw)
            response = self._response.FromString(raw)
            type_url = response.type_url
            if self._manner.answers and self.ready.is_set():
                await asyncio.sleep(self._manner.answers)
            if self._manner.answers is not None:
                await self._answer(response)
            if type_url in seen:
                continue
            seen.add(type_url)
            if type_url in NAMED_BY:
                await self._ask(NAMED_BY[type_url], tuple(self._named(response.resources)))
            if self._manner.answers is None or len(seen) == 2 * len(NAMED_BY):
                self.ready.set()
                if not self._manner.reads_on:
                    return

    async def _answer(self, response: Any) -> None:
        answer = self._request(type_url=response.type_url, response_nonce=response.nonce)
        if not self._delta:
            answer.version_info = response.version_info
            answer.resource_names.extend(self._names.get(response.type_url, ()))
        await self._call.write(answer.SerializeToString())
        if response.type_url == ENDPOINT:
            version = response.system_version_info if self._delta else response.version_info
            self.acks[version] = time.monotonic()

    async def _ask(self, type_url: str, names: tuple[str, ...] = (), node: wire.Node | None = None) -> None:
        self._names[type_url] = names
        field = "resource_names_subscribe" if self._delta else "resource_names"
        await self._call.write(self._request(node=node, type_url=type_url, **{field: names}).SerializeToString())

    def _named(self, resources: Iterable[bytes]) -> Iterable[str]:
        """The names of these resources, but not of the picker's cluster, which has its endpoints in it."""
        for raw in resources:
            body = wire.Resource.FromString(raw).resource if self._delta else wire.Any.FromString(raw)
            name: str = wire.ControlPlane.FromString(body.value).identifier  # field 1, as of any resource's name
            if name != PICKER_CLUSTER:
                yield name

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()


class Fleet:
    """Many of them, `async with`: they are gone afterwards."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._lives: dict[XdsClient, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self.leave(tuple(self._lives))

    async def join(self, count: int, *, delta: bool = True, manner: Manner = GOOD) -> tuple[XdsClient, ...]:
        """So many more, ready when this returns."""
        first = len(self._lives)
        clients = [XdsClient(self._address, f"envoy-{first + n}", delta=delta, manner=manner) for n in range(count)]
        self._lives |= {client: asyncio.create_task(client.run()) for client in clients}
        for client in clients:
            await client.ready.wait()
        return tuple(clients)

    @asynccontextmanager
    async def reporting(self, clients: Sequence[XdsClient], loads: bytes) -> AsyncIterator[None]:
        """Meanwhile each of these reports the same loads."""
        tasks = [asyncio.create_task(client.report(loads)) for client in clients]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def leave(self, clients: Sequence[XdsClient]) -> None:
        lives = [self._lives.pop(client) for client in clients]
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
        await asyncio.gather(*(client.close() for client in clients))
