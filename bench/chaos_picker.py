"""What may stand where Envoy expects a picker: a link to it that is slow, and a service that refuses every request."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import grpc

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
HEALTH = "/grpc.health.v1.Health/Check"
SERVING = b"\x08\x01"  # HealthCheckResponse.status
BLOCK = 1 << 16  # bytes read at once


class SlowLink:
    """Forwards TCP from one address to another; the answers arrive `delay` seconds late. Set it at any time."""

    def __init__(self, listen: str, target: str) -> None:
        self._listen, self._target = _address(listen), _address(target)
        self._connections: set[asyncio.Task[None]] = set()
        self.delay = 0.0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, *self._listen)

    async def stop(self) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._forward(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until either end closes; a target that refuses closes at once."""
        try:
            target_reader, target_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.close()
            return
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        pumps = [
            asyncio.create_task(pump)
            for pump in (_copy(reader, target_writer), self._read(target_reader, late), _write_late(late, writer))
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            writer.close()
            target_writer.close()

    async def _read(self, reader: asyncio.StreamReader, late: asyncio.Queue[tuple[float, bytes]]) -> None:
        while data := await reader.read(BLOCK):
            late.put_nowait((asyncio.get_running_loop().time() + self.delay, data))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(BLOCK):
            writer.write(data)
            await writer.drain()


async def _write_late(late: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
    """Each block when it is due, and none before the one that came before it."""
    with suppress(ConnectionError):
        while True:
            due, data = await late.get()
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            writer.write(data)
            await writer.drain()


class RefusingPicker:
    """An ext_proc service that says it is healthy and answers every request with a gRPC error."""

    async def start(self, address: str) -> None:
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        methods = {
            PROCESS: grpc.stream_stream_rpc_method_handler(_refuse),
            HEALTH: grpc.unary_unary_rpc_method_handler(_serving),
        }
        for path, handler in methods.items():
            _, service, method = path.split("/")
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self._server.add_insecure_port(address)
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)


async def _refuse(_: object, context: grpc.aio.ServicerContext) -> None:
    await context.abort(grpc.StatusCode.INTERNAL, "out of order")


async def _serving(_: bytes, __: grpc.aio.ServicerContext) -> bytes:
    return SERVING


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)
