"""Mutual TLS on all three legs with the real Envoy, and every certificate and CA replaced while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest

import bootstrap
from tests.envoy.conftest import BOUND, INTERVAL, Gateway
from tests.tls_files import Identity
from xds.control import Control
from xds.directory import DirectorySource
from xds.envoy import PICKER_CLUSTER, Options
from xds.scrape import Scraper
from xds.server import ManagementServer

pytestmark = [pytest.mark.envoy, pytest.mark.timeout(90)]

LONG = "You are a careful assistant. " * 1200  # 34 KB, 8,700 tokens: dearer than a few requests in front


class TlsGateway(Gateway):
    """A gateway whose three parts have files of their own."""

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch, delta=True)
        self.identities = {part: Identity(scratch / part) for part in ("server", "picker", "envoy")}
        self.sds = scratch / "sds"

    async def start_server(self) -> None:
        self.server = ManagementServer(self.metrics)
        pickers = (f"127.0.0.1:{self.picker_port}",)
        self.control = Control(
            self.server,
            Scraper(self.metrics, INTERVAL),
            self.metrics,
            interval=INTERVAL,
            options=Options(bind="127.0.0.1", pickers=pickers, picker_tls_sds=str(self.sds)),
        )
        await self.server.start([f"127.0.0.1:{self.xds_port}"], self.identities["server"].files)
        self._running = asyncio.create_task(self.control.run(DirectorySource(self.config).configs()))
        self._stack.push_async_callback(self.stop_server)

    async def start_envoy(self, tls_sds: str | None = None, edit: Callable[[str], str] = str) -> None:
        files = self.identities["envoy"].files
        self.sds.mkdir()
        for name, text in bootstrap.secrets(str(files.cert), str(files.key), str(files.ca)).items():
            (self.sds / name).write_text(text)
        await super().start_envoy(tls_sds or str(self.sds), edit)

    async def start_picker(self, *options: str, until: str = "server connected") -> None:
        await super().start_picker(*self.identities["picker"].options, *options, until=until)

    async def start_server_process(self, *options: str, until: str = '"node": "envoy"') -> asyncio.subprocess.Process:
        """Returns when Envoy, and not the picker alone, is connected to it."""
        tls = ("--picker-tls-sds", str(self.sds), *self.identities["server"].options)
        return await super().start_server_process(*tls, *options, until=until)

    async def handshakes(self, cluster: str) -> int:
        """How many TLS connections Envoy has made to this cluster."""
        stats = (await self.envoy.get(f"/stats?format=json&filter=^cluster.{cluster}.ssl.handshake$"))["stats"]
        return int(stats[0]["value"]) if stats else 0


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[TlsGateway]:
    """All parts running."""
    gateway = TlsGateway(tmp_path)
    try:
        await gateway.start()
        await gateway.start_picker()
        await gateway.picking()
        yield gateway
    finally:
        await gateway.close()


async def test_all_legs_and_a_change_of_everything(gateway: TlsGateway, session: aiohttp.ClientSession) -> None:
    """Both ports answer and prompts are picked; the same after every file is replaced, the CA included."""

    async def works(prompt: str) -> None:
        for port in (gateway.plain_port, gateway.llm_port):
            assert (await gateway.ask(session, port, "hello"))[0] == 200
        families = await gateway.pods_of(session, [f"{prompt} {family} {LONG}" for family in range(3)])
        assert [len(pods) for pods in families] == [1] * 3

    await works("first")
    for cluster in ("xds", PICKER_CLUSTER):
        assert await gateway.handshakes(cluster) > 0

    # Envoy and picker are not restarted: they have to come to the new server, and Envoy to a new picker.
    for identity in gateway.identities.values():
        identity.install("stranger")
    await gateway.stop_server()
    await gateway.start_server()
    await gateway.settled(clients=2)
    before = await gateway.handshakes(PICKER_CLUSTER)
    gateway.picker.kill()
    await gateway.picker.wait()
    await gateway.start_picker()
    async with asyncio.timeout(BOUND):
        while await gateway.handshakes(PICKER_CLUSTER) == before:
            pass  # each look is a request to Envoy's admin API
    await gateway.picking()
    await works("stranger")

    # Back to the first CA, and the server as a command.
    for identity in gateway.identities.values():
        identity.install("second")
    await gateway.stop_server()
    await gateway.start_server_process()
    for port in (gateway.plain_port, gateway.llm_port):
        assert (await gateway.ask(session, port, "hello"))[0] == 200
    stats = (await gateway.envoy.get("/stats?format=json&filter=update_rejected"))["stats"]
    assert stats
    assert {stat["value"] for stat in stats} == {0}
