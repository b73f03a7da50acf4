"""picker/workers.py: several processes as one picker."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from picker.server import HEALTH, NOT_SERVING, SERVING
from picker.worker import Settings
from xds.status import MAX_POSTED

BOUND = 40.0  # seconds for anything awaited here, far above what it takes


class Command:
    """A running `vllm-xds picker --workers 2`."""

    def __init__(self, process: asyncio.subprocess.Process, listen: str) -> None:
        self.process = process
        self.listen = listen
        self.events: list[dict[str, Any]] = []

    async def event(self, name: str, **fields: object) -> dict[str, Any]:
        """The next event of this name with these fields."""
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            self.events.append(json.loads(line))
            if self.events[-1] | {"event": name, **fields} == self.events[-1]:
                return self.events[-1]
        raise AssertionError(f"it ended before {name}: {self.events}")

    async def health(self, worker: int) -> bytes:
        async with grpc.aio.insecure_channel(f"{self.listen}.{worker}") as channel:
            answer: bytes = await channel.unary_unary(HEALTH)(b"", wait_for_ready=True, timeout=BOUND)
            return answer

    def children(self) -> list[int]:
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]


@asynccontextmanager
async def picker(tmp_path: Path, *options: str) -> AsyncIterator[Command]:
    listen = f"unix:{tmp_path}/p.sock"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "picker", "--workers", "2", "--listen", listen, "--metrics-address", "127.0.0.1:0"),
        *("--server", "127.0.0.1:1", "--log-format", "json", *options),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(BOUND):
            yield Command(process, listen)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def gone(pids: list[int]) -> None:
    """Return when none of these processes is left, waited for or not."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(descriptor, ended.set)
        await ended.wait()
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)


async def test_a_life(tmp_path: Path) -> None:
    """Both answer; one that is killed is started again, the other goes on; all drain together and leave nothing behind.

    The parent's page has each worker's series, and how often one was started again.
    """
    async with picker(tmp_path) as command, aiohttp.ClientSession() as http:
        url = f"http://{(await command.event('workers started'))['metrics']}"
        assert [await command.health(worker) for worker in (0, 1)] == [SERVING] * 2
        while (await http.get(f"{url}/readyz")).status != 200:  # until both have reported
            pass
        victim, other = command.children()
        os.kill(victim, signal.SIGKILL)
        lost = await command.event("worker lost", status=-signal.SIGKILL)
        await command.event("picker started", worker=lost["worker"])
        assert [await command.health(worker) for worker in (0, 1)] == [SERVING] * 2
        assert other in command.children()
        page = await (await http.get(f"{url}/metrics")).text()
        assert f'vllm_xds_picker_worker_restarts_total{{worker="{lost["worker"]}"}} 1.0' in page
        for worker in (0, 1):
            assert f'vllm_xds_picker_chunks{{worker="{worker}"}} 0.0' in page
        pids = command.children()
        command.process.terminate()
        for _ in range(2):
            await command.event("picker draining")
        assert (await http.get(f"{url}/readyz")).status == 503
        assert [await command.health(worker) for worker in (0, 1)] == [NOT_SERVING] * 2
        await command.event("workers stopped")
        assert await command.process.wait() == 0
        await gone(pids)
        assert os.listdir(tmp_path) == []  # noqa: PTH208 - a folder in memory


async def test_a_worker_explains(tmp_path: Path) -> None:
    """Asked by way of the parent, as often as one likes, also at once, and after one was killed: the parent's page is
    that of a picker alone, with the number of the worker that has answered."""
    async with picker(tmp_path) as command, aiohttp.ClientSession() as http:
        url = f"http://{(await command.event('workers started'))['metrics']}"
        body = json.dumps({"model": "m", "prompt": "x" * 5000}).encode()
        padded = body + b" " * (MAX_POSTED - len(body))
        query = {"cluster": "pool/a/b", "session": "\n"}

        async def ask(data: bytes, **told: str) -> tuple[int, Any]:
            async with http.post(f"{url}/debug/pick", params=told, data=BytesIO(data)) as response:
                return response.status, await (response.json() if response.status == 200 else response.text())

        assert await ask(body, **query) == (404, "no such thing\n")  # none serves yet
        while (await http.get(f"{url}/readyz")).status != 200:  # until both have reported
            pass
        for killed in (False, True):
            if killed:
                os.kill(command.children()[0], signal.SIGKILL)
                await command.event("worker lost")
            for status, explained in await asyncio.gather(*(ask(each, **query) for each in (body, padded, body))):
                assert (status, explained["cluster"], explained["reason"]) == (200, "pool/a/b", "stateless")
                assert (explained["prompt"]["bytes"], len(explained["prompt"]["chunks"])) == (5000, 2)
                assert explained["prompt"]["hint"] == explained["key"]
                assert explained["worker"] == int(killed)
        assert await ask(body) == (400, "expected the query to name a cluster\n")


async def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    """However it ended."""
    async with picker(tmp_path) as command:
        for _ in range(2):
            await command.event("picker started")
        pids = command.children()
        assert len(pids) == 2
        command.process.kill()
        await gone(pids)
        assert os.listdir(tmp_path) == []  # noqa: PTH208 - a folder in memory


async def test_one_that_cannot_start_ends_all(tmp_path: Path) -> None:
    """Its address is taken: exit code 1, one line that says so, and the other does not stay."""
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(f"{tmp_path}/p.sock.1")
        taken.listen()
        async with picker(tmp_path, "--log-level", "error") as command:
            _, err = await command.process.communicate()
            assert command.process.returncode == 1
            assert err.decode() == f"vllm-xds picker: cannot listen on {command.listen}.1: Address already in use\n"


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.0.0.1:65535"])
async def test_too_few_ports(tmp_path: Path, listen: str) -> None:
    """Wrong usage, before anything is started."""
    async with picker(tmp_path, "--listen", listen) as command:
        _, err = await command.process.communicate()
        assert command.process.returncode == 2
        assert listen in err.decode()
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("tls", [None, ("c", "k", "a")])
def test_settings_are_one_line(tls: tuple[str, str, str] | None) -> None:
    """What the parent writes is what the worker reads."""
    settings = Settings("127.0.0.1:1", ("127.0.0.1:2", "unix:/run/\n"), 3, ("127.0.0.1:3",), 5, tls, "json", "info", 4)
    line = settings.encode()
    assert (line.count(b"\n"), line[-1:]) == (1, b"\n")
    assert Settings.decode(line) == settings
