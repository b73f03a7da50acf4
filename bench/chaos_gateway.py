"""A gateway whose every part can be broken, and what shows that it is whole.

Envoy, management server and pickers are processes with their default options, to be killed and stopped by signals. The
simulated pods live in this process: what a test makes of one is in `SimulatedPod.faults`.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import tempfile
from contextlib import AsyncExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import Self

import aiohttp

import bootstrap
from bench.chaos_picker import RefusingPicker, SlowLink
from bench.chaos_traffic import until
from bench.child import end, with_parent
from bench.envoy import Envoy, free_port
from bench.rig import BY_MODEL, PICKED, PICKS, PLAIN, POD, READY, manifests, pod_network
from bench.vllm_engine import EngineConfig
from bench.vllm_server import SimulatedPod
from xds.envoy import PICKER_CLUSTER
from xds.scrape import INTERVAL
from xds.weights import BASE, HIGHEST, LOWEST, STALE, STEP

PODS = 4
ENGINE = EngineConfig(step_base=0.01, step_per_prefill_token=0.000_004, num_gpu_blocks=8_000)  # a token each 10 ms
DELETED = ', deletionTimestamp: "2026-01-01T00:00:00Z"'
LOG_POLL = 0.001  # seconds between two looks at a log: what is waited for is to be caught in the act
LEAST, MOST = (round(BASE * STEP**level) for level in (LOWEST, HIGHEST))  # the weights within the law's bounds


class Part:
    """One process of ours, to be killed, stopped, continued and started again."""

    def __init__(self, *arguments: str, log: Path) -> None:
        self._command = with_parent(sys.executable, "-m", "xds", *arguments)
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self._log.open("ab") as out:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out, process_group=0
            )

    async def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.send(signal.SIGKILL)
        assert self._process is not None  # noqa: S101 - send() would have failed
        await self._process.wait()

    async def stop(self) -> None:
        """SIGTERM; returns when it is gone, which it may be already."""
        if self._process is not None and self._process.returncode is None:
            self.send(signal.SIGCONT)  # a stopped process would not hear it
            await end(self._process)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None  # noqa: S101 - a caller's mistake
        self._process.send_signal(number)


class Gateway:
    """Running between `__aenter__` and `__aexit__`: server, Envoy and healthy pods; the pickers when `picking` is.

    Envoy speaks the `delta` variant or the other. If `linked`, it reaches the first picker by a link that can be slow:
    `delay_picker`.
    """

    def __init__(self, pickers: int = 1, *, picking: bool = True, delta: bool = True, linked: bool = False) -> None:
        self._stack = AsyncExitStack()
        self._picking = picking
        self._delta = delta
        self.port, self.plain_port, by_model, pod, server, status, admin = (free_port() for _ in range(7))
        self._ports = {PICKED: self.port, PLAIN: self.plain_port, BY_MODEL: by_model}
        self._server, self._status, self._admin = (f"127.0.0.1:{each}" for each in (server, status, admin))
        self._pickers = [(f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}") for _ in range(pickers)]
        self._reached = [address for address, _ in self._pickers]  # as Envoy does
        self._link: SlowLink | None = None
        if linked:
            self._reached[0] = f"127.0.0.1:{free_port()}"
            self._link = SlowLink(self._reached[0], self._pickers[0][0])
        self.refusing_picker = RefusingPicker()
        self.generation = 0  # of the objects' names
        self._mark = 0  # bytes of the server's log before the fault
        first = ip_address(pod_network())
        self.pods = [
            SimulatedPod(f"pod-{index}", address=str(first + index), port=pod, config=ENGINE)
            for index in range(PODS + 1)  # the last one joins when a scenario starts it
        ]

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-xds-chaos-")))
        self.config, self.empty = scratch / "config", scratch / "empty"
        self.config.mkdir()
        self.empty.mkdir()
        self._write_objects()
        (scratch / "envoy.yaml").write_text(bootstrap.render(self._server, admin=self._admin, delta=self._delta))
        self._http = await self._stack.enter_async_context(
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1.0))
        )
        for index in range(PODS):
            await self.pods[index].start()
            self._stack.push_async_callback(self.pods[index].stop)
            self.write_pod(index)
        listen = ("--bind", "127.0.0.1", "--listen", self._server, "--status", self._status, "--log-level", "debug")
        pickers = [word for address in self._reached for word in ("--picker", address)]
        self._log = scratch / "serve.log"
        self.server, self.server_on_empty = (
            Part("serve", "--config", str(directory), *listen, *pickers, log=self._log)
            for directory in (self.config, self.empty)
        )
        self.pickers = [
            Part(
                *("picker", "--server", self._server, "--listen", address, "--metrics-address", metrics),
                *("--pickers", str(len(self._pickers))),
                log=scratch / f"picker-{index}.log",
            )
            for index, (address, metrics) in enumerate(self._pickers)
        ]
        for part in (self.server, self.server_on_empty, *self.pickers):
            self._stack.push_async_callback(part.stop)
        if self._link is not None:
            await self._link.start()
            self._stack.push_async_callback(self._link.stop)
        await self.server.start()
        for picker in self.pickers if self._picking else ():
            await picker.start()
        self._envoy = Envoy(scratch / "envoy.yaml", self._admin, scratch / "envoy.log")
        await self._stack.enter_async_context(self._envoy)
        await self._envoy.ready(READY)
        await until(lambda: self._healthy(self.pool), READY)

    async def start_refusing_picker(self) -> None:
        """In the first picker's place."""
        await self.refusing_picker.start(self._pickers[0][0])

    def delay_picker(self, seconds: float) -> None:
        assert self._link is not None  # noqa: S101 - a caller's mistake
        self._link.delay = seconds

    @property
    def pool(self) -> str:
        """The name of the pool's cluster."""
        return f"pool/default/pool{self._suffix}"

    @property
    def _suffix(self) -> str:
        return f"-{self.generation}" if self.generation else ""

    def _write_objects(self) -> None:
        text = manifests(self._ports, self.pods[0].port, self.pods[0].address, 0)
        renamed = re.sub(r"(\bname: (?:pool|pods)|metadata: {name: by-model)(?=[},\n])", rf"\1{self._suffix}", text)
        (self.config / "gateway.yaml").write_text(renamed)

    def write_change(self) -> None:
        """One change: the pool and the Service, which all routes are to, and a route get new names."""
        self.generation += 1
        self._write_objects()

    def write_pod(self, index: int, *, deleted: bool = False) -> None:
        """The Pod object, Ready, into the directory that is watched."""
        text = POD.format(index=index, address=self.pods[index].address)
        path = self.config / f"pod-{index}.yaml"
        path.write_text(text.replace("{app: pod}", "{app: pod}" + DELETED * deleted))

    # --- what the server says

    def mark(self) -> None:
        """A fault begins: what follows is about what is logged from here on."""
        self._mark = self._log.stat().st_size

    async def sent(self, type_name: str) -> None:
        """Return the moment the server has sent Envoy a response of this type."""
        words = (b'"response sent"', f'"type": "{type_name}"'.encode())
        with self._log.open("rb") as log:
            log.seek(self._mark)
            async with asyncio.timeout(READY):
                while True:
                    line = log.readline()
                    if all(word in line for word in words):
                        return
                    if not line.endswith(b"\n"):
                        log.seek(-len(line), 1)
                        await asyncio.sleep(LOG_POLL)

    def wild_weights(self) -> list[str]:
        """Changes of weights beyond the law's bounds."""
        with self._log.open("rb") as log:
            log.seek(self._mark)
            events = [json.loads(line) for line in log if b'"weight changed"' in line]
        return [f"{event['endpoint']} weighs {event['new']}" for event in events if not LEAST <= event["new"] <= MOST]

    async def weights(self) -> dict[str, float]:
        """Of the pool's endpoints, by pod."""
        return await self._gauge("vllm_xds_endpoint_weight")

    async def blind(self) -> set[str]:
        """The pods whose load is too old to count."""
        ages = await self._gauge("vllm_xds_endpoint_load_age_seconds")
        return {pod for pod, age in ages.items() if age > STALE * INTERVAL}

    async def _gauge(self, name: str) -> dict[str, float]:
        pattern = rf'^{name}\{{.*endpoint="default/([^"]+)".*\}} (.*)$'
        return {pod: float(value) for pod, value in re.findall(pattern, await self._page(self._status), re.MULTILINE)}

    # --- what is whole

    async def follows(self) -> bool:
        """Return when Envoy has the pool by its latest name, its pods are healthy, and `weighs` is true."""
        return await until(lambda: self._healthy(self.pool)) and await self.weighs()

    async def picks(self) -> bool:
        """Return when Envoy takes every picker for healthy and each has since picked a pod by cost."""
        await until(lambda: self._healthy(PICKER_CLUSTER))
        before = [await self._cost_picks(metrics) for _, metrics in self._pickers]

        async def more() -> bool:
            now = [await self._cost_picks(metrics) for _, metrics in self._pickers]
            return all(new > old for new, old in zip(now, before, strict=True))

        return await until(more)

    async def weighs(self) -> bool:
        """Return when Envoy and pickers have their streams, and each pod's load is fresh."""

        async def fresh() -> bool:
            page = await self._page(self._status)
            streams = sum(map(float, re.findall(r"^vllm_xds_streams\{.*\} (.*)$", page, re.MULTILINE)))
            ages = re.findall(r"^vllm_xds_endpoint_load_age_seconds\{.*\} (.*)$", page, re.MULTILINE)
            loads = re.findall(r"^vllm_xds_endpoint_running\{.*\} (.*)$", page, re.MULTILINE)
            return (
                streams == 1 + len(self.pickers)
                and 0 < len(ages) == len(loads)
                and max(map(float, ages)) < STALE * INTERVAL
            )

        return await until(fresh)

    async def _cost_picks(self, address: str) -> float:
        page = await self._page(address)
        return sum(float(count) for count in PICKS.findall(page))

    async def _page(self, address: str) -> str:
        """A metrics page; empty when nobody answers."""
        try:
            async with self._http.get(f"http://{address}/metrics") as reply:
                return await reply.text()
        except (aiohttp.ClientError, TimeoutError):
            return ""

    async def _healthy(self, cluster: str) -> bool:
        statuses = (await self._envoy.get("/clusters?format=json"))["cluster_statuses"]
        hosts: list[dict[str, object]] = next(
            (status.get("host_statuses", []) for status in statuses if status["name"] == cluster), []
        )
        return bool(hosts) and all(host["health_status"] == {"eds_health_status": "HEALTHY"} for host in hosts)
