"""A whole gateway on loopback: our server and picker, the real Envoy, simulated pods. Nothing waits by sleeping.

The management server and the control loop run in the test's own process, so that a test awaits what it caused:
`Gateway.settled()` returns when Envoy (and the picker) have accepted everything that was published. The picker is
a process of its own, to be killed.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

import bootstrap
from bench.envoy import Envoy, free_port
from bench.vllm_engine import EngineConfig
from bench.vllm_server import SimulatedPod
from xds.control import Control
from xds.directory import DirectorySource
from xds.envoy import PICKER_CLUSTER, Options
from xds.exchange import Exchange
from xds.kube import KubernetesSource
from xds.load_reports import LoadReports
from xds.metrics import Metrics
from xds.scrape import Scraper
from xds.server import ManagementServer

INTERVAL = 0.2  # seconds between scrapes: tests do not wait for the 2 s of real life
BOUND = 30.0  # seconds for anything awaited here, far above what it takes

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
  - {{name: http, protocol: HTTP, port: {plain}}}
  - {{name: llm, protocol: HTTP, port: {llm}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: plain}}
spec:
  parentRefs: [{{name: gw, sectionName: http}}]
  rules: [{{backendRefs: [{{name: qwen, port: 8000}}]}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: llm}}
spec:
  parentRefs: [{{name: gw, sectionName: llm}}]
  rules: [{{backendRefs: [{{group: inference.networking.k8s.io, kind: InferencePool, name: pool}}]}}]
---
apiVersion: v1
kind: Service
metadata: {{name: qwen}}
spec: {{selector: {{app: qwen}}, ports: [{{port: 8000, targetPort: {port}}}]}}
"""

POOL = """\
apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata:
  name: pool
  annotations: {{inference.networking.x-k8s.io/routing-strategy: {strategy}}}
spec:
  selector: {{matchLabels: {{app: qwen}}}}
  targetPorts: [{{number: {port}}}]
"""

POD = """\
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: qwen}}{extra}}}
status: {{podIP: {ip}, conditions: [{{type: Ready, status: "True"}}]}}
"""


class Gateway:
    """What one test works with. Write objects into `config`, then await `settled()`."""

    def __init__(self, scratch: Path, *, delta: bool, workers: int = 1, told: bool = False) -> None:
        self.scratch = scratch
        self.delta = delta
        self.workers = workers  # of the picker
        self.told = told  # Envoy says of each request, in its log and to the client, what became of it
        self.config = scratch / "config"
        self.source: KubernetesSource | None = None  # in place of the directory
        self.plain_port, self.llm_port, self.xds_port, self.picker_port, self.admin_port = (
            free_port() for _ in range(5)
        )
        self.pods: list[SimulatedPod] = []
        self.pod_port = free_port()
        self.metrics = Metrics()
        self._envoys = itertools.count()
        self._stack = AsyncExitStack()

    # --- parts ---

    async def start_pods(
        self, count: int, config: EngineConfig | None = None, kind: Callable[..., SimulatedPod] = SimulatedPod
    ) -> None:
        net = random.randrange(2, 250)  # another run's pods on this machine are somewhere else
        for i in range(count):
            pod = kind(f"pod-{i}", address=f"127.{net}.{os.getpid() % 250}.{i + 1}", port=self.pod_port, config=config)
            self.pods.append(await self._stack.enter_async_context(pod))

    def write_objects(self, strategy: str = "PREFIX_CACHE") -> None:
        self.config.mkdir(exist_ok=True)
        ports = {"plain": self.plain_port, "llm": self.llm_port, "port": self.pod_port}
        (self.config / "gateway.yaml").write_text(OBJECTS.format(**ports))
        self.write_pool(strategy)
        for pod in self.pods:
            self.write_pod(pod)

    def write_pool(self, strategy: str) -> None:
        (self.config / "pool.yaml").write_text(POOL.format(strategy=strategy, port=self.pod_port))

    def write_pod(self, pod: SimulatedPod, extra: str = "") -> None:
        text = POD.format(name=pod.name, ip=pod.address, extra=f", {extra}" if extra else "")
        (self.config / f"{pod.name}.yaml").write_text(text)

    async def start_server(self) -> None:
        self.server = ManagementServer(self.metrics)
        reports = LoadReports(self.metrics)
        self.control = Control(
            self.server,
            Scraper(self.metrics, INTERVAL),
            self.metrics,
            interval=INTERVAL,
            # A busy machine may stall for longer than the 0.2 s of real life; no test here hangs a picker.
            options=Options(
                bind="127.0.0.1",
                pickers=bootstrap.worker_addresses(self._picker_address, self.workers),
                picker_timeout=2.0,
                access_log=self.told,
                debug_headers=self.told,
            ),
            in_flight=reports.in_flight,
        )
        beside = [reports.handler(), Exchange(self.metrics).handler()]
        await self.server.start([f"127.0.0.1:{self.xds_port}"], beside=beside)
        configs = (self.source or DirectorySource(self.config)).configs()
        self._running = asyncio.create_task(self.control.run(configs))
        self._stack.push_async_callback(self.stop_server)

    @property
    def _picker_address(self) -> str:
        """Several workers need several addresses, and files are free."""
        return f"127.0.0.1:{self.picker_port}" if self.workers == 1 else f"unix:{self.scratch}/picker.sock"

    async def stop_server(self) -> None:
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await self.server.stop(0)

    async def start_envoy(self, tls_sds: str | None = None, edit: Callable[[str], str] = str) -> None:
        """An Envoy with our bootstrap, as `edit` leaves it."""
        self.envoy = await self.another_envoy(self.admin_port, tls_sds=tls_sds, edit=edit)

    async def another_envoy(
        self,
        admin_port: int,
        node_cluster: str = bootstrap.DEFAULT_NODE_CLUSTER,
        tls_sds: str | None = None,
        edit: Callable[[str], str] = str,
    ) -> Envoy:
        """One beside `envoy`, which stays the one the others ask."""
        number = next(self._envoys)
        path = self.scratch / f"envoy-{number}.yaml"
        server, admin = f"127.0.0.1:{self.xds_port}", f"127.0.0.1:{admin_port}"
        text = bootstrap.render(server, node_cluster=node_cluster, admin=admin, delta=self.delta, tls_sds=tls_sds)
        path.write_text(edit(text))
        arguments = ("--concurrency", "1", "--file-flush-interval-msec", "50")  # an access log's lines wait for 10 s
        envoy = Envoy(path, admin, self.scratch / f"envoy-{number}.log", arguments)
        await self._stack.enter_async_context(envoy)
        await envoy.ready(BOUND)
        return envoy

    async def start_picker(self, *options: str, until: str = "server connected") -> None:
        self.picker = await self._start_process(
            *("picker", "--server", f"127.0.0.1:{self.xds_port}", "--listen", self._picker_address),
            *("--workers", str(self.workers), "--metrics-address", "127.0.0.1:0", *options),
            until=until,
        )

    async def start_server_process(self, *options: str, until: str = "client connected") -> asyncio.subprocess.Process:
        """A management server as a process, in place of the one in here; returns when Envoy is connected to it."""
        return await self._start_process(
            *("serve", "--config", str(self.config), "--bind", "127.0.0.1", "--listen", f"127.0.0.1:{self.xds_port}"),
            *("--picker", f"127.0.0.1:{self.picker_port}", "--status", f"127.0.0.1:{free_port()}", *options),
            until=until,
        )

    async def _start_process(self, *arguments: str, until: str) -> asyncio.subprocess.Process:
        """`python -m xds ...`, once it has logged the event `until`; killed at the end of the test if not before."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "ignore", "-m", "xds", *arguments, "--log-format", "json"),
            stderr=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parent.parent.parent,
        )
        self._stack.push_async_callback(_end, process)
        async with asyncio.timeout(BOUND):
            assert process.stderr is not None
            while until.encode() not in (line := await process.stderr.readline()):
                assert line, f"{arguments[0]} ended before it said {until!r}"
        return process

    async def close(self) -> None:
        await self._stack.aclose()

    # --- events ---

    async def settled(self, clients: int = 1) -> None:
        """What was published is accepted by `clients` streams."""
        async with asyncio.timeout(BOUND):
            await self.server.wait_settled(clients)

    async def until(self, true: Callable[[Control], bool], bound: float = BOUND) -> None:
        """`true` holds for what is served, and Envoy has accepted it."""
        async with asyncio.timeout(bound):
            await self.control.wait_until(true)
            await self.server.wait_settled()

    async def start(self) -> None:
        """Four pods, server and Envoy."""
        await self.start_pods(4, EngineConfig(max_num_seqs=16))
        self.write_objects()
        await self.start_server()
        await self.start_envoy()

    async def picking(self) -> None:
        """Envoy's health check has found the picker, and the picker has the pool's load."""
        await self.settled(clients=1 + self.workers)
        async with asyncio.timeout(BOUND):
            while not await self.healthy(PICKER_CLUSTER):
                pass  # each look is a request to Envoy's admin API

    async def healthy(self, cluster: str) -> bool:
        """What Envoy's health checks find of every host of a cluster."""
        statuses = (await self.envoy.get("/clusters?format=json"))["cluster_statuses"]
        hosts = next(status["host_statuses"] for status in statuses if status["name"] == cluster)
        return all(host["health_status"] == {"eds_health_status": "HEALTHY"} for host in hosts)

    # --- traffic ---

    async def ask(
        self, session: aiohttp.ClientSession, port: int, prompt: str, **more: object
    ) -> tuple[int, str, bytes]:
        """One completion through Envoy: status, the pod that answered, the body."""
        body = {"model": "/model/qwen", "prompt": prompt, "max_tokens": 3, **more}
        async with session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as response:
            return response.status, response.headers.get("x-sim-pod", ""), await response.read()

    async def pods_of(self, session: aiohttp.ClientSession, prompts: Sequence[str], turns: int = 6) -> list[set[str]]:
        """For each prompt the pods that answer it and its continuations on the LLM port.

        All are asked once first, and continued when the picker takes those prefills for done: 10 rounds of load
        reports. Before that, to wait for a prefix on its pod costs as much as to compute it on an idle one.
        """
        for prompt in prompts:
            await self.ask(session, self.llm_port, prompt)
        done = self.control.round + 10
        await self.until(lambda control: control.round >= done)
        return [
            {(await self.ask(session, self.llm_port, f"{prompt} {turn}"))[1] for turn in range(turns)}
            for prompt in prompts
        ]


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.communicate()


@pytest.fixture(params=["delta", "sotw"])
def variant(request: pytest.FixtureRequest) -> str:
    """Both variants of the protocol."""
    name: str = request.param
    return name


@pytest.fixture
async def gateway(tmp_path: Path, variant: str) -> AsyncIterator[Gateway]:
    """Pods, server and Envoy running, both ports answering; tests that want the picker start it."""
    gateway = Gateway(tmp_path, delta=variant == "delta")
    try:
        await gateway.start()
        await gateway.settled()
        yield gateway
    finally:
        await gateway.close()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """One client with a new connection for each request that needs one."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=BOUND)) as session:
        yield session
