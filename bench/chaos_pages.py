"""Metrics pages that no vLLM serves: what a pod may answer in place of its own page (`SimulatedPod.faults.page`)."""

from __future__ import annotations

import asyncio
import itertools
import re
from contextlib import suppress

from aiohttp import web

from bench.vllm_page import CONTENT_TYPE
from bench.vllm_server import Page

SIZE = 50_000_000  # bytes of a page that is far too long
BLOCK = b"# " + b"x" * 65_533 + b"\n"
DRIP = 0.05  # seconds between two lines of a page that never ends

_REQUESTS = re.compile(rb"^(vllm:num_requests_(?:running|waiting)\{.*\}) \S+$", re.MULTILINE)
_COUNTERS = re.compile(rb"^(vllm:\w+_(?:total|sum|count)(?:\{.*\})?) (\S+)$", re.MULTILINE)


async def _begin(request: web.Request, page: bytes) -> web.StreamResponse:
    """A chunked answer that begins with the right page."""
    response = web.StreamResponse(headers={"content-type": CONTENT_TYPE})
    response.enable_chunked_encoding()
    await response.prepare(request)
    await response.write(page)
    return response


async def huge(request: web.Request, page: bytes) -> web.StreamResponse:
    """50 MB of comments behind the right page."""
    response = await _begin(request, page)
    with suppress(ConnectionError):  # its client does not read to the end
        for _ in range(SIZE // len(BLOCK)):
            await response.write(BLOCK)
    return response


async def endless(request: web.Request, page: bytes) -> web.StreamResponse:
    """One comment after the other, for ever: the handler ends when its client leaves."""
    response = await _begin(request, page)
    while True:
        await response.write(b"#\n")
        await asyncio.sleep(DRIP)


async def html(_: web.Request, __: bytes) -> web.StreamResponse:
    """What a proxy in between may say, with status 200."""
    return web.Response(text="<html><body>vllm:kv_cache_usage_perc 0.5</body></html>", content_type="text/html")


async def mislabelled(_: web.Request, page: bytes) -> web.StreamResponse:
    """The right page, which says that it is a picture."""
    return web.Response(body=page, content_type="image/png")


def requests(value: bytes) -> Page:
    """The right page but for the numbers of requests running and waiting: the pod may seem idle."""

    async def changed(_: web.Request, page: bytes) -> web.StreamResponse:
        return web.Response(body=_REQUESTS.sub(rb"\1 " + value, page), headers={"content-type": CONTENT_TYPE})

    return changed


def backwards() -> Page:
    """The right page, whose counters are half of what they were every other time."""
    factors = itertools.cycle((0.5, 1.0))

    async def changed(_: web.Request, page: bytes) -> web.StreamResponse:
        factor = next(factors)
        body = _COUNTERS.sub(lambda line: line[1] + b" " + str(float(line[2]) * factor).encode(), page)
        return web.Response(body=body, headers={"content-type": CONTENT_TYPE})

    return changed
