"""Objects at the edges of their schemas and beyond, as Hypothesis strategies: what tests/refusals.py offers to Envoy.

A case is one base of tests/edges.yaml, all in order, with a field or a few changed to what somebody, or a program,
might write there. Many are refused by parse; what matters is that Envoy refuses no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from tests.edge_values import (
    ADDRESS,
    DURATION,
    HEADER_NAME,
    HOSTNAME,
    NAME,
    NUMBER,
    PATH,
    REGEX,
    TEXT,
    Values,
    one_of,
)

_OBJECTS = (Path(__file__).parent / "edges.yaml").read_text()
BASES = tuple(yaml.safe_load(_OBJECTS)["bases"])

# --- fields -----------------------------------------------------------------------------------------------------------

MATCH_TYPE = one_of("Exact", "PathPrefix", "RegularExpression")
APP_PROTOCOL = one_of("http", "kubernetes.io/h2c", "kubernetes.io/ws", "")
STATUS = one_of(200, 300, 301, 302, 303, 304, 307, 308, 309, 500, 0, "301")
METHOD = one_of("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "get", "M-SEARCH")

RULE = "HTTPRoute/edge spec rules 0"
MATCH = f"{RULE} matches 0"
FILTER = f"{RULE} filters 0"
BACKEND = f"{RULE} backendRefs"
SLICE = "EndpointSlice/sliced-1"
TIMEOUTS = "BackendTrafficPolicy/policy spec timeout"

# Where a value stands, and the values it may have there.
FIELDS: dict[str, Values] = {
    "HTTPRoute/edge metadata name": NAME,
    "HTTPRoute/edge spec hostnames 0": HOSTNAME,
    "Gateway/gw spec listeners 1 hostname": HOSTNAME,
    "Gateway/other spec listeners 0 hostname": HOSTNAME,
    "HTTPRoute/more spec hostnames 0": HOSTNAME,
    "HTTPRoute/more spec hostnames 2": HOSTNAME,
    f"{MATCH} path value": PATH | REGEX,
    f"{MATCH} path type": MATCH_TYPE,
    f"{MATCH} method": METHOD,
    f"{MATCH} headers 0 name": HEADER_NAME,
    f"{MATCH} headers 0 value": TEXT | REGEX,
    f"{MATCH} headers 0 type": MATCH_TYPE,
    f"{MATCH} headers 1 name": HEADER_NAME,
    f"{MATCH} queryParams 0 name": HEADER_NAME,
    f"{MATCH} queryParams 0 value": PATH | REGEX,
    f"{MATCH} queryParams 0 type": MATCH_TYPE,
    **{
        f"{RULE} filters {i} {modifier} {operation} 0 {part}": values
        for i, modifier in enumerate(("requestHeaderModifier", "responseHeaderModifier"))
        for operation in ("set", "add")
        for part, values in (("name", HEADER_NAME), ("value", TEXT))
    },
    f"{RULE} filters 0 requestHeaderModifier remove 0": HEADER_NAME,
    f"{RULE} filters 1 responseHeaderModifier remove 0": HEADER_NAME,
    f"{BACKEND} 0 filters 0 requestHeaderModifier set 0 name": HEADER_NAME,
    f"{BACKEND} 0 filters 0 requestHeaderModifier set 0 value": TEXT,
    f"{FILTER} urlRewrite hostname": HOSTNAME,
    f"{FILTER} urlRewrite path replaceFullPath": PATH,
    f"{FILTER} urlRewrite path replacePrefixMatch": PATH,
    f"{FILTER} requestRedirect scheme": one_of("http", "https", "ftp", "HTTP", ""),
    f"{FILTER} requestRedirect hostname": HOSTNAME,
    f"{FILTER} requestRedirect port": NUMBER,
    f"{FILTER} requestRedirect statusCode": STATUS,
    f"{FILTER} requestRedirect path replaceFullPath": PATH,
    f"{FILTER} requestRedirect path replacePrefixMatch": PATH,
    **{f"{BACKEND} {i} weight": NUMBER for i in range(3)},
    f"{BACKEND} 0 name": NAME,
    f"{BACKEND} 0 port": NUMBER,
    f"{RULE} timeouts request": DURATION,
    f"{RULE} timeouts backendRequest": DURATION,
    **{
        f"{TIMEOUTS} {name}": DURATION
        for name in (
            "tcp connectTimeout",
            "http requestTimeout",
            "http streamIdleTimeout",
            "http connectionIdleTimeout",
        )
    },
    "InferencePool/llm spec targetPorts 0 number": NUMBER,
    "InferencePool/llm spec appProtocol": APP_PROTOCOL,
    "InferencePool/llm metadata annotations inference.networking.x-k8s.io/routing-strategy": one_of(
        "DEFAULT", "PREFIX_CACHE", "prefix_cache", ""
    ),
    "Service/sliced spec ports 0 appProtocol": APP_PROTOCOL,
    "Service/web spec ports 0 targetPort": NUMBER,
    "Pod/web-1 status podIP": ADDRESS,
    f"{SLICE} ports 0 port": NUMBER,
    f"{SLICE} endpoints 0 addresses 0": ADDRESS,
    f"{SLICE} endpoints 1 addresses 0": ADDRESS,
    f"{SLICE} endpoints 1 targetRef name": NAME,
}


# What an operator may say, as arguments of Options.
OPTIONS: tuple[dict[str, Any], ...] = (
    *({"picker_timeout": seconds} for seconds in (0.0, -1.0, 1e-7, 0.0005, 0.001, 0.2, 3600, 3600.1, 86399, inf, nan)),
    *(
        {"pickers": (picker,)}
        for picker in ("[::1]:1", "[]:1", ":1", "[fe80::1%lo]:1", "[::1%lo]:1", "127.0.0.1:65535")
    ),
    *({"pickers": (f"unix:/{'x' * size}",)} for size in (1, 106, 107, 108, 200)),
    {"pickers": (f"unix:/{'é' * 60}",)},
    {"pickers": ("127.0.0.1:1", "127.0.0.1:1", "unix:/x", "localhost:1")},
    {"pickers": ()},
)

Documents = tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Case:
    """Documents as a file would decode to, and what was changed in them: (where, value)."""

    documents: Documents
    changed: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        return "\n".join(f"{where} = {value!r}" for where, value in self.changed)


def steady(listen: int, upstream: int) -> Case:
    """A case without a change, whose Gateway listens on `listen` and whose backends are at port `upstream`."""
    return Case(_documents("exact", listen, upstream))


def listed(listen: int, upstream: int) -> Iterator[Case]:
    """Every listed value in every field it may stand in, alone."""
    for base in BASES:
        documents = _documents(base, listen, upstream)
        for where in _fields(documents):
            for value in {repr(value): value for value in FIELDS[where].listed}.values():
                yield _case(documents, [(where, value)])


def cases(listen: int, upstream: int) -> st.SearchStrategy[Case]:
    """One to three fields of a base, with values that are listed or like them."""
    return st.one_of([_cases(_documents(base, listen, upstream)) for base in BASES])


def _cases(documents: Documents) -> st.SearchStrategy[Case]:
    change = st.one_of([st.tuples(st.just(where), FIELDS[where].any()) for where in _fields(documents)])
    changes = st.lists(change, min_size=1, max_size=3, unique_by=lambda each: each[0])
    return changes.map(lambda changed: _case(documents, changed))


def _documents(base: str, listen: int, upstream: int) -> Documents:
    objects = yaml.safe_load(_OBJECTS.replace("LISTEN", str(listen)).replace("UPSTREAM", str(upstream)))
    chosen = objects["bases"][base]
    route = next(each for each in objects["common"] if _name(each) == "HTTPRoute/edge")
    route["spec"]["rules"] = chosen["rules"]
    return (*objects["common"], *chosen.get("beside", ()))


def _name(document: dict[str, Any]) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


def _fields(documents: Documents) -> list[str]:
    """Those of FIELDS that these documents have."""
    return [where for where in FIELDS if _place(documents, where) is not None]


def _case(documents: Documents, changed: list[tuple[str, object]]) -> Case:
    new = tuple(_copy(document) for document in documents)
    for where, value in sorted(changed, key=lambda each: "metadata name" in each[0]):  # names last: they are looked for
        place = _place(new, where)
        assert place is not None
        place[0][place[1]] = value
    return Case(new, tuple(changed))


def _copy(value: Any) -> Any:
    """Without YAML's aliases, by which one change would be several."""
    if isinstance(value, dict):
        return {key: _copy(each) for key, each in value.items()}
    return [_copy(each) for each in value] if isinstance(value, list) else value


def _place(documents: Documents, where: str) -> tuple[Any, Any] | None:
    """The mapping or list that a field is in, and its key there; None where there is no such field."""
    parent: Any = None
    key: str | int = ""
    node: Any = {_name(document): document for document in documents}
    try:
        for part in where.split():
            parent, key = node, int(part) if isinstance(node, list) else part
            node = parent[key]
    except LookupError:
        return None
    return parent, key
