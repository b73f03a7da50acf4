"""Configuration changes of every kind under traffic, with the real Envoy in both variants of the protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.envoy.conftest import Gateway
from tests.envoy.test_gateway import Traffic
from xds.control import Control

pytestmark = [pytest.mark.envoy, pytest.mark.timeout(120)]


def names(control: Control) -> set[str]:
    return {cluster.name for cluster in control.topology.clusters}


async def rename(gateway: Gateway, old: str, new: str) -> None:
    """The pool and the Service get new names, with routes to them, in one change; one route goes, another comes."""
    path = gateway.config / "gateway.yaml"
    text = path.read_text()
    for kind in ("pool", "qwen"):
        text = text.replace(f"name: {kind}{old}}}", f"name: {kind}{new}}}")
        text = text.replace(f"name: {kind}{old},", f"name: {kind}{new},")
    path.write_text(text.replace(f"name: llm{old}}}", f"name: llm{new}}}"))
    pool = gateway.config / "pool.yaml"
    pool.write_text(pool.read_text().replace(f"name: pool{old}\n", f"name: pool{new}\n"))
    await gateway.until(lambda control: f"pool/default/pool{new}" in names(control))


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
    """Clusters and routes come, go and get new names in one change, several times: not one request fails, not even one
    that had its route before a change and its body and its pick after it."""
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
    for each in traffic:
        await each.more(10)
        await each.stop()
        each.assert_all_answered()
    assert [await upload.finish() for upload in uploads] == [200] * 6
    assert names(gateway.control) == {f"pool/default/pool{old}", f"service/default/qwen{old}/8000"}
