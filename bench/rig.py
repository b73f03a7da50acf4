"""The gateway to be measured: Envoy, management server and picker as processes, before pods that answer at once.

client -> Envoy :plain    -> Service
          Envoy :picked   -> PREFIX_CACHE pool        ext_proc, buffer, header_mutation
          Envoy :by_model -> the pool, by model       json_to_metadata before these
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import Self

import aiohttp

import bootstrap
from bench.child import end, with_parent
from bench.closed_loop import Client, requests
from bench.envoy import Envoy, free_port
from bench.vllm_server import MODEL
from picker.worker import REPORT

PLAIN, PICKED, BY_MODEL = "plain", "LLM", "LLM, matched by model"
READY = 30.0  # seconds for everything to be ready: some four on an idle machine
PICKS = re.compile(r'^vllm_xds_picker_picks_total\{.*reason="cost".*\} (.*)$', re.MULTILINE)
POLL = 0.05  # seconds between two looks at what is not ready

GATEWAY = """\
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {{name: envoy}}
spec: {{controllerName: vllm-xds.dev/gateway-controller}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: gateway}}
spec:
  gatewayClassName: envoy
  listeners:
  - {{name: plain, protocol: HTTP, port: {plain}}}
  - {{name: picked, protocol: HTTP, port: {picked}}}
  - {{name: by-model, protocol: HTTP, port: {by_model}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: plain}}
spec:
  parentRefs: [{{name: gateway, sectionName: plain}}]
  rules: [{{backendRefs: [{{name: pods, port: 8000}}]}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: picked}}
spec:
  parentRefs: [{{name: gateway, sectionName: picked}}]
  rules: [{{backendRefs: [{{group: inference.networking.k8s.io, kind: InferencePool, name: pool}}]}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: by-model}}
spec:
  parentRefs: [{{name: gateway, sectionName: by-model}}]
  rules:
  - matches: [{{headers: [{{name: X-Gateway-Model-Name, value: {model}}}]}}]
    backendRefs: [{{group: inference.networking.k8s.io, kind: InferencePool, name: pool}}]
---
apiVersion: v1
kind: Service
metadata: {{name: pods}}
spec: {{selector: {{app: pod}}, ports: [{{port: 8000, targetPort: {pod}}}]}}
---
apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata:
  name: pool
  annotations: {{inference.networking.x-k8s.io/routing-strategy: PREFIX_CACHE}}
spec:
  selector: {{matchLabels: {{app: pod}}}}
  targetPorts: [{{number: {pod}}}]
"""
POD = """\
---
apiVersion: v1
kind: Pod
metadata: {{name: pod-{index}, labels: {{app: pod}}}}
status: {{podIP: {address}, conditions: [{{type: Ready, status: "True"}}]}}
"""


class RigError(Exception):
    """The gateway did not do what is to be measured."""


def pod_network() -> str:
    """The first of many loopback addresses nobody else is likely to use."""
    return f"127.{random.randrange(10, 250)}.{os.getpid() % 250}.1"


def manifests(ports: dict[str, int], pod_port: int, first_pod: str, pods: int) -> str:
    """The objects of a gateway on `ports` (by PLAIN, PICKED, BY_MODEL) and of its pods, as YAML."""
    text = GATEWAY.format(plain=ports[PLAIN], picked=ports[PICKED], by_model=ports[BY_MODEL], pod=pod_port, model=MODEL)
    each = (POD.format(index=index, address=ip_address(first_pod) + index) for index in range(pods))
    return text + "".join(each)


async def start_pods(stack: AsyncExitStack, first: str, count: int, port: int, **bad: int) -> None:
    """Instant pods as one process, listening when this returns; they end with `stack`. `bad`: how many of each kind."""
    kinds = tuple(f"--{kind}={number}" for kind, number in bad.items())
    arguments = ("bench.instant_pod", "--bind", first, "--count", str(count), "--port", str(port), *kinds)
    process = await _start(stack, arguments, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None  # noqa: S101 - a pipe was asked for
    if not await process.stdout.readline():
        raise RigError("the pods ended before they listened")


async def _start(
    stack: AsyncExitStack, arguments: tuple[str, ...], stdout: int | None = None, log: Path = Path(os.devnull)
) -> asyncio.subprocess.Process:
    command = with_parent(sys.executable, "-m", *arguments)
    with log.open("ab") as out:
        process = await asyncio.create_subprocess_exec(*command, stdout=stdout or out, stderr=out)
    stack.push_async_callback(end, process)
    return process


class Rig:
    """Running and warm between `__aenter__` and `__aexit__`: `ports` by route, and the processes to be watched."""

    def __init__(self, pods: int = 4, picker: tuple[str, ...] = ("xds", "picker"), workers: int = 1) -> None:
        """`picker` is the module, and its first arguments, that takes the options of `vllm-xds picker`."""
        self._pods = pods
        self._picker_command = picker
        self._workers = workers
        self._stack = AsyncExitStack()
        server, listen, self._picker_metrics, status, admin, pod, *ports = (free_port() for _ in range(9))
        self.ports = dict(zip((PLAIN, PICKED, BY_MODEL), ports, strict=True))
        self._pod_port = pod
        self._server, self._picker, self._status, self._admin = (
            f"127.0.0.1:{each}" for each in (server, listen, status, admin)
        )

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def picker_pids(self) -> list[int]:
        """The picker's processes, parent first."""
        children = Path(f"/proc/{self._picker_pid}/task/{self._picker_pid}/children").read_text()
        return [self._picker_pid, *map(int, children.split())]

    async def picks(self) -> int:
        """Requests the picker has sent to the pod that was cheapest, so far."""
        if self._workers > 1:
            await asyncio.sleep(1.5 * REPORT)  # until each worker has told its parent
        async with self._http.get(f"http://127.0.0.1:{self._picker_metrics}/metrics") as page:
            counts = re.findall(
                r'^vllm_xds_picker_picks_total\{.*reason="cost".*\} (.*)$', await page.text(), re.MULTILINE
            )
        return round(sum(map(float, counts)))

    async def _start(self) -> None:
        scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-xds-bench-")))
        config, first = scratch / "config", pod_network()
        config.mkdir()
        (config / "gateway.yaml").write_text(manifests(self.ports, self._pod_port, first, self._pods))
        (scratch / "envoy.yaml").write_text(bootstrap.render(self._server, admin=self._admin))
        self._http = await self._stack.enter_async_context(aiohttp.ClientSession())
        await start_pods(self._stack, first, self._pods, self._pod_port)
        serve = ("--config", str(config), "--bind", "127.0.0.1", "--listen", self._server, "--status", self._status)
        listen, workers = self._picker, str(self._workers)
        if self._workers > 1:
            listen = f"unix:{scratch}/picker.sock"
        told = ("--picker", listen, "--picker-workers", workers)
        await _start(self._stack, ("xds", "serve", *serve, *told), log=scratch / "serve.log")
        picker = ("--server", self._server, "--listen", listen, "--workers", workers)
        metrics = ("--metrics-address", f"127.0.0.1:{self._picker_metrics}")
        process = await _start(self._stack, (*self._picker_command, *picker, *metrics), log=scratch / "picker.log")
        self._picker_pid = process.pid
        envoy = Envoy(scratch / "envoy.yaml", self._admin, scratch / "envoy.log")
        await self._stack.enter_async_context(envoy)
        self.envoy_pid = envoy.pid
        await envoy.ready(READY)
        await _until(lambda: self._healthy(envoy))
        await _until(self._picking)

    async def _healthy(self, envoy: Envoy) -> bool:
        clusters = (await envoy.get("/clusters?format=json"))["cluster_statuses"]
        hosts = [host["health_status"] for cluster in clusters for host in cluster.get("host_statuses", ())]
        expected = 2 * self._pods + self._workers + 1  # each pod in the pool and in the Service, the server
        return hosts == [{"eds_health_status": "HEALTHY"}] * expected

    async def _picking(self) -> bool:
        """Whether a request to each route that is to be picked is, by cost: the picker knows the pods' loads."""
        before = await self.picks()
        for name in (PICKED, BY_MODEL):
            client = await Client.connect(self.ports[name])
            await client.ask(requests(2000)[0])
            client.close()
        return await self.picks() >= before + 2


async def _until(is_true: Callable[[], Awaitable[bool]]) -> None:
    try:
        async with asyncio.timeout(READY):
            while not await is_true():  # noqa: ASYNC110 - other processes set no event here
                await asyncio.sleep(POLL)
    except TimeoutError:
        raise RigError(f"the gateway is not ready after {READY:.0f} s") from None
