"""The filters of an HTTPRoute's rules and backendRefs (HTTPRouteFilter of Gateway API v1.6.1).

Of a rule: header modifiers, RequestRedirect, URLRewrite. Of a backendRef: the header modifiers only, which is what
Envoy can do after it has chosen one of several clusters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from xds.fields import (
    CONNECTION_HEADERS,
    HEADER_NAME,
    HEADER_VALUE,
    KIND,
    PATH_CHARACTER,
    PRECISE_HOSTNAME,
    Reader,
    Text,
    describe,
)
from xds.model import (
    ConditionType,
    Filters,
    HeaderModifier,
    PathModifier,
    Problem,
    Rejection,
    RequestRedirect,
    URLRewrite,
)

# Each type of filter, and the field that holds its settings.
BACKEND_FILTERS = {
    "RequestHeaderModifier": "requestHeaderModifier",
    "ResponseHeaderModifier": "responseHeaderModifier",
}
RULE_FILTERS = BACKEND_FILTERS | {"RequestRedirect": "requestRedirect", "URLRewrite": "urlRewrite"}
REDIRECTS = (301, 302, 303, 307, 308)

# The API allows any text. Envoy would send it as it is, where a URL has no place for it.
_NEW_PATH = Text(
    "a path, percent-encoded", 1024, re.compile(rf"{PATH_CHARACTER}*"), shortest=0, reason="UnsupportedValue"
)
_NEW_LOCATION = Text(  # for a redirect of the full path: its query replaces that of the request
    "a path and perhaps a query, percent-encoded",
    1024,
    re.compile(rf"{PATH_CHARACTER}*(?:\?(?:\?|{PATH_CHARACTER})*)?"),
    shortest=0,
    reason="UnsupportedValue",
)
# Envoy sends these as they are set. Those that say where a message ends would make its body the next request on the
# connection to the pod, or be waited for; over HTTP/2 each is an error that may end the connection.
_NOT_SET = CONNECTION_HEADERS | {"content-length"}


def read_filters(reader: Reader, supported: Mapping[str, str]) -> Filters | Problem:
    """The filters of a rule or backendRef; the first problem, with rejections noted, when they cannot be served."""
    settings: dict[str, Reader] = {}
    rejected: list[Rejection] = []
    for each in reader.children("filters", 16):
        kind = each.text("type", KIND)
        if kind not in supported:
            each.skip()
            message = f"{describe(kind)} is not supported here; the rule answers 500"
            rejected.append(each.reject("type", message, "UnsupportedValue"))
            continue
        if kind in settings:
            raise each.error("type", f"expected one {kind} at most")
        if each.get(supported[kind]) is None:
            raise each.error(supported[kind], f"expected the settings of {kind}, found nothing")
        settings[kind] = each.child(supported[kind])
    request, response = settings.get("RequestHeaderModifier"), settings.get("ResponseHeaderModifier")
    redirect, rewrite = settings.get("RequestRedirect"), settings.get("URLRewrite")
    filters = Filters(
        _read_modifier(request) if request else None,
        _read_modifier(response) if response else None,
        _read_redirect(redirect) if redirect else None,
        URLRewrite(_read_hostname(rewrite), _read_path(rewrite, _NEW_PATH)) if rewrite else None,
    )
    if filters.redirect and filters.rewrite:
        message = "RequestRedirect beside URLRewrite; the rule answers 500"
        rejected.append(reader.reject("filters", message, "IncompatibleFilters"))
    for modifier in (filters.request_headers, filters.response_headers):
        for name in _unchangeable(modifier) if modifier else ():
            hint = ", URLRewrite can" if name == "host" else ""
            message = f"no modifier can change {name}{hint}; the rule answers 500"
            rejected.append(reader.reject("filters", message, "UnsupportedValue"))
    return Problem.of(ConditionType.ACCEPTED, rejected[0]) if rejected else filters


def _read_modifier(reader: Reader) -> HeaderModifier:
    return HeaderModifier(
        _read_headers(reader, "set"), _read_headers(reader, "add"), reader.texts("remove", 16, HEADER_NAME)
    )


def _unchangeable(modifier: HeaderModifier) -> list[str]:
    """The headers it names that are not its to change; Envoy refuses the whole response for Host."""
    changed = {name.lower() for name, _ in (*modifier.set, *modifier.add)}
    removed = {name.lower() for name in modifier.remove}
    return sorted((changed & _NOT_SET) | ((changed | removed) & {"host"}))


def _read_headers(reader: Reader, key: str) -> tuple[tuple[str, str], ...]:
    """Header names ignore case: of several equivalent ones the first counts, as Gateway API says."""
    headers: dict[str, tuple[str, str]] = {}
    for header in reader.children(key, 16):
        name, value = header.text("name", HEADER_NAME), header.text("value", HEADER_VALUE)
        headers.setdefault(name.lower(), (name, value))
    return tuple(headers.values())


def _read_redirect(reader: Reader) -> RequestRedirect:
    status = reader.integer("statusCode", min(REDIRECTS), max(REDIRECTS), 302)
    if status not in REDIRECTS:
        raise reader.error("statusCode", f"expected one of {', '.join(map(str, REDIRECTS))}, found {status}")
    return RequestRedirect(
        reader.choice("scheme", ("http", "https"), ""),
        _read_hostname(reader),
        _read_path(reader, _NEW_LOCATION),
        reader.port("port", 0),
        status,
    )


def _read_hostname(reader: Reader) -> str:
    return reader.text("hostname", PRECISE_HOSTNAME, "")


def _read_path(reader: Reader, whole: Text) -> PathModifier | None:
    """`whole` is the rule for a full path; in place of a prefix comes a path alone."""
    if reader.get("path") is None:
        return None
    path = reader.child("path")
    if path.choice("type", ("ReplaceFullPath", "ReplacePrefixMatch")) == "ReplaceFullPath":
        return PathModifier(True, path.text("replaceFullPath", whole))
    return PathModifier(False, path.text("replacePrefixMatch", _NEW_PATH))
