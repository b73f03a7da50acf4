"""Two pickers on one management server, behind the real Envoy: what one has sent where, the other knows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from bench.envoy import free_port
from bench.vllm_engine import EngineConfig
from tests.envoy.conftest import BOUND, Gateway
from tests.envoy.test_gateway import LONG, Traffic
from tests.envoy.test_workers import requests

pytestmark = [pytest.mark.envoy, pytest.mark.timeout(90)]


class TwoPickers(Gateway):
    """A gateway with two pickers, which are as two workers are to Envoy but share no memory."""

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch, delta=True, workers=2)
        self.pages = [f"http://127.0.0.1:{free_port()}/metrics" for _ in range(2)]
        self.processes: list[asyncio.subprocess.Process] = []

    async def start_pickers(self) -> None:
        for number, page in enumerate(self.pages):
            listen = ("--listen", f"unix:{self.scratch}/picker.sock.{number}")
            status = ("--metrics-address", page.split("/")[2])
            server = ("--server", f"127.0.0.1:{self.xds_port}")
            started = await self._start_process("picker", *server, *listen, *status, until="server connected")
            self.processes.append(started)

    async def hearing(self, session: aiohttp.ClientSession) -> None:
        """Each picker hears the other."""
        async with asyncio.timeout(BOUND):
            for page in self.pages:
                while await self.count(session, page, "exchange_peers") != 1:
                    pass  # each look is a request

    async def count(self, session: aiohttp.ClientSession, page: str, series: str) -> float:
        async with session.get(page) as response:
            lines = (await response.text()).splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"vllm_xds_picker_{series} ")), 0.0)


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[TwoPickers]:
    gateway = TwoPickers(tmp_path)
    try:
        await gateway.start_pods(4, EngineConfig(max_num_seqs=16))
        gateway.write_objects()
        await gateway.start_server()
        await gateway.start_envoy()
        await gateway.start_pickers()
        await gateway.picking()
        yield gateway
    finally:
        await gateway.close()


async def test_two_pickers_pick_as_one(gateway: TwoPickers, session: aiohttp.ClientSession) -> None:
    """Envoy asks them in turn, and what one began the other continues on the same pod. Then the server goes:
    not a request fails."""
    await gateway.hearing(session)
    prompts = [f"{family} {LONG}" for family in range(8)]
    families = await gateway.pods_of(session, prompts)
    assert [len(pods) for pods in families] == [1] * 8
    assert len(set.union(*families)) > 1
    assert min(await requests(gateway)) > 20
    for page in gateway.pages:
        assert await gateway.count(session, page, "exchange_requests_total") > 20

    traffic = Traffic(gateway, session, gateway.llm_port)
    await traffic.more()
    await gateway.stop_server()
    await traffic.more(50)
    await traffic.stop()
    traffic.assert_all_answered()
