"""Clients that send a request, wait for its answer and send the next: little Python between two readings of the clock.

`alternate` sends the same requests to several ports in turn, a few at a time, so that whatever else the machine does
hits all of them alike.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from bench.vllm_server import MODEL

SHARED = 0.75  # of a prompt is its system prompt: what prefix caches live on
SYSTEMS, USERS = 4, 4  # system prompts, and requests that begin with each
TURN = 400  # characters of a message


class AnswerError(Exception):
    """An answer that is not the 200 every request here has to get."""


def requests(size: int, seed: int = 1) -> list[bytes]:
    """HTTP requests for chat completions with a body of `size` bytes, SYSTEMS * USERS different ones."""
    rng = random.Random(seed)
    made = []
    for _ in range(SYSTEMS):
        system = _text(round(size * SHARED), rng)
        made += [_post(_body(size, system, rng)) for _ in range(USERS)]
    return made


def _body(size: int, system: str, rng: random.Random) -> bytes:
    """A conversation: the system prompt, then messages of TURN characters, the last one as long as is left."""
    messages = [{"role": "system", "content": system}]
    body = {"model": MODEL, "messages": messages, "max_completion_tokens": 100, "stream": True}
    left = size - len(json.dumps(body))
    while left > 2 * TURN:
        messages.append({"role": "user" if len(messages) % 2 else "assistant", "content": _text(TURN, rng)})
        left -= len(json.dumps(messages[-1])) + len(", ")
    messages.append({"role": "user", "content": ""})
    messages[-1]["content"] = _text(size - len(json.dumps(body)), rng)
    return json.dumps(body).encode()


def _text(length: int, rng: random.Random) -> str:
    return rng.randbytes(length // 2 + 1).hex()[:length]


def _post(body: bytes) -> bytes:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: %d"
    return head % len(body) + b"\r\n\r\n" + body


class Client(asyncio.Protocol):
    """One HTTP/1.1 connection on which one request at a time is under way."""

    def __init__(self) -> None:
        self._received = bytearray()

    @classmethod
    async def connect(cls, port: int) -> Client:
        _, client = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # as asyncio promises for TCP

    async def ask(self, request: bytes) -> float:
        """Seconds from the request's first byte to the answer's last; AnswerError when it is not a 200."""
        self._answered: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._received.clear()
        began = time.perf_counter()
        self._transport.write(request)
        return await self._answered - began

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator or self._answered.done():
            return
        if not head.startswith(b"HTTP/1.1 200 "):
            self._answered.set_exception(AnswerError(head.decode(errors="replace")))
        elif len(body) == int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]):
            self._answered.set_result(now)

    def connection_lost(self, _: Exception | None) -> None:
        if not self._answered.done():
            self._answered.set_exception(AnswerError("the connection was closed before the answer"))

    def close(self) -> None:
        self._transport.close()


async def alternate(
    ports: Mapping[str, int], sent: Sequence[bytes], clients: int, *, blocks: int, block: int, pause: float = 0.0
) -> dict[str, list[float]]:
    """For each of `ports` by name the sorted seconds of its answers: `blocks` times `block` requests of each client.

    The ports take turns by blocks. `pause` is the time from one request of a client to its next, in seconds; 0 = none.
    """
    connections = {name: [await Client.connect(port) for _ in range(clients)] for name, port in ports.items()}
    bodies = {name: itertools.cycle(sent) for name in ports}  # the same ones to each
    times: dict[str, list[float]] = {name: [] for name in ports}
    try:
        for _ in range(blocks):
            for name, crowd in connections.items():
                each = (
                    _block(client, bodies[name], times[name], block, pause=pause, delay=place * pause / clients)
                    for place, client in enumerate(crowd)
                )
                await asyncio.gather(*each)
    finally:
        for client in itertools.chain.from_iterable(connections.values()):
            client.close()
    return {name: sorted(seconds) for name, seconds in times.items()}


async def _block(
    client: Client, bodies: Iterator[bytes], times: list[float], count: int, *, pause: float, delay: float
) -> None:
    due = time.perf_counter() + delay
    for _ in range(count):
        if pause:
            await asyncio.sleep(due - time.perf_counter())
            due += pause
        times.append(await client.ask(next(bodies)))


async def hammer(port: int, sent: Sequence[bytes], clients: int, seconds: float) -> int:
    """As many requests as `clients` get answered in `seconds`; how many that were."""
    crowd = [await Client.connect(port) for _ in range(clients)]
    bodies = itertools.cycle(sent)
    end = time.perf_counter() + seconds

    async def run(client: Client) -> int:
        count = 0
        while time.perf_counter() < end:
            await client.ask(next(bodies))
            count += 1
        return count

    try:
        return sum(await asyncio.gather(*map(run, crowd)))
    finally:
        for client in crowd:
            client.close()
