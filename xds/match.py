"""A request -> the route it takes: what Envoy does with what we tell it, for people who ask why (pure).

The rules are those of Envoy 1.40 as xds/listeners.py and xds/routes.py configure it; tests/test_routes.py holds each of
its requests through the real Envoy against `find`. What Envoy itself adds to a request (x-request-id,
x-forwarded-for) cannot be known before, and is taken not to be there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from xds.envoy import MODEL_HEADER, OWN_HEADERS
from xds.model import MatchType, PathMatch, PortListener, Route, RouteMatch, ValueMatch, VirtualHost
from xds.routes import NO_HEADER

MAX_MODEL = 8192  # bytes: json_to_metadata takes a longer text for none

_SIGNED, _UNSIGNED = (
    1 << 63,
    1 << 64,
)  # between them Envoy's JSON reader gives up; beyond, it takes an integer for a double
_ESCAPED_SLASH = re.compile(r"%2f|%5c", re.IGNORECASE)
_UNRESERVED = re.compile(r"%(2d|2e|3[0-9]|4[1-9a-f]|5[0-9a]|5f|6[1-9a-f]|7[0-9a]|7e)", re.IGNORECASE)  # RFC 3986, 2.3
_PORT = re.compile(r":[^:\]]*\Z")


@dataclass(frozen=True, slots=True)
class Request:
    """A request as its client sends it; `path` with its query. `model` is the body's (see `body_model`)."""

    method: str
    host: str
    path: str
    headers: tuple[tuple[str, str], ...] = ()
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Passed:
    """A route that comes before the one taken, and the first thing by which it does not match."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Found:
    """Where a request ends up.

    `path` is what is matched, without the query. `refusal` is why Envoy looks for no route at all, "" if it does:
    `status` is its answer then, 404 where there is no route, else 0.
    """

    path: str
    virtual_host: VirtualHost | None = None
    route: Route | None = None
    passed: tuple[Passed, ...] = ()
    status: int = 0
    refusal: str = ""


def find(listener: PortListener, request: Request) -> Found:
    """The route of a request to this port; for HTTPS its host is taken to be the server name (SNI), too."""
    path, redirected = normal_path(request.path)
    if path is None:
        return Found("", status=400, refusal="Envoy takes no path with a fragment")
    if redirected:
        return Found(path, status=307, refusal=f"the path has an escaped slash: Envoy redirects to {path}")
    hostname = _PORT.sub("", request.host.lower())
    hosts: Sequence[VirtualHost] = listener.virtual_hosts
    if listener.chains:
        name = _most_specific((chain.hostname for chain in listener.chains), hostname)
        if name is None:
            return Found(path, refusal=f"no certificate is for {hostname}: the connection is closed")
        hosts = next(chain.virtual_hosts for chain in listener.chains if chain.hostname == name)
    name = _most_specific((host.hostname for host in hosts), hostname)
    host = next((host for host in hosts if host.hostname == name), None)
    if host is None:
        return Found(path, status=404)
    by_model = any(header.name == MODEL_HEADER for route in host.routes for header in route.match.headers)
    if by_model and request.model is not None and _fits(NO_HEADER, request.model):
        return Found(path, host, status=400, refusal="the model's name has control characters")
    headers = _headers(request, tls=bool(listener.chains))
    passed: list[Passed] = []
    for route in host.routes:
        why = _difference(route.match, request, path, headers)
        if not why:
            return Found(path, host, route, tuple(passed))
        passed.append(Passed(route.name, why))
    return Found(path, host, None, tuple(passed), status=404)


def normal_path(path: str) -> tuple[str | None, bool]:
    """A path as routes see it, without its query, and whether the client is redirected there; None: it is refused.

    Characters that need no escape are unescaped, backslashes are slashes, `.` and `..` are gone, slashes are merged
    (normalize_path, merge_slashes, path_with_escaped_slashes_action).
    """
    if "#" in path:
        return None, False
    path = path.partition("?")[0]
    unescaped = _ESCAPED_SLASH.sub("/", path)
    text = _UNRESERVED.sub(lambda found: chr(int(found[1], 16)), unescaped).replace("\\", "/")
    kept: list[str] = []
    segments = text.split("/")[1:]
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    if segments[-1:] in (["."], [".."]):
        kept.append("")
    return re.sub("/+", "/", "/" + "/".join(kept)), unescaped != path


def body_model(body: bytes) -> tuple[str | None, str]:
    """The `model` that json_to_metadata reads in a body, and why there is none: Envoy's JSON reader is a strict one."""
    if not body:
        return None, "there is no body"
    try:
        value = json.loads(
            body.decode("utf-8-sig"), parse_int=_integer, parse_float=_double, parse_constant=_no_constant
        )
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair
    except (ValueError, RecursionError) as error:
        return None, f"Envoy cannot read the body as JSON: {error}"
    model = value.get("model") if isinstance(value, dict) else None
    if not isinstance(model, str):
        return None, "the body names no model"
    if len(model.encode()) > MAX_MODEL:
        return None, f"the model's name is longer than {MAX_MODEL} bytes"
    return model, ""


def _integer(text: str) -> int | float:
    value = int(text)
    if _SIGNED <= value < _UNSIGNED:
        raise ValueError(f"{text} is an integer beyond 63 bits")
    return value if -_SIGNED <= value < _SIGNED else _double(text)


def _double(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text:.20} is beyond a double")
    return value


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


# --- hosts and routes -------------------------------------------------------------------------------------------------


def _most_specific(names: Iterable[str], hostname: str) -> str | None:
    """The name itself, else the longest `*.suffix` of it, else "*"."""
    found = [name for name in names if name in (hostname, "*") or _is_under(name, hostname)]
    return max(found, key=lambda name: (name == hostname, len(name)), default=None)


def _is_under(wildcard: str, hostname: str) -> bool:
    return wildcard.startswith("*.") and hostname.endswith(wildcard[1:]) and len(hostname) > len(wildcard) - 1


def _headers(request: Request, *, tls: bool) -> dict[str, list[str]]:
    """Name -> values of what routes are matched against; `host` is another name for the authority."""
    headers: dict[str, list[str]] = {"host": [request.host], ":authority": [request.host]}
    for name, value in request.headers:
        if not name.lower().startswith(OWN_HEADERS) and name.lower() not in ("host", MODEL_HEADER):
            headers.setdefault(name.lower(), []).append(value.strip(" \t"))
    headers["x-forwarded-proto"] = ["https" if tls else "http"]
    return headers


def _difference(match: RouteMatch, request: Request, path: str, headers: dict[str, list[str]]) -> str:
    """The first part of a match that the request does not meet, in words; "" when it meets all."""
    if why := _path_difference(match.path, path):
        return why
    if match.method and match.method != request.method:
        return f"the method is {request.method}, not {match.method}"
    for header in match.headers:
        if header.name == MODEL_HEADER:
            given = [] if request.model is None else [request.model]
            why = _value_difference("the body's model", header, given)
        else:  # of several lines one is enough
            why = _value_difference(f"header {header.name}", header, headers.get(header.name, []))
        if why:
            return why
    parameters = request.path.partition("?")[2].split("&")
    for query in match.query:  # the first one of this name counts, as it is written
        values = [each.partition("=")[2] for each in parameters if each.partition("=")[0] == query.name]
        if why := _value_difference(f"query parameter {query.name}", query, values[:1]):
            return why
    return ""


def _path_difference(match: PathMatch, path: str) -> str:
    if match.type is MatchType.EXACT:
        return "" if path == match.value else f"the path is not {match.value}"
    if match.type is MatchType.REGEX:
        return "" if _fits(match.value, path) else f"the path does not match {match.value}"
    prefix = match.value.rstrip("/")
    return "" if path == prefix or path.startswith(f"{prefix}/") else f"the path is not under {match.value}"


def _value_difference(what: str, match: ValueMatch, values: Sequence[str]) -> str:
    if match.type is MatchType.REGEX:
        met, expected = any(_fits(match.value, value) for value in values), f"a match of {match.value}"
    else:
        met, expected = match.value in values, match.value
    if met:
        return ""
    return f"{what} is {', '.join(values)}, not {expected}" if values else f"{what} is not there ({expected})"


def _fits(pattern: str, text: str) -> bool:
    """RE2's full match, of bytes; xds/regex.py lets through only what `re` reads in the same way."""
    return re.compile(pattern.encode()).fullmatch(text.encode(errors="surrogateescape")) is not None
