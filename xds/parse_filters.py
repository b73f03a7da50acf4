"""The filters of an HTTPRoute's rules and backendRefs (HTTPRouteFilter of Gateway API v1.6.1).

Of a rule: header modifiers, RequestRedirect, URLRewrite. Of a backendRef: the header modifiers only, which is what
Envoy can do after it has chosen one of several clusters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from xds.fields import HEADER_NAME, HEADER_VALUE, KIND, PRECISE_HOSTNAME, Reader, Text, describe
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

_NEW_PATH = Text("a path without spaces and control characters", 1024, re.compile(r"[^\x00-\x20\x7f]*"), shortest=0)


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
        URLRewrite(_read_hostname(rewrite), _read_path(rewrite)) if rewrite else None,
    )
    if filters.redirect and filters.rewrite:
        message = "RequestRedirect beside URLRewrite; the rule answers 500"
        rejected.append(reader.reject("filters", message, "IncompatibleFilters"))
    for modifier in (filters.request_headers, filters.response_headers):
        if modifier and "host" in _names(modifier):  # Envoy refuses the whole response for it
            message = "no modifier can change Host, URLRewrite can; the rule answers 500"
            rejected.append(reader.reject("filters", message, "UnsupportedValue"))
    return Problem.of(ConditionType.ACCEPTED, rejected[0]) if rejected else filters


def _read_modifier(reader: Reader) -> HeaderModifier:
    return HeaderModifier(
        _read_headers(reader, "set"), _read_headers(reader, "add"), reader.texts("remove", 16, HEADER_NAME)
    )


def _names(modifier: HeaderModifier) -> set[str]:
    return {name.lower() for name in (*dict(modifier.set), *dict(modifier.add), *modifier.remove)}


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
        _read_path(reader),
        reader.port("port", 0),
        status,
    )


def _read_hostname(reader: Reader) -> str:
    return reader.text("hostname", PRECISE_HOSTNAME, "")


def _read_path(reader: Reader) -> PathModifier | None:
    if reader.get("path") is None:
        return None
    path = reader.child("path")
    full = path.choice("type", ("ReplaceFullPath", "ReplacePrefixMatch")) == "ReplaceFullPath"
    return PathModifier(full, path.text("replaceFullPath" if full else "replacePrefixMatch", _NEW_PATH))
