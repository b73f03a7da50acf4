"""The ext_proc service: one request body in, one answer out, and the stream is over.

Envoy opens a bidirectional stream for each request; answering it as a unary call is the same on the wire and ends the
stream with the answer, so none lives as long as a streamed completion. What goes wrong in here is answered with "no
changes": Envoy then routes without a key, sooner than by a timeout. gRPC health is what Envoy's health check asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import structlog
from prometheus_client import Counter

from picker.explain import explain
from picker.frames import Code
from picker.listen import CallError, GrpcServer
from picker.messages import NOT_FOUND
from picker.metrics import PickerMetrics
from picker.pick import Pick, Picker, Reason
from picker.wire.ext_proc_pb2 import BodyResponse, ProcessingRequest, ProcessingResponse
from xds.tls import TlsFiles

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
HEALTH = "/grpc.health.v1.Health/Check"
FILTER = "envoy.filters.http.ext_proc"  # the namespace of the request's attributes
REQUEST = "request"  # the namespace of the metadata a request carries: its headers' values, `session` and `objective`
# Of the dynamic metadata the answer carries: `reason`, and `key`, `pod` and `named`, or `refused` and `model`.
NAMESPACE = "picker"
MAX_MODEL = 256  # characters of an unknown model's name that its refusal repeats
SAY_AGAIN = 60.0  # seconds between two log lines on one kind of failure
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"  # HealthCheckResponse.status
_SERVICE = b"envoy.service.ext_proc.v3.ExternalProcessor"
_HEALTH_REQUESTS = (b"", b"\x0a" + bytes([len(_SERVICE)]) + _SERVICE)  # HealthCheckRequest.service

log = structlog.get_logger()


def encode_answer(pick: Pick) -> bytes:
    """The ProcessingResponse for a pick: what Envoy is to know, and the body if it is another now."""
    if pick.refused:
        return _encode({"reason": pick.reason, "refused": str(pick.refused), "model": pick.model[:MAX_MODEL]})
    unchanged = _encode_pick(pick.key, pick.pod, pick.reason, named=pick.named)
    if pick.body is None:
        return unchanged
    answer = ProcessingResponse.FromString(unchanged)
    answer.request_body.response.body_mutation.body = pick.body
    return answer.SerializeToString()


@lru_cache(maxsize=4096)
def _encode_pick(key: str | None, pod: str, reason: Reason, *, named: bool) -> bytes:
    told: dict[str, str | bool] = {"reason": reason}
    if key is not None:
        told["key"] = key
    if pod:
        told["pod"] = pod
    if named:
        told["named"] = True
    return _encode(told)


def _encode(told: Mapping[str, str | bool]) -> bytes:
    """An answer with this metadata."""
    answer = ProcessingResponse(request_body=BodyResponse())
    if told:
        answer.dynamic_metadata.update({NAMESPACE: told})
    return answer.SerializeToString(deterministic=True)


UNCHANGED = _encode({})


class PickerServer:
    """Answers Envoy from `picker`. `clock` gives seconds; with `tls` it answers only Envoys that have a certificate."""

    def __init__(
        self, picker: Picker, metrics: PickerMetrics, clock: Callable[[], float], tls: TlsFiles | None = None
    ) -> None:
        self._picker = picker
        self._metrics = metrics
        self._clock = clock
        self._health = NOT_SERVING
        self._said: dict[str, float] = {}  # kind of failure -> when it was logged
        self._picks: dict[tuple[str, str], Counter] = {}
        self._server = GrpcServer({PROCESS: self._process, HEALTH: self._check}, clock, self._broken, tls)

    async def start(self, addresses: Sequence[str]) -> list[str]:
        """Listen on `host:port` and `unix:/path` addresses; the same with the ports chosen for port 0.

        Raises AddressError or TlsError. A unix socket is never TLS: its directory says who may reach it.
        """
        bound = await self._server.start(addresses)
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
        """Refuse new connections, and give open ones `grace` seconds."""
        await self._server.stop(grace)

    def explain(self, cluster_name: str, body: bytes, session: str, objective: str) -> dict[str, Any]:
        """What this request would be answered now, and why, as JSON (picker/explain.py); it is not counted."""
        return explain(self._picker, cluster_name, body, self._clock(), session, objective)

    def _process(self, request: bytes) -> bytes:
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
        if self._is_news(kind, now):
            log.error("pick failed", kind=kind, reason=str(error), exc_info=error)

    def _broken(self, code: Code, why: str) -> None:
        self._metrics.client_errors.labels(code.name).inc()
        if self._is_news(code.name, self._clock()):
            log.warning("client refused", code=code.name, reason=why)

    def _is_news(self, kind: str, now: float) -> bool:
        """Whether this kind of failure was not logged lately."""
        if now - self._said.get(kind, -SAY_AGAIN) < SAY_AGAIN:
            return False
        self._said[kind] = now
        return True

    def _check(self, request: bytes) -> bytes:
        if request not in _HEALTH_REQUESTS:
            raise CallError(NOT_FOUND, "no such service here")
        return self._health
