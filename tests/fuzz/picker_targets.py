"""What the picker parses: request bodies, ext_proc messages, load reports; and what it remembers of them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct
from structlog.testing import capture_logs

from picker.cost import PodLoad, PoolLoad
from picker.loads import TYPE_URL, Subscription
from picker.metrics import PickerMetrics
from picker.pick import MAX_CHUNKS, Pick, Picker, Reason
from picker.prefix import chunk_hashes
from picker.prompt import read_prompt
from picker.server import FILTER, PickerServer
from picker.stateless import MAX_NODES
from picker.wire.ext_proc_pb2 import HttpBody, ProcessingRequest, ProcessingResponse
from tests.fuzz.engine import Run, Target
from tests.fuzz.mutate import BYTES, JSON, MESSAGE, decode, encode
from tests.fuzz.script import dump, number, pure, steps, text
from xds.wire import discovery_pb2 as wire
from xds.wire.load_pb2 import EndpointLoad
from xds.wire.load_pb2 import PoolLoad as WirePoolLoad

POOL = "pool/default/p"
LONG = "You are a helpful assistant. " * 150
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
CALL = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"a": [1, 2.5, None, True]}}}
SAID = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}, IMAGE]
USER: dict[str, Any] = {"role": "user", "content": "Hi"}
CHAT: dict[str, Any] = {
    "model": "/model/qwen",
    "messages": [{"role": "system", "content": LONG}, USER],
    "max_tokens": 50,
}
BODIES: tuple[dict[str, Any], ...] = (
    CHAT,
    {"model": "m", "prompt": LONG, "cache_salt": "s", "stream": True, "max_completion_tokens": 1},
    {"model": "m", "prompt": [1, 2, 3, 4294967295]},
    {"model": "m", "prompt": [LONG, "b"]},
    {"prompt": [[1, 2], [3]]},
    {"tools": [TOOL], "messages": [{"role": "user", "content": SAID}, {"role": "assistant", "tool_calls": [CALL]}]},
    {"model": "m", "system": [{"type": "text", "text": LONG}], "messages": [USER]},
    {"instructions": "be brief", "input": [USER | {"type": "message"}, CALL], "max_output_tokens": 9},
    {"model": "m", "input": "x"},
)


def check_pick(pick: Pick, picker: Picker, pods: set[str]) -> Hashable:
    """What Envoy is told is a header's value, of a pod that is there if it is a pod's."""
    assert (pick.reason is Reason.COST) is bool(pick.pod)
    assert (pick.key is None) is (pick.reason in (Reason.UNKEYED, Reason.UNREADABLE))
    if pick.pod:
        assert pick.pod in pods
        assert pick.key == f"{pick.pod}_0"
    elif pick.key is not None:
        assert len(bytes.fromhex(pick.key)) == 8
    assert picker.chunks <= MAX_CHUNKS
    assert len(picker._unknown) <= MAX_NODES
    assert all(len(state.hot) <= MAX_NODES for state in picker._pools.values())
    return pick.reason, bool(pick.pool)


def prompt(data: bytes) -> Iterable[Hashable]:
    """Any body is a prompt, always the same one, or none."""
    found = read_prompt(data)
    assert found == read_prompt(data)
    if found is None:
        return ["none"]
    assert found.text
    assert found.max_tokens is None or found.max_tokens > 0
    hashes = chunk_hashes(found)
    assert len(hashes) == min(256, len(found.text) // 2048)
    return [(bool(found.model), bool(found.cache_salt), found.max_tokens is None, len(found.text).bit_length())]


def _request(body: bytes, cluster_name: str = POOL) -> bytes:
    attributes = Struct()
    attributes["xds.cluster_name"] = cluster_name
    request = ProcessingRequest(request_body=HttpBody(body=body, end_of_stream=True))
    request.attributes[FILTER].CopyFrom(attributes)
    return request.SerializeToString()


def loaded_picker() -> Picker:
    picker = Picker(lambda: 0.5)
    pods = tuple(
        PodLoad(f"default/{name}", f"10.0.0.{i}:80", 0.5, i, 2, 0.5, 160_000, 9000) for i, name in enumerate("abc")
    )
    picker.update(PoolLoad(POOL, pods), 0.0)
    return picker


@contextmanager
def ext_proc() -> Iterator[Run]:
    """Any message is answered, with a failure counted only if it is none of Envoy's; nothing grows by names in it."""

    async def answer(data: bytes) -> tuple[ProcessingResponse, Picker, PickerMetrics]:
        picker, metrics = loaded_picker(), PickerMetrics()
        with capture_logs():
            raw = await PickerServer(picker, metrics, lambda: 1.0)._process(data, None)
        return ProcessingResponse.FromString(raw), picker, metrics

    with asyncio.Runner() as runner:
        yield lambda data: check_answer(data, *runner.run(answer(data)))


def check_answer(data: bytes, answer: ProcessingResponse, picker: Picker, metrics: PickerMetrics) -> Iterable[Hashable]:
    try:
        request = ProcessingRequest.FromString(data)
    except DecodeError:
        request = ProcessingRequest()
    failed = sum(
        sample.value
        for family in metrics.failures.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    )
    assert bool(failed) is not request.HasField("request_body"), "a failure of our own"
    assert answer.HasField("request_body")
    assert list(picker.read_at()) == [POOL]
    told = MessageToDict(answer.dynamic_metadata)
    assert not told or list(told) == ["picker"]
    key = str(told["picker"]["key"]) if told else ""
    assert key.isascii()
    assert key.isprintable()
    pools = {sample.labels["pool"] for family in metrics.picks.collect() for sample in family.samples}
    assert pools <= {"", POOL}
    return [(key[:10] if "_0" in key else bool(key), bool(failed))]


def _response(*loads: WirePoolLoad, removed: tuple[str, ...] = ()) -> bytes:
    message = wire.DeltaDiscoveryResponse(type_url=TYPE_URL, nonce="1", removed_resources=removed)
    for load in loads:
        resource = wire.Any(type_url=TYPE_URL, value=load.SerializeToString())
        message.resources.append(wire.Resource(name=load.name, version="1", resource=resource).SerializeToString())
    return message.SerializeToString()


REPORT = WirePoolLoad(
    name=POOL,
    round=7,
    endpoints=[
        EndpointLoad(hash_key=f"default/{name}", address="10.0.0.1:80", age=0.5, running=i, waiting=2, kv_usage=0.5,
                     kv_tokens=160_000, prefill_rate=9000, start_time=1.7e9)
        for i, name in enumerate("abc")
    ],
)  # fmt: skip
REPORTS = (
    encode([(1, BYTES, _response(REPORT)), (1, BYTES, _response(removed=(POOL,)))]),
    encode([(1, BYTES, _response(REPORT, WirePoolLoad(name="pool/default/q"))), (1, BYTES, _response(REPORT))]),
)


def loads(data: bytes) -> Iterable[Hashable]:
    """Any responses: refused in words the server can be sent, or pods that can be picked from."""
    subscription, picker = Subscription("me"), Picker(lambda: 0.999)
    body = dump(CHAT)
    outcomes: set[Hashable] = set()
    for now, (_, kind, raw) in enumerate(decode(data)):
        if kind != BYTES:
            continue
        try:
            response = wire.DeltaDiscoveryResponse.FromString(raw)
        except DecodeError:
            continue
        outcome = subscription.receive(response)
        assert bool(outcome.refusal) is outcome.request.HasField("error_detail")
        assert len(outcome.refusal) < 10_000
        outcomes.add(outcome.refusal.rpartition(":")[2][:20])
        for load in outcome.loads:
            picker.update(load, float(now))
        for name in outcome.removed:
            picker.forget(name)
        for name in (*picker.read_at(), "unknown"):
            pods = set(picker._pools[name].pool._pods) if name != "unknown" else set()
            outcomes.add(check_pick(picker.pick(name, body, now + 0.5), picker, pods))
            outcomes.add(check_pick(picker.pick(name, b'{"prompt":"x"}', now + 1.5), picker, pods))
    return outcomes


FULL = {"running": 3, "kv_tokens": 4096, "kv_usage": 0.9}
PICKS = dump(
    [
        *(["update", POOL, {"a": FULL, "b": {"age": -1}, "c": {"age": 2, "start_time": 1}}], ["pick", POOL, CHAT]),
        *(["pick", POOL, BODIES[5]], ["wait", 3], ["pick", POOL, CHAT], ["pick", "other", BODIES[1]]),
        *(["update", POOL, {"a": {"start_time": 5}, "c": {"age": 20, "start_time": 2}}], ["pick", POOL, BODIES[7]]),
        *(["wait", 40], ["pick", POOL, CHAT], ["forget", POOL], ["pick", POOL, CHAT]),
    ]
)


def picks(data: bytes) -> Iterable[Hashable]:
    """Requests and reports in any order: a pod that is there or a key, twice the same, in bounded memory."""
    first, second = _play(data), _play(data)
    assert first == second
    return {(pick.reason, bool(pick.pool), pick.key is None) for pick in first}


def _play(data: bytes) -> list[Pick]:
    picker, now, made = Picker(lambda: 0.5), 0.0, []
    pods: dict[str, set[str]] = {}
    for word, given in steps(data):
        match word, given:
            case "update", [str(name), dict(given_pods)]:
                kept = {text(key): value for key, value in given_pods.items() if key and isinstance(value, dict)}
                picker.update(PoolLoad(text(name), tuple(_pod(key, value) for key, value in kept.items())), now)
                pods[text(name)] = set(kept)
            case "forget", [str(name)]:
                picker.forget(text(name))
            case "pick", [str(name), body]:
                raw = body.encode(errors="replace") if isinstance(body, str) else dump(body)
                made.append(picker.pick(text(name), raw, now))
                check_pick(made[-1], picker, pods.get(text(name), set()))
            case "wait", [seconds]:
                now += number(seconds, 0, 1e6)
    return made


def _pod(key: str, given: dict[str, Any]) -> PodLoad:
    """Any values that `picker.loads.decode` lets through."""
    most = {"running": 2.0**53, "waiting": 2.0**53, "kv_usage": 1.0, "prefill_rate": 2.0**53, "start_time": 2.0**53}
    values = {name: number(given.get(name), 0, high) for name, high in most.items()}
    age = number(given.get("age"), -math.ldexp(1, 53), math.ldexp(1, 53))
    return PodLoad(
        key, str(given.get("address")), age, kv_tokens=int(number(given.get("kv_tokens"), 0, 2.0**63)), **values
    )


SEED_BODIES = tuple(map(dump, BODIES))
TARGETS = (
    Target("prompt", pure(prompt), SEED_BODIES, JSON, short=120),
    Target("ext_proc", ext_proc, tuple(map(_request, SEED_BODIES)), MESSAGE, short=60),
    Target("loads", pure(loads), REPORTS, MESSAGE, short=80),
    Target("picks", pure(picks), (PICKS,), JSON, short=40),
)
