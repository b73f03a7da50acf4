"""picker/exchange_client.py: pickers that hear one another through the real management server, and that do not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from bench.envoy import free_port
from picker.exchange import Heard, Inbox
from picker.exchange_client import METHOD, ExchangeClient
from picker.memory import SILENT
from picker.metrics import PickerMetrics
from tests.picker.test_exchange import LONG, A, Side, placed
from tests.tls_files import Identity
from xds.exchange import Exchange
from xds.metrics import Metrics
from xds.server import ManagementServer
from xds.tls import TlsFiles
from xds.wire import exchange_pb2 as pb

PATIENCE = 20  # seconds: nothing here takes one


class Server:
    """A management server that can be stopped, and started where it was."""

    def __init__(self) -> None:
        self.address = f"127.0.0.1:{free_port()}"

    async def start(self, tls: TlsFiles | None = None) -> None:
        metrics = Metrics()
        self._server = ManagementServer(metrics)
        await self._server.start([self.address], tls, [Exchange(metrics).handler()])

    async def stop(self) -> None:
        await self._server.stop(0)


class Hung:
    """A server that welcomes a picker, with one other there, and then neither reads nor says anything."""

    async def start(self) -> None:
        self._server = grpc.aio.server()
        service, method = METHOD.removeprefix("/").split("/")
        handler = grpc.stream_stream_rpc_method_handler(self._share)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)

    async def _share(self, _: Any, context: grpc.aio.ServicerContext) -> None:
        await context.write(pb.Heard(others=1).SerializeToString())
        await asyncio.Event().wait()


class _Watched(Inbox):
    """Says when something was heard."""

    def __init__(self, side: Side) -> None:
        super().__init__(side.picker)
        self.heard = asyncio.Condition()
        self.messages = self.requests = 0

    def hear(self, message: bytes, now: float) -> Heard:
        heard = super().hear(message, now)
        self.messages += 1
        self.requests += heard.requests
        asyncio.get_running_loop().create_task(self._say())
        return heard

    async def _say(self) -> None:
        async with self.heard:
            self.heard.notify_all()


class Member(Side):
    """A picker that takes part; its clock stands still until it is set."""

    def __init__(self, number: int, servers: list[str], tls: TlsFiles | None = None, *, deaf: bool = False) -> None:
        super().__init__()
        self.now = 1.0
        self.watched = _Watched(self)
        self.waits = asyncio.Semaphore(0)
        self.metrics = PickerMetrics()
        hello = pb.Hello(picker=number, deaf=deaf, node=f"picker-{number}")
        self.client = ExchangeClient(
            servers, hello, self.outbox, self.watched, self.memory, self.metrics,
            clock=lambda: self.now, random=self._wait, tls=tls,
        )  # fmt: skip

    def _wait(self) -> float:
        """The client asks for randomness when it is about to wait for its next attempt."""
        self.waits.release()
        return 1.0

    async def failed(self, times: int = 1) -> None:
        """So many streams have ended since this was asked last."""
        async with asyncio.timeout(PATIENCE):
            for _ in range(times):
                await self.waits.acquire()

    @property
    def others(self) -> int:
        return self.memory.peers(self.now)[1]

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE), self.watched.heard:
            await self.watched.heard.wait_for(true)

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"vllm_xds_picker_exchange_{name}", labels)


Join = Callable[..., Awaitable[Member]]


@asynccontextmanager
async def joining() -> AsyncIterator[Join]:
    """Starts pickers, and stops them at the end."""
    tasks: list[asyncio.Task[None]] = []

    async def join(number: int, *servers: str, **options: Any) -> Member:
        member = Member(number, list(servers), **options)
        tasks.append(asyncio.create_task(member.client.run()))
        await asyncio.sleep(0)
        return member

    try:
        yield join
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


@pytest.fixture
async def join() -> AsyncIterator[Join]:
    async with joining() as join:
        yield join


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    await server.start()
    yield server
    await server.stop()


async def test_what_one_sends_the_other_finds(join: Join, server: Server) -> None:
    """Within a message, though alone it would have gone elsewhere; what a picker sends is not told to itself."""
    one, two = await join(1, server.address), await join(2, server.address)
    await one.until(lambda: one.others == 1)
    await two.until(lambda: two.others == 1)
    one.report(1.0, busy=9.0)
    assert one.pick(LONG, 1.0) == A
    await two.until(lambda: two.watched.requests == 1)
    two.report(2.0)
    assert two.pick(LONG + "and more", 2.0) == A
    await one.until(lambda: one.watched.requests == 1)
    assert two.watched.requests == 1
    assert (one.value("peers"), one.value("requests_total")) == (1, 1)
    assert one.value("bytes_total", direction="told")


async def test_workers_are_one_picker(join: Join, server: Server) -> None:
    """One that does not listen tells others, is told nothing, and is no other picker to its fellow."""
    one, deaf, two = (
        await join(1, server.address),
        await join(1, server.address, deaf=True),
        await join(2, server.address),
    )
    await two.until(lambda: two.others == 1)
    await one.until(lambda: one.others == 1)
    await deaf.until(lambda: deaf.value("peers") == 1)
    assert deaf.others == 0
    deaf.memory.note_peers(1, 1.0)  # as the worker that listens does, in the memory they share
    deaf.pick(LONG, 1.0)
    await two.until(lambda: two.watched.requests == 1)
    two.pick(LONG, 1.0)
    await one.until(lambda: one.watched.requests == 1)
    assert deaf.watched.requests == 0


async def test_a_server_that_goes_and_comes_back(join: Join, server: Server) -> None:
    """It picks on, as one of two that hear nothing of each other; then they hear each other again."""
    with capture_logs() as logs:
        one, two = await join(1, server.address), await join(2, server.address)
        await one.until(lambda: one.others == 1)
        await two.until(lambda: two.others == 1)
        await server.stop()
        for member in (one, two):
            await member.failed()
            assert member.value("peers") == 0
            member.now += SILENT / 1000 + 1
            assert member.memory.peers(member.now) == (1, 0)
            assert member.pick(LONG, member.now) is not None
        await server.start()
        await one.until(lambda: one.others == 1)
        await two.until(lambda: two.others == 1)
        assert one.pick(LONG + "more", one.now) is not None
        await two.until(lambda: two.watched.requests == 1)
    events = [line["event"] for line in logs if line["event"].startswith("exchange")]
    assert sorted(events) == ["exchange joined"] * 4 + ["exchange lost"] * 2


async def test_a_hung_server_costs_nothing(join: Join, server: Server) -> None:
    """What it does not take is bounded, nobody waits for it, and after SILENT the other server is told instead."""
    async with AsyncExitStack() as stack:
        hung = Hung()
        await hung.start()
        stack.push_async_callback(hung.stop)
        one = await join(1, hung.address, server.address)
        two = await join(2, server.address)
        await one.until(lambda: one.others == 1)
        await two.until(lambda: two.others == 1)
        for number in range(1000):
            assert one.pick(f"{number} " * 6000, 1.0) is not None
        assert one.outbox.full > 0
        one.now = two.now = 2.0 + SILENT / 1000
        for member in (one, two):  # the server's next message, within a second
            await member.until(lambda member=member: member.others == 1)  # type: ignore[misc]
        one.report(one.now)
        assert one.pick(LONG, one.now) is not None
        await two.until(lambda: two.watched.requests > 0)


async def test_garbage_is_refused_and_said_once(join: Join, server: Server) -> None:
    """It is counted, and the stream lives on: what is good counts."""
    with capture_logs() as logs:
        one = await join(1, server.address)
        await one.until(lambda: one.watched.messages == 1)
        async with grpc.aio.insecure_channel(server.address) as channel:
            stranger: Any = channel.stream_stream(METHOD)()
            await stranger.write(pb.Hello(picker=9).SerializeToString())
            for batch in (b"\xff", placed(tokens=1, uncached=2), placed(hash_key="nobody's"), placed(hash_key=A)):
                await stranger.write(batch)
            await one.until(lambda: one.watched.requests == 1)
    reasons = {reason: one.value("lost_total", reason=reason) for reason in ("refused", "unknown", "excess")}
    assert reasons == {"refused": 2, "unknown": 1, "excess": None}
    assert [line["event"] for line in logs].count("placements refused") == 1
    assert one.picker.chunks == 0


async def test_a_server_without_the_exchange(join: Join) -> None:
    """One of another version, or none at all: said once, and tried again."""
    bare = ManagementServer(Metrics())
    (port,) = await bare.start(["127.0.0.1:0"])
    with capture_logs() as logs:
        one = await join(1, f"127.0.0.1:{port}")
        await one.failed(2)
        await bare.stop(0)
    assert [line["event"] for line in logs] == ["exchange unreachable"]
    assert logs[0]["reason"].startswith("UNIMPLEMENTED")
    assert one.memory.peers(1.0) == (0, 0)


async def test_over_mutual_tls(join: Join, tmp_path: Any) -> None:
    """As the other services of the server: with a certificate of the CA, and not without."""
    identity = Identity(tmp_path / "tls")
    server = Server()
    await server.start(identity.files)
    try:
        one, two = await join(1, server.address, tls=identity.files), await join(2, server.address, tls=identity.files)
        stranger = await join(3, server.address)
        await one.until(lambda: one.others == 1)
        one.pick(LONG, 1.0)
        await two.until(lambda: two.watched.requests == 1)
        await stranger.failed()
        assert (one.others, stranger.others) == (1, 0)
    finally:
        await server.stop()
