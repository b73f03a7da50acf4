"""What a pool's objects and annotations say of its requests, with the real Envoy: one gateway serves the whole module.

The picker runs in the test's own process, so a test can give it what it likes, or stop it.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio

from bench.envoy import free_port
from picker.metrics import PickerMetrics
from picker.pick import Picker
from picker.prefix import hint_hash
from picker.prompt import read_prompt
from picker.server import PickerServer
from tests.envoy.conftest import BOUND, Gateway
from tests.envoy.recording_pod import Received, RecordingPod
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
apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata:
  name: picked
  annotations:
    inference.networking.x-k8s.io/routing-strategy: PREFIX_CACHE
    vllm-xds/session-header: X-Session-Id
spec:
  selector: {{matchLabels: {{app: qwen}}}}
  targetPorts: [{{number: {port}}}]
"""


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

    async def ask(self, port: str, body: bytes, **headers: str) -> tuple[int, Received | None]:
        """The status, and the request as it came to a pod."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        url = f"http://127.0.0.1:{self.ports[port]}/v1/completions"
        async with self._session.post(url, data=body, headers={"content-type": "application/json"} | names) as response:
            await response.read()
        received = [pod.received.pop() for pod in self.gateway.pods if isinstance(pod, RecordingPod) and pod.received]
        assert len(received) <= 1
        return response.status, received[0] if received else None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pools(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pools]:
    gateway = Gateway(tmp_path_factory.mktemp("pools"), delta=True)
    try:
        await gateway.start_pods(3, kind=RecordingPod)
        gateway.config.mkdir()
        ports = {"picked": free_port(), "by_model": free_port()}
        (gateway.config / "objects.yaml").write_text(OBJECTS.format(port=gateway.pod_port, **ports))
        for pod in gateway.pods:
            gateway.write_pod(pod)
        await gateway.start_server()
        await gateway.start_envoy()
        await gateway.settled()
        assert gateway.control.rejections == ()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=BOUND)) as session:
            made = Pools(gateway, session, ports)
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
