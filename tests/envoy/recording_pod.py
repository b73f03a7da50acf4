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
    """A request as it came to a pod; header names in lower case."""

    pod: str
    path: str
    headers: dict[str, str]


class RecordingPod(SimulatedPod):
    """A simulated pod that notes the head of what it is sent, the gateway's own requests aside."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.received: list[Received] = []

    @web.middleware
    async def _front(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in ("/health", "/metrics"):
            headers = {name.lower(): value for name, value in request.headers.items()}
            self.received.append(Received(self.name, request.raw_path, headers))
        return await super()._front(request, handler)
