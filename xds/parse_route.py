"""HTTPRoute: its parents, rules and matches.

Schema: the CRD of kubernetes-sigs/gateway-api v1.6.1 (standard channel), with the rules it states in CEL. Gateway API
lets no implementation skip a filter it does not know, so a rule with such a filter loses its backends and its redirect:
what it matches is answered with an error, and the rest of the route is served. A match that no request can meet, since
Envoy compares it with something else than was written, is rejected with its route.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from xds import regex
from xds.fields import (
    CONNECTION_HEADERS,
    GROUP,
    HEADER_NAME,
    HEADER_VALUE,
    HOSTNAME,
    KIND,
    NAME,
    NAMESPACE,
    OBJECT_NAME,
    PATH_CHARACTER,
    Reader,
    Text,
    describe,
)
from xds.model import (
    CORE,
    GATEWAY,
    BackendRef,
    HTTPRoute,
    MatchType,
    Meta,
    ObjectRef,
    ParentRef,
    PathMatch,
    Problem,
    RouteMatch,
    RouteRule,
    ValueMatch,
    printable,
)
from xds.parse_filters import BACKEND_FILTERS, RULE_FILTERS, read_filters

MAX_MATCHES = 128  # of all rules of a route together
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")

_PATH = Text("a path", 1024, re.compile(rf"/{PATH_CHARACTER}*"))
_NOT_IN_PATH = re.compile(r"//|/\.\.?(?=/|$)|%2f", re.IGNORECASE)  # what a server would normalise, or decode to "/"
# What is in no path when Envoy looks for a route. Percent-encoded letters, digits, "-", ".", "_" and "~" are decoded,
# "\" becomes a separator, NUL is refused; "." and ".." are resolved whatever parameters they have behind a ";".
_NORMALISED = re.compile(r"%(?:00|2[de]|3[0-9]|4[1-9a-f]|5[0-9acf]|6[1-9a-f]|7[0-9ae])|/\.\.?;", re.IGNORECASE)
# Envoy compares names and values of the query as they are in the URL, encoded.
_QUERY_NAME = Text("a name without # and &", 256, re.compile(r"[A-Za-z0-9!$%'*+\-.^_`|~]+"), reason="UnsupportedValue")
_QUERY_VALUE = Text(
    "a value as it is in a URL, percent-encoded", 1024, re.compile(r"[!\"$%'-~]+"), reason="UnsupportedValue"
)
_PATH_REGEX = _QUERY_REGEX = Text("a regular expression", 1024)
_HEADER_REGEX = Text("a regular expression", 4096)


def read_http_route(document: Reader, meta: Meta) -> HTTPRoute:
    """v1 and v1beta1 alike. A route without rules has one that matches everything and has no backend."""
    spec = document.child("spec")
    namespace = meta.ref.namespace
    parents = read_parents(document, namespace)
    hostnames = spec.texts("hostnames", 16, HOSTNAME)
    rules: tuple[RouteRule, ...] = (RouteRule(),)
    if spec.get("rules") is not None:
        rules = tuple(_read_rule(rule, namespace) for rule in spec.children("rules", most=16, least=1))
    if sum(len(rule.matches) for rule in rules) > MAX_MATCHES:
        raise spec.error("rules", f"expected at most {MAX_MATCHES} matches in all rules")
    return HTTPRoute(meta, parents, hostnames, rules)


def read_parents(document: Reader, namespace: str) -> tuple[ParentRef, ...]:
    """spec.parentRefs."""
    return tuple(_read_parent(parent, namespace) for parent in document.child("spec").children("parentRefs", 32))


def _read_parent(reader: Reader, namespace: str) -> ParentRef:
    ref = ObjectRef(
        reader.text("group", GROUP, GATEWAY),
        reader.text("kind", KIND, "Gateway"),
        reader.text("namespace", NAMESPACE, namespace),
        reader.text("name", OBJECT_NAME),
    )
    return ParentRef(ref, reader.text("sectionName", NAME, ""), reader.port("port", 0))


def _read_rule(reader: Reader, namespace: str) -> RouteRule:
    reader.skip("name")
    matches = tuple(_read_match(match) for match in reader.children("matches", 64)) or (RouteMatch(),)
    filters = read_filters(reader, RULE_FILTERS)
    backends = [_read_backend(backend, namespace) for backend in reader.children("backendRefs", 16)]
    timeout, backend_timeout = _read_timeouts(reader.child("timeouts"))
    problem = next((each for each in (filters, *backends) if isinstance(each, Problem)), None)
    if problem or isinstance(filters, Problem):
        return RouteRule(matches, problem=problem)
    if filters.redirect and backends:
        raise reader.error("backendRefs", "expected no backendRefs beside a RequestRedirect filter")
    paths = [part.path for part in (filters.redirect, filters.rewrite) if part and part.path]
    if any(not path.full for path in paths) and [match.path.type for match in matches] != [MatchType.PREFIX]:
        raise reader.error("filters", "expected exactly one match, of type PathPrefix, for ReplacePrefixMatch")
    refs = tuple(each for each in backends if isinstance(each, BackendRef))
    return RouteRule(matches, filters, refs, timeout, backend_timeout)


def _read_timeouts(reader: Reader) -> tuple[float | None, float | None]:
    request, backend = reader.duration("request"), reader.duration("backendRequest")
    if request and backend is not None and backend > request:
        raise reader.error("backendRequest", f"expected at most timeouts.request ({request:g}s), found {backend:g}s")
    return request, backend


def _read_backend(reader: Reader, namespace: str) -> BackendRef | Problem:
    ref = ObjectRef(
        reader.text("group", GROUP, CORE),
        reader.text("kind", KIND, "Service"),
        reader.text("namespace", NAMESPACE, namespace),
        reader.text("name", OBJECT_NAME),
    )
    is_service = (ref.group, ref.kind) == (CORE, "Service")
    port = reader.port("port", None if is_service else 0)
    weight = reader.integer("weight", 0, 1_000_000, 1)
    filters = read_filters(reader, BACKEND_FILTERS)
    return filters if isinstance(filters, Problem) else BackendRef(ref, reader.path, port, weight, filters)


# --- matches --------------------------------------------------------------------------------------------------------


def _read_match(reader: Reader) -> RouteMatch:
    query = reader.children("queryParams", 16)
    return RouteMatch(
        _read_path(reader.child("path")),
        _first_of_each(_read_header(header) for header in reader.children("headers", 16)),
        _first_of_each(_read_value(param, _QUERY_NAME, _QUERY_VALUE, _QUERY_REGEX) for param in query),
        _read_method(reader),
    )


def _read_method(reader: Reader) -> str:
    method = reader.choice("method", METHODS, "")
    if method == "CONNECT":
        raise reader.error("method", "Envoy opens no tunnels here: CONNECT matches no request", "UnsupportedValue")
    return method


def _read_path(reader: Reader) -> PathMatch:
    kind = MatchType(reader.choice("type", [each.value for each in MatchType], MatchType.PREFIX))
    if kind is MatchType.REGEX:
        return PathMatch(kind, _read_regex(reader, _PATH_REGEX))
    value = reader.text("value", _PATH, "/")
    if _NOT_IN_PATH.search(value):
        raise reader.error("value", f"expected a path without //, /./, /../ and %2F, found {describe(value)}")
    if encoded := _NORMALISED.search(value):
        message = f"no path that Envoy compares has {encoded[0]} in it, found {describe(value)}"
        raise reader.error("value", message, "UnsupportedValue")
    return PathMatch(kind, value)


def _read_header(reader: Reader) -> ValueMatch:
    match = _read_value(reader, HEADER_NAME, HEADER_VALUE, _HEADER_REGEX)
    name = match.name.lower()
    if name in CONNECTION_HEADERS:
        raise reader.error("name", f"{name} is a header of the connection: it matches no request", "UnsupportedValue")
    return replace(match, name=name)


def _read_value(reader: Reader, name: Text, exact: Text, expression: Text) -> ValueMatch:
    if reader.choice("type", (MatchType.EXACT, MatchType.REGEX), MatchType.EXACT) == MatchType.REGEX:
        return ValueMatch(reader.text("name", name), _read_regex(reader, expression), MatchType.REGEX)
    return ValueMatch(reader.text("name", name), reader.text("value", exact))


def _read_regex(reader: Reader, rule: Text) -> str:
    value = reader.text("value", rule)
    if problem := regex.problem(value):
        raise reader.error("value", f"expected a regular expression of RE2: {printable(problem)}")
    return value


def _first_of_each(matches: Iterable[ValueMatch]) -> tuple[ValueMatch, ...]:
    """Of matches that name the same header or parameter, "only the first entry [...] MUST be considered"."""
    by_name: dict[str, ValueMatch] = {}
    for match in matches:
        by_name.setdefault(match.name, match)
    return tuple(by_name.values())
