"""Odd and hostile client requests, with the real Envoy and the picker: each is answered, none does harm.

One gateway serves the whole module. Each case goes to three ports: `llm` (the picked pool), `models` (the same pool
behind a route by the body's model; another Service for models called other...) and `plain` (round robin, no picker).
After each, what reached the pods is looked at, and a normal request has to be picked and answered.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, ResponseReceived, StreamReset

from bench.envoy import free_port
from bench.vllm_engine import EngineConfig
from tests.envoy.conftest import BOUND, Gateway
from tests.envoy.recording_pod import Received, RecordingPod

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]

PICKER_PEAK = 400 << 20  # bytes: the picker at rest has 60 MB; gRPC and protobuf copy a body of 20 MB some five times
LEAK = 48 << 20  # bytes: fewer than three of the bodies of 20 MB that are sent between two looks
PATH = "/v1/completions"
FORGED = "default/forged_0"  # a pick that nobody made
LONG = "You are a careful assistant. " * 1200

MODELS = """\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: models}}
spec:
  gatewayClassName: envoy
  listeners:
  - {{name: models, protocol: HTTP, port: {port}}}
  - {{name: closed, protocol: HTTP, port: {closed_port}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: by-model}}
spec:
  parentRefs: [{{name: models, sectionName: models}}]
  rules:
  - matches: [{{headers: [{{name: X-Gateway-Model-Name, value: "other(.|\\\\n)*", type: RegularExpression}}]}}]
    backendRefs: [{{name: other, port: 8000}}]
  - backendRefs: [{{group: inference.networking.k8s.io, kind: InferencePool, name: pool}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: closed}}
spec:
  parentRefs: [{{name: models, sectionName: closed}}]
  rules:
  - matches: [{{headers: [{{name: X-Gateway-Model-Name, value: /model/qwen}}]}}]
    backendRefs: [{{group: inference.networking.k8s.io, kind: InferencePool, name: pool}}]
---
apiVersion: v1
kind: Service
metadata: {{name: other}}
spec: {{selector: {{app: other}}, ports: [{{port: 8000, targetPort: {pod_port}}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: other}}}}
status: {{podIP: {ip}, conditions: [{{type: Ready, status: "True"}}]}}
"""


class Clients:
    """A gateway, its three ports, and a client that speaks in bytes."""

    def __init__(self, gateway: Gateway, models_port: int, closed_port: int, other: RecordingPod) -> None:
        self.gateway = gateway
        self.other = other
        self.ports = {"llm": gateway.llm_port, "models": models_port, "plain": gateway.plain_port}
        self._closed = closed_port  # where nothing but a model has a route

    async def send(self, port: str, parts: Iterable[bytes] | AsyncIterable[bytes]) -> int:
        """Write `parts` while reading; the final answer's status."""
        async with asyncio.timeout(BOUND):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.ports.get(port, self._closed))
            writing = asyncio.create_task(_write(writer, parts))
            try:
                status = 100
                while status == 100:  # "100 Continue" comes before the answer
                    head = await reader.readuntil(b"\r\n\r\n")
                    status = int(head.split(b" ")[1])
                return status
            finally:
                writing.cancel()
                writer.transport.abort()
                await asyncio.gather(writing, return_exceptions=True)

    def received(self) -> list[Received]:
        """What came to the pods since the last call. A pick is the picker's own, and is obeyed."""
        pods = [pod for pod in self.gateway.pods if isinstance(pod, RecordingPod)] + [self.other]
        received = [one for pod in pods for one in pod.received]
        for pod in pods:
            pod.received.clear()
        for one in received:
            own = {name: value for name, value in one.headers.items() if name.startswith("x-vllm-")}
            assert own in ({}, {"x-vllm-pick": f"default/{one.pod}_0"}), one
        return received

    async def assert_unharmed(self) -> None:
        """Normal requests are answered on every port, and on the LLM port soon picked; no process has ended."""
        async with asyncio.timeout(BOUND), aiohttp.ClientSession() as session:
            for port in self.ports.values():
                assert (await self.gateway.ask(session, port, LONG))[0] == 200
            self.received()
            picked = False
            while not picked:  # one that meets the picker busy goes on unpicked
                assert (await self.gateway.ask(session, self.gateway.llm_port, LONG))[0] == 200
                picked = any("x-vllm-pick" in one.headers for one in self.received())
        assert self.gateway.picker.returncode is None
        assert self.memory("VmHWM") < PICKER_PEAK

    def memory(self, kind: str) -> int:
        """The picker's memory, in bytes: VmRSS now, VmHWM at its highest (proc_pid_status(5))."""
        status = Path(f"/proc/{self.gateway.picker.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith(kind)).split()[1]) << 10


async def _write(writer: asyncio.StreamWriter, parts: Iterable[bytes] | AsyncIterable[bytes]) -> None:
    with suppress(ConnectionError):  # answered before the end, and closed
        if isinstance(parts, AsyncIterable):
            async for part in parts:
                writer.write(part)
                await writer.drain()
        else:
            for part in parts:
                writer.write(part)
                await writer.drain()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clients(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Clients]:
    gateway = Gateway(tmp_path_factory.mktemp("clients"), delta=True)
    try:
        await gateway.start_pods(5, EngineConfig(max_num_seqs=16), RecordingPod)
        other = gateway.pods.pop()
        assert isinstance(other, RecordingPod)
        gateway.write_objects()
        port, closed = free_port(), free_port()
        objects = MODELS.format(
            port=port, closed_port=closed, pod_port=gateway.pod_port, name=other.name, ip=other.address
        )
        (gateway.config / "models.yaml").write_text(objects)
        await gateway.start_server()
        await gateway.start_envoy()
        await gateway.start_picker()
        await gateway.picking()
        assert gateway.control.rejections == ()
        yield Clients(gateway, port, closed, other)
    finally:
        await gateway.close()


def head(method: str, target: str, *headers: str) -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", "Host: gateway", *headers, "", ""]).encode("latin-1")


def post(body: bytes, *headers: str, target: str = PATH, content_type: str = "application/json") -> list[bytes]:
    return [head("POST", target, f"Content-Length: {len(body)}", f"Content-Type: {content_type}", *headers), body]


def chunk(data: bytes) -> bytes:
    """RFC 9112, section 7.1."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def completion(**more: object) -> bytes:
    return json.dumps({"model": "/model/qwen", "prompt": LONG, "max_tokens": 2} | more).encode()


CHUNKED = head("POST", PATH, "Transfer-Encoding: chunked", "Content-Type: application/json")


def bracketed(content: bytes) -> bytes:
    """A completion whose prompt is `content`, as it is."""
    return b'{"model":"/model/qwen","max_tokens":2,"prompt":' + content + b"}"


@dataclass(frozen=True, slots=True)
class Case:
    """`parts` are the request's bytes, `status` what the ports are to answer, `special` where one differs.

    `other`: the body's model is one that port `models` routes to the other Service.
    """

    name: str
    parts: list[bytes]
    status: int
    special: dict[str, int] = field(default_factory=dict)
    other: bool = False


CASES = [
    # methods
    Case("GET", [head("GET", PATH)], 404),
    Case("GET with a forged pick", [head("GET", "/v1/models", f"x-vllm-pick: {FORGED}")], 200),
    Case("HEAD", [head("HEAD", "/v1/models")], 200),
    Case("OPTIONS", [head("OPTIONS", PATH)], 404),
    Case("OPTIONS *", [head("OPTIONS", "*")], 404),
    Case("TRACE", [head("TRACE", PATH)], 404),
    Case("CONNECT", [head("CONNECT", "pod-0:80")], 404),
    Case("unknown method", [head("BREW", PATH)], 400),
    Case("upgrade", [head("GET", "/v1/models", "Connection: upgrade", "Upgrade: websocket")], 403),
    # bodies
    Case("no body", [head("POST", PATH)], 400),
    Case("empty body", post(b""), 400),
    Case("not JSON", post(b"hello"), 400),
    Case("null", post(b"null"), 400),
    Case("truncated JSON", post(completion()[:-20]), 400),
    Case("20,000 levels", post(bracketed(b"[" * 20_000 + b"]" * 20_000)), 400),
    Case("4,000,000 levels, open", post(b'{"a":' * 4_000_000), 400),
    Case("500,000 empty messages", post(b'{"messages":[' + b"[]," * 500_000 + b"[]]}"), 400),
    Case("duplicate keys", post(completion()[:-1] + b',"prompt":"b","model":"/model/qwen"}'), 200),
    Case("invalid UTF-8", post(completion().replace(b"careful", b"\xff\xfe\x80", 1)), 400),
    Case("lone surrogate", post(bracketed(rb'"\ud800 x"')), 400),
    Case("UTF-16", post(completion().decode().encode("utf-16")), 400),
    Case("byte order mark", post(b"\xef\xbb\xbf" + completion()), 400),
    Case("zero bytes", post(completion(prompt="\0" * 5000, cache_salt="\0\n")), 200),
    Case("100,000 digits", post(bracketed(b"[" + b"9" * 100_000 + b"]")), 400),
    Case("NaN", post(bracketed(b'"x"').replace(b":2", b":NaN")), 400),
    Case("gzip", post(gzip.compress(completion()), "Content-Encoding: gzip"), 200),
    Case("multipart", post(b"--b\r\n\r\n1\r\n--b--\r\n", content_type="multipart/form-data; boundary=b"), 400),
    Case("wrong content type", post(completion(), content_type="text/plain"), 200),
    Case("broken content type", post(completion(), content_type="application/json; charset=\xff;;"), 200),
    # headers
    Case("forged pick", post(b"hello", f"x-vllm-pick: {FORGED}", f"X-VLLM-PICK: {FORGED}", "X-Vllm-Other: 1"), 400),
    Case("forged pick, own one", post(completion(), f"X-VLLM-PICK: {FORGED}"), 200),
    Case("forged model header", post(completion(), "X-Gateway-Model-Name: other"), 200),
    Case("expectation", post(completion(), "Expect: 100-continue"), 200),
    Case("unknown expectation", post(completion(), "Expect: a miracle"), 417),
    Case("long header", post(completion(), "X-Long: " + "x" * 8000), 200),
    Case("too long a header", post(completion(), "X-Long: " + "x" * 100_000), 431),
    Case("too many headers", post(completion(), *(f"X-{i}: 1" for i in range(200))), 431),
    # the model's name
    *(
        Case(f"model with {code:#04x}", post(completion(model=f"other{chr(code)}x")), 404, {"models": 400})
        for code in (0x00, 0x01, 0x0A, 0x0D, 0x1B, 0x7F)
    ),
    Case("model with a header", post(completion(model=f"a\r\nx-vllm-pick: {FORGED}")), 404, {"models": 400}),
    Case("model with a tab", post(completion(model="other\tx")), 404, other=True),
    Case("two models, the last counts", post(completion()[:-1] + b',"model":"other"}'), 404, other=True),
    Case("two models, the first does not", post(b'{"model":"other",' + completion()[1:]), 200),
    Case("model in Chinese", post(completion(model="通义千问")), 404),
    Case("model like a command", post(completion(model="%REQ(host)%")), 404),
    Case("model of 8,000 bytes", post(completion(model="m" * 8_000)), 404),
    Case("model of 100 KB", post(completion(model="m" * 100_000)), 404),
    Case("model is a number", post(completion(model=7)), 400),
    Case("model is a list", post(completion(model=["other"])), 400),
    Case("no model", post(completion(model="")), 200),
    # paths
    Case("//", post(completion(), target="//v1//completions"), 200),
    Case("%2F", post(completion(), target="/v1%2Fcompletions"), 307),
    Case("..", post(completion(), target="/v1/../v1/completions"), 200),
    Case("..;", post(completion(), target="/v1/..;/v1/completions"), 200),
    Case("%2e%2e", post(completion(), target="/v1/%2e%2e/%2e%2e/etc/passwd"), 404),
    Case("%00", post(completion(), target="/v1/completions%00"), 400),
    Case("%zz", post(completion(), target="/v1/%zz"), 404),
    Case("backslash", post(completion(), target="/v1\\completions"), 200),
    Case("another host's URL", post(completion(), target="http://elsewhere/v1/completions"), 200),
    Case("fragment", post(completion(), target="/v1/completions#x"), 400),
    Case("relative path", post(completion(), target="v1/completions"), 400),
    # framing
    Case("two lengths", [head("POST", PATH, "Content-Length: 4", "Content-Length: 5"), b"abcde"], 400),
    Case(
        "length and chunks", [head("POST", PATH, "Content-Length: 4", "Transfer-Encoding: chunked"), b"0\r\n\r\n"], 400
    ),
    Case("negative length", [head("POST", PATH, "Content-Length: -1")], 400),
    Case("no chunk", [head("POST", PATH, "Transfer-Encoding: chunked"), b"zz\r\nabc\r\n0\r\n\r\n"], 400),
    Case("chunks, none", [CHUNKED, b"0\r\n\r\n"], 400),
    Case("chunks, trailer", [CHUNKED, chunk(completion()), b"0\r\nX-Vllm-Pick: " + FORGED.encode() + b"\r\n\r\n"], 200),
    Case("chunks, extension", [CHUNKED, b"1;a=b\r\n{\r\n", chunk(completion()[1:]), b"0\r\n\r\n"], 200),
    Case("GET with a body", [head("GET", PATH, "Content-Length: 5"), b"hello"], 404),
    Case("GET with chunks", [head("GET", PATH, "Transfer-Encoding: chunked"), chunk(completion()), b"0\r\n\r\n"], 404),
    Case("two requests at once", [b"".join(post(completion()) * 2)], 200),
    Case("no host", [b"GET /v1/models HTTP/1.1\r\n\r\n"], 400),
    Case("HTTP/1.0", [b"GET /v1/models HTTP/1.0\r\nHost: gateway\r\n\r\n"], 426),
    Case("TLS", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"], 400),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_odd_request(clients: Clients, case: Case) -> None:
    """It is answered as the pod or Envoy answers it, reaches no pod it is not for, and the next requests are well."""
    for port in clients.ports:
        assert await clients.send(port, case.parts) == case.special.get(port, case.status), port
        reached = {one.pod for one in clients.received()}
        if case.other and port == "models":
            assert reached == {clients.other.name}
        else:
            assert clients.other.name not in reached
    await clients.assert_unharmed()


async def test_large_bodies(clients: Clients) -> None:
    """20 MB are served, picked or not in time to be; the picker keeps nothing of them."""
    body = completion(padding="x" * 20_000_000)
    sizes = []
    for _ in range(2):
        for _ in range(4):
            for port in ("llm", "models", "plain"):
                assert await clients.send(port, post(body)) == 200
        sizes.append(clients.memory("VmRSS"))
    assert sizes[1] < sizes[0] + LEAK
    await clients.assert_unharmed()


async def test_large_bodies_where_only_models_match(clients: Clients) -> None:
    """No route takes the request before its model is read: 20 MB are served, another model or none is not found."""
    for model, status in (("/model/qwen", 200), ("gpt", 404), (None, 404)):
        body = completion(model=model, padding="x" * 20_000_000)
        assert await clients.send("closed", post(body)) == status
    assert len(clients.received()) == 1
    await clients.assert_unharmed()


async def test_too_large_a_body(clients: Clients) -> None:
    """40 MB are refused where a body is read, with and without a length, and no pod hears of it."""
    body = completion(padding="x" * 40_000_000)
    chunks = [CHUNKED, chunk(body), b"0\r\n\r\n"]
    for port in ("llm", "models"):
        for parts in (post(body), chunks):
            assert await clients.send(port, parts) == 413
        assert clients.received() == []
    await clients.assert_unharmed()


async def test_slow_body(clients: Clients) -> None:
    """A body that takes longer to come than the picker may take to answer is picked all the same."""

    async def drip() -> AsyncIterator[bytes]:
        yield CHUNKED
        body = completion()
        for start in range(0, len(body), 2048):
            yield chunk(body[start : start + 2048])
            await asyncio.sleep(0.03)  # what a slow client does
        yield b"0\r\n\r\n"

    answers = await asyncio.gather(*(clients.send("llm", drip()) for _ in range(8)))
    assert answers == [200] * 8
    assert any("x-vllm-pick" in one.headers for one in clients.received())
    await clients.assert_unharmed()


async def test_client_leaves(clients: Clients) -> None:
    """Clients that leave in the middle of a body cost nothing: no pod hears of them where a body is read."""
    request = b"".join(post(completion(), target="/v1/left"))
    for port in ("llm", "models"):
        for end in (20, 200, len(request) - 1):
            _, writer = await asyncio.open_connection("127.0.0.1", clients.ports[port])
            writer.write(request[:end])
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        assert await clients.send(port, post(completion())) == 200  # by then Envoy has seen the others leave
    assert {one.path for one in clients.received()} == {PATH}
    await clients.assert_unharmed()


async def test_bodies_that_never_end(clients: Clients) -> None:
    """They wait beside other requests, not before them."""
    waiting = []
    try:
        for _ in range(300):  # more than may wait for the picker at a time
            reader, writer = await asyncio.open_connection("127.0.0.1", clients.ports["llm"])
            writer.write(head("POST", PATH, "Content-Length: 1000000") + b"{")
            waiting.append((reader, writer))
        await clients.assert_unharmed()
    finally:
        for _, writer in waiting:
            writer.transport.abort()


@pytest.mark.parametrize(
    ("header", "answer"),
    [
        (("x-plain", "1"), "200"),
        (("x-vllm-pick", FORGED), "200"),
        (("X-VLLM-PICK", FORGED), ""),  # names are in lower case: RFC 9113, section 8.2.1
        (("x-line", "a\nb"), ""),
        (("transfer-encoding", "chunked"), ""),
    ],
)
async def test_http2(clients: Clients, header: tuple[str, str], answer: str) -> None:
    """HTTP/2 with prior knowledge is served alike; what it forbids ends the stream, not the gateway."""
    assert await _http2(clients.ports["llm"], completion(), header) == answer
    clients.received()
    await clients.assert_unharmed()


async def _http2(port: int, body: bytes, header: tuple[str, str]) -> str:
    """The status; "" when the stream or the connection is ended instead."""
    connection = H2Connection(H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False))
    connection.initiate_connection()
    names = [(":method", "POST"), (":scheme", "http"), (":authority", "gateway"), (":path", PATH), header]
    connection.send_headers(1, names)
    size = connection.max_outbound_frame_size
    for start in range(0, len(body), size):
        connection.send_data(1, body[start : start + size], end_stream=start + size >= len(body))
    async with asyncio.timeout(BOUND):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while True:
                writer.write(connection.data_to_send())
                data = await reader.read(65536)
                for event in connection.receive_data(data):
                    if isinstance(event, ResponseReceived):
                        return next(str(value, "ascii") for name, value in event.headers if name == b":status")
                    if isinstance(event, StreamReset | ConnectionTerminated):
                        return ""
                if not data:
                    return ""
        finally:
            writer.transport.abort()
