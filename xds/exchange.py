"""The exchange between pickers over gRPC: what one tells is handed to the others (xds/wire/exchange.proto).

    [ reader task -> Relay.say -> wake of the others ; wake, or HEARTBEAT -> Relay.take -> write ] * streams

It is advice: a picker that does not read loses batches, and one that talks too much is read more slowly.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import grpc
import structlog
from google.protobuf.message import DecodeError

from xds.metrics import Metrics
from xds.relay import GAP, HEARTBEAT, Member, Relay, RelayError
from xds.wire.exchange_pb2 import Hello

SERVICE = "vllm_xds.v1.Exchange"
MAX_TEXT = 256  # characters of a node's id in a log line: anyone who can connect chooses it

log = structlog.get_logger()


class Exchange:
    """`handler` belongs to a gRPC server. Bound to one event loop."""

    def __init__(self, metrics: Metrics) -> None:
        self._relay = Relay()
        self._wakes: dict[Member, asyncio.Event] = {}
        self._metrics = metrics

    def handler(self) -> grpc.GenericRpcHandler:
        method = grpc.stream_stream_rpc_method_handler(self._share)
        return grpc.method_handlers_generic_handler(SERVICE, {"Share": method})

    async def _share(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        try:
            hello = Hello.FromString(await anext(requests))
            member = self._relay.join(hello.picker, deaf=hello.deaf)
        except StopAsyncIteration:
            return
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message is no Hello")
        except RelayError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        events = log.bind(node=hello.node[:MAX_TEXT] or "unnamed", peer=context.peer())
        wake = self._wakes[member] = asyncio.Event()
        events.info("picker joined", pickers=self._changed())
        reader = asyncio.create_task(self._read(member, requests))
        reader.add_done_callback(lambda _: wake.set())
        try:
            while not reader.done():
                message = self._relay.take(member)
                await context.write(message)
                self._metrics.exchange_bytes.inc(len(message))
                await asyncio.sleep(GAP)
                with suppress(TimeoutError):
                    await asyncio.wait_for(wake.wait(), HEARTBEAT)
                wake.clear()
            if refusal := await reader:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, refusal)
        except grpc.aio.InternalError:
            return  # the stream ended while it was written to
        finally:
            reader.cancel()
            self._relay.leave(member)
            del self._wakes[member]
            events.info("picker left", pickers=self._changed())

    async def _read(self, member: Member, requests: AsyncIterator[bytes]) -> str:
        """Hand on what a picker tells, until it has no more to say, or for the reason returned is to leave."""
        async for batch in requests:
            dropped = self._relay.dropped
            try:
                others = self._relay.say(member, batch)
            except RelayError as error:
                return str(error)
            for other in others:
                self._wakes[other].set()
            self._metrics.exchange_batches.inc()
            self._metrics.exchange_dropped.inc(self._relay.dropped - dropped)
            await asyncio.sleep(GAP)
        return ""

    def _changed(self) -> int:
        """How many pickers there are, which each of them is told."""
        for wake in self._wakes.values():
            wake.set()
        self._metrics.exchange_pickers.set(self._relay.pickers)
        return self._relay.pickers
