"""An explanation in words (pure): what `vllm-xds explain` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from picker.pick import Reason
from picker.prefix import CHUNK_TOKENS

SHOWN = 20  # pods of a table, and routes passed by: the rest is in --json
COLUMNS = (  # heading, field of an offer
    ("cost", "cost"),
    ("= backlog", "backlog"),
    ("+ prefill", "prefill"),
    ("+ requests", "requests"),
    ("+ preempted", "preempted"),
    ("+ adapter", "adapter"),
    ("cached", "cached"),
    ("uncached", "uncached"),
    ("running", "running"),
)

Document = Mapping[str, Any]  # what picker/explain_main.py puts together


def words(document: Document) -> Iterator[str]:
    """The lines of it. What others have chosen is printable, and short."""
    yield from map(_clean, _request(document["request"]))
    yield ""
    yield from map(_clean, _route(document["route"]))
    for pick in document["picks"]:
        yield ""
        yield _clean(pick["cluster"])
        yield from (f"  {_clean(line)}" for line in _pick(pick))


def _request(request: Document) -> Iterator[str]:
    yield f"{request['method']} {request['path']} of {request['host']}, port {request['port']}"
    model = f"model {request['model']}" if request["model"] is not None else request["unread"]
    yield f"body: {request['body_bytes']:,} bytes, {model}"


def _route(route: Document) -> Iterator[str]:
    if route["refusal"]:
        status = f", status {route['status']}" if route["status"] else ""
        yield f"no route is looked for: {route['refusal']}{status}"
        return
    if route["virtual_host"] is None:
        yield "no route: no virtual host has this name, status 404"
        return
    name = route["route"]
    yield f"route: {name} of virtual host {route['virtual_host']}" if name else "no route matches, status 404"
    passed = route["passed"]
    yield from (f"  not {each['route']}: {each['why']}" for each in passed[:SHOWN])
    if passed[SHOWN:]:
        yield f"  nor {len(passed) - SHOWN} more"
    if name and route["status"]:
        yield f"it is answered with {route['status']}"
    total = sum(cluster["weight"] for cluster in route["clusters"])
    for cluster in route["clusters"]:
        share = f"{cluster['weight'] / total:.0%} of its requests" if len(route["clusters"]) > 1 and total else "goes"
        yield f"{share} to {_cluster(cluster)}"


def _cluster(cluster: Document) -> str:
    if not cluster["name"]:
        return "a backend that cannot be used, status 500"
    how = "round robin" if cluster["strategy"] is None else cluster["strategy"]
    return f"{cluster['name']}: {how}, {cluster['endpoints']} endpoints" + (
        "" if cluster["asked"] else "; Envoy itself chooses one, no picker is asked"
    )


def _pick(pick: Document) -> Iterator[str]:
    if "error" in pick:
        yield f"not known: {pick['error']}"
        return
    if not pick["known"]:
        yield "the picker knows nothing of this pool: is it connected to the management server?"
    prompt = pick["prompt"]
    if prompt is not None:
        chunks = f"{len(prompt['chunks'])} chunks of {CHUNK_TOKENS}"
        hint = f", hint {prompt['hint']}" if prompt["hint"] else ""
        yield f"prompt: about {prompt['tokens']:,} tokens, {chunks}{hint}"
    if pick["renamed"]:
        yield f"model: the pod is asked for {pick['model']}"
    if pick["unnamed"]:
        yield "the model's name cannot be read: 503 where the content type says JSON, else the body goes on as it is"
    if pick["stateless_key"]:
        primary = f", primary pod {pick['primary']}" if pick["primary"] else ""
        yield f"key without loads: {pick['stateless_key']}{primary}"
    yield f"pick: {_outcome(pick)}"
    yield from _table(pick)


def _outcome(pick: Document) -> str:
    match pick["reason"]:
        case Reason.COST if pick["equal"] > 1:
            return f"any of the {pick['equal']} pods that cost least"
        case Reason.COST:
            offers = pick["offers"]
            by = f", cheapest by {offers[1]['cost'] - offers[0]['cost']:,.0f} tokens" if offers[1:] else ""
            return f"{pick['pod']}{by} (x-vllm-pick: {pick['key']})"
        case Reason.STATELESS:
            return f"no pod's load is fresh, so the key alone: Envoy's ring has its pod (x-vllm-pick: {pick['key']})"
        case Reason.UNKEYED:
            return "none: no pod's load is fresh, and the prompt is shorter than a chunk; Envoy spreads by weight"
        case Reason.UNREADABLE:
            return "none: the body has no prompt that can be read; Envoy spreads by weight"
        case Reason.UNPICKED:
            return "none: Envoy balances this pool itself, the picker sees to the model's name alone"
        case Reason.UNKNOWN_MODEL:
            return f"refused with 404: there is no model {pick['model']}"
        case Reason.SHED:
            return "refused with 429: the pool is saturated, and this request may be shed"
        case other:
            return str(other)


def _table(pick: Document) -> Iterator[str]:
    """The pods by cost, in tokens."""
    offers = pick["offers"]
    if not offers:
        return
    rows = [
        (offer["pod"], *(f"{offer[field]:,.0f}" for _, field in COLUMNS), "" if offer["fresh"] else "load not fresh")
        for offer in offers[:SHOWN]
    ]
    heading = ("pod", *(name for name, _ in COLUMNS), "")
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    for first, *rest, note in (heading, *rows):
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=False)]
        yield "  ".join([first.ljust(widths[0]), *cells, note]).rstrip()
    if offers[SHOWN:]:
        yield f"and {len(offers) - SHOWN} more that cost as much or more"


def _clean(line: str) -> str:
    """Without what a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in line)
