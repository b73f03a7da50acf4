"""Pods that answer at once: what stands behind the gateway when the gateway itself is measured.

`python -m bench.instant_pod --count 4` prints `listening` when it does. Any request gets a short 200; GET /metrics gets
the page of an idle vLLM pod. Of these pods the last ones may be bad: hung, slow, or with a large page.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import re
from collections.abc import Callable
from typing import cast

import uvloop

from bench.vllm_engine import EngineConfig
from bench.vllm_page import MetricsPage
from bench.vllm_server import MODEL
from bench.vllm_stats import EngineStats, HttpStats

SLOW = 0.9  # seconds a slow pod takes: just within xds.scrape.TIMEOUT
LARGE = 80  # pages of one engine in a large one: 4 MB, just within xds.scrape.MAX_PAGE

BAD = {"hung": "that never answer", "slow": f"that answer after {SLOW:g} s", "large": "with a page of 4 MB"}

ANSWER = b'{"object": "chat.completion", "choices": []}'
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


def vllm_page() -> bytes:
    """The metrics page of a pod with nothing to do, which is as long as any other's."""
    return MetricsPage(EngineConfig(), MODEL, 1.8e9).render(EngineStats(), HttpStats())


def reply(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


class InstantPod(asyncio.Protocol):
    """One HTTP/1.1 connection. Bodies need a content-length, which Envoy keeps; chunks are not understood."""

    def __init__(self, page: bytes) -> None:
        self._page = page
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # as asyncio promises for TCP

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(bytes(self._received[:end]))
            size = end + 4 + (int(length[1]) if length else 0)
            if len(self._received) < size:
                return
            self._answer(self._page if self._received.startswith(b"GET /metrics") else reply(ANSWER))
            del self._received[:size]

    def _answer(self, answer: bytes) -> None:
        self._transport.write(answer)


class SlowPod(InstantPod):
    """The same, SLOW seconds later."""

    def _answer(self, answer: bytes) -> None:
        asyncio.get_running_loop().call_later(SLOW, self._transport.write, answer)


class HungPod(InstantPod):
    """Takes requests and answers none."""

    def _answer(self, answer: bytes) -> None:
        pass


async def serve(first: str, count: int, port: int, *, hung: int = 0, slow: int = 0, large: int = 0) -> None:
    """`count` pods on consecutive addresses from `first` on, until cancelled; the last are `hung`, `slow`, `large`."""
    page, large_page = reply(vllm_page()), reply(vllm_page() * LARGE)
    hosts = [str(ipaddress.ip_address(first) + index) for index in range(count)]
    kinds: tuple[tuple[int, Callable[[], InstantPod]], ...] = (
        (count - hung - slow - large, lambda: InstantPod(page)),
        (hung, lambda: HungPod(page)),
        (slow, lambda: SlowPod(page)),
        (large, lambda: InstantPod(large_page)),
    )
    for number, pod in kinds:
        mine, hosts = hosts[:number], hosts[number:]
        if mine:
            await asyncio.get_running_loop().create_server(pod, mine, port, backlog=1024)
    print("listening", flush=True)
    await asyncio.get_running_loop().create_future()


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.instant_pod", description=__doc__)
    parser.add_argument("--count", type=int, default=1, metavar="N", help="pods to run (default %(default)s)")
    parser.add_argument("--bind", default="127.1.0.1", metavar="IP", help="address of the first (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port of every pod (default %(default)s)")
    for kind, what in BAD.items():
        parser.add_argument(f"--{kind}", type=int, default=0, metavar="N", help=f"pods of these {what}")
    args = parser.parse_args()
    bad = {kind: getattr(args, kind) for kind in BAD}
    uvloop.run(serve(args.bind, args.count, args.port, **bad))


if __name__ == "__main__":
    main()
