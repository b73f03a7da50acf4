"""`vllm-xds status` against a real management server over loopback: what it prints, and how it ends."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from aiohttp import web
from kubernetes_asyncio.client import Configuration

from tests.ads_client import DeltaPeer, SotwPeer
from tests.objects import config, gateway, gateway_class, listener, pool
from tests.test_debug import LOAD, REJECTION, WARNING, A, Running, objects, running
from xds import debug, show
from xds.__main__ import main
from xds.kube_client import Client
from xds.kube_lease import clock
from xds.kube_writer import Options as WriterOptions
from xds.kube_writer import StatusWriter
from xds.lease import Record, Write
from xds.metrics import Metrics
from xds.scrape import Reading
from xds.show import StatusError
from xds.snapshot import CLUSTER, LISTENER, ROUTE
from xds.status import serve_status

__all__ = ["running"]  # the fixture


class Terminal(io.StringIO):
    """Standard output as a person has it."""

    def isatty(self) -> bool:
        return True


async def status(address: str, out: io.StringIO | None = None, **kw: bool) -> tuple[int, list[str]]:
    """The exit code, and the lines that are printed."""
    out = out or io.StringIO()
    code = await show.show(address, out, **kw)
    return code, out.getvalue().splitlines()


async def served(running: Running) -> None:
    """A configuration in which one pod's page has been read, and its endpoints' rejections."""
    await running.control.configure(objects(REJECTION, WARNING))
    running.now += 2.0
    await running.control.follow({f"http://{A.ip}:8000/metrics": Reading(LOAD, running.now)})
    running.now += 1.5


def section(lines: list[str], title: str) -> list[str]:
    """The lines under a title."""
    start = lines.index(title) + 1
    return lines[start : lines.index("", start) if "" in lines[start:] else None]


async def test_a_server_that_has_read_nothing_is_not_ready(running: Running) -> None:
    """That is one line, and exit code 1."""
    assert await status(running.status) == (
        1,
        [f"{running.status} is not ready: it has not read a configuration yet"],
    )


async def test_the_summary(running: Running) -> None:
    """Aligned, without decoration: ports, pools with weight and load, clients, rejections; all is well, so 0."""
    await served(running)
    running.control.in_flight.report("envoy-1", {"pool/default/llm": {"10.0.0.1:8000": 17}}, running.now)
    client = await running.client(SotwPeer("envoy-1"), CLUSTER, LISTENER)
    code, lines = await status(running.status)
    (view,) = running.server.clients()
    assert lines == [
        f"{running.status} is ready: 1 route on ports 8080",
        "1 client: 1 in sync, 0 behind, 0 refused a resource",
        "1 error and 1 warning in the configuration",
        "",
        "pool/default/llm, DEFAULT, 3 endpoints",
        "  endpoint   address          weight  in flight  running  waiting  kv usage         age",
        "  default/a  10.0.0.1:8000       100         17       12        3       43%       1.5 s",
        "  default/b  10.0.0.2:8000       100          0        -        -         -  never read",
        "  default/c  10.0.0.3:8000  draining          0        -        -         -  never read",
        "",
        "clients",
        f"  node     cluster  group  variant  {'peer':{len(view.peer)}}  state    not accepted yet",
        f"  envoy-1  test     -      sotw     {view.peer}  in sync",
        "",
        "rejected in the configuration",
        "  level    object             field   reason       message     source",
        "  error    Service default/x  spec.z  Invalid      expected y  f.yaml:3",
        "  warning                             UnknownKind  not served",
    ]
    assert code == 0
    client.call.cancel()


@pytest.mark.parametrize(
    ("holder", "line"),
    [
        ("me", "writes statuses: holds the Lease ns/l"),
        ("other", "does not write statuses: other holds the Lease ns/l"),
        ("", "does not write statuses: nobody is known to hold the Lease ns/l"),
    ],
)
async def test_who_writes_statuses_is_shown(running: Running, holder: str, line: str) -> None:
    """One line of the summary, for a server that may; the same as JSON in the page."""
    await served(running)
    client = Client(Configuration(host="http://127.0.0.1:1"))
    writer = StatusWriter(client, {}, WriterOptions(("ns", "l"), "me", ("a.io/b",)), Metrics())
    if holder == "me":
        writer.lease._elector.found(None, 0.0)
        step = writer.lease._elector.next(clock(), datetime.now(UTC))
        assert isinstance(step, Write)
        writer.lease._elector.written(Record("1", step.spec), clock())
    else:
        writer.lease._elector.found(Record("1", {"holderIdentity": holder}), clock())
    pages = debug.pages(running.control, writer)
    async with serve_status("127.0.0.1", 0, Metrics().registry, lambda: True, pages) as port:
        _, lines = await status(f"127.0.0.1:{port}")
        assert lines[3] == line
        out = io.StringIO()
        await show.show(f"127.0.0.1:{port}", out, as_json=True)
        found = json.loads(out.getvalue())["statuses"]
        assert found == {"lease": "ns/l", "identity": "me", "holder": holder, "writes": holder == "me"}
    await client.aclose()


async def test_groups_are_shown(running: Running) -> None:
    """The ports of each group of Envoys, and the group of each client."""
    edge = gateway(listener(port=81), name="edge", groups=["test"])
    await running.control.configure(config(gateway_class(), gateway(), edge, *objects().http_routes, pool()))
    client = await running.client(SotwPeer("envoy-1"), CLUSTER, LISTENER)
    code, lines = await status(running.status)
    assert lines[0] == f"{running.status} is ready: 2 routes on ports 8080; test: ports 81, 8080"
    assert section(lines, "clients")[1].split()[:4] == ["envoy-1", "test", "test", "sotw"]
    assert code == 0
    client.call.cancel()


async def test_an_empty_pool_is_shown(running: Running) -> None:
    """No pods is what an operator looks for; without clients there is no table of them."""
    made = config(gateway_class(), gateway(), *objects().http_routes, pool())
    await running.control.configure(made)
    code, lines = await status(running.status)
    assert "pool/default/llm, DEFAULT, 0 endpoints" in lines
    assert "clients" not in lines
    assert code == 0


@pytest.mark.parametrize("peer", [SotwPeer, DeltaPeer])
async def test_a_client_behind_and_then_refusing(running: Running, peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are exit code 1, and say what: the type, then the resource and the client's words; accepted, it is 0."""
    monkeypatch.setattr(show, "PAUSE", 0.0)
    await running.control.configure(objects())
    client = await running.client(peer(), CLUSTER, LISTENER)
    await client.send(client.peer.subscribe(ROUTE, "http-8080"))
    await client.send(client.peer.ack(await client.receive()))

    await running.control.configure(objects(paths=2))
    response = await client.receive()
    code, lines = await status(running.status)
    assert code == 1
    assert section(lines, "clients")[1].split()[5:] == ["behind", "RouteConfiguration"]
    assert "1 client: 0 in sync, 1 behind, 0 refused a resource" in lines

    await client.send(client.peer.nack(response, "no \x1b[31msuch\nroute" + "x" * 300))
    async with asyncio.timeout(10):
        await running.server.wait_settled()
    code, lines = await status(running.status)
    assert code == 1
    assert section(lines, "clients")[1].split()[5:] == ["refused", "RouteConfiguration"]
    row = section(lines, "refused by clients")[1]
    assert row.startswith("  envoy-1  RouteConfiguration  http-8080  no  [31msuch routexxx")
    assert row.endswith("xxx...")
    assert "\x1b" not in "".join(lines)

    await running.control.configure(objects(paths=3))
    await client.send(client.peer.ack(await client.receive()))
    async with asyncio.timeout(10):
        await running.server.wait_settled()
    code, lines = await status(running.status)
    assert code == 0
    assert "refused by clients" not in lines


async def test_a_client_that_catches_up_meanwhile_is_in_sync(running: Running) -> None:
    """A change that is only just on its way is no fault: the server is asked again."""
    await running.control.configure(objects())
    client = await running.client(DeltaPeer(), CLUSTER, LISTENER)
    running.control.options = replace(running.control.options, bind="127.0.0.1")
    await running.control.configure(objects())
    response = await client.receive()
    seen = []

    async def handler(request: web.BaseRequest) -> web.Response:
        """The server's own pages; the client accepts the change when it has been seen to be behind."""
        page = await running.get(request.path)
        if "clients" in page:
            seen.append(page["clients"][0]["settled"])
            if not seen[-1]:
                await client.send(client.peer.ack(response))
                await running.server.wait_settled()
        return web.json_response(page)

    async with answering(handler) as address:
        code, lines = await status(address)
    assert seen == [False, True]
    assert code == 0
    assert section(lines, "clients")[1].split()[5:] == ["in", "sync"]


async def test_json_is_both_pages(running: Running) -> None:
    """As one document, whole; the exit code is the same."""
    await served(running)
    await running.client(DeltaPeer("envoy-1"), CLUSTER)
    code, lines = await status(running.status, as_json=True)
    document = json.loads("\n".join(lines))
    snapshot, clients = [await running.get(f"/debug/{page}") for page in ("snapshot", "clients")]
    assert document == {**snapshot, **clients}
    assert (code, document["ready"], len(document["clients"])) == (0, True, 1)


async def test_in_a_terminal(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that fit it; what others chose is text, not markup."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    await served(running)
    await running.client(DeltaPeer("[red]envoy[/]"), CLUSTER)
    code, lines = await status(running.status, Terminal())
    text = "\n".join(lines)
    assert code == 0
    assert "─" in text
    for word in ("default/a", "10.0.0.1:8000", "43%", "[red]envoy[/]", "in sync", "expected y"):
        assert word in text


async def test_the_command(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    """`vllm-xds status` prints the same, and returns the code."""
    await running.control.configure(objects())
    code = await asyncio.to_thread(main, ["status", "--server-status", running.status])
    assert code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert f"{running.status} is ready: 1 route on ports 8080" in captured.out


# --- what is not a management server ---


def test_nobody_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 and what to look at, without a traceback."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert main(["status", "--server-status", address]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"vllm-xds status: cannot connect to {address}: is `vllm-xds serve` running with this --status?\n"
    )


@pytest.mark.parametrize("address", ["here", "h:0", "h:99999", ":1"])
def test_wrong_usage(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and a sentence."""
    assert main(["status", "--server-status", address]) == 2
    assert capsys.readouterr().err == (
        f"vllm-xds status: expected HOST:PORT with a port from 1 to 65535, found {address!r}\n"
    )


def test_a_host_that_can_not_be_one(capsys: pytest.CaptureFixture[str]) -> None:
    """One line all the same."""
    assert main(["status", "--server-status", "a b/c:1"]) == 1
    assert capsys.readouterr().err.startswith("vllm-xds status: cannot connect to a b/c:1: ")


@asynccontextmanager
async def answering(handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """Another program's HTTP server on loopback; its HOST:PORT."""
    server = web.Server(handler)
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


EMPTY: dict[str, Any] = {"ready": True, "ports": [], "pools": [], "rejections": [], "clients": []}
BUSY = {"running": 0, "waiting": 10**400, "kv_usage": 0, "age": 1}
HUGE = {
    "name": "p",
    "strategy": "DEFAULT",
    "endpoints": [{"endpoint": "a", "address": "b", "weight": 1, "draining": False, **BUSY}],
}


@pytest.mark.parametrize(
    "body",
    [
        "",
        "not JSON",
        "[]",
        "7",
        "[" * 100_000,
        '{"clients": 7}',
        '{"clients": [{}]}',
        '{"ready": true}',
        json.dumps({**EMPTY, "pools": 7}),
        json.dumps({**EMPTY, "pools": [7]}),
        json.dumps({**EMPTY, "pools": [{}]}),
        json.dumps({**EMPTY, "rejections": [{}]}),
        json.dumps({**EMPTY, "pools": [HUGE]}),
    ],
    ids=lambda body: body[:12],
)
async def test_an_answer_of_another_shape(body: str) -> None:
    """Whatever it is, a number beyond every float included, there is one sentence."""

    async def handler(_: web.BaseRequest) -> web.Response:
        return web.Response(text=body)

    async with answering(handler) as address:
        with pytest.raises(StatusError) as told:
            await status(address)
        assert str(told.value) == f"{address} answers, but not as a management server of this version"


async def test_nothing_of_an_answer_moves_the_cursor() -> None:
    """Not even where only numbers and names of ours are expected."""
    ports = [{"port": "\x1b[2J", "group": "", "routes": 0}, {"port": 1, "group": "\x1b]0;", "routes": 0}]

    async def handler(_: web.BaseRequest) -> web.Response:
        return web.json_response({**EMPTY, "ports": ports})

    async with answering(handler) as address:
        _, lines = await status(address)
    assert "\x1b" not in "".join(lines)
    assert " [2J;  ]0;: ports 1" in lines[0]


async def test_another_http_server() -> None:
    """A status other than 200 is named; a redirect is not followed."""

    async def handler(_: web.BaseRequest) -> web.Response:
        return web.Response(status=302, headers={"Location": "/elsewhere"})

    async with answering(handler) as address:
        with pytest.raises(StatusError, match=f"http://{address}/debug/snapshot answers with status 302"):
            await status(address)


async def test_a_port_that_speaks_something_else(running: Running) -> None:
    """The ADS port instead of the status port is the likely mistake."""
    with pytest.raises(StatusError, match="not as a management server"):
        await status(running.address)


async def test_a_hung_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After TIMEOUT in all."""
    monkeypatch.setattr(show, "TIMEOUT", 0.05)

    async def handler(_: web.BaseRequest) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with answering(handler) as address:
        with pytest.raises(StatusError, match=f"{address} does not answer within 0.05 s"):
            await status(address)


async def test_an_endless_answer_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """After MAX_PAGE bytes, whatever the server says of its length."""
    monkeypatch.setattr(show, "MAX_PAGE", 1 << 20)

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" " * 65536)

    async with answering(handler) as address:
        with pytest.raises(StatusError, match="answers with more than 1 MiB"):
            await status(address)
