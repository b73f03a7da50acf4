"""The whole product as child processes on loopback: management server, picker, Envoy and simulated pods.

    async with Stack(plan, directory, logs) as stack:   # started, ready, and Envoy finds every pod healthy
        ...                                             # a request to either port is answered

Nothing outlives the parent: leaving the `with` stops every child, and the kernel kills them should the parent be
killed (see bench/envoy.py).
"""

from __future__ import annotations

import asyncio
import ipaddress
import shutil
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any, Self

import aiohttp
import yaml

import bootstrap
from bench.child import end, with_parent
from bench.envoy import Envoy, EnvoyFailedError, free_port
from bench.vllm_engine import EngineConfig
from bench.vllm_server import MODEL

MANIFESTS = Path(__file__).parents[1] / "manifests" / "demo"
PLAIN, LLM = 8080, 8081  # the Gateway's ports: to the Service, and to the InferencePool
STRATEGY = "PREFIX_CACHE"  # of the pool in MANIFESTS
POD_PORT = 8000  # of every pod: the pool's targetPortNumber
SLOW = 0.5  # of the others' speed: a slow pod
POD_NAME = "qwen"  # pods are qwen-0, qwen-1, ...
POD_NETWORKS = tuple(f"127.{second}.0.1" for second in range(1, 10))  # first pod's addresses, the first free is taken
READY_TIMEOUT = 30.0  # seconds for everything to be ready: some three on an idle machine
POLL = 0.05  # seconds between two looks at whether a child is ready
TAIL = 8  # lines of a child's log in a message


class StackError(Exception):
    """Something could not be started; the text says what, and the end of its log."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where everything listens; the values are HOST:PORT. `notes` say what is not where it usually is."""

    server: str = bootstrap.DEFAULT_SERVER
    status: str = "127.0.0.1:19001"
    picker: str = "127.0.0.1:18001"
    picker_metrics: str = "127.0.0.1:19002"
    admin: str = bootstrap.DEFAULT_ADMIN
    plain: str = f"127.0.0.1:{PLAIN}"
    llm: str = f"127.0.0.1:{LLM}"
    pods: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def plan(pods: int) -> Plan:
    """The usual addresses where they are free, others where they are not. Raises StackError without free addresses."""
    notes = []
    usual = Plan()
    chosen = {}
    for name, what in (
        ("server", "the management server"),
        ("status", "the management server's /metrics"),
        ("picker", "the picker"),
        ("picker_metrics", "the picker's /metrics"),
        ("admin", "Envoy's admin API"),
        ("plain", "the Service's port"),
        ("llm", "the InferencePool's port"),
    ):
        address = getattr(usual, name)
        if not _is_free(address):
            chosen[name] = f"127.0.0.1:{free_port()}"
            notes.append(f"{address} is in use: {what} is {chosen[name]} instead")
    choices = [(network, POD_PORT) for network in POD_NETWORKS]
    choices.append((POD_NETWORKS[0], free_port("0.0.0.0")))  # noqa: S104 - free on every address
    for network, port in choices:
        first = ipaddress.ip_address(network)
        addresses = tuple(f"{first + index}:{port}" for index in range(pods))
        if all(map(_is_free, addresses)):
            break
    else:
        raise StackError(f"no {pods} loopback addresses in a row have port {POD_PORT} free, nor any other")
    if (network, port) != choices[0]:
        notes.append(f"port {POD_PORT} of {choices[0][0]} and up is in use: pods on {addresses[0]} and up instead")
    return Plan(**chosen, pods=addresses, notes=tuple(notes))


def write_manifests(plan: Plan, directory: Path, strategy: str = STRATEGY) -> None:
    """The demo's objects with the plan's ports and pods and the pool's `strategy`, in `directory`."""
    shutil.copytree(MANIFESTS, directory)
    pool = directory / "pool.yaml"
    pool.write_text(pool.read_text().replace(f"routing-strategy: {STRATEGY}\n", f"routing-strategy: {strategy}\n"))
    pod_port = bootstrap.split_address(plan.pods[0])[1]
    for name, setting, usual, port in (
        ("gateway.yaml", "port", PLAIN, bootstrap.split_address(plan.plain)[1]),
        ("gateway.yaml", "port", LLM, bootstrap.split_address(plan.llm)[1]),
        ("pool.yaml", "targetPort", POD_PORT, pod_port),
        ("pool.yaml", "targetPortNumber", POD_PORT, pod_port),
    ):
        path = directory / name
        path.write_text(path.read_text().replace(f" {setting}: {usual}\n", f" {setting}: {port}\n"))
    path = directory / "pods.yaml"
    usual_pods = list(yaml.safe_load_all(path.read_text()))
    pods = [_pod(usual_pods[0], index, address) for index, address in enumerate(plan.pods)]
    if pods != usual_pods:
        path.write_text(yaml.safe_dump_all(pods, sort_keys=False))


def fleet_options(config: EngineConfig, pods: int, *, slow: bool) -> list[str]:
    """The arguments of `python -m bench.vllm_pod` for `pods` of `config`, the last of them slower when `slow`."""
    speeds = [config.speed] * pods
    if slow:
        speeds[-1] *= SLOW
    given = ((f"--{f.name.replace('_', '-')}", str(getattr(config, f.name))) for f in fields(config))
    others = (pair for pair in given if pair[0] != "--speed")
    return ["--speed", ",".join(map(str, speeds)), "--model", MODEL, *chain.from_iterable(others)]


def _pod(example: dict[str, Any], index: int, address: str) -> dict[str, Any]:
    host, port = bootstrap.split_address(address)
    annotations = {**example["metadata"]["annotations"], "prometheus.io/port": str(port)}
    metadata = {**example["metadata"], "name": f"{POD_NAME}-{index}", "annotations": annotations}
    return {**example, "metadata": metadata, "status": {**example["status"], "podIP": host}}


def _is_free(address: str) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what waits for its last packets is free
        try:
            probe.bind(bootstrap.split_address(address))
        except OSError:
            return False
        return True


class Child:
    """One Python process of ours, in a group of its own; what it prints goes to `log`."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path) -> None:
        self.name = name
        self.log = log
        self._command = with_parent(sys.executable, "-m", *arguments)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def status(self) -> int | None:
        """The exit status, None while it runs."""
        return self._process.returncode if self._process else None

    async def start(self) -> None:
        with self.log.open("wb") as out:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out, process_group=0
            )

    async def stop(self) -> None:
        if self._process is not None:
            await end(self._process)


class Stack:
    """Everything, running between `__aenter__` and `__aexit__`. `pod_options` go to `python -m bench.vllm_pod`."""

    def __init__(self, plan: Plan, config: Path, logs: Path, pod_options: Sequence[str] = ()) -> None:
        self.plan = plan
        self.logs = logs
        first, port = bootstrap.split_address(plan.pods[0])
        fleet = ("--count", str(len(plan.pods)), "--bind", first, "--port", str(port), "--name", POD_NAME, *pod_options)
        serve = (
            *("--config", str(config), "--bind", "127.0.0.1", "--log-format", "json"),
            *("--listen", plan.server, "--status", plan.status, "--picker", plan.picker),
        )
        picker = (
            *("--server", plan.server, "--listen", plan.picker, "--log-format", "json"),
            *("--metrics-address", plan.picker_metrics),
        )
        self.children = (
            Child("simulated pods", ("bench.vllm_pod", *fleet), logs / "pods.log"),
            Child("management server", ("xds", "serve", *serve), logs / "serve.log"),
            Child("picker", ("xds", "picker", *picker), logs / "picker.log"),
        )
        self.envoy = Envoy(_bootstrap_file(plan, logs), plan.admin, logs / "envoy.log")

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.timeout(READY_TIMEOUT):
                await self._start()
        except TimeoutError:
            await self.stop()
            raise StackError(f"not ready after {READY_TIMEOUT:.0f} s: see the logs in {self.logs}") from None
        except EnvoyFailedError as error:
            await self.stop()
            raise StackError(str(error)) from error
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Envoy first, so that no request is under way when the others stop."""
        await self.envoy.stop()
        await asyncio.gather(*(child.stop() for child in self.children))

    def check(self) -> None:
        """Raises StackError when a child has ended."""
        for child in self.children:
            if child.status is not None:
                tail = "\n".join(child.log.read_text(errors="replace").splitlines()[-TAIL:])
                raise StackError(f"the {child.name} ended with status {child.status}; the end of {child.log}:\n{tail}")

    async def _start(self) -> None:
        async with aiohttp.ClientSession() as http:
            for child in self.children:
                await child.start()
            await self._until(_answers(http, f"http://{self.plan.pods[-1]}/health"))
            await self._until(_answers(http, f"http://{self.plan.status}/readyz"))
            await self._until(_answers(http, f"http://{self.plan.picker_metrics}/metrics"))
            await self.envoy.start()
            await self.envoy.ready(READY_TIMEOUT)
            await self._until(self._is_healthy)
            for address in (self.plan.plain, self.plan.llm):
                await self._until(_answers(http, f"http://{address}/v1/models"))

    async def _until(self, is_ready: Callable[[], Awaitable[bool]]) -> None:
        """Return when `is_ready` says so; StackError when a child ends before."""
        while not await is_ready():
            self.check()
            await asyncio.sleep(POLL)

    async def _is_healthy(self) -> bool:
        """Whether Envoy's health checks have passed for every endpoint, the picker's included."""
        clusters = (await self.envoy.get("/clusters?format=json"))["cluster_statuses"]
        hosts = [host["health_status"] for cluster in clusters for host in cluster.get("host_statuses", ())]
        expected = 2 * len(self.plan.pods) + 2  # each pod in the pool and in the Service, the picker, the server
        return hosts == [{"eds_health_status": "HEALTHY"}] * expected


async def until_signal(work: Coroutine[Any, Any, int]) -> int:
    """The result of `work`, which SIGINT and SIGTERM cancel."""
    task = asyncio.ensure_future(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await task


def _bootstrap_file(plan: Plan, directory: Path) -> Path:
    """bootstrap/envoy.yaml as it stands where it fits, else one for the plan's addresses."""
    if (plan.server, plan.admin) == (bootstrap.DEFAULT_SERVER, bootstrap.DEFAULT_ADMIN):
        return Path(bootstrap.__file__).with_name("envoy.yaml")
    path = directory / "bootstrap.yaml"
    path.write_text(bootstrap.render(plan.server, admin=plan.admin))
    return path


def _answers(http: aiohttp.ClientSession, url: str) -> Callable[[], Awaitable[bool]]:
    async def ask() -> bool:
        try:
            async with http.get(url) as reply:
                return reply.status == 200
        except aiohttp.ClientError:
            return False

    return ask
