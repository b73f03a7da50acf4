"""The picker behind other gRPC servers than its own: `python -m bench.grpc_servers NAME [options of vllm-xds picker]`.

    aio     grpc.aio on uvloop
    sync    grpc's synchronous server, one thread
    h2      asyncio's protocol around the h2 library

The same methods, options and process around each; only for comparison (bench/server_cost.py).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import grpc
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamReset

from picker import server
from picker.__main__ import main
from picker.connection import Limits
from picker.listen import Method
from picker.messages import MESSAGE_HEAD

OPTIONS = (("grpc.max_receive_message_length", Limits().message), ("grpc.so_reuseport", 0))


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio ships no types
    def __init__(self, methods: Mapping[str, Callable[[bytes, object], Any]]) -> None:
        self._methods = {path: grpc.unary_unary_rpc_method_handler(method) for path, method in methods.items()}

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._methods.get(details.method)


class AioServer:
    """grpc.aio."""

    def __init__(self, methods: Mapping[str, Method], *_: object) -> None:
        def called(method: Method) -> Callable[[bytes, object], Any]:
            async def call(message: bytes, _: object) -> bytes:
                return method(message)

            return call

        self._server = grpc.aio.server(options=OPTIONS)
        self._server.add_generic_rpc_handlers((_Handlers({path: called(each) for path, each in methods.items()}),))

    async def start(self, addresses: Sequence[str]) -> list[str]:
        for address in addresses:
            self._server.add_insecure_port(address)
        await self._server.start()
        return list(addresses)

    async def stop(self, grace: float) -> None:
        await self._server.stop(grace)


class SyncServer:
    """grpc's threads: one of them works, for more would only wait for the interpreter."""

    def __init__(self, methods: Mapping[str, Method], *_: object) -> None:
        def called(method: Method) -> Callable[[bytes, object], Any]:
            return lambda message, _: method(message)

        self._server = grpc.server(ThreadPoolExecutor(1), options=OPTIONS)
        self._server.add_generic_rpc_handlers((_Handlers({path: called(each) for path, each in methods.items()}),))

    async def start(self, addresses: Sequence[str]) -> list[str]:
        for address in addresses:
            self._server.add_insecure_port(address)
        self._server.start()
        return list(addresses)

    async def stop(self, grace: float) -> None:
        await asyncio.to_thread(self._server.stop(grace).wait)


class _H2Protocol(asyncio.Protocol):
    def __init__(self, methods: Mapping[str, Method], connections: dict[asyncio.Transport, asyncio.Event]) -> None:
        self._methods = methods
        self._connections = connections
        self._connection = H2Connection(H2Configuration(client_side=False, header_encoding=None))
        self._calls: dict[int, tuple[Method, bytearray]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._connections[self._transport] = asyncio.Event()
        self._connection.initiate_connection()
        self._connection.increment_flow_control_window((1 << 31) - (1 << 16))
        self._transport.write(self._connection.data_to_send())

    def connection_lost(self, _: Exception | None) -> None:
        self._connections.pop(self._transport).set()

    def data_received(self, data: bytes) -> None:
        for event in self._connection.receive_data(data):
            match event:
                case RequestReceived(stream_id=stream_id, headers=headers):
                    path = dict(headers or ())[b":path"].decode()
                    self._calls[stream_id] = (self._methods[path], bytearray())
                case DataReceived(stream_id=stream_id, data=part, flow_controlled_length=length):
                    self._connection.acknowledge_received_data(length, stream_id)
                    self._add(stream_id, part)
                case StreamReset(stream_id=stream_id):
                    self._calls.pop(stream_id, None)
        self._transport.write(self._connection.data_to_send())

    def _add(self, stream_id: int, part: bytes) -> None:
        if stream_id not in self._calls:
            return
        method, body = self._calls[stream_id]
        body += part
        if len(body) < MESSAGE_HEAD.size or len(body) < MESSAGE_HEAD.size + MESSAGE_HEAD.unpack_from(body)[1]:
            return
        del self._calls[stream_id]
        message = method(bytes(body[MESSAGE_HEAD.size :]))
        send = self._connection
        send.send_headers(stream_id, [(":status", "200"), ("content-type", "application/grpc")])
        send.send_data(stream_id, MESSAGE_HEAD.pack(0, len(message)) + message)
        send.send_headers(stream_id, [("grpc-status", "0")], end_stream=True)


class H2Server:
    """h2."""

    def __init__(self, methods: Mapping[str, Method], *_: object) -> None:
        self._methods = methods
        self._connections: dict[asyncio.Transport, asyncio.Event] = {}  # that are open -> when one is not

    async def start(self, addresses: Sequence[str]) -> list[str]:
        for address in addresses:
            host, _, port = address.rpartition(":")
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(
                lambda: _H2Protocol(self._methods, self._connections), host, int(port)
            )
        return list(addresses)

    async def stop(self, _grace: float) -> None:
        self._server.close()
        closed = list(self._connections.values())
        for transport in self._connections:
            transport.abort()
        for each in closed:
            await each.wait()


SERVERS: dict[str, type[AioServer | SyncServer | H2Server]] = {"aio": AioServer, "sync": SyncServer, "h2": H2Server}

if __name__ == "__main__":
    vars(server)["GrpcServer"] = SERVERS[sys.argv.pop(1)]  # it has the same three methods
    sys.exit(main())
