"""The exchange over gRPC, as pickers that speak the wire by hand see it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
import structlog

from xds.exchange import SERVICE, Exchange
from xds.metrics import Metrics
from xds.relay import MAX_BATCH
from xds.server import ManagementServer
from xds.wire.exchange_pb2 import Heard, Hello

PATIENCE = 10  # seconds: nothing here takes two


class Peer:
    """A picker's stream, in bytes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call: Any = channel.stream_stream(f"/{SERVICE}/Share")()

    async def join(self, picker: int, *, deaf: bool = False) -> int:
        """How many others it is told there are."""
        await self.call.write(Hello(picker=picker, deaf=deaf, node=f"picker-{picker}").SerializeToString())
        return (await self.heard()).others

    async def heard(self) -> Heard:
        async with asyncio.timeout(PATIENCE):
            return Heard.FromString(await self.call.read())

    async def batches(self, count: int) -> list[bytes]:
        """The next so many, and what comes with them."""
        found: list[bytes] = []
        while len(found) < count:
            found += (await self.heard()).batches
        return found

    async def others(self, count: int) -> None:
        """It is told that there are so many; each look is a message."""
        while (await self.heard()).others != count:
            pass

    async def code(self) -> grpc.StatusCode:
        """How it ends, when all is read."""
        async with asyncio.timeout(PATIENCE):
            with suppress(grpc.aio.AioRpcError):
                while await self.call.read() is not grpc.aio.EOF:
                    pass
            code: grpc.StatusCode = await self.call.code()
            return code


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
async def channel(metrics: Metrics) -> AsyncIterator[grpc.aio.Channel]:
    server = ManagementServer(metrics)
    (port,) = await server.start(["127.0.0.1:0"], beside=[Exchange(metrics).handler()])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


async def test_pickers_come_tell_and_go(channel: grpc.aio.Channel, metrics: Metrics) -> None:
    """Each is told at once how many others there are, and what they tell, whatever it is; its own it is not."""
    one, two, deaf = (Peer(channel) for _ in range(3))
    with structlog.testing.capture_logs() as logs:
        assert await one.join(1) == 0
        assert await two.join(2) == 1
        assert await deaf.join(2, deaf=True) == 1
        await one.others(1)
        await two.call.write(b"\xff")
        await deaf.call.write(b"two")
        assert sorted(await one.batches(2)) == [b"two", b"\xff"]
        await one.call.write(b"one")
        assert await two.batches(1) == [b"one"]
        assert not (await deaf.heard()).batches
        two.call.cancel()
        deaf.call.cancel()
        await one.others(0)
    assert [(line["event"], line["node"]) for line in logs[:3]] == [
        ("picker joined", "picker-1"),
        ("picker joined", "picker-2"),
        ("picker joined", "picker-2"),
    ]
    assert [line["event"] for line in logs[3:]] == ["picker left"] * 2
    assert metrics.registry.get_sample_value("vllm_xds_exchange_pickers") == 1
    assert metrics.registry.get_sample_value("vllm_xds_exchange_batches_total") == 3
    assert not (await one.heard()).batches


@pytest.mark.parametrize("joined", [True, False])
async def test_garbage_ends_the_stream_it_came_on(channel: grpc.aio.Channel, joined: bool) -> None:
    """No Hello, or a batch that is too long: INVALID_ARGUMENT. Others hear nothing of it, and go on."""
    good, other, bad = (Peer(channel) for _ in range(3))
    await good.join(1)
    await other.join(2)
    if joined:
        await bad.join(3)
        await good.others(2)
    await bad.call.write(bytes([0xFF]) * (MAX_BATCH + 1 if joined else 9))
    assert await bad.code() is grpc.StatusCode.INVALID_ARGUMENT
    await good.call.write(b"still")
    assert await other.batches(1) == [b"still"]
    await other.others(1)


async def test_one_that_does_not_read_holds_up_nobody(channel: grpc.aio.Channel, metrics: Metrics) -> None:
    """Megabytes are told while one of two others reads nothing: the other has all of it, and batches give way."""
    reader, hung, *speakers = (Peer(channel) for _ in range(6))
    for number, peer in enumerate((reader, hung, *speakers)):
        await peer.join(number, deaf=peer in speakers)
    told = 0
    while not metrics.registry.get_sample_value("vllm_xds_exchange_dropped_total"):
        for speaker in speakers:
            await speaker.call.write(bytes(MAX_BATCH))
        told += len(speakers)
        assert len(await reader.batches(len(speakers))) == len(speakers)
    assert told < 200
