"""A simulated pod that remembers what it was asked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from bench.vllm_server import SimulatedPod

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Received:
    """A request as it came to a pod; header names in lower case, `body` only where the pod keeps it."""

    pod: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


class RecordingPod(SimulatedPod):
    """A simulated pod that notes the head of what it is sent, the gateway's own requests aside; on demand all of it."""

    def __init__(self, *args: Any, keep_bodies: bool = False, **more: Any) -> None:
        super().__init__(*args, **more)
        self._keep_bodies = keep_bodies
        self.received: list[Received] = []

    @web.middleware
    async def _front(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in ("/health", "/metrics"):
            headers = {name.lower(): value for name, value in request.headers.items()}
            body = await request.read() if self._keep_bodies else b""
            self.received.append(Received(self.name, request.raw_path, headers, body))
        return await super()._front(request, handler)
