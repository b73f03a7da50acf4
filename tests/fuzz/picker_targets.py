"""What the picker parses: request bodies, ext_proc messages, load reports; and what it remembers of them."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable
from itertools import islice
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct
from structlog.testing import capture_logs

from picker.cost import PodLoad, PoolLoad
from picker.exchange import Inbox
from picker.loads import CONFIG, LOAD, MAX_PODS, Subscription
from picker.memory import CHUNKS
from picker.metrics import PickerMetrics
from picker.model_name import find_model
from picker.models import Models, Rule, judge
from picker.pick import Pick, Picker, PoolConfig, Reason
from picker.prefix import chunk_hashes
from picker.prompt import read_prompt
from picker.server import FILTER, MAX_MODEL, REQUEST, PickerServer
from picker.stateless import MAX_NODES
from picker.wire.ext_proc_pb2 import HttpBody, ProcessingRequest, ProcessingResponse
from tests.fuzz.engine import Target
from tests.fuzz.mutate import BYTES, JSON, MESSAGE, decode, encode
from tests.fuzz.script import dump, number, pure, steps, text, texts
from xds.wire import discovery_pb2 as wire
from xds.wire import exchange_pb2, pool_config_pb2
from xds.wire.load_pb2 import EndpointLoad
from xds.wire.load_pb2 import PoolLoad as WirePoolLoad
from xds.wire.pool_config_pb2 import PoolConfig as WirePoolConfig

POOL, OTHER = "pool/default/p", "pool/default/models"
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
    assert (pick.key is not None) is (pick.reason in (Reason.COST, Reason.STATELESS))
    if pick.pod:
        assert pick.pod in pods
        assert pick.key == f"{pick.pod}_0"
    elif pick.key is not None:
        assert len(bytes.fromhex(pick.key)) == 8
    assert picker.chunks <= CHUNKS
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


MODELS = Models(
    {"/model/qwen": Rule((("a", 1), ("b", 3))), "m": Rule((("renamed", 1),), sheddable=True), "c": Rule(critical=True)},
    closed=True,
    objectives={"batch": -1},
)


def models(data: bytes) -> Iterable[Hashable]:
    """Any body is refused, left alone, or the same with another name in it; always the same."""
    outcomes: list[Hashable] = []
    for said in (MODELS, Models({**MODELS.rules, "": Rule((("any", 1),))})):
        verdict = judge(said, data, "session", "batch", lambda: True)
        assert verdict == judge(said, data, "session", "batch", lambda: True)
        assert (verdict.body is None) or not verdict.refused
        outcomes.append((verdict.refused, verdict.named, verdict.body is not None))
        if verdict.body is not None:
            found = find_model(verdict.body)
            assert found is not None
            assert found.name == verdict.model
            _check_renamed(data, verdict.body, verdict.model)
    return outcomes


def _check_renamed(before: bytes, after: bytes, name: str) -> None:
    """For a parser nothing has changed but the name."""
    try:
        value = json.loads(before)
    except (ValueError, RecursionError):
        return
    assert json.dumps(json.loads(after)) == json.dumps(value | {"model": name})


def _request(body: bytes, cluster_name: str = POOL) -> bytes:
    attributes, told = Struct(), Struct()
    attributes["xds.cluster_name"] = cluster_name
    told["session"], told["objective"] = "s", "batch"
    request = ProcessingRequest(request_body=HttpBody(body=body, end_of_stream=True))
    request.attributes[FILTER].CopyFrom(attributes)
    request.metadata_context.filter_metadata[REQUEST].CopyFrom(told)
    return request.SerializeToString()


def loaded_picker() -> Picker:
    """One that knows a pool with loads, and one with models."""
    picker = Picker(lambda: 0.5)
    for name in (POOL, OTHER):
        pods = tuple(
            PodLoad(f"default/{pod}", f"10.0.0.{i}:80", 0.5, i, 2, 0.5, 160_000, 9000) for i, pod in enumerate("abc")
        )
        picker.update(PoolLoad(name, pods), 0.0)
    picker.configure(PoolConfig(OTHER, models=MODELS))
    return picker


def ext_proc(data: bytes) -> Iterable[Hashable]:
    """Any message is answered, with a failure counted only if it is none of Envoy's; nothing grows by names in it."""
    picker, metrics = loaded_picker(), PickerMetrics()
    with capture_logs():
        answer = ProcessingResponse.FromString(PickerServer(picker, metrics, lambda: 1.0)._process(data))
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
    assert list(picker.read_at()) == [POOL, OTHER]
    told = MessageToDict(answer.dynamic_metadata).get("picker", {})
    assert told.keys() <= {"reason", "key", "pod", "named", "refused", "model"}
    key = str(told.get("key", ""))
    assert key.isascii()
    assert key.isprintable()
    assert len(str(told.get("model", ""))) <= MAX_MODEL
    pools = {sample.labels["pool"] for family in metrics.picks.collect() for sample in family.samples}
    assert pools <= {"", POOL, OTHER}
    return [(key[:10] if "_0" in key else bool(key), bool(failed), told.get("refused"), told.get("named"))]


def _response(type_url: str, *values: WirePoolLoad | WirePoolConfig, removed: tuple[str, ...] = ()) -> bytes:
    message = wire.DeltaDiscoveryResponse(type_url=type_url, nonce="1", removed_resources=removed)
    for value in values:
        resource = wire.Any(type_url=type_url, value=value.SerializeToString())
        message.resources.append(wire.Resource(name=value.name, version="1", resource=resource).SerializeToString())
    return message.SerializeToString()


REPORT = WirePoolLoad(
    name=POOL,
    round=7,
    endpoints=[
        EndpointLoad(
            hash_key=f"default/{name}",
            address="10.0.0.1:80",
            age=0.5,
            running=i,
            waiting=2,
            kv_usage=0.5,
            kv_tokens=160_000,
            prefill_rate=9000,
            start_time=1.7e9,
            max_lora=2,
            running_adapters=["l"],
            waiting_adapters=["/model/qwen"],
        )
        for i, name in enumerate("abc")
    ],
)
SETTINGS = WirePoolConfig(
    name=POOL,
    costs=pool_config_pb2.Costs(output_tokens=100, prefill_rate=5000, request_cost=10),
    models=[
        pool_config_pb2.ModelRule(name="/model/qwen", targets=[pool_config_pb2.Target(name="a", weight=3)]),
        pool_config_pb2.ModelRule(name="m", sheddable=True),
    ],
    objectives=[pool_config_pb2.Objective(name="batch", priority=-1)],
    saturation=pool_config_pb2.Saturation(waiting=3, kv_usage=0.8),
)
LOADS, SETTINGS_OF = 1, 2  # field numbers: an input is a message of responses, each of the one type or the other
REPORTS = (
    encode([(LOADS, BYTES, _response(LOAD, REPORT)), (SETTINGS_OF, BYTES, _response(CONFIG, SETTINGS))]),
    encode(
        [(SETTINGS_OF, BYTES, _response(CONFIG, SETTINGS, removed=(POOL,))), (LOADS, BYTES, _response(LOAD, REPORT))]
    ),
    encode([(LOADS, BYTES, _response(LOAD, REPORT, removed=(POOL,))), (LOADS, BYTES, _response(LOAD, REPORT))]),
)


def loads(data: bytes) -> Iterable[Hashable]:
    """Any responses: refused in words the server can be sent, or pods that can be picked from and settings."""
    subscriptions = {LOADS: Subscription("me", LOAD), SETTINGS_OF: Subscription("me", CONFIG)}
    picker, body = Picker(lambda: 0.999), dump(CHAT)
    outcomes: set[Hashable] = set()
    for now, (which, kind, raw) in enumerate(decode(data)):
        if kind != BYTES or which not in subscriptions:
            continue
        try:
            response = wire.DeltaDiscoveryResponse.FromString(raw)
        except DecodeError:
            continue
        outcome = subscriptions[which].receive(response)
        assert bool(outcome.refusal) is outcome.request.HasField("error_detail")
        assert len(outcome.refusal) < 10_000
        outcomes.add(outcome.refusal.rpartition(":")[2][:20])
        for value in outcome.values:
            if isinstance(value, PoolLoad):
                picker.update(value, float(now))
            else:
                picker.configure(value)
        for name in outcome.removed:
            (picker.forget if which == LOADS else picker.unconfigure)(name)
        assert picker._pods == sum(len(state.pool) for state in picker._pools.values())
        for name in (*picker.read_at(), "unknown"):
            pods = set(picker._pools[name].pool._pods) if name in picker._pools else set()
            outcomes.add(check_pick(picker.pick(name, body, now + 0.5), picker, pods))
            outcomes.add(
                check_pick(picker.pick(name, b'{"prompt":"x","model":"m"}', now + 1.5, "s", "batch"), picker, pods)
            )
    return outcomes


def _batch(**placed: Any) -> bytes:
    one: Any = {"pool": POOL, "hash_key": "default/a", "requests": 2, "tokens": 900, "uncached": 400}
    return exchange_pb2.Batch(placed=[one | placed]).SerializeToString()


HEARD = tuple(
    exchange_pb2.Heard(others=2, batches=batches).SerializeToString()
    for batches in (
        [_batch(prompts=[b"8 bytes." * 9, b""])],
        [_batch(), _batch(pool="nobody's")],
        [_batch(tokens=2**63)],
    )
)


def exchange(data: bytes) -> Iterable[Hashable]:
    """What other pickers tell: noted, lost or refused in words; no name grows anything, and there is still a pick."""
    picker = loaded_picker()
    try:
        heard = Inbox(picker).hear(data, 1.0)
    except DecodeError:
        return ["none"]
    assert bool(heard.refusal) is ("refused" in heard.lost)
    assert len(heard.refusal) < 200
    assert heard.requests >= 0
    assert list(picker.read_at()) == [POOL, OTHER]
    pick = check_pick(picker.pick(POOL, dump(CHAT), 1.5), picker, {f"default/{pod}" for pod in "abc"})
    return [(pick, heard.requests.bit_length(), *sorted(heard.lost)), picker.chunks, heard.refusal[:9]]


BUSY = {"running": 3, "kv_tokens": 4096, "kv_usage": 0.9}
PICKS = dump(
    [
        *(["update", POOL, {"a": BUSY, "b": {"age": -1}, "c": {"age": 2, "start_time": 1}}], ["pick", POOL, CHAT]),
        *(["pick", POOL, BODIES[5]], ["wait", 3], ["pick", POOL, CHAT], ["pick", "other", BODIES[1]]),
        *(["update", POOL, {"a": {"start_time": 5}, "c": {"age": 20, "adapters": ["m"]}}], ["pick", POOL, BODIES[7]]),
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
                kept = dict(islice(kept.items(), MAX_PODS))
                picker.update(PoolLoad(text(name), tuple(_pod(key, value) for key, value in kept.items())), now)
                pods[text(name)] = set(kept)
            case "forget", [str(name)]:
                picker.forget(text(name))
            case "pick", [str(name), body]:
                raw = body.encode(errors="replace") if isinstance(body, str) else dump(body)
                made.append(picker.pick(text(name), raw, now, "s"))
                check_pick(made[-1], picker, pods.get(text(name), set()))
            case "wait", [seconds]:
                now += number(seconds, 0, 1e6)
    return made


def _pod(key: str, given: dict[str, Any]) -> PodLoad:
    """Any values that `picker.loads.decode` lets through."""
    most = {"running": 2.0**53, "waiting": 2.0**53, "kv_usage": 1.0, "prefill_rate": 2.0**53, "start_time": 2.0**53}
    values: Any = {name: number(given.get(name), 0, high) for name, high in most.items()}
    values["age"] = number(given.get("age"), -math.ldexp(1, 53), math.ldexp(1, 53))
    values["kv_tokens"] = int(number(given.get("kv_tokens"), 0, 2.0**63))
    adapters = tuple(texts(given.get("adapters")))
    return PodLoad(key, str(given.get("address")), max_lora=2, running_adapters=adapters, **values)


SEED_BODIES = tuple(map(dump, BODIES))
PROCESSED = (*map(_request, SEED_BODIES), *(_request(body, OTHER) for body in SEED_BODIES[:2]))
TARGETS = (
    Target("prompt", pure(prompt), SEED_BODIES, JSON, short=120),
    Target("models", pure(models), SEED_BODIES, JSON, short=120),
    Target("ext_proc", pure(ext_proc), PROCESSED, MESSAGE, short=60),
    Target("exchange", pure(exchange), HEARD, MESSAGE, short=80),
    Target("loads", pure(loads), REPORTS, MESSAGE, short=80),
    Target("picks", pure(picks), (PICKS,), JSON, seconds_large=10, short=40),
)
