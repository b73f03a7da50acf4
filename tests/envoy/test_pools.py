"""What a pool's objects and annotations say of its requests, with the real Envoy: one gateway serves the whole module.

The picker runs in the test's own process, so a test can look into it, or stop it.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import aiohttp
import pytest
import pytest_asyncio

from bench.envoy import free_port
from picker.cost import Costs
from picker.loads import LoadsClient
from picker.metrics import PickerMetrics
from picker.pick import Picker
from picker.prefix import hint_hash
from picker.prompt import read_prompt
from picker.server import PickerServer
from tests.envoy.conftest import BOUND, Gateway
from tests.envoy.recording_pod import Received, RecordingPod
from xds.control import Control
from xds.envoy import PICKER_CLUSTER

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
---
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


class Pools:
    """A gateway, its picker, and a client of its ports."""

    def __init__(self, gateway: Gateway, session: aiohttp.ClientSession, ports: dict[str, int]) -> None:
        self.gateway = gateway
        self.ports = ports
        self._session = session

    async def start_picker(self) -> None:
        """A picker that knows nothing; returns when Envoy has found it."""
        self.picker = Picker(random.Random(1).random)
        self.server = PickerServer(self.picker, PickerMetrics(), time.monotonic)
        await self.server.start([f"127.0.0.1:{self.gateway.picker_port}"])
        async with asyncio.timeout(BOUND):
            while not await self.gateway.healthy(PICKER_CLUSTER):
                pass  # each look is a request to Envoy's admin API

    @asynccontextmanager
    async def informed(self) -> AsyncIterator[None]:
        """The picker is told of pools and loads, as its own process is."""
        client = LoadsClient(
            f"127.0.0.1:{self.gateway.xds_port}",
            self.picker,
            PickerMetrics(),
            node_id="picker",
            clock=time.monotonic,
            random=random.random,
        )
        task = asyncio.create_task(client.run())
        try:
            await self.gateway.settled(clients=2)
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
            for name in self.picker.read_at():
                self.picker.forget(name)
                self.picker.unconfigure(name)
            await self.gateway.settled()

    def write_pool(self, **annotations: str) -> None:
        """The picked pool, with these of our annotations beside its session header."""
        lines = "\n".join(f'    vllm-xds/{name.replace("_", "-")}: "{text}"' for name, text in annotations.items())
        text = POOL.format(port=self.gateway.pod_port, annotations=lines)
        (self.gateway.config / "pool.yaml").write_text(text)

    async def ask(self, port: str, body: bytes, **headers: str) -> tuple[int, Received | None]:
        """The status, and the request as it came to a pod."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        url = f"http://127.0.0.1:{self.ports[port]}/v1/completions"
        async with self._session.post(url, data=body, headers={"content-type": "application/json"} | names) as response:
            await response.read()
        received = [pod.received.pop() for pod in self.gateway.pods if isinstance(pod, RecordingPod) and pod.received]
        assert len(received) <= 1
        return response.status, received[0] if received else None

    def forget_received(self) -> None:
        """Requests that have come to the pods and are not answered yet."""
        for pod in self.gateway.pods:
            assert isinstance(pod, RecordingPod)
            pod.received.clear()

    async def pod_of(self, port: str, body: bytes) -> str:
        """The pod that served it."""
        status, received = await self.ask(port, body)
        assert status == 200
        assert received is not None
        return received.pod

    def config(self) -> Costs | None:
        """What the picker knows of the picked pool's costs."""
        config = self.picker.config(PICKED)
        return config.costs if config is not None else None

    async def balance_factor(self) -> int:
        """The one in Envoy's own copy of the picked pool's cluster."""
        dump = await self.gateway.envoy.get("/config_dump?resource=dynamic_active_clusters")
        (cluster,) = [each["cluster"] for each in dump["configs"] if each["cluster"]["name"] == PICKED]
        (policy,) = cluster["load_balancing_policy"]["policies"]
        factor: int = policy["typed_extension_config"]["typed_config"]["consistent_hashing_lb_config"][
            "hash_balance_factor"
        ]
        return factor


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pools(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pools]:
    gateway = Gateway(tmp_path_factory.mktemp("pools"), delta=True)
    try:
        await gateway.start_pods(3, kind=partial(RecordingPod, adapters=("code", "chat")))
        gateway.config.mkdir()
        ports = {"picked": free_port(), "by_model": free_port()}
        (gateway.config / "objects.yaml").write_text(OBJECTS.format(**ports))
        for pod in gateway.pods:
            gateway.write_pod(pod)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=BOUND)) as session:
            made = Pools(gateway, session, ports)
            made.write_pool()
            await gateway.start_server()
            await gateway.start_envoy()
            await gateway.settled()
            assert gateway.control.rejections == ()
            await made.start_picker()
            yield made
            await made.server.stop(0)
    finally:
        await gateway.close()


@pytest.mark.parametrize("port", ["picked", "by_model"])
async def test_the_session_header_reaches_the_picker(pools: Pools, port: str) -> None:
    """The pool's session header, and no other, is the request's hint, also where the route is found by the model: a
    prompt too short for a key has the session's, as the specification says it."""
    body = json.dumps({"model": "/model/qwen", "prompt": "hi", "max_tokens": 1}).encode()
    prompt = read_prompt(body)
    assert prompt is not None
    for session in ("one", "two"):
        hint = hint_hash(prompt, session)
        assert hint is not None
        _, received = await pools.ask(port, body, X_Session_Id=session)
        assert received is not None
        assert received.headers["x-vllm-pick"] == hint.hex()
        assert received.headers["x-session-id"] == session
    for headers in ({}, {"x-session-id": ""}, {"x-session": "one"}):
        status, received = await pools.ask(port, body, **headers)
        assert status == 200
        assert received is not None
        assert "x-vllm-pick" not in received.headers


async def test_settings_follow_the_annotations(pools: Pools) -> None:
    """Changed live: what is the cluster's is in Envoy, what is the picker's in the picker.

    A wrong one is a warning, and the default is back.
    """

    def applied(factor: int) -> bool:
        return pools.gateway.control.topology.clusters[0].settings.hash_balance_factor == factor

    async with pools.informed():
        assert pools.config() == Costs()
        pools.write_pool(hash_balance_factor="150", output_tokens="1800", request_cost="0", prefill_rate="25000")
        await pools.gateway.until(lambda _: applied(150))
        assert pools.config() == Costs(output_tokens=1800.0, prefill_rate=25_000.0, request_cost=0.0)
        assert await pools.balance_factor() == 150
        pools.write_pool(hash_balance_factor="99", output_tokens="many", other="1")
        await pools.gateway.until(lambda _: applied(300))
        assert pools.config() == Costs()
        assert await pools.balance_factor() == 300
        reasons = Counter((each.level, each.reason) for each in pools.gateway.control.rejections)
        assert reasons == {("warning", "InvalidSetting"): 2, ("warning", "UnknownSetting"): 1}
        pools.write_pool()
        await pools.gateway.until(lambda control: not control.rejections)


async def test_requests_for_an_adapter_go_where_it_is_loaded(pools: Pools) -> None:
    """A pod that runs a LoRA adapter is asked for it again; other pods, as idle, are not. The base model is spread."""

    def body(model: str, tokens: int) -> bytes:
        made = {"model": model, "prompt": "hi", "max_tokens": tokens, "ignore_eos": True}
        return json.dumps(made).encode()

    def loaded(control: Control) -> bool:
        members = control.pools[PICKED].members.values()
        return any(member.load and "code" in member.load.running_adapters for member in members)

    async with pools.informed():
        first = asyncio.create_task(pools.ask("picked", body("code", 4000)))
        try:
            await pools.gateway.until(loaded)
            pools.forget_received()
            found = Counter([await pools.pod_of("picked", body("code", 1)) for _ in range(3)])
            other = Counter([await pools.pod_of("picked", body("/model/qwen", 1)) for _ in range(6)])
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
    (running,) = [pod.name for pod in pools.gateway.pods if pod.engine.stats.lora]
    assert found == {running: 3}
    assert len(other) > 1
