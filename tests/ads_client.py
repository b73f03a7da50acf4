"""An ADS client for tests, in both variants: a `Peer` is the client's side of the protocol without I/O, `AdsClient`
speaks it over gRPC. A peer holds what it has accepted, as Envoy does, and answers nothing by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc

from xds.snapshot import CLUSTER, ENDPOINT, LISTENER, ROUTE, SECRET, Resource, make_resource
from xds.wire import discovery_pb2 as wire

# The services of Envoy's protos and their methods, SotW and delta: written out, not taken from the server under test.
ADS = "envoy.service.discovery.v3.AggregatedDiscoveryService"
OF_TYPE = {
    CLUSTER: "envoy.service.cluster.v3.ClusterDiscoveryService",
    ENDPOINT: "envoy.service.endpoint.v3.EndpointDiscoveryService",
    LISTENER: "envoy.service.listener.v3.ListenerDiscoveryService",
    ROUTE: "envoy.service.route.v3.RouteDiscoveryService",
    SECRET: "envoy.service.secret.v3.SecretDiscoveryService",
}
METHODS = {
    ADS: ("StreamAggregatedResources", "DeltaAggregatedResources"),
    OF_TYPE[CLUSTER]: ("StreamClusters", "DeltaClusters"),
    OF_TYPE[ENDPOINT]: ("StreamEndpoints", "DeltaEndpoints"),
    OF_TYPE[LISTENER]: ("StreamListeners", "DeltaListeners"),
    OF_TYPE[ROUTE]: ("StreamRoutes", "DeltaRoutes"),
    OF_TYPE[SECRET]: ("StreamSecrets", "DeltaSecrets"),
}
FULL_STATE = (LISTENER, CLUSTER)  # what SotW sends as a whole


def resource(type_url: str, name: str, revision: str = "1", refs: Iterable[tuple[str, str]] = ()) -> Resource:
    """Make a resource whose body names it in field 1, as every xDS type does, and has a revision in field 2."""
    return make_resource(type_url, name, wire.Node(id=name, cluster=revision).SerializeToString(), refs)


def name_of(body: bytes) -> str:
    """Return the name in a resource's body: field 1 of clusters, listeners, routes, endpoints and pool loads."""
    return wire.ControlPlane.FromString(body).identifier


def revision_of(body: bytes) -> str:
    """Return the revision that `resource` put into the body."""
    return wire.Node.FromString(body).cluster


class Peer:
    """What both variants share; `held` are bodies by type and name."""

    def __init__(self, node_id: str = "envoy-1") -> None:
        self.node = wire.Node(id=node_id, cluster="test")
        self.names: dict[str, set[str]] = {}
        self.held: dict[str, dict[str, bytes]] = {}
        self._spoken = False

    def revisions(self, type_url: str) -> dict[str, str]:
        """Return what is held of a type, as name -> revision."""
        return {name: revision_of(body) for name, body in sorted(self.held.get(type_url, {}).items())}

    def _greeting(self) -> wire.Node | None:
        """Return the node for the first request of a stream, None for the others."""
        node, self._spoken = (None if self._spoken else self.node), True
        return node


class SotwPeer(Peer):
    """State of the world."""

    variant = "sotw"
    request, response = wire.DiscoveryRequest, wire.DiscoveryResponse

    def __init__(self, node_id: str = "envoy-1") -> None:
        super().__init__(node_id)
        self.nonces: dict[str, str] = {}
        self.versions: dict[str, str] = {}

    def subscribe(self, type_url: str, *names: str) -> wire.DiscoveryRequest:
        """Ask for these names too; none at all is the legacy wildcard."""
        self.names.setdefault(type_url, set()).update(names)
        return self._request(type_url)

    def unsubscribe(self, type_url: str, *names: str) -> wire.DiscoveryRequest:
        """Ask for these names no longer, and forget them."""
        self.names[type_url].difference_update(names)
        for name in names:
            self.held.get(type_url, {}).pop(name, None)
        return self._request(type_url)

    def repeat(self, type_url: str) -> wire.DiscoveryRequest:
        """Say what was said last."""
        return self._request(type_url)

    def updates(self, response: wire.DiscoveryResponse) -> dict[str, bytes]:
        """Return the resources in a response: name -> body."""
        bodies = [wire.Any.FromString(raw).value for raw in response.resources]
        return {name_of(body): body for body in bodies}

    def ack(self, response: wire.DiscoveryResponse) -> wire.DiscoveryRequest:
        """Accept a response."""
        updates, type_url = self.updates(response), response.type_url
        if type_url in FULL_STATE:
            self.held[type_url] = updates
        else:
            self.held.setdefault(type_url, {}).update(
                {name: body for name, body in updates.items() if name in self.names[type_url]}
            )
        self.nonces[type_url], self.versions[type_url] = response.nonce, response.version_info
        return self._request(type_url)

    def nack(self, response: wire.DiscoveryResponse, message: str = "no") -> wire.DiscoveryRequest:
        """Refuse a response."""
        self.nonces[response.type_url] = response.nonce
        request = self._request(response.type_url)
        request.error_detail.code, request.error_detail.message = 13, message
        return request

    def reconnect(self) -> list[wire.DiscoveryRequest]:
        """Start a new stream: every subscription with its version, as Envoy does."""
        self._spoken = False
        self.nonces.clear()
        return [self.resume(type_url) for type_url in self.names]

    def resume(self, type_url: str) -> wire.DiscoveryRequest:
        """Subscribe to one type again, as `reconnect` does to all."""
        return self._request(type_url)

    def _request(self, type_url: str) -> wire.DiscoveryRequest:
        return wire.DiscoveryRequest(
            node=self._greeting(),
            type_url=type_url,
            resource_names=sorted(self.names[type_url]),
            response_nonce=self.nonces.get(type_url, ""),
            version_info=self.versions.get(type_url, ""),
        )


class DeltaPeer(Peer):
    """Incremental. `absent` are the names it has been told do not exist."""

    variant = "delta"
    request, response = wire.DeltaDiscoveryRequest, wire.DeltaDiscoveryResponse

    def __init__(self, node_id: str = "envoy-1") -> None:
        super().__init__(node_id)
        self.versions: dict[str, dict[str, str]] = {}
        self.absent: dict[str, set[str]] = {}
        self.legacy: set[str] = set()  # types subscribed to by an empty first list

    def subscribe(self, type_url: str, *names: str) -> wire.DeltaDiscoveryRequest:
        """Ask for these names too; none at all in the first request is the legacy wildcard."""
        if not names:
            self.legacy.add(type_url)
        self.names.setdefault(type_url, set()).update(names)
        return wire.DeltaDiscoveryRequest(
            node=self._greeting(), type_url=type_url, resource_names_subscribe=sorted(names)
        )

    def unsubscribe(self, type_url: str, *names: str) -> wire.DeltaDiscoveryRequest:
        """Ask for these names no longer, and forget them."""
        self.names[type_url].difference_update(names)
        if "*" in names:
            self.legacy.discard(type_url)
        for name in names:
            for memory in (self.held, self.versions):
                memory.get(type_url, {}).pop(name, None)
        return wire.DeltaDiscoveryRequest(type_url=type_url, resource_names_unsubscribe=sorted(names))

    def repeat(self, type_url: str) -> wire.DeltaDiscoveryRequest:
        """Say nothing new."""
        return wire.DeltaDiscoveryRequest(type_url=type_url)

    def updates(self, response: wire.DeltaDiscoveryResponse) -> dict[str, bytes]:
        """Return the resources in a response: name -> body."""
        entries = [wire.Resource.FromString(raw) for raw in response.resources]
        return {entry.name: entry.resource.value for entry in entries}

    def ack(self, response: wire.DeltaDiscoveryResponse) -> wire.DeltaDiscoveryRequest:
        """Accept a response."""
        type_url = response.type_url
        held, versions = self.held.setdefault(type_url, {}), self.versions.setdefault(type_url, {})
        wildcard = type_url in self.legacy or "*" in self.names[type_url]
        absent = self.absent.setdefault(type_url, set())
        for raw in response.resources:
            entry = wire.Resource.FromString(raw)
            if wildcard or entry.name in self.names[type_url]:
                held[entry.name], versions[entry.name] = entry.resource.value, entry.version
            absent.discard(entry.name)
        for name in response.removed_resources:
            held.pop(name, None)
            versions.pop(name, None)
            absent.add(name)
        return wire.DeltaDiscoveryRequest(type_url=type_url, response_nonce=response.nonce)

    def nack(self, response: wire.DeltaDiscoveryResponse, message: str = "no") -> wire.DeltaDiscoveryRequest:
        """Refuse a response."""
        request = wire.DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
        request.error_detail.code, request.error_detail.message = 13, message
        return request

    def reconnect(self) -> list[wire.DeltaDiscoveryRequest]:
        """Start a new stream: every subscription with the versions held, as Envoy does."""
        self._spoken = False
        return [self.resume(type_url) for type_url in self.names]

    def resume(self, type_url: str) -> wire.DeltaDiscoveryRequest:
        """Subscribe to one type again, as `reconnect` does to all."""
        return wire.DeltaDiscoveryRequest(
            node=self._greeting(),
            type_url=type_url,
            resource_names_subscribe=sorted(self.names[type_url]),
            initial_resource_versions=self.versions.get(type_url, {}),
        )


class AdsClient:
    """A peer's stream over gRPC, of ADS or another service. `async with`; every wait is at most `patience` seconds."""

    def __init__(self, address: str, peer: SotwPeer | DeltaPeer, patience: float = 10.0, service: str = ADS) -> None:
        self.peer: Any = peer
        self._patience = patience
        self._channel = grpc.aio.insecure_channel(address)
        sotw, delta = METHODS[service]
        self._open = self._channel.stream_stream(
            f"/{service}/{delta if isinstance(peer, DeltaPeer) else sotw}",
            request_serializer=peer.request.SerializeToString,
            response_deserializer=peer.response.FromString,
        )
        self.call = self._open()

    async def __aenter__(self) -> AdsClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.call.cancel()
        await self._channel.close()

    async def send(self, *requests: Any) -> None:
        """Send requests in order."""
        for request in requests:
            await self.call.write(request)

    async def receive(self) -> Any:
        """Return the next response; TimeoutError when none comes, EOFError at the end of the stream."""
        async with asyncio.timeout(self._patience):
            response = await self.call.read()
        if response is grpc.aio.EOF:
            raise EOFError
        return response

    async def reconnect(self) -> None:
        """Break the stream and open the next one; the peer says what it holds."""
        self.call.cancel()
        self.call = self._open()
        await self.send(*self.peer.reconnect())
