"""What a running server serves now, from which loads, and what each client has of it; the route a request would take.

GET /debug/snapshot, /debug/clients        POST /debug/route (for `vllm-xds explain`)
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from envoy_data_plane.google.protobuf import Any as PackedMessage
from google.protobuf.json_format import MessageToDict

from xds.control import Control
from xds.explain import explain_route
from xds.in_flight import Reported
from xds.kube_writer import StatusWriter
from xds.model import Cluster, Endpoint, Rejection, authority
from xds.snapshot import ENDPOINT, POOL_CONFIG, POOL_LOAD, SECRET, TYPES, Snapshot, label
from xds.status import Page, Posted
from xds.weights import BASE, Pool
from xds.wire import discovery_pb2, endpoint_pb2, load_pb2, pool_config_pb2

OURS: Mapping[str, type[Any]] = {
    ENDPOINT: endpoint_pb2.ClusterLoadAssignment,
    POOL_CONFIG: pool_config_pb2.PoolConfig,
    POOL_LOAD: load_pb2.PoolLoad,
}  # decoded in ms, not in seconds


def pages(control: Control, writer: StatusWriter | None = None) -> dict[str, Page]:
    """Path -> page, for `serve_status`. `/debug/snapshot?type=Cluster&name=...` is one resource, decoded."""

    one_at_a_time = asyncio.Lock()

    async def snapshot_page(query: Mapping[str, str]) -> object:
        if not query:
            return describe(control) | _writing(writer)
        # In a thread: 1,000 routes take three seconds, and streams must not wait for that.
        async with one_at_a_time:
            return await asyncio.to_thread(decode, control.snapshot, query.get("type", ""), query.get("name", ""))

    async def clients_page(_: Mapping[str, str]) -> object:
        return {"clients": [asdict(client) for client in control.server.clients()]}

    return {"/debug/snapshot": snapshot_page, "/debug/clients": clients_page}


def posted(control: Control) -> dict[str, Posted]:
    """Path -> what answers a question posted there, for `serve_status`."""

    async def route(_: Mapping[str, str], question: bytes) -> object:
        return explain_route(control.topology, question)

    return {"/debug/route": route}


def describe(control: Control) -> dict[str, Any]:
    """The snapshot without its bodies, every pool's endpoints with weight and last load, and what is rejected."""
    now = control.clock()
    resources = control.snapshot.resources if control.snapshot else {}
    versions = control.snapshot.versions if control.snapshot else {}
    return {
        "ready": control.snapshot is not None,
        "ports": [
            {
                "port": listener.port,
                "group": listener.group,
                "routes": sum(len(host.routes) for host in listener.all_virtual_hosts),
            }
            for listener in control.topology.listeners
        ],
        "types": {
            label(type_url): {
                "version": versions[type_url],
                "resources": [
                    {"name": each.name, "version": each.version, "bytes": len(each.any)} for each in by_name.values()
                ],
            }
            for type_url, by_name in resources.items()
        },
        "pools": [
            _pool(cluster, control.pools[cluster.name], now, control.in_flight.of(cluster.name, now))
            for cluster in control.topology.clusters
            if cluster.name in control.pools
        ],
        "rejections": [_rejection(each) for each in control.rejections],
    }


def _writing(writer: StatusWriter | None) -> dict[str, Any]:
    """Whether this replica writes the statuses of Kubernetes objects, where it was asked to."""
    if writer is None:
        return {}
    return {
        "statuses": {
            "lease": writer.lease.name,
            "identity": writer.lease.identity,
            "holder": writer.lease.holder,
            "writes": writer.lease.leads(),
        }
    }


def decode(snapshot: Snapshot | None, type_label: str, name: str) -> dict[str, Any] | None:
    """One resource with its body as protobuf's JSON, or None if there is no such one; seconds for a very large one."""
    type_url = next((each for each in TYPES if label(each) == type_label), None)
    resource = snapshot.resources[type_url].get(name) if snapshot and type_url else None
    if resource is None or type_url is None:
        return None
    if type_url == SECRET:
        body: dict[str, Any] = {"@type": type_url, "name": name}  # the rest is a private key
    elif type_url in OURS:
        message = OURS[type_url].FromString(discovery_pb2.Any.FromString(resource.any).value)
        body = {"@type": type_url, **MessageToDict(message)}
    else:
        body = PackedMessage.parse(resource.any).to_dict()
    return {"name": name, "version": resource.version, "bytes": len(resource.any), "resource": body}


def _pool(cluster: Cluster, pool: Pool, now: float, reported: Reported | None) -> dict[str, Any]:
    return {
        "name": cluster.name,
        "strategy": cluster.strategy,
        "endpoints": [_endpoint(endpoint, pool, now, reported) for endpoint in cluster.endpoints],
    }


def _endpoint(endpoint: Endpoint, pool: Pool, now: float, reported: Reported | None) -> dict[str, Any]:
    """`age` in seconds, and the load, are null if its page was never read; `in_flight` is if no Envoy reports."""
    member = pool.members.get(endpoint.hash_key)  # while a new configuration is translated the pool is ahead of it
    load = member.load if member else None
    return {
        "endpoint": endpoint.hash_key,
        "address": authority(endpoint.address, endpoint.port),
        "draining": endpoint.draining,
        "weight": member.weight if member else BASE,
        "age": round(now - member.read_at, 3) if member and load else None,
        "running": load.running if load else None,
        "waiting": load.waiting if load else None,
        "kv_usage": load.kv_usage if load else None,
        "in_flight": reported.to(endpoint.address, endpoint.port) if reported else None,
    }


def _rejection(rejection: Rejection) -> dict[str, str]:
    return {
        "object": str(rejection.ref) if rejection.ref else "",
        "field": rejection.field,
        "reason": rejection.reason,
        "message": rejection.message,
        "source": rejection.source,
        "level": rejection.level,
    }
