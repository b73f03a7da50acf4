"""A pool -> PoolConfig bytes (pure): what the picker is told of it beside its loads (xds/wire/pool_config.proto)."""

from __future__ import annotations

from xds.model import Cluster, Criticality, Strategy
from xds.wire import pool_config_pb2 as pb


def pool_config(cluster: Cluster) -> bytes:
    """The encoded PoolConfig of a pool's cluster."""
    settings, models = cluster.settings, cluster.models
    costs = pb.Costs(
        output_tokens=settings.output_tokens, prefill_rate=settings.prefill_rate, request_cost=settings.request_cost
    )
    message = pb.PoolConfig(
        name=cluster.name,
        costs=costs,
        unpicked=cluster.strategy is Strategy.DEFAULT,
        closed=models.closed,
        saturation=pb.Saturation(waiting=settings.shed_waiting, kv_usage=settings.shed_kv_usage),
    )
    for rule in models.rules:
        message.models.add(
            name=rule.name,
            targets=[pb.Target(name=name, weight=weight) for name, weight in rule.targets],
            sheddable=rule.criticality is Criticality.SHEDDABLE,
            critical=rule.criticality is Criticality.CRITICAL,
        )
    for name, priority in models.objectives:
        message.objectives.add(name=name, priority=priority)
    return message.SerializeToString(deterministic=True)
