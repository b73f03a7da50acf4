"""A pool's endpoints and their last readings -> PoolLoad bytes (pure): what the picker learns (xds/wire/load.proto)."""

from __future__ import annotations

from xds.in_flight import Reported
from xds.model import Cluster, authority
from xds.weights import Member, Pool
from xds.wire import load_pb2 as pb


def pool_load(cluster: Cluster, pool: Pool, now: float, report: int, reported: Reported | None = None) -> bytes:
    """The encoded PoolLoad of `cluster` as of `now`; `report` numbers the reports: each one is a new version.

    `reported` is what Envoys say is under way to it, None if none does.
    """
    message = pb.PoolLoad(name=cluster.name, round=report)
    if reported is not None:
        message.in_flight.age = max(0.0, now - reported.at)
    for endpoint in sorted(cluster.endpoints, key=lambda e: e.hash_key):
        if not endpoint.draining:
            entry = message.endpoints.add(
                hash_key=endpoint.hash_key, address=authority(endpoint.address, endpoint.port), age=-1.0
            )
            if reported is not None:
                entry.in_flight = reported.to(endpoint.address, endpoint.port)
            _fill(entry, pool.members.get(endpoint.hash_key), now)
    return message.SerializeToString(deterministic=True)


def _fill(entry: pb.EndpointLoad, member: Member | None, now: float) -> None:
    if member is None or member.load is None:
        return
    load = member.load
    entry.max_lora = load.max_lora
    entry.running_adapters.extend(load.running_adapters)
    entry.waiting_adapters.extend(load.waiting_adapters)
    entry.age = max(0.0, now - member.read_at)
    entry.running, entry.waiting = load.running, load.waiting
    entry.kv_usage, entry.kv_tokens = load.kv_usage, load.kv_tokens
    entry.prefill_rate, entry.start_time = member.prefill_rate, load.start_time or 1.0 + member.restarts
