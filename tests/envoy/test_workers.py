"""Two workers of one picker behind the real Envoy: one picker in what they do, and one may be killed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.envoy.conftest import BOUND, Gateway
from tests.envoy.test_gateway import LONG, Traffic

pytestmark = [pytest.mark.envoy, pytest.mark.timeout(90)]


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    gateway = Gateway(tmp_path, delta=True, workers=2)
    try:
        await gateway.start()
        await gateway.start_picker()
        await gateway.picking()
        yield gateway
    finally:
        await gateway.close()


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def requests(gateway: Gateway) -> list[int]:
    """How many each worker's host in Envoy has had."""
    stats = (await gateway.envoy.get("/clusters?format=json"))["cluster_statuses"]
    hosts = next(each["host_statuses"] for each in stats if each["name"] == "vllm-xds/picker")
    return [int(next(s["value"] for s in host["stats"] if s.get("name") == "rq_total")) for host in hosts]


async def test_two_workers_are_one_picker(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    """Envoy asks them in turn, and a family of prompts stays on one pod. One is killed: not a request fails.

    Its successor knows where every family is; nothing else of it could be known to a process that has just begun.
    """
    prompts = [f"{family} {LONG}" for family in range(8)]
    families = await gateway.pods_of(session, prompts)
    assert [len(pods) for pods in families] == [1] * 8
    assert len(set.union(*families)) > 1
    counts = await requests(gateway)
    assert min(counts) > 20
    assert max(counts) - min(counts) < 10

    traffic = Traffic(gateway, session, gateway.llm_port)
    await traffic.more()
    before = await requests(gateway)
    os.kill(children_of(gateway.picker.pid)[0], signal.SIGKILL)
    await traffic.more()
    await gateway.picking()
    async with asyncio.timeout(BOUND):  # Envoy's host counts on, from the dead worker to the next
        while min(now - then for now, then in zip(await requests(gateway), before, strict=True)) < 30:
            await traffic.more(10)
    await traffic.stop()
    traffic.assert_all_answered()
    again = [{(await gateway.ask(session, gateway.llm_port, f"{prompt} last"))[1]} for prompt in prompts * 2]
    assert again == families * 2
