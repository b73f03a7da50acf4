"""From an API server to the real Envoy: the seed's objects applied, and a cluster's life under streaming load."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from bench.vllm_engine import EngineConfig
from bench.vllm_server import SimulatedPod
from tests.apiserver import APPLY, FakeApiServer
from tests.envoy.conftest import BOUND, Gateway
from tests.goldens import ROOT
from xds.control import Control
from xds.kube import KubernetesSource
from xds.kube_client import connect
from xds.model import Strategy
from xds.reflector import LONGEST_DELAY

pytestmark = [pytest.mark.envoy, pytest.mark.timeout(240)]

SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: qwen}
spec: {selector: {app: qwen}, ports: [{port: 8000}]}
"""
AWAY = 60.0  # seconds without an API server: long enough for the pauses between attempts to be at their longest
POOL, PLAIN = "pool/default/vllm-qwen-pool", "service/default/qwen/8000"


class Cluster:
    """What a cluster does around the gateway: kubectl, and the node on which the pods of a Deployment run."""

    def __init__(self, api: FakeApiServer, gateway: Gateway, session: aiohttp.ClientSession) -> None:
        self.api, self.gateway, self.session = api, gateway, session
        self.pods: dict[str, SimulatedPod] = {}
        self._net = f"127.{random.randrange(2, 250)}.{os.getpid() % 250}"
        self._hosts = itertools.count(1)
        self._stack = AsyncExitStack()

    async def kubectl(self, method: str, path: str, body: object = None) -> Any:
        headers = {"Authorization": f"Bearer {self.api.token}", "Content-Type": APPLY}
        url, data = f"{self.api.url}{path}", None if body is None else json.dumps(body)
        async with self.session.request(method, url, data=data, headers=headers) as response:
            answer = await response.json()
            assert response.status < 300, answer
            return answer

    async def apply(self, manifest: str) -> None:
        """`kubectl apply --server-side` of every document."""
        for value in yaml.safe_load_all(manifest):
            table = self.api.store.table(value["kind"], value["apiVersion"].rpartition("/")[0])
            group = f"apis/{value['apiVersion']}" if "/" in value["apiVersion"] else "api/v1"
            within = "/namespaces/default" if table.resource.namespaced else ""
            path = (
                f"/{group}{within}/{table.resource.plural}/{value['metadata']['name']}?fieldManager=kubectl&force=true"
            )
            await self.kubectl("PATCH", path, value)

    async def start_pod(self, name: str) -> None:
        """The pod runs, and the API server knows that it is ready."""
        address = f"{self._net}.{next(self._hosts)}"
        pod = SimulatedPod(name, address=address, port=self.gateway.pod_port, config=EngineConfig(max_num_seqs=64))
        self.pods[name] = await self._stack.enter_async_context(pod)
        self.api.store.put(self.manifest(name))

    def manifest(self, name: str) -> dict[str, Any]:
        pod = self.pods[name]
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"app": "qwen"}},
            "spec": {"nodeName": "node"},
            "status": {"podIP": pod.address, "conditions": [{"type": "Ready", "status": "True"}]},
        }

    async def delete_pod(self, name: str) -> None:
        """`kubectl delete pod`: the kubelet's preStop waits, here for Envoy to know; SIGTERM; the object goes."""
        await self.kubectl("DELETE", f"/api/v1/namespaces/default/pods/{name}")
        await self.gateway.until(lambda control: name not in serving(control))
        pod = self.pods.pop(name)
        await pod.stop(shutdown_timeout=BOUND)
        self.api.store.delete(self.api.store.table("Pod"), ("default", name), grace=0)

    async def close(self) -> None:
        await self._stack.aclose()


class Load:
    """Streamed completions on both ports without a pause; every one has to come to its end."""

    def __init__(self, gateway: Gateway, session: aiohttp.ClientSession, clients: int = 6) -> None:
        self.answered: Counter[tuple[int, str]] = Counter()  # by port and pod, of requests begun since `reaches`
        self.failed: list[str] = []
        self._gateway, self._session = gateway, session
        self._progress = asyncio.Condition()
        self._stopping = False
        self._round = 0
        ports = (gateway.plain_port, gateway.llm_port)
        self._tasks = [asyncio.create_task(self._run(ports[i % 2], i)) for i in range(clients)]

    async def _run(self, port: int, client: int) -> None:
        turn = 0
        while not self._stopping:
            turn += 1
            began = self._round
            body = {"model": "/model/qwen", "prompt": f"{client} {turn}", "max_tokens": 12, "ignore_eos": True}
            url = f"http://127.0.0.1:{port}/v1/completions"
            try:
                async with self._session.post(url, json=body | {"stream": True}) as response:
                    answer = await response.read()
                    whole = answer.endswith(b"data: [DONE]\n\n") and b"error" not in answer
                    if response.status != 200 or not whole:
                        self.failed.append(f"{response.status} {answer[-200:]!r}")
                    elif began == self._round:
                        self.answered[port, response.headers["x-sim-pod"]] += 1
            except aiohttp.ClientError as error:
                self.failed.append(repr(error))
            async with self._progress:
                self._progress.notify_all()

    async def reaches(self, *pods: str) -> None:
        """Each of these answers requests that begin from now on, on both ports, and no other does."""
        self.answered.clear()
        self._round += 1
        wanted = {(port, pod) for port in (self._gateway.plain_port, self._gateway.llm_port) for pod in pods}
        async with asyncio.timeout(BOUND), self._progress:
            await self._progress.wait_for(lambda: self.failed or wanted <= self.answered.keys())
        assert self.failed == []
        assert {pod for _, pod in self.answered} == set(pods)

    async def goes_on(self, seconds: float) -> None:
        """For so long, and as many requests as come in it."""
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        async with asyncio.timeout(seconds + BOUND), self._progress:
            await self._progress.wait_for(lambda: self.failed or clock() >= end)
        assert self.failed == []

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)


def serving(control: Control) -> set[str]:
    """The pods that get new requests, of both clusters together."""
    return {
        endpoint.hash_key.removeprefix("default/")
        for cluster in control.topology.clusters
        for endpoint in cluster.endpoints
        if not endpoint.draining
    }


def _serves(name: str, control: Control) -> bool:
    return name in serving(control)


@pytest.fixture
async def cluster(tmp_path: Path, session: aiohttp.ClientSession) -> AsyncIterator[Cluster]:
    """An API server with its definitions and no objects, a management server that reads it, and an Envoy that waits."""
    gateway = Gateway(tmp_path, delta=True)
    async with FakeApiServer() as api:
        (tmp_path / "kubeconfig").write_text(api.kubeconfig())
        cluster = Cluster(api, gateway, session)
        async with aclosing(await connect(str(tmp_path / "kubeconfig"))) as client:
            try:
                gateway.source = KubernetesSource(client, gateway.metrics)
                await gateway.start_server()
                yield cluster
            finally:
                await gateway.close()
                await cluster.close()


async def test_a_cluster_lives_under_load(cluster: Cluster, session: aiohttp.ClientSession) -> None:
    """Apply, scale up and down, roll, delete, switch, and an API server away for a minute: not one request fails."""
    api, gateway = cluster.api, cluster.gateway
    seed = (ROOT / "tests" / "golden" / "seed" / "input.yaml").read_text()
    for port, free in (("8080", gateway.plain_port), ("8081", gateway.llm_port), ("8000", gateway.pod_port)):
        seed = seed.replace(f"port: {port}", f"port: {free}").replace(f"Number: {port}", f"Number: {free}")
    plain = PLAIN.replace("8000", str(gateway.pod_port))

    # apply
    await cluster.apply(seed + "---\n" + SERVICE.replace("8000", str(gateway.pod_port)))
    for name in ("a", "b"):
        await cluster.start_pod(name)
    async with asyncio.timeout(BOUND):
        await gateway.control.wait_until(lambda control: serving(control) == {"a", "b"})
    await gateway.start_envoy()
    await gateway.settled()
    assert {each.name for each in gateway.control.topology.clusters} == {POOL, plain}
    load = Load(gateway, session)
    await load.reaches("a", "b")

    # scale up and down
    for name in ("c", "d"):
        await cluster.start_pod(name)
    await gateway.until(lambda control: serving(control) == {"a", "b", "c", "d"})
    await load.reaches("a", "b", "c", "d")
    await cluster.delete_pod("d")
    await load.reaches("a", "b", "c")

    # rolling update: one more, then one less, until all are others
    for old, new in (("a", "a2"), ("b", "b2"), ("c", "c2")):
        await cluster.start_pod(new)
        await gateway.until(partial(_serves, new))
        await cluster.delete_pod(old)
    await load.reaches("a2", "b2", "c2")

    # a live change of the pool's strategy
    key = "/apis/inference.networking.x-k8s.io/v1alpha2/namespaces/default/inferencepools/vllm-qwen-pool"
    notes = {"inference.networking.x-k8s.io/routing-strategy": "PREFIX_CACHE"}
    pool = {"apiVersion": "inference.networking.x-k8s.io/v1alpha2", "kind": "InferencePool"}
    await cluster.kubectl(
        "PATCH", f"{key}?fieldManager=other", pool | {"metadata": {"name": "vllm-qwen-pool", "annotations": notes}}
    )
    await gateway.until(lambda control: control.topology.clusters[0].strategy is Strategy.PREFIX_CACHE)

    # the API server goes away; what happens meanwhile is found when it is back, without its events
    await api.stop()
    await load.reaches("a2", "b2", "c2")
    await cluster.start_pod("e")
    api.store.put(cluster.manifest("a2") | {"metadata": {"name": "a2", "labels": {"app": "other"}}})
    await load.goes_on(AWAY)
    failures = {"resource": "pods", "reason": "Unreachable"}
    assert (gateway.metrics.registry.get_sample_value("vllm_xds_api_failures_total", failures) or 0) >= 4
    await load.reaches("a2", "b2", "c2")
    assert serving(gateway.control) == {"a2", "b2", "c2"}
    api.store.forget()
    await api.start()
    await gateway.until(lambda control: serving(control) == {"b2", "c2", "e"}, LONGEST_DELAY + BOUND)
    await load.reaches("b2", "c2", "e")
    await load.stop()
    assert load.failed == []
    assert gateway.control.rejections == ()
    stats = (await gateway.envoy.get("/stats?format=json&filter=update_rejected"))["stats"]
    assert {stat["value"] for stat in stats} == {0}
