"""`vllm-xds status`: what a running management server serves, from which loads, to whom, and what is wrong."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import aiohttp
import rich.box
import rich.table
from rich.console import Console
from rich.text import Text

import bootstrap
from xds.status import DEFAULT_ADDRESS

EPILOG = """\
exit codes: 0 the server is ready, and every client has accepted what it serves; 1 not so, or no answer; 2 wrong usage
one resource, decoded: curl 'http://127.0.0.1:19001/debug/snapshot?type=RouteConfiguration&name=http-8080'
"""

TIMEOUT = 5.0  # seconds for everything asked of the server: it answers from memory
MAX_PAGE = 64 << 20  # bytes: 10,000 endpoints are 2 MB
LOOKS, PAUSE = 3, 0.5  # times, seconds: a client that is only just being told of a change is not behind
MAX_TEXT = 200  # characters of one cell: Envoy quotes the whole resource in a refusal

UNEXPECTED = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    OverflowError,
)  # what reading JSON of another shape ends in

NUMBERS = frozenset(
    {"weight", "in flight", "running", "waiting", "kv usage", "age"}
)  # columns that are aligned to the right
STYLES = {"in sync": "green", "behind": "yellow", "refused": "red", "warning": "yellow", "error": "red"}


class StatusError(Exception):
    """There is no status to show; the text is a sentence."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--server-status", metavar="HOST:PORT", default=DEFAULT_ADDRESS, help="the --status address of `serve`"
    )
    parser.add_argument("--json", action="store_true", help="print /debug/snapshot and /debug/clients as one document")


def run(args: argparse.Namespace) -> int:
    try:
        bootstrap.split_address(args.server_status)
    except ValueError as error:
        print(f"vllm-xds status: {error}", file=sys.stderr)
        return 2
    try:
        return asyncio.run(show(args.server_status, sys.stdout, as_json=args.json))
    except StatusError as error:
        print(f"vllm-xds status: {error}", file=sys.stderr)
        return 1


async def show(address: str, out: TextIO, *, as_json: bool = False) -> int:
    """Print the status of the server at `address` (HOST:PORT); returns the exit code. Raises StatusError."""
    document = await _ask(address)
    try:
        healthy = document["ready"] and all(_state(client) == "in sync" for client in document["clients"])
        lines, tables = list(map(_visible, _summary(address, document))), list(_tables(document))
    except UNEXPECTED:
        raise StatusError(f"{address} answers, but not as a management server of this version") from None
    if as_json:
        print(json.dumps(document, indent=2), file=out)
    elif out.isatty():
        _print_rich(lines, tables, Console(file=out))
    else:
        _print_plain(lines, tables, out)
    return 0 if healthy else 1


# --- asking ---


async def _ask(address: str) -> dict[str, Any]:
    """Both pages as one document; asked again while a client is behind."""
    document: dict[str, Any] = {}
    try:
        async with asyncio.timeout(TIMEOUT), aiohttp.ClientSession(auto_decompress=False) as session:
            for look in range(LOOKS):
                if look:
                    await asyncio.sleep(PAUSE)
                for page in ("snapshot", "clients"):
                    document.update(await _page(session, f"http://{address}/debug/{page}"))
                if not any(_state(client) == "behind" for client in document.get("clients", ())):
                    break
    except TimeoutError:
        raise StatusError(f"{address} does not answer within {TIMEOUT:g} s") from None
    except (aiohttp.ClientConnectorError, aiohttp.InvalidURL):
        raise StatusError(f"cannot connect to {address}: is `vllm-xds serve` running with this --status?") from None
    except (aiohttp.ClientError, OSError, RecursionError, *UNEXPECTED):
        raise StatusError(f"{address} answers, but not as a management server of this version") from None
    return document


async def _page(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.get(url, allow_redirects=False) as response:
        if response.status != 200:
            raise StatusError(f"{url} answers with status {response.status}")
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > MAX_PAGE:
                raise StatusError(f"{url} answers with more than {MAX_PAGE >> 20} MiB")
    value = json.loads(body)
    return dict(value)


# --- saying ---


@dataclass(frozen=True, slots=True)
class _Table:
    """`rows` are as long as `columns`."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def _state(client: dict[str, Any]) -> str:
    if any(each["refused"] for each in client["types"]):
        return "refused"
    return "in sync" if client["settled"] else "behind"


def _summary(address: str, document: dict[str, Any]) -> list[str]:
    if not document["ready"]:
        return [f"{address} is not ready: it has not read a configuration yet"]
    ports, routes = document["ports"], sum(port["routes"] for port in document["ports"])
    states = [_state(client) for client in document["clients"]]
    levels = [rejection["level"] for rejection in document["rejections"]]
    return [
        f"{address} is ready: {_count(routes, 'route')} on {_ports(ports)}",
        f"{_count(len(states), 'client')}: {states.count('in sync')} in sync, {states.count('behind')} behind, "
        f"{states.count('refused')} refused a resource",
        f"{_count(levels.count('error'), 'error')} and {_count(levels.count('warning'), 'warning')} "
        "in the configuration",
        *_writing(document.get("statuses")),
    ]


def _writing(statuses: dict[str, Any] | None) -> list[str]:
    """A line for a server that may write the statuses of Kubernetes objects."""
    if statuses is None:
        return []
    if statuses["writes"]:
        return [f"writes statuses: holds the Lease {_clean(statuses['lease'])}"]
    holder = f"{_clean(statuses['holder'])} holds" if statuses["holder"] else "nobody is known to hold"
    return [f"does not write statuses: {holder} the Lease {_clean(statuses['lease'])}"]


def _ports(ports: list[dict[str, Any]]) -> str:
    """`ports 8080, 8081`, and those of each group of Envoys behind it."""
    of_group: dict[str, list[str]] = {"": []}
    for port in ports:
        of_group.setdefault(port["group"], []).append(str(port["port"]))
    texts = {group: f"ports {', '.join(found) or 'none'}" for group, found in of_group.items()}
    return "; ".join([texts.pop(""), *(f"{group}: {text}" for group, text in texts.items())])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _tables(document: dict[str, Any]) -> Iterator[_Table]:
    """Only those with a row, but for pools: one without endpoints is worth knowing of."""
    columns: tuple[str, ...] = ("endpoint", "address", "weight", "in flight", "running", "waiting", "kv usage", "age")
    for pool in document["pools"]:
        rows = [_endpoint_row(endpoint) for endpoint in pool["endpoints"]]
        yield _Table(_clean(f"{pool['name']}, {pool['strategy']}, {_count(len(rows), 'endpoint')}"), columns, rows)
    rows = [_client_row(client) for client in document["clients"]]
    if rows:
        yield _Table("clients", ("node", "cluster", "group", "variant", "peer", "state", "not accepted yet"), rows)
    rows = [
        _cells(client["node_id"], each["type"], ", ".join(each["refused"]), each["last_nack"])
        for client in document["clients"]
        for each in client["types"]
        if each["refused"]
    ]
    if rows:
        yield _Table("refused by clients", ("node", "type", "resources", "message"), rows)
    columns = ("level", "object", "field", "reason", "message", "source")
    rows = [_cells(*(rejection[column] for column in columns)) for rejection in document["rejections"]]
    if rows:
        yield _Table("rejected in the configuration", columns, rows)


def _endpoint_row(endpoint: dict[str, Any]) -> tuple[str, ...]:
    weight = "draining" if endpoint["draining"] else endpoint["weight"]
    load = ("-", "-", "-", "never read")
    if endpoint["age"] is not None:
        running, waiting, kv_usage, age = (endpoint[name] for name in ("running", "waiting", "kv_usage", "age"))
        load = (f"{running:g}", f"{waiting:g}", f"{kv_usage:.0%}", f"{age:.1f} s")
    in_flight = "-" if endpoint["in_flight"] is None else endpoint["in_flight"]
    return _cells(endpoint["endpoint"], endpoint["address"], weight, in_flight, *load)


def _client_row(client: dict[str, Any]) -> tuple[str, ...]:
    state = _state(client)
    # Nothing was sent to one that came back with the newest version.
    late = [each["type"] for each in client["types"] if each["version_sent"] not in ("", each["version_acked"])]
    return _cells(
        client["node_id"],
        client["node_cluster"],
        client["group"] or "-",
        client["variant"],
        client["peer"],
        state,
        "" if state == "in sync" else ", ".join(late),
    )


def _cells(*values: object) -> tuple[str, ...]:
    return tuple(_clean(str(value)) for value in values)


def _clean(text: str) -> str:
    """A cell: visible, and not longer than MAX_TEXT."""
    line = _visible(text)
    return line if len(line) <= MAX_TEXT else f"{line[:MAX_TEXT]}..."


def _visible(text: str) -> str:
    """One line without what a terminal would obey: anyone who can connect chooses a node's id and its messages."""
    return "".join(c if c.isprintable() else " " for c in text)


def _print_plain(lines: list[str], tables: list[_Table], out: TextIO) -> None:
    for line in lines:
        print(line, file=out)
    for table in tables:
        print(f"\n{table.title}", file=out)
        widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
        for row in (table.columns, *table.rows):
            cells = [
                cell.rjust(width) if name in NUMBERS else cell.ljust(width)
                for name, cell, width in zip(table.columns, row, widths, strict=True)
            ]
            print("  ".join(["", *cells]).rstrip(), file=out)


def _print_rich(lines: list[str], tables: list[_Table], console: Console) -> None:
    for line in lines:
        console.print(Text(line))
    for table in tables:
        console.print()
        grid = rich.table.Table(
            title=Text(table.title, style="bold"), title_justify="left", box=rich.box.SIMPLE_HEAD, show_edge=False
        )
        for name in table.columns:
            grid.add_column(Text(name), justify="right" if name in NUMBERS else "left", overflow="fold")
        for row in table.rows:
            grid.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
        console.print(grid)
