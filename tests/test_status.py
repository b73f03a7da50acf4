"""The HTTP endpoints of a process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Counter

from xds.metrics import EndpointCollector, EndpointState, Metrics
from xds.model import Load
from xds.status import serve_status


async def get(port: int, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as response:
        return response.status, await response.text()


async def test_health_readiness_and_metrics() -> None:
    """Alive from the start, ready when it does its work, and its own registry and no other."""
    registry = CollectorRegistry()
    Counter("requests", "Requests.", registry=registry).inc()
    ready = False
    async with serve_status("127.0.0.1", 0, registry, lambda: ready) as port:
        assert await get(port, "/healthz") == (200, "ok\n")
        assert await get(port, "/readyz") == (503, "not ready\n")
        ready = True
        assert await get(port, "/readyz") == (200, "ready\n")
        status, page = await get(port, "/metrics")
        assert status == 200
        assert "requests_total 1.0" in page.splitlines()
        assert "python_info" not in page
        assert (await get(port, "/"))[0] == 404
    with pytest.raises(aiohttp.ClientConnectorError):
        await get(port, "/healthz")


async def test_a_busy_port_is_an_error() -> None:
    """Nothing is served beside another process, and nothing stays open."""
    async with serve_status("127.0.0.1", 0, CollectorRegistry(), lambda: True) as port:
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            async with serve_status("127.0.0.1", port, CollectorRegistry(), lambda: True):
                pass


async def test_pages_of_json() -> None:
    """A page is given the query, and what it does not have is a 404, as is a page that nobody gave."""

    async def page(query: Mapping[str, str]) -> object:
        return {"name": query["name"]} if query.get("name") else None

    async with serve_status("127.0.0.1", 0, CollectorRegistry(), lambda: True, {"/debug/x": page}) as port:
        assert await get(port, "/debug/x?name=a%2Fb") == (200, '{"name": "a/b"}')
        assert await get(port, "/debug/x") == (404, "no such thing\n")
        assert (await get(port, "/debug/y?name=a"))[0] == 404


@pytest.mark.parametrize(
    "request_",
    [
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"a" * 9000,
        b"GET http://[ HTTP/1.1\r\n\r\n",
    ],
)
async def test_a_bad_request_is_refused_without_a_word(request_: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever can connect would fill the log: an answer of 400, and the next one is served."""
    async with serve_status("127.0.0.1", 0, CollectorRegistry(), lambda: True) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_)
        assert b" 400 " in await reader.readline()
        writer.close()
        assert (await get(port, "/healthz"))[0] == 200
    assert caplog.records == []


async def test_a_fault_of_a_page_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """It is ours: an answer of 500, and a traceback."""

    async def page(_: Mapping[str, str]) -> object:
        raise ZeroDivisionError

    async with serve_status("127.0.0.1", 0, CollectorRegistry(), lambda: True, {"/debug/x": page}) as port:
        assert (await get(port, "/debug/x"))[0] == 500
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


def test_every_series_has_our_prefix() -> None:
    """The names dashboards know are ours alone."""
    names = [family.name for family in Metrics().registry.collect()]
    assert [name for name in names if not name.startswith("vllm_xds_")] == []
    assert len(names) > 10


def test_an_endpoint_without_a_page_has_no_gauges_of_one() -> None:
    """Zero would say it is idle."""
    read = EndpointState("p", "default/a", 80, 1.5, Load(running=3, waiting=2, kv_usage=0.25))
    unread = EndpointState("p", "default/b", 100, 9.0, None)
    families = EndpointCollector(lambda: [read, unread]).collect()
    samples = {
        (s.name.removeprefix("vllm_xds_endpoint_"), s.labels["endpoint"]): s.value for f in families for s in f.samples
    }
    assert samples == {
        ("weight", "default/a"): 80,
        ("weight", "default/b"): 100,
        ("load_age_seconds", "default/a"): 1.5,
        ("load_age_seconds", "default/b"): 9.0,
        ("running", "default/a"): 3,
        ("waiting", "default/a"): 2,
        ("kv_usage", "default/a"): 0.25,
    }
