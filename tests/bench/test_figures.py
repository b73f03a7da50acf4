"""The benchmarks: each measures what it says, in a tiny form. No test here looks at how long anything took."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import pytest

from bench import (
    change_ack,
    exchange_cost,
    figures,
    many_clients,
    page_cost,
    picker_memory,
    request_cpu,
    route_latency,
    server_cost,
    worker_hits,
)
from bench.closed_loop import SYSTEMS, USERS, AnswerError, Client, alternate, hammer, requests
from bench.envoy import free_port
from bench.grpc_servers import SERVERS
from bench.instant_pod import ANSWER, InstantPod, reply, vllm_page
from bench.many_clients import Server
from bench.report import Table, cpu_seconds, number
from bench.rig import BY_MODEL, PICKED, PLAIN, Rig
from bench.route_latency import Case
from bench.xds_clients import BAD, Fleet


@asynccontextmanager
async def listening(protocol: Callable[[], asyncio.Protocol]) -> AsyncIterator[int]:
    """A server on loopback; its port."""
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def pod() -> InstantPod:
    return InstantPod(reply(b"page"))


def positive(cells: tuple[str, ...]) -> bool:
    return all(float(cell.replace(",", "")) > 0 for cell in cells)


@pytest.mark.parametrize("size", [2_000, 6_000, 400_000])
def test_bodies_are_conversations_of_the_size_asked_for(size: int) -> None:
    """Exactly `size` bytes of JSON, all different, and a system prompt that USERS of them share."""
    sent = requests(size)
    bodies = [request.partition(b"\r\n\r\n")[2] for request in sent]
    assert {len(body) for body in bodies} == {size}
    assert all(f"content-length: {size}\r\n".encode() in request for request in sent)
    assert len(set(bodies)) == SYSTEMS * USERS
    systems = [json.loads(body)["messages"][0]["content"] for body in bodies]
    assert {systems.count(system) for system in systems} == {USERS}
    assert sent == requests(size)


class Written(asyncio.Transport):
    """A connection's other end: what was written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.data = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.data += data


def test_an_instant_pod_answers_whole_requests() -> None:
    """Nothing before the body is complete, one answer each when two come at once, and the page for /metrics."""
    connection, out = pod(), Written()
    connection.connection_made(out)
    request = b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"
    for index in range(len(request)):
        assert out.data == b""
        connection.data_received(request[index : index + 1])
    assert out.data == reply(ANSWER)
    connection.data_received(request + b"GET /metrics HTTP/1.1\r\n\r\n")
    assert out.data == reply(ANSWER) * 2 + reply(b"page")


async def test_the_ports_get_the_same_requests() -> None:
    """`alternate` times blocks * block * clients answers of each port, sorted; `hammer` counts what it gets."""
    async with listening(pod) as one, listening(pod) as other:
        ports = {"one": one, "other": other}
        times = await alternate(ports, requests(2_000), 3, blocks=2, block=4, pause=0.001)
        assert {name: len(seconds) for name, seconds in times.items()} == {"one": 24, "other": 24}
        assert all(seconds == sorted(seconds) and seconds[0] > 0 for seconds in times.values())
        assert await hammer(one, requests(2_000), 2, seconds=0.01) > 0


class Refusing(asyncio.Protocol):
    """Answers 503, and closes the connection at the second request."""

    def __init__(self) -> None:
        self._asked = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:  # noqa: ARG002 - asyncio's form
        if self._asked:
            self._transport.close()
        else:
            self._asked = True
            assert isinstance(self._transport, asyncio.WriteTransport)
            self._transport.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")


async def test_a_failed_request_is_no_figure() -> None:
    """An answer that is not a 200, and a connection that is closed, raise instead of being timed."""
    async with listening(Refusing) as port, asyncio.timeout(10):
        client = await Client.connect(port)
        with pytest.raises(AnswerError, match="503"):
            await client.ask(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(AnswerError, match="closed"):
            await client.ask(b"GET / HTTP/1.1\r\n\r\n")


def test_a_table_is_markdown() -> None:
    """A header, a line that aligns numbers to the right, the rows, the notes."""
    table = str(Table("Title", ("what", "us"), (("a", "1.00"),), ("Note.",)))
    assert table == "### Title\n\n| what | us |\n| --- | ---: |\n| a | 1.00 |\n\nNote.\n"


def test_numbers_have_three_digits() -> None:
    """Large ones with separators, small ones without an exponent, and none negative by accident."""
    assert [number(value) for value in (12345.6, 123.4, 12.34, 1.234, 0.1234, 0.01234, -1.234)] == [
        "12,346",
        "123",
        "12.3",
        "1.23",
        "0.12",
        "0.012",
        "-1.23",
    ]


def test_cpu_seconds_grow_with_work() -> None:
    """What proc says of this process is what this process says of itself, within a clock tick or two."""
    times = os.times()
    assert cpu_seconds(os.getpid()) == pytest.approx(times.user + times.system, abs=0.1)


def test_pages_are_parsed_by_both() -> None:
    """A row for each parser, with the page's real size."""
    page = vllm_page()
    table = page_cost.parsers({"pod": page}, rounds=1)
    assert [row[:2] for row in table.rows] == [
        (f"pod, {len(page):,} bytes, {len(page.splitlines())} lines", parser)
        for parser in ("xds.exposition", "prometheus_client")
    ]
    assert all(positive(row[2:]) for row in table.rows)


async def test_the_scraper_reads_every_pod() -> None:
    """Three pods, each at an address of its own, none failing; of five with bad ones, what hangs or is slow fails."""
    fleet, read, failing, *figures_ = await page_cost.scraper(pods=3, interval=0.1, rounds=5)
    assert (fleet, failing) == ("3", "0")
    assert int(read) > 3
    assert positive(tuple(figures_))
    fleet, read, failing, *figures_ = await page_cost.scraper(pods=5, interval=0.3, rounds=2, hung=1, slow=1, large=1)
    assert (fleet, failing) == ("5, 1 hung, 1 slow, 1 large", "2")
    assert int(read) > 3
    assert len(figures_) == 4


async def test_envoys_are_simulated() -> None:
    """Every change is accepted by every good client of both variants, whatever bad ones do; without one nothing is."""
    async with Server(endpoints=40, pools=2, interval=0.1) as running, Fleet(running.address) as fleet:
        delta, (sotw,) = await fleet.join(2), await fleet.join(1, delta=False)
        for manner in BAD:
            await fleet.join(1, manner=manner)
        good = (*delta, sotw)
        watched = await running.watch(good, rounds=3)
        assert watched.rounds >= 3
        assert len(watched.acks) >= 3 * len(watched.last) >= 3
        assert 0 < watched.acks[0] <= watched.acks[-1] == watched.last[-1]
        assert watched.sent > 3 * 40 * 70  # bytes: an endpoint has some 80
        assert len(watched.cells(len(good))) == len(many_clients.COLUMNS)
        running.change(1)
        one = await running.watch(good, rounds=3)
        assert one.sent / one.rounds < 0.75 * watched.sent / watched.rounds
        running.change(0)
        none = await running.watch(good, rounds=3)
        assert (none.sent, none.acks, none.last) == (0, [], [])
    assert many_clients.state_bytes(endpoints=4, pools=2, count=1) > 1_000


def test_a_decision_is_made_by_cost() -> None:
    """`decision` times picks of a pool whose loads are fresh; it raises when one is not by cost."""
    body = requests(2_000)[0].partition(b"\r\n\r\n")[2]
    assert request_cpu.decision([body], pods=2, rounds=1) > 0
    with pytest.raises(Exception, match="not every prompt"):
        request_cpu.decision([b"no JSON"], pods=2, rounds=1)


@pytest.mark.envoy
async def test_requests_through_the_gateway() -> None:
    """Latency and CPU of each route through the real Envoy, with every LLM request picked by cost (else they raise)."""
    async with Rig(pods=2) as rig:
        tiny = Case("tiny", 2, blocks=2, block=3)
        table = await route_latency.measure(rig, [(tiny, 2_000)], warm=tiny)
        assert [row[:3] for row in table.rows] == [("2 KB, tiny", route, "12") for route in (PLAIN, PICKED, BY_MODEL)]
        assert all(positive(row[3:5]) for row in table.rows)
        assert table.rows[0][5:] == ("",) * 4
        envoy, picker = await request_cpu.measure(rig, sizes=(2_000,), seconds=0.4, idle=0.2)
        assert envoy.columns == ("body", f"{PLAIN}, us", f"{PICKED}, us", f"{BY_MODEL}, us")
        assert [len(row) for row in (*envoy.rows, *picker.rows)] == [4, 5]
        assert positive(picker.rows[0][1:])
        table = await server_cost.measure(
            {server_cost.OURS: rig}, sizes=(2_000,), seconds=0.3, rounds=1, alone=5, idle=0.1
        )
        assert [row[:2] for row in table.rows] == [("2 KB", server_cost.OURS)]
        assert positive((table.rows[0][2], table.rows[0][4]))


@pytest.mark.parametrize("name", SERVERS)
async def test_other_servers_answer(name: str) -> None:
    """What the picker's own server is compared with does the same: messages of any size, one after another."""
    server = SERVERS[name]({"/a.B/C": lambda message: message[::-1]})
    address = f"127.0.0.1:{free_port()}"
    await server.start([address])
    try:
        async with asyncio.timeout(20), grpc.aio.insecure_channel(address) as channel:
            for message in (b"", b"abc", bytes(range(256)) * 1000):
                assert await channel.unary_unary("/a.B/C")(message) == message[::-1]
    finally:
        await server.stop(0)


def test_workers_and_pickers_pick_as_one() -> None:
    """A row for one, and for two as workers, with and without exchange; neither of the first two loses hits."""
    table = worker_hits.measure((1, 2), requests=1200, seeds=(1,))
    assert [row[0] for row in table.rows] == ["1 picker", "2 workers", "2 pickers, exchange", "2 pickers, no exchange"]
    one, shared, heard, apart = (float(row[1]) for row in table.rows)
    assert abs(one - shared) < 1 < one - apart
    assert abs(one - heard) < 1


async def test_what_the_exchange_costs() -> None:
    """One picker tells nothing, and hears only that it is alone; two hear nearly all that they tell, and it costs."""
    table = await exchange_cost.measure(((1, 50), (2, 200)), seconds=0.6, requests=200)
    (alone, told, _, noted, *_), two = table.rows
    assert (alone, float(told), noted) == ("1, 50", 0, "-")
    assert two[0] == "2, 200"
    assert positive(two[1:-1])
    assert float(two[-1]) >= 0  # counted in ticks of 10 ms: of so short a time there may be none
    assert 30 < float(two[3]) < 130


def test_memory_of_new_prompts() -> None:
    """Each prompt has chunks of its own, and they are held."""
    table = picker_memory.measure((0, 40))
    assert [(row[0], row[3]) for row in table.rows] == [("0", "0"), ("40", "80")]


@pytest.mark.envoy
async def test_weights_reach_envoy() -> None:
    """Every change is accepted by the real Envoy; the bytes are those of the whole assignment."""
    endpoints, changes, *times, size = await change_ack.weights(2, changes=3)
    assert (endpoints, changes) == ("2", "3")
    assert positive(tuple(times))
    assert 100 < int(size) < 200
    assert positive(change_ack.computing(2, rounds=1))


@pytest.mark.envoy
async def test_saved_files_reach_envoy() -> None:
    """Each save changes what is served, and is accepted."""
    what, count, *times = await change_ack.saves(2, pods=2)
    assert (what, count) == ("2 pods", "2")
    assert positive(tuple(times))


def test_a_benchmark_that_fails_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    """The exit status is 1, and what failed is named; the machine is named first."""
    assert figures.main(("bench.nothing",)) == 1
    out, err = capfd.readouterr()
    assert "Envoy 1." in out.splitlines()[0]
    assert "bench.nothing FAILED" in err
