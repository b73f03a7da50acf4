"""picker/server.py over real sockets: what Envoy sends, and what it must get."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from structlog.testing import capture_logs

from picker.cost import PodLoad, PoolLoad
from picker.listen import AddressError
from picker.metrics import PickerMetrics
from picker.pick import Pick, Picker, Reason
from picker.server import FILTER, HEALTH, PROCESS, REQUEST, UNCHANGED, PickerServer, encode_answer
from picker.wire.ext_proc_pb2 import HttpBody, ProcessingRequest, ProcessingResponse

POOL = "pool/default/qwen"
PICKED = encode_answer(Pick("default/a_0", Reason.COST, POOL, "default/a"))
UNREADABLE, UNKEYED = (encode_answer(Pick(None, reason)) for reason in (Reason.UNREADABLE, Reason.UNKEYED))
OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1))


class Service:
    """A started picker server and a client's channel to it."""

    channel: grpc.aio.Channel
    port: str

    def __init__(self) -> None:
        self.now = time.monotonic
        self.picker = Picker(Random(1).random)
        self.picker.update(PoolLoad(POOL, (PodLoad("default/a"),)), self.now())
        self.metrics = PickerMetrics()
        self.server = PickerServer(self.picker, self.metrics, self.now)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"vllm_xds_picker_{name}", labels)

    async def ask(self, message: bytes) -> list[bytes]:
        """As Envoy does: one message on a new stream that stays open on its side; all that comes until OK."""
        stream = self.channel.stream_stream(PROCESS)()
        await stream.write(message)
        answers = []
        while (answer := await stream.read()) is not grpc.aio.EOF:
            answers.append(answer)
        assert await stream.code() is grpc.StatusCode.OK
        return answers


@asynccontextmanager
async def serving(address: str = "127.0.0.1:0") -> AsyncIterator[Service]:
    service = Service()
    (bound,) = await service.server.start([address])
    try:
        service.port = bound.rpartition(":")[2]
        async with grpc.aio.insecure_channel(bound, options=OPTIONS) as service.channel:
            yield service
    finally:
        await service.server.stop(0)


def request(body: bytes, cluster_name: str = POOL, **told: str) -> bytes:
    message = ProcessingRequest(request_body=HttpBody(body=body, end_of_stream=True))
    message.attributes[FILTER].update({"xds.cluster_name": cluster_name})
    if told:
        message.metadata_context.filter_metadata[REQUEST].update(told)
    return message.SerializeToString()


CHAT = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 5000}]}).encode()


async def test_one_message_each_way() -> None:
    """The answer addresses the pod, and the server ends the stream: nothing more is sent, nothing stays open."""
    async with serving() as service:
        assert await service.ask(request(CHAT)) == [PICKED]
        assert service.metric("picks_total", pool=POOL, reason="cost") == 1
        assert service.metric("pick_seconds_count") == 1


@pytest.mark.parametrize(
    ("pick", "told"),
    [
        (Pick("p_0", Reason.COST, POOL, "p"), {"reason": "cost", "key": "p_0", "pod": "p"}),
        (Pick("ab", Reason.STATELESS, POOL, named=True), {"reason": "stateless", "key": "ab", "named": True}),
        (
            Pick(None, Reason.SHED, POOL, model="m" * 999, refused=429),
            {"reason": "shed", "refused": "429", "model": "m" * 256},
        ),
        (Pick(None, Reason.UNKEYED), {"reason": "unkeyed"}),
    ],
)
def test_what_envoy_is_told(pick: Pick, told: dict[str, object]) -> None:
    """The metadata of each kind of answer: what is not there is not told, so that nothing of it is hashed or logged."""
    answer = ProcessingResponse.FromString(encode_answer(pick))
    assert MessageToDict(answer.dynamic_metadata) == {"picker": told}
    assert not answer.request_body.HasField("response")


async def test_an_unknown_cluster_and_no_attributes_at_all() -> None:
    """Both get the stateless key; the label of the count is not the caller's."""
    async with serving() as service:
        (keyed,) = await service.ask(request(CHAT, "made-up"))
        bare = ProcessingRequest(request_body=HttpBody(body=CHAT)).SerializeToString()
        assert keyed not in (UNCHANGED, PICKED)
        assert await service.ask(bare) == [keyed]
        assert service.metric("picks_total", pool="", reason="stateless") == 2


async def test_the_session_header_is_a_hint() -> None:
    """As Envoy's metadata says it: a prompt too short for a key of its own has the session's."""
    async with serving() as service:
        short = b'{"model":"m","prompt":"hi"}'
        answers = [await service.ask(request(short, "other", **told)) for told in ({}, {"session": ""})]
        assert answers == [[UNKEYED]] * 2
        first = await service.ask(request(short, "other", session="s1"))
        assert first not in ([UNKEYED], await service.ask(request(short, "other", session="s2")))
        assert first == await service.ask(request(short, "other", session="s1", more="x"))


@pytest.mark.parametrize("body", [b"", b"not json", b"{}", b'{"messages":'])
async def test_no_prompt_is_no_key(body: bytes) -> None:
    """Answered at once and without a key: Envoy must not wait, and must not hash a constant."""
    async with serving() as service:
        assert await service.ask(request(body)) == [UNREADABLE]
        assert b"key" not in UNREADABLE
        assert service.metric("picks_total", pool=POOL, reason="unreadable") == 1


async def test_what_is_no_request_fails_open_and_is_said_once() -> None:
    """Bytes that are no message, and messages of another mode: counted each time, logged once a kind."""
    async with serving() as service:
        with capture_logs() as logs:
            for _ in range(3):
                assert await service.ask(b"\xff\xff\xff") == [UNCHANGED]
                assert await service.ask(b"") == [UNCHANGED]
        assert service.metric("failures_total", kind="DecodeError") == 3
        assert service.metric("failures_total", kind="ValueError") == 3
        assert sorted((line["event"], line["kind"]) for line in logs) == [
            ("pick failed", "DecodeError"),
            ("pick failed", "ValueError"),
        ]
        assert await service.ask(request(CHAT)) == [PICKED]


async def test_a_client_that_breaks_the_protocol_is_told_and_left() -> None:
    """GOAWAY and the end of the connection, counted each time, logged once a kind; others are served."""
    async with serving() as service:
        with capture_logs() as logs:
            for _ in range(2):
                reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
                writer.write(b"GET / HTTP/1.1\r\n\r\n")
                assert (await reader.read()).endswith(b"this is not HTTP/2")
                writer.close()
        assert service.metric("client_errors_total", code="PROTOCOL_ERROR") == 2
        assert [(line["event"], line["code"]) for line in logs] == [("client refused", "PROTOCOL_ERROR")]
        assert await service.ask(request(CHAT)) == [PICKED]


async def test_a_body_of_20_mb() -> None:
    """As large as Envoy may buffer; the picker still answers from its beginning."""
    async with serving() as service:
        big = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * (20 << 20)}]}).encode()
        assert await service.ask(request(big)) == [PICKED]


async def test_health() -> None:
    """Serving by the empty name Envoy asks for and by the service's, not found by another; draining is not serving."""
    async with serving() as service:
        check = service.channel.unary_unary(HEALTH)
        name = b"envoy.service.ext_proc.v3.ExternalProcessor"
        assert await check(b"") == b"\x08\x01"
        assert await check(b"\x0a" + bytes([len(name)]) + name) == b"\x08\x01"
        with pytest.raises(grpc.aio.AioRpcError) as not_found:
            await check(b"\x0a\x01x")
        assert not_found.value.code() is grpc.StatusCode.NOT_FOUND
        service.server.drain()
        assert await check(b"") == b"\x08\x02"
        assert await service.ask(request(CHAT)) == [PICKED]


async def test_other_methods_are_unimplemented() -> None:
    """Health/Watch among them, which clients take as "not offered"."""
    async with serving() as service:
        with pytest.raises(grpc.aio.AioRpcError) as unimplemented:
            await service.channel.unary_unary("/grpc.health.v1.Health/Watch")(b"")
        assert unimplemented.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_unix_socket_any_user_may_use(tmp_path: Path) -> None:
    """A dead picker's socket is replaced, and Envoy may be another user."""
    path = tmp_path / "p.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serving(f"unix:{path}") as service:
        assert path.stat().st_mode & 0o777 == 0o666
        assert await service.ask(request(CHAT)) == [PICKED]


async def test_an_address_in_use(tmp_path: Path) -> None:
    """A second picker is an error that names the address, not a silent half of the requests; the first goes on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(AddressError, match=f"listen on {address}: Address already in use"):
            await Service().server.start([address])
    unix = f"unix:{tmp_path}/p.sock"
    async with serving(unix) as service:
        with pytest.raises(AddressError, match=f"listen on {unix}: Address already in use"):
            await Service().server.start([unix])
        assert await service.ask(request(CHAT)) == [PICKED]
    with pytest.raises(AddressError, match="No such file or directory"):
        await Service().server.start([f"unix:{tmp_path}/none/p.sock"])


async def test_it_says_whether_it_serves() -> None:
    """What /readyz says: not before it listens, not while it drains; the health check says the same."""
    assert not Service().server.serving
    async with serving() as service:
        assert service.server.serving
        service.server.drain()
        assert not service.server.serving
