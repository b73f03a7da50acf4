"""The ext_proc service: one request body in, one answer out, and the stream is over.

Envoy opens a bidirectional stream for each request; answering it as a unary call is the same on the wire and ends the
stream with the answer, so none lives as long as a streamed completion. What goes wrong in here is answered with "no
changes": Envoy then routes without a key, sooner than by a timeout. gRPC health is what Envoy's health check asks for.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from pathlib import Path

import grpc
import structlog
from prometheus_client import Counter

from picker.metrics import PickerMetrics
from picker.pick import Pick, Picker
from picker.wire.ext_proc_pb2 import BodyResponse, ProcessingRequest, ProcessingResponse
from xds.tls import TlsFiles, server_credentials

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
HEALTH = "/grpc.health.v1.Health/Check"
FILTER = "envoy.filters.http.ext_proc"  # the namespace of the request's attributes
REQUEST = "request"  # the namespace of the metadata a request carries: its headers' values, `session` and `objective`
NAMESPACE = "picker"  # of the dynamic metadata the answer carries: `key`, `named`, or `refused` and `model`
MAX_MODEL = 256  # characters of an unknown model's name that its refusal repeats
MAX_MESSAGE = 40 << 20  # bytes: above the 32 MiB Envoy buffers of a body
SAY_AGAIN = 60.0  # seconds between two log lines on one kind of failure
UNIX = "unix:"
SOCKET_MODE = 0o666  # Envoy runs as another user; who may reach the socket is its directory's matter
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.so_reuseport", 0),  # else a second picker takes half of the requests instead of an error
)
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"  # HealthCheckResponse.status
_SERVICE = b"envoy.service.ext_proc.v3.ExternalProcessor"
_HEALTH_REQUESTS = (b"", b"\x0a" + bytes([len(_SERVICE)]) + _SERVICE)  # HealthCheckRequest.service

log = structlog.get_logger()


class AddressError(Exception):
    """An address cannot be listened on; the text says which and why."""


def encode_answer(pick: Pick) -> bytes:
    """The ProcessingResponse for a pick: what Envoy is to know, and the body if it is another now."""
    if pick.refused:
        answer = ProcessingResponse(request_body=BodyResponse())
        told = {"refused": str(pick.refused), "model": pick.model[:MAX_MODEL]}
        answer.dynamic_metadata.update({NAMESPACE: told})
        return answer.SerializeToString()
    unchanged = _encode(pick.key, named=pick.named)
    if pick.body is None:
        return unchanged
    answer = ProcessingResponse.FromString(unchanged)
    answer.request_body.response.body_mutation.body = pick.body
    return answer.SerializeToString()


@lru_cache(maxsize=4096)
def _encode(key: str | None, *, named: bool) -> bytes:
    answer = ProcessingResponse(request_body=BodyResponse())
    told: dict[str, str | bool] = {"key": key} if key is not None else {}
    if named:
        told["named"] = True
    if told:
        answer.dynamic_metadata.update({NAMESPACE: told})
    return answer.SerializeToString()


UNCHANGED = _encode(None, named=False)


class PickerServer:
    """Answers Envoy from `picker`. `clock` gives seconds; with `tls` it answers only Envoys that have a certificate."""

    def __init__(
        self, picker: Picker, metrics: PickerMetrics, clock: Callable[[], float], tls: TlsFiles | None = None
    ) -> None:
        self._picker = picker
        self._metrics = metrics
        self._clock = clock
        self._tls = tls
        self._health = NOT_SERVING
        self._said: dict[str, float] = {}  # kind of failure -> when it was logged
        self._picks: dict[tuple[str, str], Counter] = {}
        self._server = grpc.aio.server(options=OPTIONS)
        self._server.add_generic_rpc_handlers((_Handlers(self._process, self._check),))

    async def start(self, addresses: Sequence[str]) -> list[str]:
        """Listen on `host:port` and `unix:/path` addresses; the same with the ports chosen for port 0.

        Raises AddressError or TlsError. A unix socket is never TLS: its directory says who may reach it.
        """
        bound = [self._bind(address) for address in addresses]
        await self._server.start()
        self._health = SERVING
        return bound

    @property
    def serving(self) -> bool:
        """Whether requests are welcome: it has started, and does not drain."""
        return self._health == SERVING

    def drain(self) -> None:
        """Tell health checks to look elsewhere; requests are still answered."""
        self._health = NOT_SERVING

    async def stop(self, grace: float) -> None:
        """Refuse new streams, and give open ones `grace` seconds."""
        await self._server.stop(grace)

    def _bind(self, address: str) -> str:
        try:
            _probe(address)
            if self._tls is None or address.startswith(UNIX):
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, server_credentials(self._tls))
        except (OSError, RuntimeError) as error:
            raise AddressError(f"cannot listen on {address}: {_why(error)}") from None
        if not address.startswith(UNIX):
            return f"{address.rpartition(':')[0]}:{port}"
        Path(address.removeprefix(UNIX)).chmod(SOCKET_MODE)
        return address

    async def _process(self, request: bytes, _context: object) -> bytes:
        start = self._clock()
        try:
            answer = encode_answer(self._pick(request, start))
        except Exception as error:  # the top of a request: it fails open, whatever it was
            self._failed(error, start)
            answer = UNCHANGED
        self._metrics.pick_seconds.observe(self._clock() - start)
        return answer

    def _pick(self, data: bytes, now: float) -> Pick:
        request = ProcessingRequest.FromString(data)
        if not request.HasField("request_body"):
            raise ValueError("no request_body: request_body_mode must be BUFFERED and the other modes SKIP or NONE")
        attributes = request.attributes.get(FILTER)
        cluster_name = attributes.fields["xds.cluster_name"].string_value if attributes is not None else ""
        told = request.metadata_context.filter_metadata.get(REQUEST)
        session = told.fields["session"].string_value if told is not None else ""
        objective = told.fields["objective"].string_value if told is not None else ""
        pick = self._picker.pick(cluster_name, request.request_body.body, now, session, objective)
        counter = self._picks.get((pick.pool, pick.reason))
        if counter is None:
            counter = self._picks[pick.pool, pick.reason] = self._metrics.picks.labels(pick.pool, pick.reason)
        counter.inc()
        if pick.body is not None:
            self._metrics.renamed.labels(pick.pool).inc()
        return pick

    def _failed(self, error: Exception, now: float) -> None:
        kind = type(error).__name__
        self._metrics.failures.labels(kind).inc()
        if now - self._said.get(kind, -SAY_AGAIN) >= SAY_AGAIN:
            self._said[kind] = now
            log.error("pick failed", kind=kind, reason=str(error), exc_info=error)

    async def _check(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        if request not in _HEALTH_REQUESTS:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service here")
        return self._health


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio ships no types
    """The two methods, in raw bytes; any other is UNIMPLEMENTED."""

    def __init__(
        self,
        process: Callable[[bytes, object], Awaitable[bytes]],
        check: Callable[[bytes, grpc.aio.ServicerContext], Awaitable[bytes]],
    ) -> None:
        self._methods = {
            PROCESS: grpc.unary_unary_rpc_method_handler(process),
            HEALTH: grpc.unary_unary_rpc_method_handler(check),
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._methods.get(handler_call_details.method)


def _probe(address: str) -> None:
    """Raise the OSError that listening on `address` would meet: gRPC writes its own to standard error."""
    if address.startswith(UNIX):
        path = Path(address.removeprefix(UNIX))
        _clear_socket(path)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(path))
        path.unlink()
    else:
        host, _, port = address.rpartition(":")
        socket.create_server(
            (host.strip("[]"), int(port)), family=socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        ).close()


def _clear_socket(path: Path) -> None:
    """Remove a dead picker's socket, or raise OSError for a living one's, which gRPC would remove as well."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _why(error: Exception) -> str:
    """The system's own words; asyncio and socket repeat the address in theirs."""
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno and error.errno > 0 else str(error)
