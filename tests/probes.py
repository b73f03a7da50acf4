"""What a route promises, asked of a running Envoy: a request that meets the route's match, and whether the answer is
what its object says. For tests/refusals.py, where Envoy may accept a route and then serve something else.

The expectation is computed from the values the route was parsed to, and from nothing that was made for Envoy of them.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from xds.model import Forward, HeaderModifier, MatchType, PathModifier, RequestRedirect, Respond, Route

MODEL_HEADER = "x-gateway-model-name"
LONGEST_MODEL = 8192  # bytes: Envoy drops a longer one, and no route matches it
PATIENCE = 10.0  # seconds: an answer takes milliseconds

# Headers that are not the client's or the route's alone: Envoy, or the connection, has a say in them.
_SHARED = frozenset(
    {"host", "content-length", "content-type", "transfer-encoding", "connection", "keep-alive", "proxy-connection"}
    | {"upgrade", "te", "trailer", "expect", "x-request-id", "server", "date", "via"}
)
_SHARED_PREFIXES = ("x-envoy-", "x-forwarded-", "x-vllm-", MODEL_HEADER)

# A path of a URL, and perhaps a query (RFC 3986): what a server will take for one.
_TARGET = re.compile(rb"/(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|%[0-9a-fA-F]{2})*(?:\?[!-~]*)?")

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    host: str
    path: str
    query: str
    headers: tuple[tuple[str, str], ...]
    body: bytes = b""

    def encode(self) -> bytes:
        lines = [
            f"{self.method} {self.path}{self.query} HTTP/1.1",
            f"Host: {self.host}",
            "Connection: close",
            *(f"{name}: {value}" for name, value in self.headers),
        ]
        if self.body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(self.body)}"]
        return "\r\n".join([*lines, "", ""]).encode() + self.body


@dataclass(frozen=True, slots=True)
class Reply:
    """`seen` is the head of the request as the upstream had it, (b"", []) where Envoy answered itself."""

    status: int
    headers: Headers
    seen: tuple[bytes, Headers]


async def exchange(port: int, request: Request) -> Reply:
    """Ask Envoy on this port of loopback."""
    async with asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request.encode())
            status, headers = _head(await reader.readuntil(b"\r\n\r\n"))
            echoed = (b"x-upstream", b"echo") in headers and request.method != "HEAD"
            if echoed and (b"transfer-encoding", b"chunked") in headers:
                await reader.readline()  # the length of the first chunk, which is all
            seen = _head(await reader.readuntil(b"\r\n\r\n")) if echoed else (b"", [])
        finally:
            writer.close()
    return Reply(int(status.split()[1]), headers, seen)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An upstream for asyncio.start_server: answers one request with the head it came with."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        _, headers = _head(head)
        await reader.readexactly(int(dict(headers).get(b"content-length", b"0")))
        answer = b"HTTP/1.1 200 OK\r\nX-Upstream: echo\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(head)
        writer.write(answer + head)
        await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # Envoy closes connections as it likes
    finally:
        writer.close()


def _head(raw: bytes) -> tuple[bytes, Headers]:
    first, *lines = raw.rstrip(b"\r\n").split(b"\r\n")
    pairs = (line.partition(b":") for line in lines)
    return first, [(name.lower(), value.strip(b" \t")) for name, _, value in pairs]


def request_for(route: Route, hostname: str) -> Request | None:
    """A request that the first match of the route is met by; None where that cannot be said without trying."""
    match = route.match
    if MatchType.REGEX in (match.path.type, *(each.type for each in (*match.headers, *match.query))):
        return None
    model = next((each.value for each in match.headers if each.name == MODEL_HEADER), None)
    headers = tuple((each.name, each.value) for each in match.headers if each.name != MODEL_HEADER)
    if any(map(_shared, (name for name, _ in headers))):
        return None
    query = "&".join(f"{each.name}={each.value}" for each in match.query)
    body = b"" if model is None else json.dumps({"model": model}).encode()
    if model and (match.method not in ("", "POST") or len(model.encode()) > LONGEST_MODEL):
        return None
    return Request(
        match.method or ("POST" if body else "GET"),
        hostname.replace("*", "any", 1),
        match.path.value,
        f"?{query}" if query else "",
        headers,
        body,
    )


def complaints(route: Route, request: Request, reply: Reply) -> Iterator[str]:
    """What the answer should be and is not."""
    match route.action:
        case Respond(status=status):
            if reply.status != status:
                yield f"expected {status}, found {reply.status}"
        case RequestRedirect() as redirect:
            yield from _redirected(redirect, route, request, reply)
        case Forward() as forward:
            yield from _forwarded(forward, route, request, reply)
    modifier = route.filters.response_headers
    yield from _modified(modifier, _touched(modifier), reply.headers, "the answer")


def _forwarded(forward: Forward, route: Route, request: Request, reply: Reply) -> Iterator[str]:
    if reply.status != 200:
        yield f"expected 200, found {reply.status}"
        return
    line, headers = reply.seen
    if not line:
        return  # the answer to HEAD has no body
    rewrite = forward.rewrite
    path = _rewritten(rewrite.path if rewrite else None, route, request)
    target = line.partition(b" ")[2].rpartition(b" ")[0]
    if target != path.encode():
        yield f"expected the pod to see {path}, found {line!r}"
    if not _TARGET.fullmatch(target) or target.count(b"?") > request.query.count("?"):
        yield f"expected the pod to see a path and a query, found {line!r}"
    host = rewrite.hostname if rewrite and rewrite.hostname else request.host
    if dict(headers).get(b"host") != host.encode():
        yield f"expected the pod to see host {host}, found {dict(headers).get(b'host')!r}"
    shares = [filters.request_headers for _, _, filters in forward.clusters]
    touched = _touched(route.filters.request_headers, *shares)
    for modifier in (route.filters.request_headers, *(shares if len(shares) == 1 else ())):
        yield from _modified(modifier, touched, headers, "the pod's request")


def _redirected(redirect: RequestRedirect, route: Route, request: Request, reply: Reply) -> Iterator[str]:
    if reply.status != redirect.status:
        yield f"expected {redirect.status}, found {reply.status}"
        return
    location = dict(reply.headers).get(b"location", b"")
    path = _rewritten(redirect.path, route, request)
    if redirect.path and redirect.path.full and "?" in path:
        path = _absolute(redirect.path.value)  # its own query is the one that counts
    target = b"/" + location.partition(b"://")[2].partition(b"/")[2]
    if target != path.encode() or not _TARGET.fullmatch(target):
        yield f"expected a redirect to the path {path}, found {location!r}"


def _touched(*modifiers: HeaderModifier | None) -> Counter[str]:
    """How often each header is named: where that is more than once, what comes of it is not said here."""
    return Counter(
        name.lower()
        for each in modifiers
        if each is not None
        for name in (*(name for name, _ in (*each.set, *each.add)), *each.remove)
    )


def _modified(modifier: HeaderModifier | None, touched: Counter[str], headers: Headers, where: str) -> Iterator[str]:
    def found(name: str) -> list[bytes] | None:
        if touched[name.lower()] > 1 or _shared(name):
            return None
        return [value for key, value in headers if key == name.lower().encode()]

    if modifier is None:
        return
    for name, value in modifier.set:
        if (values := found(name)) is not None and values != [value.encode()]:
            yield f"expected {name}: {value!r} alone in {where}, found {values}"
    for name, value in modifier.add:
        if (values := found(name)) is not None and value.encode() not in values:
            yield f"expected {name}: {value!r} in {where}, found {values}"
    for name in modifier.remove:
        if found(name):
            yield f"expected no {name} in {where}"


def _rewritten(modifier: PathModifier | None, route: Route, request: Request) -> str:
    if modifier is None:
        return request.path + request.query
    if modifier.full:
        return _absolute(modifier.value) + request.query
    prefix = route.match.path.value.rstrip("/")
    rest = request.path[len(prefix) :].lstrip("/")
    new = _absolute(modifier.value).rstrip("/")
    return (f"{new}/{rest}" if rest or request.path != prefix or not new else new) + request.query


def _absolute(path: str) -> str:
    return path if path.startswith("/") else f"/{path}"


def _shared(name: str) -> bool:
    return name.lower() in _SHARED or name.lower().startswith(_SHARED_PREFIXES)
