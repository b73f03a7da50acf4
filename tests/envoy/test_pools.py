"""What a pool's objects and annotations say of its requests, with the real Envoy: one gateway serves the whole module.

What `vllm-xds explain` says of a request, and what Envoy says in its access log, is held against what becomes of it.

Each test says which picker it wants: none, one `alone` that the management server tells nothing, or an `informed` one.
In this order there are two starts.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from bench.envoy import free_port
from bench.vllm_engine import EngineConfig
from bench.vllm_server import SimulatedPod
from picker.explain_ask import Running
from picker.explain_main import document
from picker.prefix import hint_hash
from picker.prompt import read_prompt
from tests.envoy.conftest import BOUND, Gateway
from tests.envoy.recording_pod import Received, RecordingPod
from xds import debug
from xds.control import Control
from xds.envoy import PICKER_CLUSTER
from xds.match import Request
from xds.snapshot import POOL_CONFIG
from xds.status import serve_status
from xds.wire import discovery_pb2
from xds.wire.pool_config_pb2 import Costs, PoolConfig

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]

OBJECTS = """\
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {{name: envoy}}
spec: {{controllerName: vllm-xds.dev/gateway-controller}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: gw}}
spec:
  gatewayClassName: envoy
  listeners:
  - {{name: picked, protocol: HTTP, port: {picked}}}
  - {{name: by-model, protocol: HTTP, port: {by_model}}}
  - {{name: balanced, protocol: HTTP, port: {balanced}}}
  - {{name: shared, protocol: HTTP, port: {shared}}}
  - {{name: every, protocol: HTTP, port: {every}}}
  - {{name: mixed, protocol: HTTP, port: {mixed}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: picked}}
spec:
  parentRefs: [{{name: gw, sectionName: picked}}]
  rules: [{{backendRefs: [{{group: inference.networking.k8s.io, kind: InferencePool, name: picked}}]}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: by-model}}
spec:
  parentRefs: [{{name: gw, sectionName: by-model}}]
  rules:
  - matches: [{{headers: [{{name: X-Gateway-Model-Name, value: /model/qwen}}]}}]
    backendRefs: [{{group: inference.networking.k8s.io, kind: InferencePool, name: picked}}]
  - matches: [{{headers: [{{name: X-Gateway-Model-Name, value: ".+", type: RegularExpression}}]}}]
    backendRefs: [{{group: inference.networking.x-k8s.io, kind: InferencePool, name: balanced}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: balanced}}
spec:
  parentRefs: [{{name: gw, sectionName: balanced}}]
  rules: [{{backendRefs: [{{group: inference.networking.x-k8s.io, kind: InferencePool, name: balanced}}]}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: shared}}
spec:
  parentRefs: [{{name: gw, sectionName: shared}}]
  rules:
  - backendRefs:
    - {{group: inference.networking.x-k8s.io, kind: InferencePool, name: balanced}}
    - {{group: inference.networking.k8s.io, kind: InferencePool, name: picked}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: every}}
spec:
  parentRefs: [{{name: gw, sectionName: every}}]
  rules: [{{backendRefs: [{{group: inference.networking.k8s.io, kind: InferencePool, name: every}}]}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: mixed}}
spec:
  parentRefs: [{{name: gw, sectionName: mixed}}]
  rules:
  - backendRefs:
    - {{group: inference.networking.x-k8s.io, kind: InferencePool, name: balanced}}
    - {{group: inference.networking.k8s.io, kind: InferencePool, name: plain}}
    - {{name: qwen, port: 8000}}
---
apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata: {{name: plain}}
spec: {{selector: {{matchLabels: {{app: qwen}}}}, targetPorts: [{{number: {port}}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: qwen}}
spec: {{selector: {{app: qwen}}, ports: [{{port: 8000, targetPort: {port}}}]}}
---
apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata: {{name: every}}
spec: {{selector: {{matchLabels: {{app: qwen}}}}, targetPorts: [{{number: {port}}}]}}
---
apiVersion: inference.networking.x-k8s.io/v1alpha2
kind: InferenceModelRewrite
metadata: {{name: every}}
spec:
  poolRef: {{name: every}}
  rules:
  - targets: [{{modelRewrite: code}}]
  - matches: [{{model: {{value: /model/qwen}}}}]
    targets: [{{modelRewrite: /model/qwen}}]
---
apiVersion: inference.networking.x-k8s.io/v1alpha2
kind: InferencePool
metadata: {{name: balanced}}
spec: {{selector: {{app: qwen}}, targetPortNumber: {port}}}
---
apiVersion: inference.networking.x-k8s.io/v1alpha2
kind: InferenceModel
metadata: {{name: qwen}}
spec: {{modelName: /model/qwen, criticality: Critical, poolRef: {{name: balanced}}}}
---
apiVersion: inference.networking.x-k8s.io/v1alpha2
kind: InferenceModel
metadata: {{name: coder}}
spec: {{modelName: coder, criticality: Sheddable, targetModels: [{{name: code}}], poolRef: {{name: balanced}}}}
---
apiVersion: inference.networking.x-k8s.io/v1alpha2
kind: InferenceModel
metadata: {{name: talk}}
spec:
  modelName: talk
  targetModels: [{{name: code, weight: 50}}, {{name: chat, weight: 50}}]
  poolRef: {{name: balanced}}
---
apiVersion: llm-d.ai/v1alpha2
kind: InferenceModelRewrite
metadata: {{name: coder}}
spec:
  poolRef: {{name: picked}}
  rules: [{{matches: [{{model: {{value: coder}}}}], targets: [{{modelRewrite: code}}]}}]
---
apiVersion: inference.networking.x-k8s.io/v1alpha2
kind: InferenceObjective
metadata: {{name: batch}}
spec: {{priority: -1, poolRef: {{name: picked}}}}
"""

POOL = """\
apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata:
  name: picked
  annotations:
    inference.networking.x-k8s.io/routing-strategy: PREFIX_CACHE
    vllm-xds/session-header: X-Session-Id
{annotations}
spec:
  selector: {{matchLabels: {{app: qwen}}}}
  targetPorts: [{{number: {port}}}]
"""
PICKED = "pool/default/picked"
PATH = "/v1/completions"
NO_HEADERS: Mapping[str, str] = {}
QWEN, CODER = "/model/qwen", "coder"
PORTS = ("picked", "by_model", "balanced", "shared")


def request(model: str, prompt: str = "hi", tokens: int = 1) -> bytes:
    return json.dumps({"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}).encode()


RENAMED = [  # a body, and the part of it that is the model's name
    (b'{"model":"coder","prompt":"hi","max_tokens":1}', b'"coder"'),
    (b'{ "max_tokens" : 1,\n"n" :1234567890123456789,"z":1.0, "model" :\t"coder"  ,"prompt":"hi"}', b'"coder"'),
    (b'{"a":{"model":"x"},"prompt":"\\"model\\":\\"y\\"","model":"coder","max_tokens":1}', b'"coder"'),
    (rb'{"mod\u0065l":"cod\u0065r","prompt":"hi","max_tokens":1}', rb'"cod\u0065r"'),
    (b'{"padding":"' + b"x" * 3_000_000 + b'","prompt":"hi","max_tokens":1,"model":"coder"}', b'"coder"'),
]
TOO_BIG_FOR_ENVOY = b'{"n":12345678901234567890,"model":"coder","prompt":"hi","max_tokens":1}'  # beyond 63 bits


@dataclass(frozen=True, slots=True)
class Answer:
    """What the client gets, and how the request came to a pod; None: it came to none."""

    status: int
    headers: dict[str, str]
    body: bytes
    received: Received | None

    @property
    def sent(self) -> Received:
        """What a pod was sent."""
        assert self.received is not None, (self.status, self.body)
        return self.received

    def error(self) -> dict[str, Any]:
        """OpenAI's error JSON, which the gateway or the pod has answered."""
        assert self.headers["Content-Type"].startswith("application/json")
        (error,) = json.loads(self.body).values()
        assert sorted(error) == ["code", "message", "param", "type"]
        assert error["code"] == self.status
        return dict(error)


async def _chunks(body: bytes) -> AsyncIterator[bytes]:
    yield body[:11]
    yield body[11:]


class Pools:
    """A gateway, its picker, and a client of its ports."""

    def __init__(self, gateway: Gateway, session: aiohttp.ClientSession, ports: dict[str, int]) -> None:
        self.gateway = gateway
        self.ports = ports
        self.picker_status = f"127.0.0.1:{free_port()}"
        self._session = session
        self._picker = "none"

    async def use(self, picker: str) -> None:
        """The picker named: `alone` or `informed`. Returns when Envoy asks it."""
        if picker == self._picker:
            return
        if self._picker != "none":
            self.gateway.picker.kill()
            await self.gateway.picker.wait()
        self._picker = picker
        informed = picker == "informed"
        server = () if informed else ("--server", f"127.0.0.1:{free_port()}")
        await self.gateway.start_picker(
            *server,
            *("--metrics-address", self.picker_status),
            until="server connected" if informed else "server unreachable",
        )
        if informed:
            await self.gateway.settled(clients=2)
        async with asyncio.timeout(BOUND):  # it may be found healthy still, or again, and not be asked yet
            while "x-vllm-pick" not in (await self.ask("picked", request(QWEN), {"X-Session-Id": "s"})).sent.headers:
                pass

    def write_pool(self, **annotations: str) -> None:
        """The picked pool, with these of our annotations beside its session header."""
        lines = "\n".join(f'    vllm-xds/{name.replace("_", "-")}: "{text}"' for name, text in annotations.items())
        text = POOL.format(port=self.gateway.pod_port, annotations=lines)
        (self.gateway.config / "pool.yaml").write_text(text)

    async def ask(
        self,
        port: str,
        body: bytes,
        headers: Mapping[str, str] = NO_HEADERS,
        *,
        method: str = "POST",
        path: str = PATH,
        chunked: bool = False,
    ) -> Answer:
        """What the client gets, and the request as it came to a pod.

        On a busy machine Envoy's health check may lose the picker for a second: an answer of that time does not count.
        """
        sent = {"content-type": "application/json", **headers}
        url = f"http://127.0.0.1:{self.ports[port]}{path}"
        while True:
            found = await self._found()
            data = _chunks(body) if chunked else BytesIO(body)
            async with self._session.request(method, url, data=data, headers=sent) as response:
                answer = await response.read()
            received = [pod.received.pop() for pod in self._pods if pod.received]
            assert len(received) <= 1
            if found and await self._found():
                return Answer(response.status, dict(response.headers), answer, received[0] if received else None)

    async def _found(self) -> bool:
        """Whether Envoy holds the picker that is to be there for healthy."""
        return self._picker == "none" or await self.gateway.healthy(PICKER_CLUSTER)

    async def ask_pod(self, pod: SimulatedPod, body: bytes) -> None:
        """One request to a pod itself, past the gateway."""
        async with self._session.post(f"http://{pod.address}:{pod.port}{PATH}", data=body) as response:
            await response.read()

    async def arrives(self, port: str, body: bytes, headers: Mapping[str, str]) -> bool:
        """Whether a request comes to a pod, however long that would take to answer; False: it is answered before."""
        task = asyncio.create_task(self.ask(port, body, headers))
        try:
            async with asyncio.timeout(BOUND):
                while not task.done():
                    if any(pod.received for pod in self._pods):
                        return True
                    await self.gateway.envoy.get("/stats?format=json&filter=nothing")  # a turn of the loop, and more
            return False
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def forget_received(self) -> None:
        """Requests that have come to the pods and are not answered yet."""
        for pod in self._pods:
            pod.received.clear()

    @property
    def _pods(self) -> list[RecordingPod]:
        return [pod for pod in self.gateway.pods if isinstance(pod, RecordingPod)]

    def costs(self) -> Costs:
        """What the picker has been told of the picked pool, and has accepted."""
        snapshot = self.gateway.control.snapshot
        assert snapshot is not None
        (picker,) = [view for view in self.gateway.server.clients() if view.node_cluster == "picker"]
        assert picker.settled
        any_ = discovery_pb2.Any.FromString(snapshot.resources[POOL_CONFIG][PICKED].any)
        return PoolConfig.FromString(any_.value).costs

    def access_log(self) -> list[dict[str, Any]]:
        """Envoy's, so far."""
        return [json.loads(line) for line in self.gateway.envoy.log.read_bytes().splitlines() if line.startswith(b"{")]

    async def balance_factor(self) -> int:
        """The one in Envoy's own copy of the picked pool's cluster."""
        dump = await self.gateway.envoy.get("/config_dump?resource=dynamic_active_clusters")
        (cluster,) = [each["cluster"] for each in dump["configs"] if each["cluster"]["name"] == PICKED]
        (policy,) = cluster["load_balancing_policy"]["policies"]
        config = policy["typed_extension_config"]["typed_config"]["consistent_hashing_lb_config"]
        factor: int = config["hash_balance_factor"]
        return factor


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pools(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pools]:
    gateway = Gateway(tmp_path_factory.mktemp("pools"), delta=True, told=True)
    try:
        config = EngineConfig(max_num_seqs=4)
        await gateway.start_pods(3, config, partial(RecordingPod, adapters=("code", "chat", "sql"), keep_bodies=True))
        gateway.config.mkdir()
        ports = {name: free_port() for name in (*PORTS, "every", "mixed")}
        (gateway.config / "objects.yaml").write_text(OBJECTS.format(port=gateway.pod_port, **ports))
        for pod in gateway.pods:
            gateway.write_pod(pod)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=BOUND)) as session:
            made = Pools(gateway, session, ports)
            made.write_pool()
            await gateway.start_server()
            await gateway.start_envoy()
            await gateway.settled()
            assert gateway.control.rejections == ()
            yield made
    finally:
        await gateway.close()


# --- no picker --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", PORTS)
async def test_without_a_picker_no_name_is_sent_on_that_was_to_be_another(pools: Pools, port: str) -> None:
    """The clear error is Envoy's own; what needs no other name flows on, and so does what names no model."""
    for body, content_type in (*((body, "application/json") for body, _ in RENAMED), (RENAMED[0][0], "text/plain")):
        answer = await pools.ask(port, body, {"content-type": content_type})
        assert (answer.status, answer.received) == (503, None)
        assert answer.headers["Retry-After"] == "1"
        assert answer.error() == {
            "message": "The gateway can not give model `coder` its server's name at the moment. Try again.",
            "type": "ServiceUnavailable",
            "param": "model",
            "code": 503,
        }
    for body, status in ((request(QWEN), 200), (request("nope"), 404), (b'{"prompt":"hi","max_tokens":1}', 200)):
        answer = await pools.ask(port, body)
        if port == "by_model" and b"model" not in body:
            assert (answer.status, answer.received) == (404, None)  # no route for it
        else:
            assert (answer.status, answer.sent.body) == (status, body)


async def test_without_a_picker_bodies_envoy_can_not_read(pools: Pools) -> None:
    """They may have a name that is to be another: refused if they are said to be JSON. Others, and none, flow on."""
    for body in (b'{"model":"coder",', b"hello", TOO_BIG_FOR_ENVOY):
        answer = await pools.ask("balanced", body)
        assert (answer.status, answer.received) == (503, None)
        assert answer.error()["message"].startswith("The gateway can not read which model is asked for")
        assert (await pools.ask("balanced", body, {"content-type": "text/plain"})).sent.body == body
    assert (await pools.ask("balanced", b"")).sent.body == b""
    assert (await pools.ask("balanced", b"", method="GET", path="/v1/models")).status == 200


async def test_without_a_picker_a_rule_for_every_name(pools: Pools) -> None:
    """Every name is refused but those that keep theirs: the target's, and one with a rule of its own."""
    for name in ("anything", "chat", "\u2028 x\n"):
        answer = await pools.ask("every", request(name))
        assert (answer.status, answer.received) == (503, None)
    for body in (request("code"), request(QWEN), request(""), b'{"prompt":"hi","max_tokens":1}'):
        answer = await pools.ask("every", body)
        assert (answer.status, answer.sent.body) == (200, body)


async def test_without_a_picker_nobody_is_shed_or_refused(pools: Pools) -> None:
    """An objective that could be shed and a model that is not in the closed set go to the pod, which answers."""
    assert (await pools.ask("picked", request(QWEN), {"x-gateway-inference-objective": "batch"})).status == 200
    assert (await pools.ask("balanced", request("nope"))).sent.body == request("nope")


# --- a picker alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", ["picked", "by_model"])
async def test_the_session_header_reaches_the_picker(pools: Pools, port: str) -> None:
    """The pool's session header, and no other, is the request's hint, also where the route is found by the model: a
    prompt too short for a key has the session's, as the specification says it."""
    await pools.use("alone")
    body = request(QWEN)
    prompt = read_prompt(body)
    assert prompt is not None
    for session in ("one", "two"):
        hint = hint_hash(prompt, session)
        assert hint is not None
        sent = (await pools.ask(port, body, {"X-Session-Id": session})).sent
        assert (sent.headers["x-vllm-pick"], sent.headers["x-session-id"]) == (hint.hex(), session)
    for headers in ({}, {"x-session-id": ""}, {"x-session": "one"}):
        answer = await pools.ask(port, body, headers)
        assert answer.status == 200
        assert "x-vllm-pick" not in answer.sent.headers


async def test_a_picker_that_knows_nothing_yet_renames_nothing_wrongly(pools: Pools) -> None:
    """It answers, but not that it has seen to the name: the same clear error until it is told of the pool."""
    await pools.use("alone")
    for port in PORTS:
        answer = await pools.ask(port, request(CODER))
        assert (answer.status, answer.received) == (503, None)
        assert (await pools.ask(port, request(QWEN))).status == 200


# --- an informed picker -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", PORTS)
async def test_a_model_is_renamed_by_bytes(pools: Pools, port: str) -> None:
    """The pod is sent the body with another name in it, every other byte as it was, and the length that fits: in a pool
    with and without picks, behind a route by the model, and in each share of a route."""
    await pools.use("informed")
    for body, name in RENAMED:
        for chunked in (False, True):
            answer = await pools.ask(port, body, chunked=chunked)
            assert (answer.status, answer.sent.body) == (200, body.replace(name, b'"code"'))
            assert answer.sent.headers["content-length"] == str(len(answer.sent.body))
            assert "transfer-encoding" not in answer.sent.headers
            assert json.loads(answer.body)["model"] == "code"  # the answer is the pod's, byte for byte
    same = await pools.ask(port, request(QWEN))
    assert (same.status, same.sent.body) == (200, request(QWEN))


async def test_a_share_without_models_is_sent_on(pools: Pools) -> None:
    """Of a route whose other share is renamed, be it a pool's or a Service's: the picker says that there is nothing to
    see to."""
    await pools.use("informed")
    sent = Counter([(await pools.ask("mixed", request(CODER))).sent.body for _ in range(24)])
    assert set(sent) == {request("code"), request(CODER)}


async def test_a_rule_for_every_name(pools: Pools) -> None:
    """It stands for all but those with a rule of their own; a request without a name goes to the pod's own model."""
    await pools.use("informed")
    for name in ("anything", "chat", "code"):
        answer = await pools.ask("every", request(name))
        assert (answer.status, answer.sent.body) == (200, request("code"))
    for body in (request(QWEN), request(""), b'{"prompt":"hi","max_tokens":1}'):
        answer = await pools.ask("every", body)
        assert (answer.status, answer.sent.body) == (200, body)


async def test_odd_bodies_are_renamed_or_left_to_the_pod(pools: Pools) -> None:
    """A byte order mark, equal keys, another content type make no difference; what is no JSON is the pod's matter."""
    await pools.use("informed")
    for body, content_type in (
        (b'\xef\xbb\xbf{"model":"coder","prompt":"hi"}', "application/json"),
        (b'{"model":"coder","prompt":"hi"}', "application/x-www-form-urlencoded"),
        (b'{"model":"coder","prompt":"hi","model":"coder"}', "application/json"),
        (TOO_BIG_FOR_ENVOY, "application/json"),
        (b"hello", "application/json"),
        (b'{"model":7}', "application/json"),
        (b'{"prompt":"hi"}', "application/json"),
        (b"", "application/json"),
    ):
        answer = await pools.ask("balanced", body, {"content-type": content_type})
        assert answer.sent.body == body.replace(b'"coder"', b'"code"')
    assert (await pools.ask("balanced", b"", method="GET", path="/v1/models")).status == 200


async def test_a_split_is_stable_and_shared(pools: Pools) -> None:
    """Each conversation has one target, whatever the pod; all of them together have both."""
    await pools.use("informed")

    def turn(conversation: int, turns: int) -> bytes:
        messages = [{"role": "user", "content": f"{conversation} {i}"} for i in range(turns)]
        return json.dumps({"model": "talk", "messages": messages, "max_tokens": 1}).encode()

    targets: list[set[str]] = []
    for conversation in range(16):
        answers = [
            await pools.ask("balanced", turn(conversation, turns), path="/v1/chat/completions") for turns in (1, 2, 3)
        ]
        targets.append({json.loads(answer.sent.body)["model"] for answer in answers})
    assert {len(each) for each in targets} == {1}
    assert set.union(*targets) == {"code", "chat"}


async def test_an_unknown_model_is_refused(pools: Pools) -> None:
    """InferenceModels name all there are: the gateway answers as vLLM would, and no pod is asked, also for a target's
    own name. A pool of rewrites leaves it to the pod."""
    await pools.use("informed")
    for name in ("nope", "code", 'we"ird\\ \x7f é %REQ(host)%', "n" * 300):
        answer = await pools.ask("balanced", request(name))
        assert (answer.status, answer.received) == (404, None)
        assert answer.error() == {
            "message": f"The model `{name[:256]}` does not exist.",
            "type": "NotFoundError",
            "param": "model",
            "code": 404,
        }
    pods = await pools.ask("picked", request("nope"))
    assert pods.received is not None
    assert pods.error() == answer.error() | {"message": "The model `nope` does not exist."}


async def test_sheddable_requests_are_shed_while_the_pool_is_saturated(pools: Pools) -> None:
    """By the model's criticality or the request's objective, in either of its headers; nobody else, and nobody before
    the pool is saturated or when it is no longer."""
    await pools.use("informed")
    cases: list[tuple[str, str, dict[str, str], bool]] = [
        ("balanced", CODER, {}, True),
        ("balanced", QWEN, {}, False),
        ("balanced", "talk", {}, False),
        ("picked", CODER, {}, False),
        ("picked", CODER, {"x-gateway-inference-objective": "batch"}, True),
        ("picked", CODER, {"x-llm-d-inference-objective": "batch"}, True),
        ("picked", CODER, {"x-gateway-inference-objective": "usual"}, False),
    ]

    def saturated(control: Control) -> bool:
        return all(m.load and m.load.waiting >= 5 for pool in control.pools.values() for m in pool.members.values())

    def idle(control: Control) -> bool:
        return all(m.load and not m.load.waiting for pool in control.pools.values() for m in pool.members.values())

    async def all_served() -> None:
        for port, model, headers, _ in cases:
            assert (await pools.ask(port, request(model), headers)).status == 200

    await all_served()
    busy = request(QWEN, tokens=30_000)
    flood = [asyncio.create_task(pools.ask_pod(pod, busy)) for pod in pools.gateway.pods for _ in range(16)]
    try:
        await pools.gateway.until(saturated)
        for port, model, headers, shed in cases:
            pools.forget_received()
            if shed:
                answer = await pools.ask(port, request(model), headers)
                assert (answer.status, answer.received) == (429, None)
                assert answer.headers["Retry-After"] == "2"
                assert answer.error()["type"] == "RateLimitError"
            else:
                assert await pools.arrives(port, request(model), headers)
    finally:
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        pools.forget_received()
    await pools.gateway.until(idle)
    await all_served()


async def test_settings_follow_the_annotations(pools: Pools) -> None:
    """Changed live: what is the cluster's is in Envoy, what is the picker's in the picker.

    A wrong one is a warning, and the default is back.
    """
    await pools.use("informed")

    async def applied(factor: int) -> None:
        def is_it(control: Control) -> bool:
            (cluster,) = [each for each in control.topology.clusters if each.name == PICKED]
            return cluster.settings.hash_balance_factor == factor

        await pools.gateway.until(is_it)

    pools.write_pool(hash_balance_factor="150", output_tokens="1800", request_cost="0", prefill_rate="25000")
    await applied(150)
    assert pools.costs() == Costs(output_tokens=1800.0, prefill_rate=25_000.0, request_cost=0.0)
    assert await pools.balance_factor() == 150
    pools.write_pool(hash_balance_factor="99", output_tokens="many", other="1")
    await applied(300)
    assert pools.costs() == Costs()
    assert await pools.balance_factor() == 300
    reasons = Counter((each.level, each.reason) for each in pools.gateway.control.rejections)
    assert reasons == {("warning", "InvalidSetting"): 2, ("warning", "UnknownSetting"): 1}
    pools.write_pool()
    await pools.gateway.until(lambda control: not control.rejections)


async def test_requests_for_an_adapter_go_where_it_is_loaded(pools: Pools) -> None:
    """A pod that runs a LoRA adapter is asked for it again; other pods, as idle, are not. The base model is spread."""
    await pools.use("informed")

    def running(control: Control) -> list[str]:
        members = control.pools[PICKED].members
        return [key for key, m in members.items() if m.load and "sql" in m.load.running_adapters]

    first = asyncio.create_task(pools.ask("picked", request("sql", tokens=4000)))
    try:
        await pools.gateway.until(lambda control: bool(running(control)))
        (pod,) = running(pools.gateway.control)
        pools.forget_received()
        found = Counter([(await pools.ask("picked", request("sql"))).sent.pod for _ in range(3)])
        others = Counter([(await pools.ask("picked", request(QWEN))).sent.pod for _ in range(6)])
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        pools.forget_received()
    assert found == {pod.removeprefix("default/"): 3}
    assert len(others) > 1


# --- explained --------------------------------------------------------------------------------------------------------

LONG = "You are a careful assistant. " * 300  # four chunks
SESSION = {"X-Session-Id": "s"}
EXPLAINED: list[tuple[str, bytes, dict[str, str]]] = [  # in this order: what was sent before is remembered
    ("picked", request(QWEN, LONG), {}),
    ("picked", request(QWEN, LONG + "and on"), {}),
    ("picked", request(QWEN, f"Another {LONG}"), {}),
    ("by_model", request(QWEN, f"A third {LONG}"), {}),
    ("picked", request(QWEN, "short"), SESSION),
    ("picked", request(QWEN, "short, too"), SESSION),
    ("by_model", request(QWEN, "short, too"), SESSION | {"x-session-id": "t"}),
    ("picked", request(CODER, LONG), SESSION),
    ("by_model", request(CODER, LONG), {}),
    ("balanced", request(CODER), {}),
    ("balanced", request("nope"), {}),
    ("balanced", b"no JSON", {}),
    ("picked", b"", {}),
    ("by_model", request(""), {}),
]


async def test_explained_is_what_happens(pools: Pools) -> None:
    """The route that Envoy takes, the pod it sends the request to, what it answers itself: `vllm-xds explain`, asking
    the server and the picker just before, has said it; and the access log, and the headers of the answer, say it after.
    """
    await pools.use("informed")
    gateway, seen = pools.gateway, Counter[str]()
    posted = debug.posted(gateway.control)
    async with serve_status("127.0.0.1", 0, gateway.metrics.registry, lambda: True, posted=posted) as status:
        running = Running(f"127.0.0.1:{status}", pools.picker_status)
        for number, (port, body, headers) in enumerate(EXPLAINED):
            host = f"explained-{number}.test"
            asked = Request("POST", host, PATH, tuple(headers.items()))
            explained = await document(running, asked, pools.ports[port], body)
            answer = await pools.ask(port, body, headers | {"Host": host})
            route, picks = explained["route"], explained["picks"]
            assert len(picks) == (len(route["clusters"]) if body else 0)
            expected = {
                "route": route["route"] or "no-match",
                "picked": None,
                "key": None,
                "reason": None,
                "refused": None,
            }
            for pick in picks:
                seen[pick["reason"] if pick["equal"] <= 1 else "equal"] += 1
                if pick["equal"] > 1 and answer.received:  # any of them
                    pick["pod"] = f"default/{answer.received.pod}"
                    pick["key"] = f"{pick['pod']}_0"
                    assert pick["pod"] in {offer["pod"] for offer in pick["offers"][: pick["equal"]]}
                expected |= {name: pick[name] for name in ("key", "reason")} | {"picked": pick["pod"]}
                if pick["refused"]:
                    expected |= {"route": pick["reason"], "refused": str(pick["refused"])}
                    assert (answer.status, answer.received) == (pick["refused"], None)
                if pick["pod"]:
                    assert f"default/{answer.sent.pod}" == pick["pod"]
                    assert json.loads(answer.sent.body)["model"] == pick["model"]
            served = f"default/{answer.received.pod}" if answer.received else None
            told = {name: answer.headers.get(f"x-vllm-{name}") for name in ("route", "reason", "picked", "pod")}
            assert told == {name: expected[name] for name in ("route", "reason", "picked")} | {"pod": served}
            async with asyncio.timeout(BOUND):
                while not (lines := [line for line in pools.access_log() if line["host"] == host]):
                    await gateway.envoy.get("/stats?format=json&filter=nothing")
            line = lines[-1]
            assert {name: line[name] for name in expected} == expected
            assert (line["served"], line["status"], line["port"]) == (served, answer.status, pools.ports[port])
            assert line["cluster"] == (route["clusters"][0]["name"] if served else None)
    assert seen.keys() - {"equal"} == {"cost", "unpicked", "unknown-model"}, seen
    assert seen["cost"] > seen["equal"]
