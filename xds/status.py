"""The HTTP endpoints of a process of ours: /metrics, /healthz (alive), /readyz (does its work), and pages of JSON.

What is posted is work, so it is done for this machine alone, wherever else the pages may be read.
"""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler
from prometheus_client import CollectorRegistry
from prometheus_client.aiohttp import make_aiohttp_handler

from xds.model import authority

DEFAULT_ADDRESS = "127.0.0.1:19001"  # of the management server: whoever may ask is told every pod's address

SHUTDOWN = 1.0  # seconds for pages that are being read when the process ends

KEEP_ALIVE = 75.0  # seconds a connection may be idle; aiohttp's own is an hour
MAX_POSTED = 8 << 20  # bytes: of a request's body the picker reads the first 2 MiB, and the rest only for its model

Page = Callable[[Mapping[str, str]], Awaitable[object]]  # the query -> a JSON value, or None: there is no such thing
Posted = Callable[[Mapping[str, str], bytes], Awaitable[object]]  # the same of query and body; ValueError, a sentence


@asynccontextmanager
async def serve_status(
    host: str,
    port: int,
    registry: CollectorRegistry,
    ready: Callable[[], bool],
    pages: Mapping[str, Page] | None = None,
    posted: Mapping[str, Posted] | None = None,
) -> AsyncIterator[int]:
    """Serve on `host:port` (0 = any free one) inside the `with`; yields the port. OSError, a sentence: it is taken."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ready\n") if ready() else web.Response(status=503, text="not ready\n")

    app = web.Application(client_max_size=MAX_POSTED)
    app.router.add_get("/metrics", make_aiohttp_handler(registry))
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    for path, page in (pages or {}).items():
        app.router.add_get(path, _json_handler(page))
    for path, answer in (posted or {}).items():
        app.router.add_post(path, _posted_handler(answer))
    runner = web.AppRunner(app, access_log=None, logger=_log(), shutdown_timeout=SHUTDOWN, keepalive_timeout=KEEP_ALIVE)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:  # asyncio's text repeats the address, the system's own does not
            why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
            raise OSError(f"cannot listen on {authority(host, port)}: {why}") from None
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def _log() -> logging.Logger:
    """Where aiohttp writes of failed requests: our own faults alone, or anyone could have a traceback logged."""
    log = logging.Logger("aiohttp.server")  # noqa: LOG001 - not the process's: another application may use aiohttp too
    log.parent = logging.getLogger()
    log.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError)))
    return log


def _json_handler(page: Page) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        value = await page(request.query)
        return web.Response(status=404, text="no such thing\n") if value is None else web.json_response(value)

    return handle


def _posted_handler(answer: Posted) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        if not _is_here(request.remote):
            return web.Response(status=403, text="only for this machine\n")
        try:
            value = await answer(request.query, await request.read())
        except ValueError as error:
            return web.Response(status=400, text=f"{error}\n")
        return web.Response(status=404, text="no such thing\n") if value is None else web.json_response(value)

    return handle


def _is_here(address: str | None) -> bool:
    """Whether a peer is on this machine."""
    peer = ipaddress.ip_address(address or "::")
    mapped = peer.ipv4_mapped if isinstance(peer, ipaddress.IPv6Address) else None
    return (mapped or peer).is_loopback
