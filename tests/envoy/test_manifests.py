"""The pods of manifests/kubernetes as processes on loopback: the very commands of their containers, and both curls.

The API server is the fake one, with the example's objects; kubelet's part (the order, probes, preStop) is played here.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import sysconfig
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.child import with_parent
from bench.envoy import find_envoy, free_port
from bench.vllm_engine import EngineConfig
from bench.vllm_server import SimulatedPod
from tests.apiserver import VERBS, FakeApiServer
from tests.apiserver_store import Resource
from tests.envoy.conftest import BOUND
from tests.kustomize import KUBERNETES, Object, container, grants, objects, one
from tests.monitoring import expressions, metrics

pytestmark = [pytest.mark.envoy, pytest.mark.timeout(90)]

PORTS = ("18000", "19000", "19001", "19002", "19003")  # of the manifests, in places that say HOST:PORT or HOST/PORT
CURL = {  # the example's
    "model": "/model/qwen",
    "max_completion_tokens": 100,
    "temperature": 0,
    "messages": [{"role": "user", "content": "Write as if you were a critic: Los Angeles"}],
}
NAMESPACE = "vllm-xds"
CLUSTER_IP = "10.96.0.8"
CRDS = Resource(
    "apiextensions.k8s.io", ("v1",), "CustomResourceDefinition", "customresourcedefinitions", namespaced=False
)
WRITES = {
    *((verb, "leases") for verb in ("get", "create", "patch")),
    *(("patch", f"{kind}s") for kind in ("gateway", "httproute", "inferencepool", "inferencemodel")),
    ("patch", "gatewayclasses"),
    ("get", CRDS.plural),
    ("create", "events"),
}
STRATEGY = "inference.networking.x-k8s.io/routing-strategy"


class Pods:
    """One pod of each Deployment of an overlay."""

    def __init__(self, overlay: list[Object], scratch: Path, session: aiohttp.ClientSession) -> None:
        self.session = session
        self.ports = {port: free_port() for port in PORTS}
        self._overlay, self._scratch = overlay, scratch
        self._run = scratch / "run"
        self._run.mkdir()
        self._stack = AsyncExitStack()

    def here(self, text: str) -> str:
        """What a container is told, for a process on this machine."""
        text = text.replace("/run/vllm-xds", str(self._run)).replace("$(POD_NAME)", "envoy-0")
        text = text.replace("$(POD_NAMESPACE)", NAMESPACE)
        text = text.replace("vllm-xds:18000", "127.0.0.1:18000").replace("0.0.0.0", "127.0.0.1")
        return re.sub(rf"(127\.0\.0\.1[:/])({'|'.join(PORTS)})\b", lambda m: f"{m[1]}{self.ports[m[2]]}", text)

    async def start(self, name: str, *more: str) -> asyncio.subprocess.Process:
        """The container's process, in a session of its own; it ends with the test."""
        each = container(self._overlay, name)
        command = each.get("command") or ["vllm-xds"]  # the image's ENTRYPOINT
        return await self.run(name, [*command, *each["args"], *more])

    async def run(self, name: str, command: list[str]) -> asyncio.subprocess.Process:
        command = [self.here(each) for each in command]
        scripts = sysconfig.get_path("scripts")
        if command[0] in ("envoy", "vllm-xds"):
            command[0] = find_envoy() if command[0] == "envoy" else f"{scripts}/vllm-xds"
        else:
            command[0] = f"/bin/{command[0]}"
        with (self._scratch / f"{name}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *with_parent(*command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": f"{scripts}:/usr/bin:/bin", "KUBECONFIG": str(self._scratch / "kubeconfig")},
                start_new_session=True,
            )
        self._stack.push_async_callback(_end, process)
        return process

    def prestop(self) -> list[str]:
        """Envoy's, which does not wait for the proxies of a Service that is not there."""
        command: list[str] = container(self._overlay, "envoy")["lifecycle"]["preStop"]["exec"]["command"]
        assert command[-1].count("sleep 10\n") == 1
        return [*command[:-1], command[-1].replace("sleep 10\n", "sleep 0.1\n")]

    async def probe(self, name: str) -> int:
        """The status of a container's readiness probe; 0: nobody listens."""
        each = container(self._overlay, name)
        probe = each["readinessProbe"]["httpGet"]
        (port,) = [str(each["containerPort"]) for each in each["ports"] if each["name"] == probe["port"]]
        with suppress(aiohttp.ClientConnectionError):
            async with self.session.get(f"http://127.0.0.1:{self.ports[port]}{probe['path']}") as response:
                return response.status
        return 0

    async def until_ready(self, name: str) -> None:
        async with asyncio.timeout(BOUND):
            while await self.probe(name) != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # as kubelet asks

    async def page(self, port: str, path: str = "/metrics") -> str:
        async with self.session.get(f"http://127.0.0.1:{self.ports[port]}{path}") as response:
            assert response.status == 200
            return await response.text()

    async def told(self, name: str, **labels: str) -> float:
        """The sum of one of the picker's series over its workers."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(await self.page("19002"))
            for sample in family.samples
            if sample.name == f"vllm_xds_picker_{name}_total" and labels.items() <= sample.labels.items()
        )

    async def picks(self) -> float:
        return await self.told("picks", reason="cost")

    async def close(self) -> None:
        await self._stack.aclose()


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


@asynccontextmanager
async def cluster(scratch: Path, ports: dict[str, int]) -> AsyncIterator[FakeApiServer]:
    """An API server with the example's objects, and two of its pods that are running."""
    net = f"127.{random.randrange(2, 250)}.{os.getpid() % 250}"
    config = EngineConfig(max_num_seqs=16)
    async with (
        FakeApiServer() as api,
        SimulatedPod("qwen-0", address=f"{net}.1", port=8000, config=config) as first,
        SimulatedPod("qwen-1", address=f"{net}.2", port=8000, config=config) as second,
    ):
        example = [*objects(KUBERNETES / "example" / "seed"), *objects(KUBERNETES / "example" / "simulated")]
        deployment = one(example, "Deployment", "qwen")
        for listener in one(example, "Gateway", "qwen-inference-gateway")["spec"]["listeners"]:
            listener["port"] = ports[listener["name"]]
        for each in example:
            if each["kind"] != "Deployment":
                api.store.put(each)
        for pod in (first, second):
            metadata = deployment["spec"]["template"]["metadata"] | {"name": pod.name}
            status = {"podIP": pod.address, "conditions": [{"type": "Ready", "status": "True"}]}
            api.store.put({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": status})
        (scratch / "kubeconfig").write_text(api.kubeconfig())
        yield api


def hold_to_rights(api: FakeApiServer, overlay: list[Object]) -> None:
    """It refuses whatever the overlay's roles do not grant; there is something to write about each kind."""
    granted = {(verb, name.partition("/")[0]) for rules in grants(overlay).values() for _, name, verb in rules}
    api.store.install(CRDS)
    api.forbidden = {(verb, table.resource.plural) for table in api.store.tables.values() for verb in VERBS} - granted
    api.store.put(one(overlay, "Namespace", NAMESPACE))
    service = one(overlay, "Service", "vllm-xds-envoy")
    api.store.put(service | {"spec": service["spec"] | {"clusterIP": CLUSTER_IP}})
    broken = one(objects(KUBERNETES / "example" / "seed"), "HTTPRoute", "qwen-backend")
    broken["metadata"]["name"] = "broken"
    broken["spec"]["rules"][0]["matches"][0]["path"]["type"] = "Prefix"
    api.store.put(broken)


async def until_written(api: FakeApiServer) -> None:
    """Every status, the Lease and an Event, and nothing was asked for that is not granted but Secrets."""
    async with asyncio.timeout(BOUND):
        while not (asked := {tuple(each.split(" ")) for each in api.requests}) >= WRITES:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # the API server is this process
    assert asked & api.forbidden == {("list", "secrets")}
    gateway = api.store.get(api.store.table("Gateway"), ("default", "qwen-inference-gateway"))
    assert gateway["status"]["addresses"] == [{"type": "IPAddress", "value": CLUSTER_IP}]


async def curl(session: aiohttp.ClientSession, port: int, **more: Any) -> aiohttp.ClientResponse:
    """The example's; the whole answer was read."""
    async with session.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=CURL | more) as response:
        await response.read()
        return response


def children(process: asyncio.subprocess.Process) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


async def test_pods_serve_the_example(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """From nothing to both curls, with the rights granted; pickers that die cost no request; Envoy leaves in order."""
    gateway = {"http": free_port(), "llm-gw": free_port()}
    overlay = objects(KUBERNETES / "overlays" / "quick")
    pods = Pods(overlay, tmp_path, session)
    async with cluster(tmp_path, gateway) as api:
        hold_to_rights(api, overlay)
        try:
            # Envoy's pod, in the order in which its containers start; the server comes later and is waited for.
            assert await (await pods.start("bootstrap")).wait() == 0
            picker = await pods.start("picker")
            envoy = await pods.start("envoy")
            await pods.start("server", "--bind=127.0.0.1", "--scrape-interval=0.2", f"--lease={NAMESPACE}/vllm-xds")
            assert await pods.probe("envoy") != 200
            await pods.until_ready("server")
            await pods.until_ready("envoy")
            for port in gateway.values():
                answer = await curl(session, port)
                assert (answer.status, (await answer.json())["object"]) == (200, "chat.completion")

            await until_written(api)

            # The strategy is switched live, and the sidecar picks.
            pool = one(objects(KUBERNETES / "example" / "seed"), "InferencePool", "vllm-qwen-pool")
            pool["metadata"]["annotations"] = {STRATEGY: "PREFIX_CACHE"}
            api.store.put(pool)
            assert await pods.picks() == 0
            await _until_picked(pods, gateway["llm-gw"])

            # Its workers die: the container does not, requests go on, and others pick.
            workers = children(picker)
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
            async with asyncio.timeout(BOUND):
                while await pods.told("worker_restarts") < len(workers):
                    assert (await curl(session, gateway["llm-gw"], max_completion_tokens=1)).status == 200
                while await pods.picks():  # the last that the first ones said
                    assert (await curl(session, gateway["llm-gw"], max_completion_tokens=1)).status == 200
            await _until_picked(pods, gateway["llm-gw"])
            assert len(workers) == 2
            assert picker.returncode is None

            # What alerts and dashboard name is on Envoy's page, which shows nothing else of the admin API.
            page = await pods.page("19003", "/stats/prometheus")
            used = {name for each in expressions() for name in metrics(each) if name.startswith("envoy_")}
            assert {name for name in used if not re.search(rf"^{name}(_bucket)?\{{", page, re.MULTILINE)} == set()
            async with session.get(f"http://127.0.0.1:{pods.ports['19003']}/config_dump") as response:
                assert response.status == 404

            # The pod is deleted: not ready, and closing; ended when its last answer is, and not before.
            long = asyncio.create_task(curl(session, gateway["http"], max_completion_tokens=150))
            await _until_active(pods)
            prestop = await pods.run("prestop", pods.prestop())
            async with asyncio.timeout(BOUND):
                while await pods.probe("envoy") != 503:
                    pass
            async with aiohttp.ClientSession() as another:
                answer = await curl(another, gateway["http"], max_completion_tokens=1)
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            async with asyncio.timeout(BOUND):
                ended = asyncio.create_task(prestop.wait())
                first_done, _ = await asyncio.wait({long, ended}, return_when=asyncio.FIRST_COMPLETED)
                assert first_done == {long}
                assert ((await long).status, await ended) == (200, 0)
                envoy.terminate()
                assert await envoy.wait() == 0
                workers = children(picker)
                picker.terminate()
                assert await picker.wait() == 0
            for worker in workers:
                with pytest.raises(ProcessLookupError):
                    os.kill(worker, 0)
        finally:
            await pods.close()


async def _until_picked(pods: Pods, port: int) -> None:
    """The picker picks: Envoy has found it well, and it has its loads."""
    async with asyncio.timeout(BOUND):
        while not await pods.picks():
            assert (await curl(pods.session, port, max_completion_tokens=1)).status == 200


async def _until_active(pods: Pods) -> None:
    """Envoy has a request under way."""
    async with asyncio.timeout(BOUND):
        while not re.search(r"^http\.http-.*: [1-9]", await pods.page("19000", "/stats"), re.MULTILINE):
            pass
