"""A gateway whose every part can be broken, and the steady traffic through it that must not notice.

Envoy, management server and pickers are processes with their default options, to be killed and stopped by signals. The
simulated pods live in this process: what a test makes of one is in `SimulatedPod.faults`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Self

import aiohttp

import bootstrap
from bench.child import end, with_parent
from bench.envoy import Envoy, free_port
from bench.rig import BY_MODEL, PICKED, PICKS, PLAIN, POD, READY, manifests, pod_network
from bench.vllm_engine import EngineConfig
from bench.vllm_server import MODEL, SimulatedPod
from xds.envoy import PICKER_CLUSTER
from xds.scrape import INTERVAL
from xds.weights import STALE

PODS = 4
ENGINE = EngineConfig(step_base=0.01, step_per_prefill_token=0.000_004, num_gpu_blocks=8_000)  # a token each 10 ms
RATE = 40.0  # requests a second: a tenth of what two cores carry, so that a late answer is the fault's doing
STREAM_EACH = 8  # every so many requests one is a streamed answer
STREAM_TOKENS = 150  # of a streamed answer: 1.5 s, so that some eight are running at any time
PREFIXES = 12  # texts that three of four prompts begin with
PREFIX_SIZE = 2000  # characters
ANSWER_TIMEOUT = 60.0  # seconds after which a client gives up: a failure
POLL = 0.02  # seconds between two looks at what is not whole yet
DELETED = ', deletionTimestamp: "2026-01-01T00:00:00Z"'


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
    """Running between `__aenter__` and `__aexit__`: server, Envoy and healthy pods; the pickers when `picking` is."""

    def __init__(self, pickers: int = 1, *, picking: bool = True) -> None:
        self._stack = AsyncExitStack()
        self._picking = picking
        self.port, plain, by_model, pod, server, status, admin = (free_port() for _ in range(7))
        self._ports = {PICKED: self.port, PLAIN: plain, BY_MODEL: by_model}
        self._server, self._status, self._admin = (f"127.0.0.1:{each}" for each in (server, status, admin))
        self._pickers = [(f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}") for _ in range(pickers)]
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
        (self.config / "gateway.yaml").write_text(manifests(self._ports, self.pods[0].port, self.pods[0].address, 0))
        (scratch / "envoy.yaml").write_text(bootstrap.render(self._server, admin=self._admin))
        self._http = await self._stack.enter_async_context(
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1.0))
        )
        for index in range(PODS):
            await self.pods[index].start()
            self._stack.push_async_callback(self.pods[index].stop)
            self.write_pod(index)
        listen = ("--bind", "127.0.0.1", "--listen", self._server, "--status", self._status)
        pickers = [word for address, _ in self._pickers for word in ("--picker", address)]
        self.server, self.server_on_empty = (
            Part("serve", "--config", str(directory), *listen, *pickers, log=scratch / "serve.log")
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
        await self.server.start()
        for picker in self.pickers if self._picking else ():
            await picker.start()
        self._envoy = Envoy(scratch / "envoy.yaml", self._admin, scratch / "envoy.log")
        await self._stack.enter_async_context(self._envoy)
        await self._envoy.ready(READY)
        await until(lambda: self._healthy("pool/default/pool"), READY)

    def write_pod(self, index: int, *, deleted: bool = False) -> None:
        """The Pod object, Ready, into the directory that is watched."""
        text = POD.format(index=index, address=self.pods[index].address)
        path = self.config / f"pod-{index}.yaml"
        path.write_text(text.replace("{app: pod}", "{app: pod}" + DELETED * deleted))

    # --- what is whole

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


async def until(is_true: Callable[[], Awaitable[bool]], seconds: float = 60.0) -> bool:
    """Whether it is true within so many seconds; returns as soon as it is."""
    try:
        async with asyncio.timeout(seconds):
            while not await is_true():  # noqa: ASYNC110 - other processes set no event here
                await asyncio.sleep(POLL)
    except TimeoutError:
        return False
    return True


# --- traffic ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one request. `due` is when it was to be sent (perf_counter); `first` the seconds to the answer's
    first byte. `error` "" means a complete 200."""

    due: float
    first: float
    pod: str = ""
    error: str = ""


class Traffic:
    """An open loop of RATE requests a second on one port between `__aenter__` and `__aexit__`; `outcomes` grows."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/v1/completions"
        self._rng = random.Random(os.getpid())
        self._prefixes = [self._text(PREFIX_SIZE) for _ in range(PREFIXES)]
        self._under_way: set[asyncio.Task[None]] = set()
        self.outcomes: list[Outcome] = []

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=ANSWER_TIMEOUT)
        )
        self._schedule = asyncio.create_task(self._send())
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in (self._schedule, *self._under_way):
            task.cancel()
        await asyncio.gather(self._schedule, *self._under_way, return_exceptions=True)
        await self._http.close()

    async def answered(self) -> None:
        """Return when what is under way now has come to an end, by ANSWER_TIMEOUT at the latest."""
        if self._under_way:
            await asyncio.wait(set(self._under_way))

    async def answers_from(self, pod: str, since: float) -> bool:
        """Return when a request that was due after `since` has been answered by this pod."""

        async def seen() -> bool:
            return any(o.pod == pod and o.due >= since and not o.error for o in reversed(self.outcomes))

        return await until(seen)

    async def _send(self) -> None:
        began = time.perf_counter()
        for number in itertools.count():
            due = began + number / RATE
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(self._ask(number, due))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def _ask(self, number: int, due: float) -> None:
        streamed = number % STREAM_EACH == 0
        prefix = self._rng.choice(self._prefixes) if number % 4 != 1 else self._text(PREFIX_SIZE)
        request = {"model": MODEL, "prompt": f"{prefix} {number}", "max_tokens": 1}
        if streamed:
            request |= {"max_tokens": STREAM_TOKENS, "stream": True, "ignore_eos": True}
        first, pod, error = 0.0, "", ""
        try:
            async with self._http.post(self._url, data=json.dumps(request)) as reply:
                first = time.perf_counter() - due
                pod = reply.headers.get("x-sim-pod", "")
                body = await reply.read()
                if reply.status != 200:
                    error = f"HTTP {reply.status} {body[:80].decode(errors='replace')}"
                elif streamed and (b'"error"' in body or not body.endswith(b"data: [DONE]\n\n")):
                    error = "stream cut"
        except (aiohttp.ClientError, TimeoutError) as failure:
            error = type(failure).__name__
        self.outcomes.append(Outcome(due, first or time.perf_counter() - due, pod, error))

    def _text(self, size: int) -> str:
        return self._rng.randbytes(size // 2).hex()
