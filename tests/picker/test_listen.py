"""picker/listen.py: sockets, with clients that speak the bytes themselves."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from picker.frames import GOAWAY, HEAD, HEADERS, PING, SETTINGS, frame
from picker.listen import GrpcServer
from picker.messages import MESSAGE_HEAD
from tests.picker.test_connection import GREETING, PATH, call, message
from tests.tls_files import CERTS, Identity
from xds.tls import TlsFiles

BOUND = 20.0  # seconds for anything awaited here, far above what it takes


@asynccontextmanager
async def serving(started: GrpcServer, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    (bound,) = await started.start([address])
    try:
        async with asyncio.timeout(BOUND):
            yield bound
    finally:
        await started.stop(0)


def echo(message: bytes) -> bytes:
    return message


def server(tls: TlsFiles | None = None, max_connections: int = 10) -> GrpcServer:
    return GrpcServer({PATH: echo}, time.monotonic, lambda *_: None, tls, max_connections)


async def connect(
    address: str, context: ssl.SSLContext | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port), ssl=context)


async def read(reader: asyncio.StreamReader) -> tuple[int, int, bytes]:
    """Type, stream and payload of the next frame."""
    length_kind, _, stream_id = HEAD.unpack(await reader.readexactly(HEAD.size))
    return length_kind & 255, stream_id, await reader.readexactly(length_kind >> 8)


async def answer(reader: asyncio.StreamReader, stream_id: int) -> bytes:
    """The message of the stream's answer, which ends with trailers."""
    body = b""
    headers = 0
    while headers < 2:
        kind, stream, payload = await read(reader)
        if stream == stream_id:
            headers += kind == HEADERS
            body += payload if kind != HEADERS else b""
    return body[MESSAGE_HEAD.size :]


async def test_a_client_that_does_not_read_is_not_read() -> None:
    """Its answers stay bounded: sending stops until it reads, and then every call is answered."""
    async with serving(server()) as address:
        reader, writer = await connect(address)
        writer.write(GREETING + frame(SETTINGS, 0, 0, b"\0\4\x7f\xff\xff\xff") + frame(8, 0, 0, b"\x7f\xff\0\0"))
        part = b"".join(call(stream_id, bytes(10_000)) for stream_id in range(1, 201, 2))
        sent = 0
        writer.transport.set_write_buffer_limits(high=1 << 16)
        try:
            while sent < 100:  # a gigabyte, if it were taken
                writer.write(_shifted(part, 200 * sent))
                sent += 1
                async with asyncio.timeout(0.5):
                    await writer.drain()
        except TimeoutError:
            pass
        assert sent < 100
        assert await answer(reader, 200 * sent - 1) == bytes(10_000)
        writer.close()


def _shifted(frames: bytes, by: int) -> bytes:
    """The same frames for streams whose numbers are larger by `by`."""
    out, position = list[bytes](), 0
    while position < len(frames):
        length_kind, flags, stream_id = HEAD.unpack_from(frames, position)
        end = position + HEAD.size + (length_kind >> 8)
        out += (HEAD.pack(length_kind, flags, stream_id + by), frames[position + HEAD.size : end])
        position = end
    return b"".join(out)


async def test_it_stops_in_order(tmp_path: Path) -> None:
    """An open call is answered within the grace, its client told to go; the socket's file is gone, nobody comes."""
    stopped = server()
    path = tmp_path / "p.sock"
    async with serving(stopped, f"unix:{path}") as address:
        reader, writer = await connect(address)
        whole = call(1, b"abc")
        writer.write(GREETING + frame(PING, 0, 0, bytes(8)) + whole[:-1])
        while (await read(reader))[0] != PING:
            pass
        stopping = asyncio.create_task(stopped.stop(BOUND))
        while (await read(reader))[0] != GOAWAY:
            pass
        writer.write(whole[-1:])
        assert await answer(reader, 1) == b"abc"
        assert not stopping.done()
        writer.close()
        await stopping
        assert not path.exists()
        with pytest.raises(OSError, match="No such file"):
            await connect(address)


async def test_a_client_that_stays_is_cut_off() -> None:
    """The grace ends."""
    stopped = server()
    async with serving(stopped) as address:
        reader, writer = await connect(address)
        writer.write(GREETING)
        await read(reader)
        await stopped.stop(0.05)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await answer(reader, 1)
        writer.close()


async def test_connections_are_bounded() -> None:
    """One too many is closed at once; when another has gone, a next one is served."""
    async with serving(server(max_connections=1)) as address:
        first_reader, first = await connect(address)
        await read(first_reader)
        reader, writer = await connect(address)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await read(reader)
        writer.close()
        first.close()
        while True:  # until the server has noticed
            reader, writer = await connect(address)
            writer.write(GREETING + call(1, b"abc"))
            try:
                assert await answer(reader, 1) == b"abc"
            except (asyncio.IncompleteReadError, ConnectionResetError):
                continue
            finally:
                writer.close()
            break


async def test_tls_without_http2_is_closed(tmp_path: Path) -> None:
    """A client with a good certificate that does not offer h2 gets nothing, one that does is answered."""
    guarded = server(Identity(tmp_path / "server").files)
    async with serving(guarded) as address:
        context = ssl.create_default_context(cafile=CERTS / "ca.pem")
        context.load_cert_chain(CERTS / "first.pem", CERTS / "first.key")
        reader, writer = await connect(address, context)
        assert await reader.read() == b""
        writer.close()
        context.set_alpn_protocols(["h2"])
        reader, writer = await connect(address, context)
        writer.write(GREETING + call(1, message(b"abc")))
        assert await answer(reader, 1) == message(b"abc")
        writer.close()
