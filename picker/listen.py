"""Sockets for `picker.connection`: addresses, TLS, and a gRPC server of unary methods that are plain functions.

A call is answered in the same turn of the event loop in which its last byte was read, and all answers of a turn leave
together. Methods therefore have to be quick, and get a whole message.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from picker.connection import Call, Connection, Limits
from picker.frames import Code
from picker.messages import UNIMPLEMENTED, Budget
from xds.tls import TlsFiles, server_context

UNIX = "unix:"
SOCKET_MODE = 0o666  # Envoy runs as another user; who may reach the socket is its directory's matter
BACKLOG = 128  # connections: an Envoy has one for each of its threads
MAX_CONNECTIONS = 1024  # eight Envoys of 128 threads: one more is closed at once
MAX_HELD = 512 << 20  # bytes of incomplete messages of all connections: sixteen of Envoy's largest bodies
HANDSHAKE = 5.0  # seconds for TLS
EXPIRE = 1.0  # seconds between looks for what is too slow

Method = Callable[[bytes], bytes]  # a request's message -> the answer's; CallError for another status


class AddressError(Exception):
    """An address cannot be listened on; the text says which and why."""


class CallError(Exception):
    """A call is answered with this gRPC status; `text` is plain ASCII."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class GrpcServer:
    """Answers calls of `methods`, by path. `clock` gives seconds; with `tls` only clients that have a certificate.

    `broken` is told of each connection that ended by its client's mistake: what it was, and in words.
    """

    def __init__(
        self,
        methods: Mapping[str, Method],
        clock: Callable[[], float],
        broken: Callable[[Code, str], None],
        tls: TlsFiles | None = None,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self.methods = methods
        self.clock = clock
        self.broken = broken
        self.limits = Limits()
        self.max_connections = max_connections
        self.memory = Budget(MAX_HELD)
        self.connections: set[_Protocol] = set()
        self._tls = tls
        self._listeners: list[asyncio.Server] = []
        self._sockets: list[Path] = []
        self._expiring: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()

    async def start(self, addresses: Sequence[str]) -> list[str]:
        """Listen on `host:port` and `unix:/path` addresses; the same with the ports chosen for port 0.

        Raises AddressError or TlsError. A unix socket is never TLS: its directory says who may reach it.
        """
        context = server_context(self._tls) if self._tls is not None else None
        bound = []
        for address in addresses:
            plain = address.startswith(UNIX)
            try:
                sock = _unix_socket(Path(address.removeprefix(UNIX))) if plain else _tcp_socket(address)
            except OSError as error:
                raise AddressError(f"cannot listen on {address}: {_why(error)}") from None
            if plain:
                self._sockets.append(Path(address.removeprefix(UNIX)))
            port = "" if plain else sock.getsockname()[1]
            bound.append(address if plain else f"{address.rpartition(':')[0]}:{port}")
            tls = None if plain else context
            listener = await asyncio.get_running_loop().create_server(
                lambda: _Protocol(self),
                sock=sock,
                backlog=BACKLOG,
                ssl=tls,
                ssl_handshake_timeout=HANDSHAKE if tls else None,
            )
            self._listeners.append(listener)
        self._expire()
        return bound

    async def stop(self, grace: float) -> None:
        """Refuse new connections, have open ones go away, and close them after at most `grace` seconds."""
        for listener in self._listeners:
            listener.close()
        for path in self._sockets:
            path.unlink(missing_ok=True)
        self._sockets.clear()
        for connection in tuple(self.connections):
            connection.finish()
        if self.connections:
            self._empty.clear()
        if self.connections and grace:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), grace)
        for connection in tuple(self.connections):
            connection.abort()
        if self.connections:
            await self._empty.wait()  # what is aborted is closed in the loop's next turn
        if self._expiring is not None:
            self._expiring.cancel()

    def closed(self, connection: _Protocol) -> None:
        self.connections.discard(connection)
        if not self.connections:
            self._empty.set()

    def _expire(self) -> None:
        now = self.clock()
        for connection in tuple(self.connections):
            connection.expire(now)
        self._expiring = asyncio.get_running_loop().call_later(EXPIRE, self._expire)


class _Protocol(asyncio.Protocol):
    """One connection's socket."""

    def __init__(self, server: GrpcServer) -> None:
        self._server = server
        self._methods = server.methods
        self._clock = server.clock
        self._connection = Connection(server.limits, server.memory, server.clock())
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # as asyncio promises for streams
        tls = transport.get_extra_info("ssl_object")
        if len(self._server.connections) >= self._server.max_connections or (
            tls and tls.selected_alpn_protocol() != "h2"
        ):
            self._transport.abort()
            return
        self._server.connections.add(self)
        self._flush()

    def data_received(self, data: bytes) -> None:
        for call in self._connection.receive(data, self._clock()):
            self._serve(call)
        self._flush()

    def _serve(self, call: Call) -> None:
        method = self._methods.get(call.path)
        if method is None:
            self._connection.fail(call.stream_id, UNIMPLEMENTED, "no such method here")
            return
        try:
            self._connection.answer(call.stream_id, method(call.message))
        except CallError as error:
            self._connection.fail(call.stream_id, error.status, str(error))

    def _flush(self) -> None:
        out = self._connection.take()
        if out:
            self._transport.write(out)
        if self._connection.ended and not self._transport.is_closing():
            self._transport.close()
            if self._connection.error is not None:
                self._server.broken(*self._connection.error)

    def pause_writing(self) -> None:
        """The client does not read what it asked for: ask it nothing more."""
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, _: Exception | None) -> None:
        self._connection.close()
        self._server.closed(self)

    def finish(self) -> None:
        self._connection.finish()
        self._flush()

    def expire(self, now: float) -> None:
        self._connection.expire(now)
        self._flush()

    def abort(self) -> None:
        self._transport.abort()


def _tcp_socket(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    return socket.create_server((host.strip("[]"), int(port)), family=family, backlog=BACKLOG)


def _unix_socket(path: Path) -> socket.socket:
    _clear_socket(path)
    made = socket.socket(socket.AF_UNIX)
    try:
        made.bind(str(path))
        path.chmod(SOCKET_MODE)
    except OSError:
        made.close()
        raise
    return made


def _clear_socket(path: Path) -> None:
    """Remove a dead picker's socket; OSError for a living one's."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _why(error: OSError) -> str:
    """The system's own words; socket repeats the address in its own."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
