"""Which route a request takes, to which clusters, and what the picker would be told of it, as JSON (pure).

xds/match.py finds the route; here is what follows from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from xds.envoy import OBJECTIVE_HEADERS
from xds.match import Request, find
from xds.model import Cluster, Forward, PortListener, RequestRedirect, Respond, Strategy, Topology

MAX_TOLD = 8192  # bytes: header_to_metadata passes a longer value by


def asked(request: Request, port: int, group: str | None = None) -> bytes:
    """What `explain_route` is asked: a request to `port` of the Envoys of `group`, None where only one has it."""
    return json.dumps(
        {
            "port": port,
            "group": group,
            "method": request.method,
            "host": request.host,
            "path": request.path,
            "headers": request.headers,
            "model": request.model,
        }
    ).encode()


def explain_route(topology: Topology, question: bytes) -> dict[str, Any]:
    """The answer to what `asked` has made, a JSON object: the route that the request takes.

    `status` is what Envoy answers itself, 0 where it forwards; `refusal` says why, where no route is looked for at all.
    `passed` are the routes before the one taken, with the first thing in which the request differs. Of each of the
    `clusters` that share the requests by weight, `strategy` is null for a Service, and `picked` says whether the picker
    is asked for a pod, `asked` whether at all; `renames` that the
    route has models whose name a pod must not be sent. `session` and `objective` are what it is told beside the body.
    ValueError, a sentence: there is no such port, or the question is none.
    """
    request, port, group = _read(question)
    listener = _listener(topology.listeners, port, group)
    found = find(listener, request)
    action = found.route.action if found.route is not None else None
    told = _told(request.headers, action) if isinstance(action, Forward) and action.asked else ("", "")
    return {
        "port": listener.port,
        "group": listener.group,
        "tls": bool(listener.chains),
        "path": found.path,
        "virtual_host": found.virtual_host.hostname if found.virtual_host is not None else None,
        "route": found.route.name if found.route is not None else None,
        "passed": [{"route": each.name, "why": each.why} for each in found.passed],
        "refusal": found.refusal,
        "status": found.status or _status(action),
        "clusters": _clusters(action, topology.clusters) if isinstance(action, Forward) else [],
        "session": told[0],
        "objective": told[1],
    }


def _read(question: bytes) -> tuple[Request, int, str | None]:
    try:
        fields = json.loads(question)
        headers = tuple((name, value) for name, value in fields["headers"])
        method, host, path = fields["method"], fields["host"], fields["path"]
        port, group, model = fields["port"], fields["group"], fields["model"]
    except (TypeError, LookupError, RecursionError):
        raise ValueError("expected a request as `vllm-xds explain` asks") from None
    texts = (method, host, path, *(text for pair in headers for text in pair), group or "", model or "")
    if type(port) is not int or not all(isinstance(each, str) for each in texts):
        raise ValueError("expected texts, and a number for the port")
    return Request(method, host, path, headers, model), port, group


def _listener(listeners: Sequence[PortListener], port: int, group: str | None) -> PortListener:
    found = [each for each in listeners if each.port == port and group in (None, each.group)]
    if len(found) == 1:
        return found[0]
    if not found:
        ports = ", ".join(sorted({str(each.port) for each in listeners}, key=int)) or "none"
        of_group = f" for the Envoys of group {group!r}" if group is not None else ""
        raise ValueError(f"no Gateway has port {port}{of_group}: there are {ports}")
    groups = ", ".join(repr(each.group) for each in found)
    raise ValueError(f"several groups of Envoys have port {port}: name one of {groups}")


def _status(action: object) -> int:
    match action:
        case Respond(status=status) | RequestRedirect(status=status):
            return status
        case _:
            return 0


def _clusters(action: Forward, clusters: Iterable[Cluster]) -> list[dict[str, Any]]:
    """A name of "" is a backend that cannot be used: that share is answered with 500."""
    known = {each.name: each for each in clusters}
    rows = []
    for name, weight, _ in action.clusters:
        strategy = known[name].strategy if name in known else None
        rows.append(
            {
                "name": name,
                "weight": weight,
                "strategy": str(strategy) if strategy is not None else None,
                "endpoints": len(known[name].endpoints) if name in known else 0,
                "asked": action.asked and name != "",
                "picked": strategy is Strategy.PREFIX_CACHE,
                "renames": bool(action.renames),
            }
        )
    return rows


def _told(headers: Iterable[tuple[str, str]], action: Forward) -> tuple[str, str]:
    """Session and objective as header_to_metadata has them: of several names the last that is there counts."""
    values: dict[str, list[str]] = {}
    for name, value in headers:
        values.setdefault(name.lower(), []).append(value.strip())
    joined = {name: ",".join(each) for name, each in values.items()}
    sayable = {name: value for name, value in joined.items() if 0 < len(value.encode()) < MAX_TOLD}
    session = [sayable[name] for name in action.session_headers if name in sayable]
    named = action.objectives or action.session_headers
    objective = [sayable[name] for name in OBJECTIVE_HEADERS if named and name in sayable]
    return session[-1] if session else "", objective[-1] if objective else ""
