"""Envoy's load reporting service (LRS) over gRPC: each Envoy is told to report, and its last report is kept.

https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/service/load_stats/v3/lrs.proto
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable

import grpc
import structlog
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError

from xds.in_flight import INTERVAL, InFlight, read_report
from xds.metrics import Metrics
from xds.wire import load_stats_pb2 as pb

SERVICE = "envoy.service.load_stats.v3.LoadReportingService"
POOLS = "pool/"  # clusters that count: those of InferencePools
MAX_TEXT = 256  # characters of a node's id in a log line: anyone who can connect chooses it

log = structlog.get_logger()


class LoadReports:
    """`in_flight` has what the Envoys report; `handler` belongs to a gRPC server. Bound to one event loop."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.in_flight = InFlight()
        self._metrics = metrics
        self._clock = clock

    def handler(self) -> grpc.GenericRpcHandler:
        method = grpc.stream_stream_rpc_method_handler(self._stream)
        return grpc.method_handlers_generic_handler(SERVICE, {"StreamLoadStats": method})

    async def _stream(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        """The first message is a greeting; what Envoy is to report is said once."""
        envoy, node = object(), ""
        self._metrics.reporting.inc()
        try:
            async for raw in requests:
                try:
                    request = pb.LoadStatsRequest.FromString(raw)
                    counts = read_report(request, POOLS)
                except DecodeError:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request cannot be decoded")
                if not node:
                    node = request.node.id[:MAX_TEXT] or "unnamed"
                    await context.write(ASK)
                    log.info("load reporting started", node=node, peer=context.peer())
                else:
                    self.in_flight.report(envoy, counts, self._clock())
        finally:
            self.in_flight.forget(envoy)
            self._metrics.reporting.dec()
            if node:
                log.info("load reporting ended", node=node, peer=context.peer())


ASK = pb.LoadStatsResponse(
    send_all_clusters=True,
    report_endpoint_granularity=True,
    load_reporting_interval=Duration(seconds=int(INTERVAL), nanos=round(INTERVAL % 1 * 1e9)),
).SerializeToString()
