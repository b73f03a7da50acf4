"""One picker at work: its server, its loads and its end. Alone it is the command's process; of several, a child.

A child is `python -m picker.worker MEMORY CONTROL`, two inherited descriptors: the workers' shared memory, and a socket
to the parent. The parent writes one line, the settings, and then a line for each request that is to be explained; when
the socket ends, so has the parent, and the worker ends as well. The worker writes a line each REPORT seconds: whether
it serves, and its metrics; and one for each explanation.
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import gc
import json
import mmap
import os
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog
import uvloop
from prometheus_client import generate_latest

from picker.exchange import Inbox, Outbox
from picker.exchange_client import ExchangeClient
from picker.listen import AddressError
from picker.loads import LoadsClient, watch
from picker.memory import SIZE, Memory
from picker.metrics import PickerMetrics
from picker.pick import Picker
from picker.server import PickerServer
from xds.log import configure
from xds.status import Posted
from xds.tls import TlsError, TlsFiles
from xds.wire.exchange_pb2 import Hello

GC_THRESHOLD = (50_000, 20, 100)  # objects, then collections: a large body is many objects, and none is in a cycle
# What malloc keeps for the next large body instead of giving it back to the system, which would hand it out again page
# by page, and zeroed: that took two thirds of the CPU of a body of 1 MB. The numbers are mallopt(3)'s.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 64 << 20  # bytes free at the heap's end: some copies of a body of 10 MB
MAPPED = 32 << 20  # bytes: what is larger alone is given back
DRAIN = 1.5  # seconds between "not serving" and the end: Envoy's health check, each second, sees it first
GRACE = 0.5  # seconds for the requests then open: an answer takes a millisecond
REPORT = 1.0  # seconds between a worker's reports to its parent
LINE = 16 << 20  # bytes of a report at most: thousands of pools

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Settings:
    """What a picker is told.

    `exchange` are the servers through which it and other pickers hear one another, and `picker` is its number there.
    `tls` are certificate, key and CA. `worker` is its number among several, -1 for none.
    """

    server: str
    listen: tuple[str, ...]
    pickers: int
    exchange: tuple[str, ...]
    picker: int
    tls: tuple[str, str, str] | None
    log_format: str
    log_level: str
    worker: int = -1

    @property
    def files(self) -> TlsFiles | None:
        return TlsFiles(*map(Path, self.tls)) if self.tls else None

    def encode(self) -> bytes:
        """As one line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> Settings:
        fields = json.loads(line)
        tls = tuple(fields.pop("tls") or ())
        return cls(**fields | {name: tuple(fields[name]) for name in ("listen", "exchange")}, tls=tls or None)


# Says that a picker is there, and how it is; yields where.
Status = Callable[[PickerMetrics, PickerServer], AbstractAsyncContextManager[str]]


async def work(settings: Settings, memory: Memory, status: Status, asked: asyncio.Event) -> None:
    """Serve until `asked` is set, then drain; set once more, it ends the drain.

    Raises AddressError, TlsError, and OSError for a status that cannot be served.
    """
    keep_memory()
    metrics = PickerMetrics()
    outbox = Outbox()
    picker = Picker(random.random, settings.pickers, memory, outbox.tell)
    server = PickerServer(picker, metrics, time.monotonic, settings.files)
    node_id = f"picker-{os.uname().nodename}-{os.getpid()}"
    client = LoadsClient(
        settings.server,
        picker,
        metrics,
        node_id=node_id,
        clock=time.monotonic,
        random=random.random,
        tls=settings.files,
    )
    exchange = ExchangeClient(
        settings.exchange,
        Hello(picker=settings.picker, deaf=settings.worker > 0, node=node_id),  # of several, one listens for all
        outbox,
        Inbox(picker),
        memory,
        metrics,
        clock=time.monotonic,
        random=random.random,
        tls=settings.files,
    )
    async with status(metrics, server) as where:
        try:
            listening = await server.start(settings.listen)
            log.info("picker started", listen=listening, metrics=where, server=settings.server, node=node_id)
            gc.freeze()  # what is loaded by now stays: collections need not look at it
            gc.set_threshold(*GC_THRESHOLD)
            async with asyncio.TaskGroup() as tasks:
                background = [
                    tasks.create_task(client.run()),
                    tasks.create_task(watch(picker, metrics, time.monotonic)),
                    tasks.create_task(exchange.run()),
                ]
                await asked.wait()
                asked.clear()
                server.drain()
                log.info("picker draining", seconds=DRAIN)
                with suppress(TimeoutError):
                    await asyncio.wait_for(asked.wait(), DRAIN)
                for task in background:
                    task.cancel()
            log.info("picker stopped")
        finally:
            await server.stop(GRACE)


def keep_memory() -> None:
    """Have malloc keep up to KEPT bytes of what large bodies took."""
    with suppress(AttributeError):  # a C library other than glibc
        malloc_option = ctypes.CDLL(None).mallopt
        malloc_option(M_TRIM_THRESHOLD, KEPT)
        malloc_option(M_MMAP_THRESHOLD, MAPPED)


def on_signals(asked: asyncio.Event) -> None:
    """Let SIGTERM and SIGINT set `asked`."""
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, asked.set)


Explain = Callable[[str, bytes, str, str], Awaitable[dict[str, Any] | None]]  # as PickerServer.explain


def explaining(explain: Explain) -> dict[str, Posted]:
    """/debug/pick, for `serve_status`: a body is posted, and the query has `cluster`, `session` and `objective`."""

    async def pick(query: Mapping[str, str], body: bytes) -> object:
        if not query.get("cluster"):
            raise ValueError("expected the query to name a cluster")
        return await explain(query["cluster"], body, query.get("session", ""), query.get("objective", ""))

    return {"/debug/pick": pick}


# --- a child ---


def encode_report(metrics: PickerMetrics, *, serving: bool) -> bytes:
    """A line to the parent."""
    report = {"serving": serving, "metrics": generate_latest(metrics.registry).decode()}
    return json.dumps(report).encode() + b"\n"


def encode_question(cluster_name: str, body: bytes, session: str, objective: str) -> bytes:
    """A line to a worker: what `PickerServer.explain` is to be asked."""
    question = {"cluster_name": cluster_name, "session": session, "objective": objective}
    return json.dumps(question | {"body": base64.b64encode(body).decode()}).encode() + b"\n"


def answer(question: bytes, server: PickerServer, worker: int) -> bytes:
    """The line to the parent that answers it."""
    fields = json.loads(question)
    explained = server.explain(**fields | {"body": base64.b64decode(fields["body"])})
    return json.dumps({"explained": {**explained, "worker": worker}}).encode() + b"\n"


async def _child(memory: Memory, control: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=control, limit=LINE)
    settings = Settings.decode(await reader.readline())
    configure(settings.log_format, settings.log_level)
    structlog.contextvars.bind_contextvars(worker=settings.worker)
    asked = asyncio.Event()
    on_signals(asked)

    async def reported(metrics: PickerMetrics, server: PickerServer) -> None:
        while True:
            writer.write(encode_report(metrics, serving=server.serving))
            with suppress(ConnectionError):
                await writer.drain()
            await asyncio.sleep(REPORT if server.serving else REPORT / 10)

    async def parent_asks(server: PickerServer) -> None:
        with suppress(ConnectionError):  # a report that could not be written
            while question := await reader.readline():
                writer.write(answer(question, server, settings.worker))
        asked.set()

    @asynccontextmanager
    async def status(metrics: PickerMetrics, server: PickerServer) -> AsyncIterator[str]:
        tasks = [asyncio.create_task(each) for each in (reported(metrics, server), parent_asks(server))]
        try:
            yield "parent"
        finally:
            for task in tasks:
                task.cancel()

    await work(settings, memory, status, asked)


def main() -> int:
    memory, control = (int(argument) for argument in sys.argv[1:])
    shared = Memory(mmap.mmap(memory, SIZE))
    try:
        uvloop.run(_child(shared, socket.socket(fileno=control)))
    except (AddressError, TlsError) as error:
        sys.stderr.write(f"vllm-xds picker: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
