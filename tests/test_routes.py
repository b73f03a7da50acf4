"""Routes, evaluated: one real Envoy with a static configuration of ours in front of an upstream that echoes.

Whatever a test asks, the route that Envoy says it has taken is held against the one xds/match.py finds.

Redirects, whose Location depends on the listener's port, are looked at on ports 80 and 8080: Envoy listens on free
ports instead, and is told of the others by nothing but its routes.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from yarl import URL

from bench.envoy import Envoy, free_port
from tests.goldens import OUTPUTS, decoded
from tests.objects import (
    backend,
    config,
    exact,
    gateway,
    gateway_class,
    listener,
    parent,
    pod,
    pool,
    prefix,
    route,
    rule,
    service,
)
from xds.envoy import Options
from xds.match import Found, Request, body_model, find
from xds.model import (
    Filters,
    HeaderModifier,
    MatchType,
    Object,
    PathMatch,
    PathModifier,
    PortListener,
    RequestRedirect,
    RouteMatch,
    RouteRule,
    Strategy,
    Topology,
    URLRewrite,
    ValueMatch,
)
from xds.resolve import resolve
from xds.translate import translate

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]

# Path of a request, path of its match, replacement, what comes of it: the table of HTTPPathModifier.replacePrefixMatch,
# then what it leaves to us.
PREFIXES = [
    ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
    ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
    ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
    ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
    ("/foo", "/foo", "/xyz", "/xyz"),
    ("/foo/", "/foo", "/xyz", "/xyz/"),
    ("/foo/bar", "/foo", "", "/bar"),
    ("/foo/", "/foo", "", "/"),
    ("/foo", "/foo", "", "/"),
    ("/foo/", "/foo", "/", "/"),
    ("/foo", "/foo", "/", "/"),
    ("/foo/bar?q=1&r=%2F", "/foo", "/xyz", "/xyz/bar?q=1&r=%2F"),
    ("/foo?q=/foo", "/foo", "/", "/?q=/foo"),
    ("/foo/bar", "/foo", "xyz", "/xyz/bar"),  # a path begins with a slash, whoever forgot it
    ("/bar", "/", "/xyz", "/xyz/bar"),
    ("/bar", "/", "/xyz/", "/xyz/bar"),
    ("/bar", "/", "/", "/bar"),
    ("/bar", "/", "", "/bar"),
    ("/f.o-o~/bar", "/f.o-o~", "/", "/bar"),
    ("/foo/bar", "/foo", "/\\1", "/\\1/bar"),
]
FULL = [
    ("/foo/bar", "/xyz", "/xyz"),
    ("/foo?q=1", "/xyz", "/xyz?q=1"),
    ("/foo", "xyz", "/xyz"),
    ("/foo", "", "/"),
    ("/foo", "/\\1", "/\\1"),
]


def rewritten(to: str, *, full: bool) -> Filters:
    return Filters(rewrite=URLRewrite(path=PathModifier(full, to)))


def redirected(**kw: Any) -> Filters:
    return Filters(redirect=RequestRedirect(**kw))


def on_host(hostname: str, *rules: RouteRule) -> Object:
    return route(*rules, name=hostname, hostnames=[hostname], parents=[parent(section="any")])


def value(name: str, text: str, kind: MatchType = MatchType.EXACT) -> ValueMatch:
    return ValueMatch(name, text, kind)


def objects(upstream: int) -> list[Object]:
    """Two Services and a pool on loopback addresses of one upstream, which says at which it was asked."""
    modifier = HeaderModifier(
        set=(("X-Set", "100%"), ("X-Op", "%REQ(:path)%")), add=(("X-Add", "ours"),), remove=("X-Remove",)
    )
    model = [(name, prefix(headers=(value("x-gateway-model-name", name),))) for name in ("small", "large")]
    return [
        gateway_class(),
        gateway(
            listener("any", 8080),
            listener("isolated", 8080, "*.isolated.test"),
            listener("eighty", 80),
        ),
        service("web", selector={"app": "web"}, target=upstream),
        service("other", selector={"app": "other"}, target=upstream),
        service("empty", selector={"app": "empty"}),
        pool("llm", selector={"app": "llm"}, ports=(upstream,), strategy=Strategy.PREFIX_CACHE),
        *(pod(name, ip, labels={"app": name}) for name, ip in ADDRESSES.items()),
        on_host(
            "matches.test",
            rule(matches=[exact("/exact")]),
            rule(backend("other"), matches=[prefix("/exact")]),
            rule(matches=[RouteMatch(PathMatch(MatchType.REGEX, "/r[0-9]+"))]),
            rule(matches=[prefix("/m", method="POST")]),
            rule(matches=[prefix("/h", headers=(value("x-a", "1"), value("x-b", "[0-9]+", MatchType.REGEX)))]),
            rule(matches=[prefix("/q", query=(value("a", "1"), value("b", "x.*", MatchType.REGEX)))]),
        ),
        on_host("*.matches.test", rule(matches=[prefix("/wild")])),
        on_host("one.matches.test", rule(backend("other"), matches=[prefix("/one")])),
        on_host("headers.test", rule(filters=Filters(request_headers=modifier, response_headers=modifier))),
        on_host(
            "backend-headers.test",
            rule(backend(filters=Filters(request_headers=HeaderModifier(set=(("X-Backend", "100%"),))))),
        ),
        on_host("host.test", rule(filters=Filters(rewrite=URLRewrite(hostname="inner.test")))),
        on_host("invalid.test", rule(backend("missing"))),
        on_host("half.test", rule(backend(), backend("missing"))),
        on_host("weights.test", rule(backend(weight=3), backend("other", weight=1), backend("empty", weight=0))),
        on_host("empty.test", rule(backend("empty"))),
        on_host(
            "timeouts.test",
            rule(matches=[prefix("/request")], timeout=0.1),
            rule(matches=[prefix("/backend")], backend_timeout=0.1),
            rule(matches=[prefix("/both")], timeout=10.0, backend_timeout=0.1),
        ),
        on_host("llm.test", rule(backend("llm", "InferencePool", port=0))),
        on_host("name.test", rule(filters=redirected(scheme="https"))),
        route(
            rule(matches=[prefix("/anywhere")]),
            rule(matches=[prefix("/to-https")], filters=redirected(scheme="https", status=301)),
            rule(matches=[prefix("/to-host")], filters=redirected(hostname="new.test")),
            rule(
                matches=[prefix("/to-https-host")], filters=redirected(scheme="https", hostname="new.test", status=308)
            ),
            rule(matches=[prefix("/to-http")], filters=redirected(scheme="http", hostname="new.test", status=303)),
            rule(matches=[prefix("/to-port")], filters=redirected(port=8443, scheme="https", status=307)),
            rule(matches=[prefix("/to-443")], filters=redirected(port=443, scheme="http", hostname="new.test")),
            rule(matches=[prefix("/to-path")], filters=redirected(path=PathModifier(True, "/here"))),
            name="anywhere",
            parents=[parent(section="any"), parent(section="eighty")],
        ),
        *(
            on_host(f"prefix-{i}.test", rule(matches=[prefix(match)], filters=rewritten(to, full=False)))
            for i, (_, match, to, _) in enumerate(PREFIXES)
        ),
        *(
            on_host(
                f"prefix-{i}.moved.test",
                rule(matches=[prefix(match)], filters=redirected(path=PathModifier(False, to), port=80, scheme="http")),
            )
            for i, (_, match, to, _) in enumerate(PREFIXES)
        ),
        *(on_host(f"full-{i}.test", rule(filters=rewritten(to, full=True))) for i, (_, to, _) in enumerate(FULL)),
        *(
            on_host(
                f"full-{i}.moved.test",
                rule(filters=redirected(path=PathModifier(True, to), port=80, scheme="http")),
            )
            for i, (_, to, _) in enumerate(FULL)
        ),
        on_host(
            "model.test",
            rule(backend("llm", "InferencePool", port=0), matches=[model[0][1]]),
            rule(backend("other"), matches=[model[1][1]]),
            rule(matches=[prefix("/plain")]),
            rule(matches=[prefix("/old")], filters=redirected(hostname="new.test", port=80)),
        ),
        on_host(
            "odd.test",
            rule(matches=[prefix("/host", headers=(value("host", "odd.test:1"),))]),
            rule(matches=[prefix("/scheme", headers=(value("x-forwarded-proto", "http"),))]),
            rule(matches=[RouteMatch(PathMatch(MatchType.REGEX, "/a/.{3}/(b|c+)/?"))]),
            rule(matches=[prefix("/any", headers=(value("x-gateway-model-name", ".*", MatchType.REGEX),))]),
            rule(matches=[prefix("/a/b", query=(value("q", "%61", MatchType.EXACT),)), exact("/a/b/")]),
            rule(matches=[prefix("/a/b/c", headers=(value("x-a", "[^,]", MatchType.REGEX),)), prefix("/a")]),
        ),
    ]


ADDRESSES = {"web": "127.9.0.1", "other": "127.9.0.2", "llm": "127.9.0.3"}
BACKENDS = {ip: name for name, ip in ADDRESSES.items()}


OWN_ROUTES = ("no-match", "unsendable-model")  # ours, and no HTTPRoute's
WORKERS_STARTED = {"stats": [{"name": "listener_manager.workers_started", "value": 1}]}


@dataclass
class Proxy:
    """Envoy's two ports, by the number its Gateway gives them, and a client."""

    ports: dict[int, int]
    listeners: dict[int, PortListener]
    session: aiohttp.ClientSession

    async def ask(
        self, host: str, path: str = "/", *, port: int = 8080, method: str = "GET", **kw: Any
    ) -> tuple[int, Any, aiohttp.ClientResponse]:
        """Status, the upstream's echo (or the text of Envoy's own answer), and the response."""
        url = URL(f"http://127.0.0.1:{self.ports[port]}{path}", encoded=True)
        headers = {"Host": host, **kw.pop("headers", {})}
        async with self.session.request(method, url, headers=headers, allow_redirects=False, **kw) as response:
            text = await response.text()
            taken = response.headers.get("X-Vllm-Route")
            body = json.dumps(kw["json"]).encode() if "json" in kw else kw.get("data", b"")
            self.explained(port, Request(method, host, path, tuple(headers.items()), body_model(body)[0]), taken)
            echoed = response.headers.get("X-Upstream") == "echo"
            return response.status, json.loads(text) if echoed else text, response

    def explained(self, port: int, request: Request, taken: str | None) -> Found:
        """What our own matching finds, which has to be what Envoy has taken."""
        found = find(self.listeners[port], request)
        assert (found.route and found.route.name) == (None if taken in OWN_ROUTES else taken), request
        return found

    async def location(self, host: str, path: str, port: int = 8080) -> tuple[int, str]:
        status, _, response = await self.ask(host, path, port=port)
        return status, response.headers["Location"]

    async def reached(self, host: str, path: str = "/", **kw: Any) -> str | int:
        """The Service or pool that answered, else Envoy's status."""
        status, echo, _ = await self.ask(host, path, **kw)
        return BACKENDS[echo["address"]] if status == HTTPStatus.OK else status


async def echo(request: web.Request) -> web.Response:
    assert request.transport is not None
    if request.path.endswith("/silence"):
        await asyncio.Event().wait()  # until Envoy gives the request up
    seen = {
        "address": request.transport.get_extra_info("sockname")[0],
        "path": request.raw_path,
        "host": request.host,
        "headers": [(name.lower(), text) for name, text in request.headers.items()],
        "body": await request.text(),
    }
    return web.json_response(
        seen, headers={"X-Upstream": "echo", "X-Set": "theirs", "X-Add": "theirs", "X-Remove": "x"}
    )


def static(topology: Topology, ports: dict[int, int], admin: int) -> dict[str, Any]:
    """Our resources as one static configuration, on other ports."""
    snapshot = translate(topology, Options(bind="127.0.0.1", pickers=("127.0.0.1:1",), debug_headers=True), {})
    listeners, routes, clusters, endpoints = (decoded(snapshot, *OUTPUTS[file]) for file in OUTPUTS)
    by_name = {each["name"]: each | {"validate_clusters": False} for each in routes}
    for each in listeners:
        address = each["address"]["socket_address"]
        address["port_value"] = ports[address["port_value"]]
        manager = each["filter_chains"][0]["filters"][0]["typed_config"]
        manager["route_config"] = by_name[manager.pop("rds")["route_config_name"]]
    assignments = {each["cluster_name"]: each for each in endpoints}
    for each in clusters:
        if each.pop("eds_cluster_config", None):
            each |= {"type": "STATIC", "load_assignment": assignments[each["name"]]}
    return {
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": admin}}},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Proxy]:
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", echo)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, max_field_size=1 << 14)
    await runner.setup()
    site = web.TCPSite(runner, "0.0.0.0", 0)
    await site.start()
    upstream = runner.addresses[0][1]
    folder: Path = tmp_path_factory.mktemp("routes")
    ports = {80: free_port(), 8080: free_port()}
    admin = free_port()
    topology = resolve(config(*objects(upstream)))
    (folder / "envoy.json").write_text(json.dumps(static(topology, ports, admin)))
    async with (
        Envoy(folder / "envoy.json", f"127.0.0.1:{admin}", folder / "envoy.log") as envoy,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
    ):
        await envoy.ready()
        async with asyncio.timeout(20):  # its workers listen a moment later
            while await envoy.get("/stats?format=json&filter=workers_started") != WORKERS_STARTED:
                pass
        yield Proxy(ports, {each.port: each for each in topology.listeners}, session)
    await runner.cleanup()


# --- matches ---


@pytest.mark.parametrize(
    ("path", "kw", "expected"),
    [
        ("/exact", {}, "web"),
        ("/exact?q=1", {}, "web"),
        ("/exact/", {}, "other"),
        ("/exact/more", {}, "other"),
        ("/exactly", {}, 404),
        ("/Exact", {}, 404),
        ("/r12", {}, "web"),
        ("/r12?q", {}, "web"),
        ("/r12x", {}, 404),
        ("/x/r12", {}, 404),
        ("/m", {"method": "POST"}, "web"),
        ("/m", {}, 404),
        ("/h", {"headers": {"X-A": "1", "X-B": "42"}}, "web"),
        ("/h", {"headers": {"X-A": "1", "X-B": "42x"}}, 404),
        ("/h", {"headers": {"X-A": "2", "X-B": "42"}}, 404),
        ("/h", {"headers": {"X-A": "1"}}, 404),
        ("/q?b=xyz&a=1", {}, "web"),
        ("/q?a=1", {}, 404),
        ("/q?a=2&b=x", {}, 404),
        ("/", {}, 404),
    ],
)
async def test_matches(proxy: Proxy, path: str, kw: dict[str, Any], expected: str | int) -> None:
    """Every kind of match is met by what it describes, and by nothing beside it; then the answer is 404."""
    assert await proxy.reached("matches.test", path, **kw) == expected


@pytest.mark.parametrize(
    ("host", "path", "expected"),
    [
        ("one.matches.test", "/one", "other"),
        ("one.matches.test:12345", "/one", "other"),
        ("ONE.Matches.Test", "/one", "other"),
        ("one.matches.test", "/wild", "web"),
        ("one.matches.test", "/anywhere", "web"),
        ("two.matches.test", "/one", 404),
        ("two.matches.test", "/wild", "web"),
        ("x.y.matches.test", "/wild", "web"),
        ("matches.test", "/wild", 404),
        ("else.test", "/anywhere", "web"),
        ("else.test", "/wild", 404),
        ("a.isolated.test", "/anywhere", 404),
        ("isolated.test", "/anywhere", "web"),
    ],
)
async def test_hostnames(proxy: Proxy, host: str, path: str, expected: str | int) -> None:
    """The exact name first, then wider ones, whatever port and case the client wrote; never another listener's."""
    assert await proxy.reached(host, path) == expected


MATCHING = [  # a request for each kind of match
    ("matches.test", "GET", "/exact", ()),
    ("matches.test", "GET", "/exact/more", ()),
    ("matches.test", "GET", "/r12", ()),
    ("matches.test", "POST", "/m", ()),
    ("matches.test", "GET", "/h", (("x-a", "1"), ("x-b", "42"))),
    ("matches.test", "GET", "/q?a=1&b=x", ()),
    ("x.matches.test", "GET", "/wild", ()),
    ("one.matches.test", "GET", "/one", ()),
    ("else.test", "GET", "/anywhere", ()),
    ("x.isolated.test", "GET", "/anywhere", ()),
    ("odd.test:1", "GET", "/host", ()),
    ("odd.test", "GET", "/scheme", ()),
    ("odd.test", "GET", "/a/abc/cc/", ()),
    ("odd.test", "GET", "/a/b?q=%61", ()),
    ("odd.test", "GET", "/a/b/", ()),
    ("odd.test", "GET", "/a/b/c", (("x-a", "2"),)),
    ("model.test", "POST", "/plain", ()),
    ("model.test", "POST", "/old", ()),
]
SPELLINGS = [
    *(
        ("/", text)
        for text in ("//", "/./", "/b/../", "/../", "/%2e/", "/%2E%2e/a/", "/%2F", "/a%5c..%2f", "\\", "/%20/", "/;x/")
    ),
    *(("a", text) for text in ("%61", "A", "%zz", "a#a", "a?a", "a&a")),
    *(("1", text) for text in ("%31", "1&a=1", "2&a=1", "1=1")),
]
HOSTS = [
    "x.matches.test",
    "X.Matches.TEST:80",
    "x.y.matches.test",
    "one-matches.test",
    ".matches.test",
    "x..matches.test",
]
HOSTS += ["matches.test", "matches.test.", "x.matches.test:x", "x.matches.test:", "[::1]:80", "[::1]", "*.matches.test"]
HEADERS = [
    ("x-a", "1"),
    ("x-a", "2"),
    ("X-A", "1,2"),
    ("x-b", "42"),
    ("x-gateway-model-name", "large"),
    ("x-vllm-x", "1"),
]
BODIES = [
    *(
        b'{"model":"%s"}' % name
        for name in (b"small", b"large", b"", b"a\\nb", b"\\u0000", b"l\\u0061rge", b"a" * 8192, b"a" * 8193)
    ),
    *(b'{"n":%s,"model":"large"}' % n for n in (b"1", b"1.5", b"-0", b"01", b"NaN", b"1e308", b"1e309", b"9" * 400)),
    *(
        b'{"n":%d,"model":"large"}' % n
        for n in ((1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63), -(1 << 63) - 1)
    ),
    *(
        b'{"x":%s,"model":"large"}' % x
        for x in (b'"\\ud800"', b'"\xff"', b'"\x01"', b'"\x7f"', b'"\\x41"', b"[" * 900 + b"]" * 900)
    ),
    *(
        b"",
        b"model",
        b'["model"]',
        b'{"model":["large"]}',
        b'{"model":3}',
        b'{"model":null}',
        b'{"model":"small","model":"large"}',
    ),
    *(b'\xef\xbb\xbf{"model":"large"}', b' {"model":"large"}\n', b'{"model":"large"} x', b'{"model":"large",}', b"{"),
]


async def test_odd_requests(proxy: Proxy) -> None:
    """Paths that are normalised, hosts, repeated headers and parameters, bodies at the edge of JSON: for each one Envoy
    takes the route that our matching finds, or answers itself with the status that it says."""
    rng = random.Random(1)
    asked = [(_odd(rng, *rng.choice(MATCHING)), b"") for _ in range(600)]
    asked += [(Request("GET", host, "/wild"), b"") for host in HOSTS]
    for values in (("1", "2"), ("2", "1"), ("1,2",), (" 1 ",), ("",)):
        headers = tuple(("x-a", value) for value in values)
        asked += [(Request("GET", "matches.test", "/h", (*headers, ("x-b", "42"))), b"")]
        asked += [(Request("GET", "odd.test", "/a/b/c", headers), b"")]
    asked += [(Request("POST", host, "/any"), body) for host in ("model.test", "odd.test") for body in BODIES]
    taken: Counter[str] = Counter()
    for request, body in asked:
        status, route = await _raw(proxy.ports[8080], request, body)
        found = proxy.explained(8080, replace(request, model=body_model(body)[0]), route)
        assert (found.status or status) == status, request
        taken[route or str(status)] += 1
    routes = {
        route.name
        for host in proxy.listeners[8080].virtual_hosts
        for route in host.routes
        if host.hostname.endswith(("odd.test", "matches.test")) and "/anywhere/" not in route.name
    }
    assert {"400", "307", "404", "no-match", "unsendable-model", "default/model.test/1/0", *routes} <= set(taken)


def _odd(rng: random.Random, host: str, method: str, path: str, headers: tuple[tuple[str, str], ...]) -> Request:
    """The request, or something like it."""
    for old, new in rng.choices(SPELLINGS, k=rng.randint(0, 2)):
        path = path[:1] + path[1:].replace(old, new, 1)
    if rng.random() < 0.3:
        path += rng.choice(["/", "/x", "/..", "/.", "?", "?x=1"])
    if rng.random() < 0.3:
        headers = tuple(rng.sample([*headers, *HEADERS], k=rng.randint(0, 3)))
    return Request(method if rng.random() < 0.9 else "PUT", host, path, headers)


async def _raw(port: int, request: Request, body: bytes) -> tuple[int, str | None]:
    """Status and route of a request that no client would write."""
    lines = [
        f"{request.method} {request.path} HTTP/1.1",
        *(f"{name}: {text}" for name, text in (("Host", request.host), *request.headers)),
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    async with asyncio.timeout(20):
        head, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    writer.close()
    routes = [line.partition(": ")[2] for line in fields if line.startswith("x-vllm-route: ")]
    return int(head.split()[1]), routes[0] if routes else None


# --- filters ---


async def test_header_modifiers(proxy: Proxy) -> None:
    """Set replaces, add appends, remove removes, in both directions, and every character is itself."""
    sent = {"X-Set": "a", "X-Add": "b", "X-Remove": "c", "X-Keep": "d"}
    _, echoed, response = await proxy.ask("headers.test", headers=sent)
    got = [(name, text) for name, text in echoed["headers"] if name in {h.lower() for h in sent} | {"x-op"}]
    assert sorted(got) == [
        ("x-add", "b"),
        ("x-add", "ours"),
        ("x-keep", "d"),
        ("x-op", "%REQ(:path)%"),
        ("x-set", "100%"),
    ]
    assert response.headers.getall("X-Set") == ["100%"]
    assert response.headers.getall("X-Add") == ["theirs", "ours"]
    assert "X-Remove" not in response.headers
    assert response.headers["X-Op"] == "%REQ(:path)%"


async def test_header_modifiers_of_a_backend(proxy: Proxy) -> None:
    """They are applied to the requests of that backend."""
    _, echoed, _ = await proxy.ask("backend-headers.test")
    assert ["x-backend", "100%"] in echoed["headers"]


async def test_host_rewrite(proxy: Proxy) -> None:
    """The upstream sees the new hostname, and the path as it was."""
    _, echoed, _ = await proxy.ask("host.test", "/a?b=c")
    assert (echoed["host"], echoed["path"]) == ("inner.test", "/a?b=c")


@pytest.mark.parametrize(("i", "row"), list(enumerate(PREFIXES)))
async def test_prefix_rewrite(proxy: Proxy, i: int, row: tuple[str, str, str, str]) -> None:
    """HTTPPathModifier.replacePrefixMatch, row by row, with the query untouched."""
    _, echoed, _ = await proxy.ask(f"prefix-{i}.test", row[0])
    assert echoed["path"] == row[3]


@pytest.mark.parametrize(("i", "row"), list(enumerate(PREFIXES)))
async def test_prefix_redirect(proxy: Proxy, i: int, row: tuple[str, str, str, str]) -> None:
    """A redirect replaces a prefix as a rewrite does."""
    assert await proxy.location(f"prefix-{i}.moved.test", row[0]) == (302, f"http://prefix-{i}.moved.test{row[3]}")


@pytest.mark.parametrize(("i", "row"), list(enumerate(FULL)))
async def test_full_path_rewrite(proxy: Proxy, i: int, row: tuple[str, str, str]) -> None:
    """The whole path goes, the query stays; what comes is a path whatever was written, and no pattern."""
    _, echoed, _ = await proxy.ask(f"full-{i}.test", row[0])
    assert echoed["path"] == row[2]


@pytest.mark.parametrize(("i", "row"), list(enumerate(FULL)))
async def test_full_path_redirect(proxy: Proxy, i: int, row: tuple[str, str, str]) -> None:
    """A redirect replaces the whole path as a rewrite does."""
    assert await proxy.location(f"full-{i}.moved.test", row[0]) == (302, f"http://full-{i}.moved.test{row[2]}")


@pytest.mark.parametrize(
    ("port", "host", "path", "expected"),
    [
        # a scheme: "the redirect port MUST be the well-known port associated with the redirect scheme"
        (80, "a.test", "/to-https/x?q", (301, "https://a.test/to-https/x?q")),
        (80, "a.test:80", "/to-https", (301, "https://a.test/to-https")),
        (8080, "a.test:8080", "/to-https", (301, "https://a.test:443/to-https")),
        (8080, "name.test:8080", "/", (302, "https://name.test/")),
        (8080, "a.test:8080", "/to-https-host", (308, "https://new.test/to-https-host")),
        (8080, "a.test:8080", "/to-http", (303, "http://new.test/to-http")),
        # no scheme: "the redirect port MUST be the Gateway Listener port"
        (80, "a.test", "/to-host", (302, "http://new.test/to-host")),
        (8080, "a.test", "/to-host", (302, "http://new.test:8080/to-host")),
        (8080, "a.test:8080", "/to-path", (302, "http://a.test:8080/here")),
        (80, "a.test", "/to-path", (302, "http://a.test/here")),
        # a port of its own
        (80, "a.test", "/to-port", (307, "https://a.test:8443/to-port")),
        (8080, "a.test:8080", "/to-port", (307, "https://a.test:8443/to-port")),
        (8080, "a.test", "/to-443", (302, "http://new.test:443/to-443")),
    ],
)
async def test_redirects(proxy: Proxy, port: int, host: str, path: str, expected: tuple[int, str]) -> None:
    """Status, scheme, host and port of the Location; a scheme's own port is left out wherever Envoy can do so.

    It can not for a hostname no object names, on a port other than 80: `:443` is then right, if long.
    """
    assert await proxy.location(host, path, port) == expected


# --- backends ---


async def test_an_invalid_backend_is_a_500(proxy: Proxy) -> None:
    """With the route's name in the text, for who has to find it."""
    status, text, _ = await proxy.ask("invalid.test")
    assert status == 500
    assert "default/invalid.test/0/0" in text


async def test_half_an_invalid_backend_is_half_500s(proxy: Proxy) -> None:
    """Both answers come, and no third one."""
    answers = Counter(await asyncio.gather(*(proxy.reached("half.test") for _ in range(60))))
    assert set(answers) == {"web", 500}


async def test_weights_share_requests(proxy: Proxy) -> None:
    """Three to one, and nothing for 0: of 200 requests 50 are expected at the second, with a deviation of 6."""
    answers = Counter(await asyncio.gather(*(proxy.reached("weights.test") for _ in range(200))))
    assert set(answers) == {"web", "other"}
    assert 20 <= answers["other"] <= 90


async def test_a_backend_without_endpoints_is_a_503(proxy: Proxy) -> None:
    """It exists, so this is no 500."""
    assert await proxy.reached("empty.test") == 503


@pytest.mark.parametrize("path", ["/request", "/backend", "/both"])
async def test_a_backend_that_is_silent_for_too_long_is_a_504(proxy: Proxy, path: str) -> None:
    """Whichever of the two timeouts is over first; an answer in time is passed on."""
    assert await proxy.reached("timeouts.test", f"{path}/silence") == 504
    assert await proxy.reached("timeouts.test", path) == "web"


# --- LLM routes ---


@pytest.mark.parametrize("host", ["llm.test", "headers.test", "model.test"])
async def test_own_headers_of_a_client_are_stripped(proxy: Proxy, host: str) -> None:
    """No client addresses a pod or claims a model: no upstream sees such a header that a client made up."""
    sent = {"x-vllm-pick": "default/llm_0", "X-VLLM-Other": "x", "X-Gateway-Model-Name": "other"}
    _, echoed, _ = await proxy.ask(host, "/plain", method="POST", headers=sent, json={"model": "x"})
    assert [name for name, _ in echoed["headers"] if name.startswith("x-vllm")] == []
    assert "other" not in [value for name, value in echoed["headers"] if name == "x-gateway-model-name"]


async def test_a_dead_picker_costs_no_request(proxy: Proxy) -> None:
    """Nobody listens at the picker's address: the body arrives as it was sent, with its length."""
    body = b'{"model": "m",   "prompt": "x"}'
    status, echoed, _ = await proxy.ask("llm.test", "/v1/completions", method="POST", data=body)
    assert (status, echoed["body"]) == (200, body.decode())
    assert ["content-length", str(len(body))] in echoed["headers"]


@pytest.mark.parametrize(
    ("path", "model", "expected"),
    [
        ("/v1/completions", "small", "llm"),
        ("/v1/completions", "large", "other"),
        ("/v1/completions", "unknown", 404),
        ("/v1/completions", None, 404),
        ("/plain", "small", "web"),  # the longer prefix goes before the header
        ("/plain", None, "web"),
    ],
)
async def test_routing_by_the_bodys_model(proxy: Proxy, path: str, model: str | None, expected: str | int) -> None:
    """X-Gateway-Model-Name is matched against `model` of the body."""
    body = {"prompt": "x"} | ({"model": model} if model else {})
    assert await proxy.reached("model.test", path, method="POST", json=body) == expected


async def test_a_client_does_not_choose_by_the_models_header(proxy: Proxy) -> None:
    """The body decides, and a header the client sent does not; the upstream is told what the body said."""
    sent = {"X-Gateway-Model-Name": "large"}
    _, echoed, _ = await proxy.ask(
        "model.test", "/v1/completions", method="POST", headers=sent, json={"model": "small"}
    )
    assert BACKENDS[echoed["address"]] == "llm"
    assert [text for name, text in echoed["headers"] if name == "x-gateway-model-name"] == ["small"]


async def test_a_redirect_beside_model_routes(proxy: Proxy) -> None:
    """It needs no model, and no picker."""
    assert await proxy.location("model.test", "/old") == (302, "http://new.test/old")
