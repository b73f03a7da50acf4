"""A pool -> PoolConfig bytes (pure): what the picker is told of it beside its loads (xds/wire/pool_config.proto)."""

from __future__ import annotations

from xds.model import Cluster
from xds.wire import pool_config_pb2 as pb


def pool_config(cluster: Cluster) -> bytes:
    """The encoded PoolConfig of a pool's cluster."""
    settings = cluster.settings
    costs = pb.Costs(
        output_tokens=settings.output_tokens, prefill_rate=settings.prefill_rate, request_cost=settings.request_cost
    )
    return pb.PoolConfig(name=cluster.name, costs=costs).SerializeToString(deterministic=True)
