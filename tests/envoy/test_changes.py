"""Configuration changes of every kind under traffic, with the real Envoy in both variants of the protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace

import aiohttp
import pytest

from bench.envoy import free_port
from tests.envoy.conftest import BOUND, POOL, Gateway
from tests.envoy.test_gateway import Traffic
from xds.control import Control

pytestmark = [pytest.mark.envoy, pytest.mark.timeout(120)]


def names(control: Control) -> set[str]:
    return {cluster.name for cluster in control.topology.clusters}


async def rename(gateway: Gateway, old: str, new: str) -> None:
    """The pool and the Service get new names, with the routes to them, in one change; one route goes, another comes."""
    rewrite(gateway, old, new)
    await gateway.until(lambda control: f"pool/default/pool{new}" in names(control))


def rewrite(gateway: Gateway, old: str, new: str) -> None:
    for path in gateway.config.glob("*.yaml"):
        text = path.read_text()
        for name in (" name: pool", "{name: qwen", "metadata: {name: llm"):
            for end in ("}", ",", "\n"):
                text = text.replace(f"{name}{old}{end}", f"{name}{new}{end}")
        path.write_text(text)


class Upload:
    """A completion whose body comes in two parts: the request has its route before it has its last byte."""

    def __init__(self, session: aiohttp.ClientSession, port: int) -> None:
        self._rest = asyncio.Event()
        self._half = asyncio.Event()
        self._task = asyncio.create_task(self._ask(session, f"http://127.0.0.1:{port}/v1/completions"))

    async def half(self) -> None:
        """The first part is on its way."""
        await self._half.wait()

    async def finish(self) -> int:
        """Send the second part; the answer's status."""
        self._rest.set()
        return await self._task

    async def _ask(self, session: aiohttp.ClientSession, url: str) -> int:
        async with session.post(url, data=self._body(), headers={"content-type": "application/json"}) as response:
            await response.read()
            return response.status

    async def _body(self) -> AsyncIterator[bytes]:
        body = json.dumps({"model": "/model/qwen", "prompt": "x" * 4000, "max_tokens": 1}).encode()
        yield body[:2000]
        self._half.set()
        await self._rest.wait()
        yield body[2000:]


async def test_add_rename_and_remove_in_one_change(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    """Clusters and routes come, go and get new names in one change, several times, at last while the server is away: no
    request fails, not even one that had its route before a change and its body and its pick after it."""
    await gateway.start_picker()
    await gateway.picking()
    ports = (gateway.plain_port, gateway.llm_port)
    traffic = [Traffic(gateway, session, port) for port in ports]
    uploads = []
    old = ""
    for turn in range(3):
        for each in traffic:
            await each.more(10)
        uploads += [Upload(session, port) for port in ports]
        for upload in uploads[-2:]:
            await upload.half()
        await rename(gateway, old, old := f"-{turn}")
    await gateway.stop_server()
    rewrite(gateway, old, old := "-last")
    await gateway.start_server()
    await gateway.settled(clients=2)
    for each in traffic:
        await each.more(10)
        await each.stop()
        each.assert_all_answered()
    assert [await upload.finish() for upload in uploads] == [200] * 6
    assert names(gateway.control) == {f"pool/default/pool{old}", f"service/default/qwen{old}/8000"}


EXTRA_ROUTE = """\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: extra}}
spec:
  parentRefs: [{{name: gw, sectionName: {listener}}}]
  rules: [{{backendRefs: [{{group: inference.networking.k8s.io, kind: InferencePool, name: pool}}]}}]
"""
OTHER_ROUTE = """\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: other}}
spec:
  parentRefs: [{{name: gw, sectionName: http}}]
  rules: [{{matches: [{{path: {{value: {path}}}}}], backendRefs: [{{name: qwen, port: 8000}}]}}]
"""
POLICY = """\
apiVersion: gateway.envoyproxy.io/v1alpha1
kind: BackendTrafficPolicy
metadata: {name: timeouts}
spec:
  targetRef: {group: gateway.networking.k8s.io, kind: Gateway, name: gw}
  timeout: {tcp: {connectTimeout: 500ms}}
"""
TO_POOL = "{group: inference.networking.k8s.io, kind: InferencePool, name: pool}"
TO_SERVICE = "{name: qwen, port: 8000}"
TOKENS = 2000  # of an answer: at a tenth of the speed, 70 ms each, more than the test may last


class Answer:
    """A streamed answer that is read as it comes."""

    def __init__(self, session: aiohttp.ClientSession, port: int, number: int) -> None:
        self.port, self.pod, self.end = port, "", b""
        self._events = 0
        self._progress = asyncio.Condition()
        self.task = asyncio.create_task(self._read(session, number))

    async def _read(self, session: aiohttp.ClientSession, number: int) -> None:
        body = {"model": "/model/qwen", "prompt": f"{number}", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        timeout = aiohttp.ClientTimeout(total=None)
        async with session.post(f"http://127.0.0.1:{self.port}/v1/completions", json=body, timeout=timeout) as response:
            assert response.status == 200
            self.pod = response.headers["x-sim-pod"]
            async for line in response.content:
                self.end = line if line.strip() else self.end
                async with self._progress:
                    self._events += 1
                    self._progress.notify_all()

    async def goes_on(self, since: str) -> None:
        """More of it arrives after the call."""
        seen = self._events
        waiting = asyncio.create_task(self._more(seen + 2))
        async with asyncio.timeout(BOUND):
            await asyncio.wait({waiting, self.task}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        assert not self.task.done(), f"the answer on port {self.port} ended: {since}"

    async def _more(self, events: int) -> None:
        async with self._progress:
            await self._progress.wait_for(lambda: self._events >= events)


class Live:
    """Answers that run while the configuration changes; each of them has to go on after each change."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self.answers: list[Answer] = []

    async def change(self, name: str, **files: str) -> None:
        """Files of the configuration get these texts, "" takes one away; what is served is another afterwards."""
        before = self._gateway.control.topology
        for file, text in files.items():
            path = self._gateway.config / f"{file}.yaml"
            if text:
                path.write_text(text)
            else:
                path.unlink()
        await self._gateway.until(lambda control: control.topology != before)
        await self.go_on(name)

    async def go_on(self, since: str) -> None:
        for answer in self.answers:
            await answer.goes_on(since)


async def flood(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    """Let requests queue at one pod until Envoy has another weight for it."""
    pod = gateway.pods[0]
    body = {"model": "/model/qwen", "prompt": "x", "max_tokens": 1000, "ignore_eos": True}
    url = f"http://{pod.address}:{pod.port}/v1/completions"
    requests = [asyncio.ensure_future(session.post(url, json=body)) for _ in range(60)]
    try:
        await gateway.until(lambda control: control.pools["pool/default/pool"].members["default/pod-0"].weight < 100)
    finally:
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)


async def test_running_answers_survive_every_change(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    """Answers run on three ports while everything about them changes, their own routes, clusters, pods and listener and
    the server included: each goes on after each change, and ends as it should."""
    extra, added = free_port(), free_port()
    objects = (gateway.config / "gateway.yaml").read_text()
    objects = objects.replace("  listeners:\n", f"  listeners:\n  - {{name: extra, protocol: HTTP, port: {extra}}}\n")
    pods = {pod.name: (gateway.config / f"{pod.name}.yaml").read_text() for pod in gateway.pods}
    live = Live(gateway)
    await live.change("a listener with a route", gateway=objects, extra=EXTRA_ROUTE.format(listener="extra"))
    for pod in gateway.pods:
        pod.engine.config = replace(pod.config, speed=0.1)
    ports = (gateway.plain_port, gateway.llm_port, extra)
    live.answers = [Answer(session, port, number) for number, port in enumerate(ports * 2)]
    await live.go_on("it began")

    await live.change("another route added", other=OTHER_ROUTE.format(path="/other"))
    await live.change("another route changed", other=OTHER_ROUTE.format(path="/another"))
    await live.change("another route removed", other="")
    await live.change("its own route to another cluster", gateway=objects.replace(TO_POOL, TO_SERVICE))
    await live.change("its own route back", gateway=objects)
    await live.change("cluster settings", policy=POLICY)
    await live.change("cluster settings taken back", policy="")
    await live.change("strategy DEFAULT", pool=POOL.format(strategy="DEFAULT", port=gateway.pod_port))
    await live.change("strategy PREFIX_CACHE", pool=POOL.format(strategy="PREFIX_CACHE", port=gateway.pod_port))
    await flood(gateway, session)
    await live.go_on("another weight")
    deleted = 'labels: {app: qwen}, deletionTimestamp: "2026-01-01T00:00:00Z"'
    await live.change(
        "all pods draining", **{n: text.replace("labels: {app: qwen}", deleted) for n, text in pods.items()}
    )
    await live.change("no pod left", **dict.fromkeys(pods, ""))
    await live.change("all pods back", **pods)
    moved = objects.replace("name: extra", "name: added").replace(f"port: {extra}", f"port: {added}")
    await live.change("a listener added, its own removed", gateway=moved, extra=EXTRA_ROUTE.format(listener="added"))
    await rename(gateway, "", "-next")
    await live.go_on("pool and Service renamed")
    await gateway.stop_server()
    await live.go_on("server gone")
    await gateway.start_server()
    await gateway.settled()
    await live.go_on("server back")
    await gateway.stop_server()
    rewrite(gateway, "-next", "-last")
    await gateway.start_server()
    await gateway.settled()
    await live.go_on("server back with other names")

    for pod in gateway.pods:
        pod.engine.config = replace(pod.config, speed=20.0)
    async with asyncio.timeout(BOUND):
        await asyncio.gather(*(answer.task for answer in live.answers))
    assert {answer.end for answer in live.answers} == {b"data: [DONE]\n"}
    assert {answer.pod for answer in live.answers} <= pods.keys()
