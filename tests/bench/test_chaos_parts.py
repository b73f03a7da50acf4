"""What `make chaos` puts in the way: metrics pages no vLLM serves, a slow link, a picker that refuses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import pytest

from bench import chaos_pages as pages
from bench.chaos_picker import HEALTH, PROCESS, SERVING, RefusingPicker, SlowLink
from bench.envoy import free_port
from bench.vllm_server import Page, SimulatedPod
from xds.exposition import Unreadable, parse_page
from xds.model import Load
from xds.scrape import Failure, fetch, open_session

WITHIN = 1.0  # seconds for a page


@pytest.fixture
async def pod() -> AsyncIterator[SimulatedPod]:
    async with SimulatedPod("pod-0") as pod:
        yield pod


async def read(pod: SimulatedPod) -> bytes | Failure:
    async with open_session(1.0) as session:
        return await fetch(session, f"http://{pod.address}:{pod.port}/metrics", WITHIN)


@pytest.mark.parametrize(("page", "reason"), [(pages.huge, "TooLarge"), (pages.endless, "Timeout")])
async def test_pages_without_an_end(pod: SimulatedPod, page: Page, reason: str) -> None:
    """The scraper gives up on them, each for its reason, and the pod is well again with its own page."""
    pod.faults.page = page
    failure = await read(pod)
    assert isinstance(failure, Failure)
    assert failure.reason == reason
    pod.faults.page = None
    assert isinstance(await read(pod), bytes)


@pytest.mark.parametrize(
    ("page", "read_as"),
    [
        (pages.html, Unreadable.NOT_METRICS),
        (pages.requests(b"NaN"), Unreadable.BAD_GAUGE),
        (pages.requests(b"-3"), Unreadable.BAD_GAUGE),
        (pages.requests(b"+Inf"), Unreadable.BAD_GAUGE),
        (pages.requests(b"1"), Load),
        (pages.mislabelled, Load),
        (pages.backwards(), Load),
    ],
)
async def test_pages_that_come(pod: SimulatedPod, page: Page, read_as: Unreadable | type[Load]) -> None:
    """Each is what it is made to be: unreadable, or a load that is to be taken with care."""
    pod.faults.page = page
    text = await read(pod)
    assert isinstance(text, bytes)
    load = parse_page(text)
    assert load is read_as or type(load) is read_as


async def test_counters_go_back(pod: SimulatedPod) -> None:
    """Every other page has less than the one before."""
    pod.engine.stats.prompt_tokens = 1000
    pod.faults.page = pages.backwards()
    counts = []
    for _ in range(3):
        text = await read(pod)
        assert isinstance(text, bytes)
        load = parse_page(text)
        assert isinstance(load, Load)
        counts.append(load.prompt_tokens)
    assert counts == [500, 1000, 500]


async def test_a_slow_link_delays_answers_in_order() -> None:
    """Both directions arrive whole; what comes back is late by `delay`, and keeps its order when that ends."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    port = free_port()
    link = SlowLink(f"127.0.0.1:{port}", target)
    await link.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(10):
            link.delay = 0.2
            began = time.monotonic()
            writer.write(b"late")
            assert await reader.readexactly(2) == b"la"
            assert time.monotonic() - began >= 0.2
            assert await reader.readexactly(2) == b"te"
            writer.write(b"1")
            assert await reader.readexactly(1) == b"1"
            link.delay = 0.0
            writer.write(b"23")
            assert await reader.readexactly(2) == b"23"
            server.close()
            writer.write_eof()
            assert await reader.read() == b""
    finally:
        writer.close()
        await link.stop()
        server.close()


async def test_a_slow_link_to_nobody_is_closed() -> None:
    """A target that refuses is a connection that ends."""
    port = free_port()
    link = SlowLink(f"127.0.0.1:{port}", f"127.0.0.1:{free_port()}")
    await link.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(10):
        assert await reader.read() == b""
    writer.close()
    await link.stop()


async def test_a_refusing_picker_is_healthy_and_refuses() -> None:
    """Its health check passes and each request gets a gRPC error; its port is free again when it has stopped."""
    address, picker = f"127.0.0.1:{free_port()}", RefusingPicker()
    for _ in range(2):
        await picker.start(address)
        async with grpc.aio.insecure_channel(address) as channel, asyncio.timeout(10):
            assert await channel.unary_unary(HEALTH)(b"") == SERVING
            call = channel.stream_stream(PROCESS)()
            await call.write(b"")
            assert await call.code() is grpc.StatusCode.INTERNAL
        await picker.stop()
