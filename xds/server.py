"""The management server: ADS, and LDS, RDS, CDS, EDS and SDS alone, over gRPC in both variants.

Every protocol decision is in xds/stream.py, here is the I/O.

    publish --newest snapshot--> [ client: reader task -> Stream.receive ; writer loop -> Stream.advance -> write ] * n

Each client has one reader and one writer and shares with the others nothing but the snapshot. Whatever is published
while a client does not read, it keeps one unanswered response of each type and a reference to the newest snapshot.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from xds.clusters import stand_in
from xds.metrics import Metrics
from xds.snapshot import CLUSTER, ENDPOINT, LISTENER, POOL_LOAD, ROUTE, SECRET, Snapshot, group_of, label
from xds.stream import LINGER, DeltaStream, Kind, Received, Response, SotwStream, Stream
from xds.tls import TlsFiles, server_credentials
from xds.wire import discovery_pb2 as wire

ADS = "envoy.service.discovery.v3.AggregatedDiscoveryService"
SERVICES = {  # service -> its two methods, and the one type it is for ("": all of them)
    ADS: ("StreamAggregatedResources", "DeltaAggregatedResources", ""),
    "envoy.service.cluster.v3.ClusterDiscoveryService": ("StreamClusters", "DeltaClusters", CLUSTER),
    "envoy.service.endpoint.v3.EndpointDiscoveryService": ("StreamEndpoints", "DeltaEndpoints", ENDPOINT),
    "envoy.service.listener.v3.ListenerDiscoveryService": ("StreamListeners", "DeltaListeners", LISTENER),
    "envoy.service.route.v3.RouteDiscoveryService": ("StreamRoutes", "DeltaRoutes", ROUTE),
    "envoy.service.secret.v3.SecretDiscoveryService": ("StreamSecrets", "DeltaSecrets", SECRET),
}
HEALTH = "grpc.health.v1.Health"
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"  # encoded grpc.health.v1.HealthCheckResponse

MAX_LOGGED_NAMES = 5  # resources named in a log line; of a refusal the one that is bad ends up alone in a later one
MAX_TEXT = 256  # characters of a client's node id or cluster in logs and views: anyone who can connect chooses them

FIRST_REQUEST = 30.0  # seconds a stream may be open without one: Envoy sends it together with the stream's headers

OPTIONS = (
    ("grpc.max_receive_message_length", 4 << 20),  # bytes: Envoy's first request is 60 KB, with 10,000 names 1 MB
    ("grpc.max_send_message_length", -1),  # our own snapshot is never too long for us; the client has its own limit
    ("grpc.max_concurrent_streams", 100),  # a connection: Envoy opens one
    ("grpc.max_allowed_incoming_connections", 10_000),  # 0.6 GB; twice the Envoys that fill a core: docs/benchmarks.md
    # Streams not taken yet: all come at once when a server is back. gRPC itself refuses some of more than 1,000.
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 20_000),
    ("grpc.max_connection_idle_ms", 300_000),  # without a stream: Envoy's has one as long as it lives
    ("grpc.keepalive_time_ms", 30_000),  # a client whose machine died sends no FIN: found after 40 s
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # the one that ends the connection; its default is 60 s
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),  # Envoy's connection_keepalive may ping each second; gRPC's default cuts it off
    ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a silent half of the clients
)

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class TypeView:
    """One type of one client; versions are "" before the first. `names` is 0 for a wildcard subscription."""

    type: str
    wildcard: bool
    names: int
    version_sent: str
    version_acked: str
    refused: tuple[str, ...]
    last_nack: str


@dataclass(frozen=True, slots=True)
class ClientView:
    """One stream as it is now; `node_id` is "" until its first request.

    `group` is the group of Envoys it is in ("": of none that a Gateway names). `settled`: it has accepted all it wants
    of the newest snapshot, but for what it refuses.
    """

    node_id: str
    node_cluster: str
    group: str
    variant: str
    peer: str
    settled: bool
    types: tuple[TypeView, ...]


class _Client:
    """One open stream: its protocol state, and the event that wakes its writer."""

    def __init__(self, variant: str, stream: Stream[Any], request_type: type[Any], peer: str) -> None:
        self.variant = variant
        self.stream = stream
        self.request_type = request_type
        self.peer = peer
        self.node_id = ""
        self.node_cluster = ""
        self.greeted = False
        self.fault: tuple[grpc.StatusCode, str] | None = None  # why the stream has to be closed
        self.wake = asyncio.Event()
        self.log = log.bind(variant=variant, peer=peer)

    def close(self, code: grpc.StatusCode, reason: str) -> None:
        """Have its writer end the stream with this status."""
        self.fault = (code, reason)
        self.wake.set()

    def close_if_silent(self) -> None:
        if not self.greeted:
            self.close(grpc.StatusCode.DEADLINE_EXCEEDED, "no request came")

    def settled(self, snapshot: Snapshot | None) -> bool:
        return snapshot is not None and self.greeted and self.stream.settled(snapshot)

    def view(self, snapshot: Snapshot | None, group: str) -> ClientView:
        types = tuple(
            TypeView(
                label(type_url),
                sub.wildcard,
                len(sub.names),
                sub.version_sent,
                sub.version_acked,
                tuple(sub.refused),
                sub.last_nack,
            )
            for type_url, sub in self.stream.subscriptions.items()
            if sub.opened
        )
        settled = self.settled(snapshot)
        return ClientView(self.node_id, self.node_cluster, group, self.variant, self.peer, settled, types)


class ManagementServer:
    """Serves the newest snapshot to every client. Use from one event loop: `start`, any number of `publish`, `stop`.

    `linger` in seconds: how long clients keep what is gone (xds/stream.py, rule 9).
    """

    def __init__(
        self,
        metrics: Metrics,
        identifier: str = "vllm-xds",
        clock: Callable[[], float] = time.monotonic,
        first_request: float = FIRST_REQUEST,
        linger: float = LINGER,
    ) -> None:
        self._metrics = metrics
        self._identifier = identifier
        self._clock = clock
        self._first_request = first_request
        self._linger = linger
        self._snapshot: Snapshot | None = None
        self._views: dict[str, Snapshot] = {}  # what each group of clients is served of it
        self._clients: set[_Client] = set()
        self._tell: Callable[[str, Mapping[str, str], str], None] = lambda *_: None
        self._stopping = False
        self._progress = asyncio.Event()  # set, and replaced, whenever a client may have come closer to the snapshot
        self._server: grpc.aio.Server | None = None

    async def start(
        self, addresses: Sequence[str], tls: TlsFiles | None = None, beside: Iterable[grpc.GenericRpcHandler] = ()
    ) -> list[int]:
        """Listen on each `host:port` (port 0: any free one), with mutual TLS if there are files; return the ports.

        `beside` are the handlers of other services that are to be had at the same addresses.

        RuntimeError: an address is not free. TlsError: the files can not be used.
        """
        server = grpc.aio.server(options=OPTIONS)
        services = {HEALTH: {"Check": grpc.unary_unary_rpc_method_handler(self._check)}}
        for service, (sotw, delta, only) in SERVICES.items():
            services[service] = {
                sotw: grpc.stream_stream_rpc_method_handler(partial(self._sotw, only)),
                delta: grpc.stream_stream_rpc_method_handler(partial(self._delta, only)),
            }
        server.add_generic_rpc_handlers(
            [*(grpc.method_handlers_generic_handler(name, methods) for name, methods in services.items()), *beside]
        )
        if tls is None:
            ports = [server.add_insecure_port(address) for address in addresses]
        else:
            ports = [server.add_secure_port(address, server_credentials(tls)) for address in addresses]
        await server.start()
        self._server = server
        return ports

    def follow_answers(self, tell: Callable[[str, Mapping[str, str], str], None]) -> None:
        """Have every client's answer told: type_url, the resources' name -> version, and "" or why they are refused."""
        self._tell = tell

    def publish(self, snapshot: Snapshot) -> None:
        """Make this the snapshot every client is brought to, or its group's view of it; returns at once."""
        served = {client: self._served(client) for client in self._clients}
        before, self._snapshot = self._snapshot, snapshot
        self._views = {group: snapshot.view(group, self._views.get(group)) for group in snapshot.groups}
        for client, was in served.items():
            if client.stream.concerned(was, self._served(client)):
                client.wake.set()
        changed = {
            label(type_url): version
            for type_url, version in snapshot.versions.items()
            if before is None or before.versions[type_url] != version
        }
        counts = {label(type_url): len(resources) for type_url, resources in snapshot.resources.items()}
        for name, count in counts.items():
            self._metrics.resources.labels(name).set(count)
        tell = (
            log.info if changed.keys() - {label(POOL_LOAD)} else log.debug
        )  # a load report comes each scrape interval
        tell("snapshot published", resources=counts, changed=changed, clients=len(self._clients))

    def clients(self) -> tuple[ClientView, ...]:
        """Return every open stream, sorted by node id."""
        views = [client.view(self._served(client), self._group(client)) for client in self._clients]
        return tuple(sorted(views, key=lambda view: (view.node_id, view.peer)))

    async def wait_settled(self, clients: int = 1) -> None:
        """Wait until at least `clients` streams are open and each has accepted all it wants of the newest snapshot."""
        while not self._settled(clients):
            await self._progress.wait()

    async def stop(self, grace: float = 1.0) -> None:
        """End every stream, and close the ports; cut what has not ended after `grace` seconds."""
        self._stopping = True
        for client in self._clients:
            client.wake.set()
        if self._server is not None:
            await self._server.stop(grace)

    def _settled(self, clients: int) -> bool:
        return len(self._clients) >= clients and all(client.settled(self._served(client)) for client in self._clients)

    def _group(self, client: _Client) -> str:
        return group_of(self._views, client.node_cluster, client.node_id)

    def _served(self, client: _Client) -> Snapshot | None:
        """What this client is brought to; None before there is anything."""
        return self._views[self._group(client)] if self._views else self._snapshot

    def _progressed(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()

    # --- gRPC ---

    async def _check(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:  # noqa: ARG002 - gRPC's form
        """grpc.health.v1: serving once there is something to serve."""
        return NOT_SERVING if self._snapshot is None or self._stopping else SERVING

    async def _sotw(self, only: str, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        stream = SotwStream(stand_in, self._identifier, only, self._linger)
        await self._serve(_Client("sotw", stream, wire.DiscoveryRequest, context.peer()), requests, context)

    async def _delta(self, only: str, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        stream = DeltaStream(self._identifier, only, self._linger)
        await self._serve(_Client("delta", stream, wire.DeltaDiscoveryRequest, context.peer()), requests, context)

    async def _serve(self, client: _Client, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        self._clients.add(client)
        self._metrics.streams.labels(client.variant).inc()
        reader = asyncio.create_task(self._read(client, requests))
        reader.add_done_callback(lambda _: client.wake.set())
        silence = asyncio.get_running_loop().call_later(self._first_request, client.close_if_silent)
        try:
            await self._write(client, reader, context)
            if client.fault is not None:
                await context.abort(*client.fault)
        finally:
            silence.cancel()
            reader.cancel()
            self._clients.discard(client)
            self._metrics.streams.labels(client.variant).dec()
            self._progressed()
            if client.greeted:
                client.log.info("client disconnected", clients=len(self._clients))

    async def _read(self, client: _Client, requests: AsyncIterator[bytes]) -> None:
        """Feed the client's requests to its stream until it ends or has to be closed."""
        async for raw in requests:
            try:
                request = client.request_type.FromString(raw)
            except DecodeError:
                client.close(grpc.StatusCode.INVALID_ARGUMENT, "the request cannot be decoded")
                return
            if not client.greeted:
                self._greet(client, request.node)
            received = client.stream.receive(request)
            self._note(client, received)
            if received.kind is Kind.EXCESS:
                client.close(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many resource names, or too long a name")
                return
            client.wake.set()

    async def _write(self, client: _Client, reader: asyncio.Task[None], context: grpc.aio.ServicerContext) -> None:
        """Send what the stream says has to be sent, whenever something has happened that may matter to it."""
        while not (reader.done() or self._stopping or client.fault):
            now = self._clock()
            await self._send(client, context, now)
            self._progressed()
            deadline = client.stream.deadline(now)
            try:
                async with asyncio.timeout(None if deadline is None else deadline - now):
                    await client.wake.wait()
            except TimeoutError:
                pass  # the deadline is a reason to look again, as an event is
            client.wake.clear()
        if reader.done():
            await reader

    async def _send(self, client: _Client, context: grpc.aio.ServicerContext, now: float) -> None:
        """Write what the stream says, in order. While the client does not read, it is all that waits for it here."""
        served, stand_ins = self._served(client), client.stream.stand_ins
        for response in client.stream.advance(served, now):
            await context.write(response.encode())
            self._count(client, response)
            if response.type_url == LISTENER and not (served and served.resources[LISTENER]):
                client.log.warning(
                    "client without gateway", cluster=client.node_cluster, groups=sorted(self._views.keys() - {""})
                )
        if client.stream.stand_ins != stand_ins:
            names = client.stream.stand_ins
            client.log.info("stand-ins sent", clusters=len(names), names=names[:MAX_LOGGED_NAMES])

    # --- what operators see ---

    def _greet(self, client: _Client, node: wire.Node) -> None:
        """Take the node from the first request, the only one that has to carry it."""
        client.greeted = True
        client.node_id, client.node_cluster = node.id[:MAX_TEXT], node.cluster[:MAX_TEXT]
        client.log = client.log.bind(node=client.node_id)
        client.log.info("client connected", cluster=client.node_cluster, clients=len(self._clients))

    def _note(self, client: _Client, received: Received) -> None:
        name = label(received.type_url)
        self._metrics.requests.labels(name, received.kind.value).inc()
        client.log.debug("request received", type=name, kind=received.kind.value)
        if received.refusal is not None:
            refusal = received.refusal
            self._metrics.nacks.labels(name).inc()
            client.log.warning(
                "response refused",
                type=name,
                version=refusal.version,
                nonce=refusal.nonce,
                resources=len(refusal.resources),
                names=tuple(refusal.resources)[:MAX_LOGGED_NAMES],
                message=refusal.message,
            )
            if len(refusal.resources) == 1:  # of several it is not known yet which one is bad: xds/subscription.py
                self._tell(received.type_url, refusal.resources, refusal.message or "no reason given")
        if received.accepted:
            self._tell(received.type_url, received.accepted, "")

    def _count(self, client: _Client, response: Response) -> None:
        name, size = label(response.type_url), len(response.resources)
        self._metrics.responses.labels(name).inc()
        self._metrics.response_bytes.labels(name).inc(size)
        client.log.debug("response sent", type=name, nonce=response.nonce, resources=response.count, bytes=size)
