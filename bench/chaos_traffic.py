"""The steady traffic that must not notice a fault: an open loop of completions, some of them streamed."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Self

import aiohttp

from bench.vllm_server import MODEL

RATE = 40.0  # requests a second: a tenth of what two cores carry, so that a late answer is the fault's doing
STREAM_EACH = 8  # every so many requests one is a streamed answer
STREAM_TOKENS = 150  # of a streamed answer: 1.5 s, so that some eight are running at any time
PREFIXES = 12  # texts that three of four prompts begin with
PREFIX_SIZE = 2000  # characters
ANSWER_TIMEOUT = 60.0  # seconds after which a client gives up: a failure
POLL = 0.02  # seconds between two looks at what is not whole yet


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one request. `due` is when it was to be sent (perf_counter); `first` the seconds to the answer's
    first byte. `error` "" means a complete 200. `lag` is how late this process was to send it: the machine is busy."""

    due: float
    first: float
    pod: str = ""
    error: str = ""
    lag: float = 0.0


class Traffic:
    """RATE requests a second, to the ports in turn, between `__aenter__` and `__aexit__`; `outcomes` grows."""

    def __init__(self, *ports: int) -> None:
        self._urls = [f"http://127.0.0.1:{port}/v1/completions" for port in ports]
        self._rng = random.Random(os.getpid())
        self._prefixes = [self._text(PREFIX_SIZE) for _ in range(PREFIXES)]
        self._under_way: set[asyncio.Task[None]] = set()
        self.outcomes: list[Outcome] = []

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=ANSWER_TIMEOUT)
        )
        self._schedule = asyncio.create_task(self._send())
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in (self._schedule, *self._under_way):
            task.cancel()
        await asyncio.gather(self._schedule, *self._under_way, return_exceptions=True)
        await self._http.close()

    async def answered(self) -> None:
        """Return when what is under way now has come to an end, by ANSWER_TIMEOUT at the latest."""
        if self._under_way:
            await asyncio.wait(set(self._under_way))

    async def answers_from(self, pod: str, since: float) -> bool:
        """Return when a request that was due after `since` has been answered by this pod."""

        async def seen() -> bool:
            return any(o.pod == pod and o.due >= since and not o.error for o in reversed(self.outcomes))

        return await until(seen)

    async def _send(self) -> None:
        began = time.perf_counter()
        for number in itertools.count():
            due = began + number / RATE
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            turn, port = divmod(number, len(self._urls))
            task = asyncio.create_task(self._ask(self._urls[port], turn, due))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def _ask(self, url: str, turn: int, due: float) -> None:
        streamed = turn % STREAM_EACH == 0
        prefix = self._rng.choice(self._prefixes) if turn % 4 != 1 else self._text(PREFIX_SIZE)
        request = {"model": MODEL, "prompt": f"{prefix} {turn}", "max_tokens": 1}
        if streamed:
            request |= {"max_tokens": STREAM_TOKENS, "stream": True, "ignore_eos": True}
        first, pod, error = 0.0, "", ""
        lag = time.perf_counter() - due
        try:
            async with self._http.post(url, data=json.dumps(request)) as reply:
                first = time.perf_counter() - due
                pod = reply.headers.get("x-sim-pod", "")
                body = await reply.read()
                if reply.status != 200:
                    error = f"HTTP {reply.status} {body[:80].decode(errors='replace')}"
                elif streamed and (b'"error"' in body or not body.endswith(b"data: [DONE]\n\n")):
                    error = "stream cut"
        except (aiohttp.ClientError, TimeoutError) as failure:
            error = type(failure).__name__
        self.outcomes.append(Outcome(due, first or time.perf_counter() - due, pod, error, lag))

    def _text(self, size: int) -> str:
        return self._rng.randbytes(size // 2).hex()


async def until(is_true: Callable[[], Awaitable[bool]], seconds: float = 60.0) -> bool:
    """Whether it is true within so many seconds; returns as soon as it is."""
    try:
        async with asyncio.timeout(seconds):
            while not await is_true():  # noqa: ASYNC110 - other processes set no event here
                await asyncio.sleep(POLL)
    except TimeoutError:
        return False
    return True
