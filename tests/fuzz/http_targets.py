"""HTTP, over real sockets: what pods and an API server answer, requests at the status port, answers to
`vllm-xds status`.
"""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp
from kubernetes_asyncio.client import Configuration

from tests.fuzz.engine import ROOT, Run, Target
from tests.fuzz.mutate import JSON, words
from tests.fuzz.script import dump
from xds import debug, show
from xds.api_wire import Failure as ApiFailure
from xds.control import Control
from xds.directory import read_documents
from xds.envoy import Options
from xds.index import Index, Reading
from xds.kube_client import Client
from xds.metrics import Metrics
from xds.scrape import Failure, Scraper, fetch, open_session
from xds.server import ManagementServer
from xds.status import serve_status

HTTP = (
    *(b"HTTP/1.1", b" 200 ", b"\r\n\r\n", b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", b"-1"),
    *(b"Connection: close\r\n", b"Content-Encoding: deflate\r\n", b"Content-Type: text/plain; charset=", b"\xff\xfe"),
    *(b"ffffffffffffffff\r\n", b"Content-Length: 99999999999999999999\r\n", b"Location: //\r\n"),
)
PAGES = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 36\r\n\r\n# TYPE x gauge\nkv_cache_usage_perc 1",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;a=b\r\n world\r\n0\r\nTrailer: x\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 OK\r\nContent-Encoding: gzip\r\nSet-Cookie: a=b\r\n\r\nuntil the end",
    b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
)


@asynccontextmanager
async def answering(answer: Callable[[], bytes]) -> AsyncIterator[str]:
    """A server that answers each request with these bytes, and closes; its HOST:PORT."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer())
            await writer.drain()
        except OSError:
            pass  # the client has seen enough
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    await server.wait_closed()


@contextmanager
def scrape() -> Iterator[Run]:
    """A pod answers the request for its page with any bytes: a page or a failure, in time."""
    answer = b""
    with asyncio.Runner() as runner:
        pod = answering(lambda: answer)
        address = runner.run(pod.__aenter__())

        async def opened() -> aiohttp.ClientSession:
            return open_session(2.0)

        session = runner.run(opened())

        def run(data: bytes) -> Iterable[Hashable]:
            nonlocal answer
            answer = data
            page = runner.run(fetch(session, f"http://{address}/metrics", 1.0))
            return [re.sub(r"[^a-zA-Z ]", "", page.detail)[:20] if isinstance(page, Failure) else "page"]

        yield run
        runner.run(session.close())
        runner.run(pod.__aexit__(None, None, None))


WATCHED = (
    b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{}\n\r\nb\r\n{"type":"X"}\r\n0\r\n\r\n',
    b'HTTP/1.1 429 No\r\nRetry-After: 3\r\n\r\n{"kind":"Status","code":429,"message":"no","details":{}}',
    b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic\r\nContent-Length: 2\r\n\r\n{}",
)


@contextmanager
def api_server() -> Iterator[Run]:
    """An API server answers with any bytes: values and failures, whether a document is asked for or a watch."""
    answer = b""

    async def opened(address: str) -> Client:
        configuration = Configuration()
        configuration.host = f"http://{address}"
        return Client(configuration)

    async def ask() -> list[Any]:
        document = await client.get("/apis", {"limit": 1}, 1.0)
        return [document, *[line async for line in client.lines("/apis", {"watch": "true"}, 1.0)]]

    with asyncio.Runner() as runner:
        server = answering(lambda: answer)
        client = runner.run(opened(runner.run(server.__aenter__())))

        def run(data: bytes) -> Iterable[Hashable]:
            nonlocal answer
            answer = data
            found = runner.run(ask())
            return [
                f"{each.reason} {each.status}" if isinstance(each, ApiFailure) else str(type(each)) for each in found
            ]

        yield run
        runner.run(client.aclose())
        runner.run(server.__aexit__(None, None, None))


QUERIES = (
    b"GET /debug/snapshot?type=ClusterLoadAssignment&name=pool/default/vllm-qwen-pool HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /debug/snapshot?type=Cluster&name=%70ool%2Fdefault HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /debug/snapshot HTTP/1.0\r\n\r\n",
    b"GET /debug/clients?%ff=%00&a&a=b HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /metrics?name[]=vllm_xds_objects HTTP/1.1\r\nHost: a\r\nAccept: application/openmetrics-text\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept-Encoding: gzip\r\n\r\n",
    b"POST /readyz HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
    b"GET /healthz HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
)
UNFINISHED = 0.05  # seconds for an answer: a request that is not finished has none


@contextmanager
def status() -> Iterator[Run]:
    """Any bytes at the status port: never an answer of 500, and never the end of the pages."""

    async def ask(data: bytes, within: float) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(data)
            async with asyncio.timeout(within):
                return await reader.readuntil(b"\r\n")
        except (TimeoutError, asyncio.IncompleteReadError, OSError):
            return b"no answer"
        finally:
            writer.close()

    objects = read_documents("seed.yaml", (ROOT / "tests/golden/seed/input.yaml").read_text())
    numbers = Metrics()
    with asyncio.Runner() as runner:
        server, scraper = ManagementServer(numbers), Scraper(numbers)
        control = Control(server, scraper, numbers, interval=2.0, options=Options(), clock=lambda: 0.0)
        runner.run(control.configure(Index().update(Reading(tuple(objects))).config()))
        pages = serve_status("127.0.0.1", 0, numbers.registry, lambda: True, debug.pages(control))
        port = runner.run(pages.__aenter__())

        def run(data: bytes) -> Iterable[Hashable]:
            answer = runner.run(ask(data, UNFINISHED))
            assert b" 500 " not in answer
            assert runner.run(ask(b"GET /healthz HTTP/1.0\r\n\r\n", 10)).endswith(b" 200 OK\r\n")
            return [answer[:20]]

        yield run
        runner.run(pages.__aexit__(None, None, None))


STATUS = dump(
    {
        "ready": True,
        "ports": [{"port": 8080, "group": "", "routes": 2}],
        "groups": ["edge"],
        "types": {"Cluster": {"version": "v", "resources": [{"name": "a", "version": "v", "bytes": 3}]}},
        "pools": [
            {
                "name": "pool/default/p",
                "strategy": "DEFAULT",
                "endpoints": [
                    {"endpoint": "default/a", "address": "10.0.0.1:80", "draining": False, "weight": 100, "age": 0.5}
                    | {"running": 3.0, "waiting": 0.0, "kv_usage": 0.5, "in_flight": 3},
                ],
            }
        ],
        "rejections": [
            {
                "object": "Pod a",
                "field": "spec",
                "reason": "Invalid",
                "message": "no",
                "source": "a:1",
                "level": "error",
            }
        ],
        "clients": [
            {
                "node_id": "envoy",
                "node_cluster": "c",
                "group": "",
                "variant": "delta",
                "peer": "ipv4:1",
                "settled": False,
            }
            | {
                "types": [
                    {"type": "Cluster", "wildcard": True, "names": 0, "version_sent": "2", "version_acked": "1"}
                    | {"refused": ["a"], "last_nack": "no"}
                ]
            }
        ],
    }
)
OBEYED = set("\a\b\x9b\u2028\x7f\0")  # by a terminal; escape sequences of our own are colours


class Terminal(io.StringIO):
    """Text that says it goes to a person."""

    def isatty(self) -> bool:
        return True


@contextmanager
def shown() -> Iterator[Run]:
    """Any answer of a status port is shown, or is none of ours: never a traceback, never a control character."""
    answer = b""
    pause, show.PAUSE = show.PAUSE, 0.0
    with asyncio.Runner() as runner:
        server = answering(lambda: b"HTTP/1.0 200 OK\r\n\r\n" + answer)
        address = runner.run(server.__aenter__())

        def run(data: bytes) -> Iterable[Hashable]:
            nonlocal answer
            answer = data
            outcomes: list[Hashable] = []
            for as_json in (False, True):
                out = Terminal()
                try:
                    outcomes.append(runner.run(show.show(address, out, as_json=as_json)))
                except show.StatusError as error:
                    outcomes.append(str(error).rpartition(":")[2])
                printed = out.getvalue()
                assert as_json or not set(printed) & OBEYED
                assert printed.encode() is not None
            return outcomes

        yield run
        show.PAUSE = pause
        runner.run(server.__aexit__(None, None, None))


TARGETS = (
    Target("scrape", scrape, PAGES, words(*HTTP), short=40),
    Target("api_server", api_server, (*WATCHED, *PAGES), words(b"{}\n", b"Retry-After: ", *HTTP), short=30),
    Target("status", status, QUERIES, words(b"&name=", b"%00", b"%ff", b"?type=Cluster", *HTTP), short=20),
    Target("shown", shown, (STATUS,), JSON, seconds_large=20, short=10),
)
