"""LRS over gRPC: an Envoy that connects is asked to report, and its last report is what counts until it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import structlog

from tests.test_in_flight import POOL, request
from xds.load_reports import SERVICE, LoadReports
from xds.metrics import Metrics
from xds.server import HEALTH, ManagementServer
from xds.wire import load_stats_pb2 as pb

PATIENCE = 10  # seconds: nothing here takes one


def greeting(node_id: str) -> pb.LoadStatsRequest:
    """The first message of a stream."""
    message = pb.LoadStatsRequest()
    message.node.id = node_id
    return message


class Envoy:
    """A client that greets as Envoy does."""

    def __init__(self, channel: grpc.aio.Channel, node_id: str) -> None:
        self._node_id = node_id
        self.call = channel.stream_stream(
            f"/{SERVICE}/StreamLoadStats",
            request_serializer=pb.LoadStatsRequest.SerializeToString,
            response_deserializer=pb.LoadStatsResponse.FromString,
        )()

    async def ask(self) -> pb.LoadStatsResponse:
        await self.call.write(greeting(self._node_id))
        async with asyncio.timeout(PATIENCE):
            response: pb.LoadStatsResponse = await self.call.read()
        return response


class Served:
    """A management server with the service beside it, and a channel to it."""

    channel: grpc.aio.Channel

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.reports = LoadReports(self.metrics, clock=lambda: 1.0)
        self.server = ManagementServer(self.metrics)

    async def until(self, cluster: dict[str, int] | None) -> None:
        """The sum over all Envoys is this; each look is a round trip to the server."""
        async with asyncio.timeout(PATIENCE):
            while (found := self.reports.in_flight.of(POOL, 1.0)) is None or found.requests != cluster:
                if cluster is None is found:
                    return
                await self.look()

    async def look(self) -> None:
        """A round trip to the server, in which it goes on with what it has to do."""
        await self.channel.unary_unary(f"/{HEALTH}/Check")(b"")

    @property
    def reporting(self) -> float | None:
        return self.metrics.registry.get_sample_value("vllm_xds_load_reporting_envoys")


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    it = Served()
    (port,) = await it.server.start(["127.0.0.1:0"], beside=[it.reports.handler()])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as it.channel:
        yield it
    await it.server.stop(0)


async def test_envoys_are_asked_and_their_reports_summed(served: Served) -> None:
    """Every cluster, each endpoint, each second; a second Envoy adds to the first, and takes its share with it."""
    with structlog.testing.capture_logs() as logs:
        first, second = Envoy(served.channel, "one"), Envoy(served.channel, "two")
        for envoy in (first, second):
            response = await envoy.ask()
            assert (response.send_all_clusters, response.report_endpoint_granularity) == (True, True)
            assert response.load_reporting_interval.ToSeconds() == 1
            assert list(response.clusters) == []
        await served.until(None)
        await first.call.write(request(a=3))
        await second.call.write(request(a=1, b=2))
        await served.until({"10.0.0.1:8000": 4, "[fd00::2]:8000": 2})
        assert served.reporting == 2
        second.call.cancel()
        await served.until({"10.0.0.1:8000": 3})
        assert served.reporting == 1
    assert [(line["event"], line["node"]) for line in logs] == [
        ("load reporting started", "one"),
        ("load reporting started", "two"),
        ("load reporting ended", "two"),
    ]
    first.call.cancel()


NO_ADDRESS = pb.LoadStatsRequest(
    cluster_stats=[
        {"cluster_name": POOL, "upstream_locality_stats": [{"upstream_endpoint_stats": [{"address": b"\xff"}]}]}
    ]
)


@pytest.mark.parametrize("broken", [b"\xff", NO_ADDRESS.SerializeToString()])
@pytest.mark.parametrize("greeted", [True, False])
async def test_what_can_not_be_read_ends_the_stream(served: Served, greeted: bool, broken: bytes) -> None:
    """With INVALID_ARGUMENT, and what that Envoy had reported is forgotten."""
    raw: Any = served.channel.stream_stream(f"/{SERVICE}/StreamLoadStats")()
    if greeted:
        await raw.write(greeting("one").SerializeToString())
        await raw.read()
        await raw.write(request(a=3).SerializeToString())
        await served.until({"10.0.0.1:8000": 3})
    await raw.write(broken)
    async with asyncio.timeout(PATIENCE):
        assert await raw.code() is grpc.StatusCode.INVALID_ARGUMENT
    async with asyncio.timeout(PATIENCE):
        while served.reporting != 0:
            await served.look()
    await served.until(None)
