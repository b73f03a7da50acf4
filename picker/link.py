"""One bidirectional stream to a management server, opened again for as long as it is wanted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from xds.tls import TlsError, TlsFiles, channel_credentials

MAX_MESSAGE = 16 << 20  # bytes: 100,000 pods in one response
BACKOFF = 0.2  # seconds before the second attempt, doubled for each one after it, less up to half at random
MAX_BACKOFF = 5.0  # seconds: a restarted server is found before the loads are stale
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.keepalive_time_ms", 10_000),  # a server that hangs with its sockets open is noticed in 15 s
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # the one that ends the connection; its default is 60 s
    ("grpc.http2.max_pings_without_data", 0),  # a server without pools has nothing to send
    ("grpc.use_local_subchannel_pool", 1),  # else a new channel inherits the old one's wait
)

# Of bytes: what cannot be decoded is ours to judge. `write`, and `read` until grpc.aio.EOF.
Stream = Any


class Link:
    """To `method` of the server at `address` (HOST:PORT). Mutable.

    `random` gives floats in [0, 1). `tls` is read at each connection. `failures` counts attempts since a stream was of
    use: whoever has it says so by setting it to 0.
    """

    def __init__(self, address: str, method: str, random: Callable[[], float], tls: TlsFiles | None) -> None:
        self.address = address
        self.failures = 0
        self._method = method
        self._random = random
        self._tls = tls

    async def run(self, talk: Callable[[Stream], Awaitable[None]], ended: Callable[[str], None]) -> None:
        """One stream after another, until it is cancelled: `talk` has it, then `ended` is told why it is over."""
        while True:
            ended(await self._follow(talk))
            delay = min(MAX_BACKOFF, BACKOFF * 2 ** min(self.failures, 16))
            self.failures += 1
            await asyncio.sleep(delay * (1 - self._random() / 2))

    async def _follow(self, talk: Callable[[Stream], Awaitable[None]]) -> str:
        try:
            opened = self._open()
        except TlsError as error:
            return str(error)
        async with opened as channel:
            stream = channel.stream_stream(self._method)()
            try:
                await talk(stream)
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name}: {error.details()}"
            except (asyncio.InvalidStateError, DecodeError) as error:  # the stream ended while it was written to
                return str(error)
            return f"{(await stream.code()).name}: the server ended the stream"

    def _open(self) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(self.address, channel_credentials(self._tls), options=CHANNEL_OPTIONS)
