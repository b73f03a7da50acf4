"""`vllm-xds explain URL`: the route, the pool, the prompt's chunks, each pod's cost and the pick for one request."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

import bootstrap
from picker.explain_ask import Directory, ExplainError, Running, Source, read_loads
from picker.explain_words import words
from xds.directory import DirectoryError
from xds.explain import asked
from xds.match import Request, body_model
from xds.resolve import CONTROLLER_NAMES
from xds.status import DEFAULT_ADDRESS, MAX_POSTED

PICKER_STATUS = "127.0.0.1:19002"
EPILOG = """\
The request is described as curl sends it, and nothing is sent to Envoy or to a pod. URL says the Gateway's port and the
host; the path is matched as Envoy matches it.

asking what runs (the true answer: a picker remembers what it has sent to each pod):
  vllm-xds explain http://localhost:8081/v1/completions --body request.json
  vllm-xds explain http://llm.example.com:8081/v1/chat/completions -H 'x-session: s1' --body - < request.json

of a directory, with a picker that has sent nothing yet; without --loads every pod is idle:
  vllm-xds explain http://localhost:8081/v1/completions --body request.json --config DIR --loads loads.yaml

LOADS is YAML or JSON, a document for each pool; a pod that is left out has never reported. This is one, and what
`curl 'http://127.0.0.1:19001/debug/snapshot?type=PoolLoad&name=pool/default/qwen'` prints another:
  name: pool/default/qwen
  endpoints:
  - {hash_key: default/qwen-0, running: 12, waiting: 3, kv_usage: 0.6, kv_tokens: 400000, prefill_rate: 9000}

Costs are tokens of prefill: docs/explain.md. The running processes answer this machine alone.
exit codes: 0 explained; 1 not, or not all of it: no answer, nothing to read; 2 wrong usage
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="scheme, host, port and path of the request, as a client says them")
    parser.add_argument("--body", metavar="FILE", help="the request's body; - is standard input (default: no body)")
    parser.add_argument("-H", "--header", metavar="'NAME: VALUE'", action="append", help="a request header, repeatable")
    parser.add_argument("--method", help="the request's method (default: POST with a body, else GET)")
    parser.add_argument(
        "--group", metavar="NAME", help="the group of Envoys (vllm-xds/nodes) it reaches; '' are those of none"
    )
    parser.add_argument(
        "--server-status", metavar="HOST:PORT", default=DEFAULT_ADDRESS, help="the --status address of `serve`"
    )
    parser.add_argument(
        "--picker-status", metavar="HOST:PORT", default=PICKER_STATUS, help="the --metrics-address of `picker`"
    )
    parser.add_argument(
        "--config", metavar="DIR", type=Path, help="ask no running process, but read the objects from a directory"
    )
    parser.add_argument("--loads", metavar="FILE", type=Path, help="with --config: what the pods report (below)")
    parser.add_argument("--controller-name", metavar="NAME", action="append", help="with --config: as for `serve`")
    parser.add_argument("--json", action="store_true", help="print one JSON document, with everything")


def run(args: argparse.Namespace) -> int:
    try:
        request, port = _read_request(args)
        _check(args)
    except ValueError as error:
        print(f"vllm-xds explain: {error}", file=sys.stderr)
        return 2
    try:
        body = _read_body(args.body)
        return asyncio.run(explain(_source(args), request, port, body, sys.stdout, group=args.group, as_json=args.json))
    except (ExplainError, DirectoryError) as error:
        print(f"vllm-xds explain: {error}", file=sys.stderr)
        return 1


async def explain(
    source: Source,
    request: Request,
    port: int,
    body: bytes,
    out: TextIO,
    *,
    group: str | None = None,
    as_json: bool = False,
) -> int:
    """Print what `source` says of a request to `port`; the exit code. ExplainError when the route cannot be found."""
    explained = await document(source, request, port, body, group)
    if as_json:
        print(json.dumps(explained, indent=2), file=out)
    else:
        for line in words(explained):
            print(line, file=out)
    return 1 if any("error" in pick for pick in explained["picks"]) else 0


async def document(
    source: Source, request: Request, port: int, body: bytes, group: str | None = None
) -> dict[str, Any]:
    """The whole explanation, JSON: the request, its route, and a pick for each cluster the picker is asked for.

    A pick that cannot be had is its cluster and an `error`. `request.model` is read from the body.
    """
    model, unread = body_model(body)
    request = Request(request.method, request.host, request.path, request.headers, model)
    route = await source.route(asked(request, port, group))
    picks = []
    for cluster in route["clusters"] if body else ():  # without one Envoy does not ask
        if cluster["asked"]:
            try:
                pick = await source.pick(cluster["name"], body, route["session"], route["objective"])
            except ExplainError as error:
                picks.append({"cluster": cluster["name"], "error": str(error)})
            else:
                picks.append(pick | {"unnamed": cluster["renames"] and not pick["named"]})
    described = {
        "method": request.method,
        "host": request.host,
        "port": port,
        "path": request.path,
        "headers": [list(each) for each in request.headers],
        "body_bytes": len(body),
        "model": model,
        "unread": unread,
    }
    return {"request": described, "route": route, "picks": picks}


# --- what is asked ---


def _read_request(args: argparse.Namespace) -> tuple[Request, int]:
    """The request, and the port it is sent to. ValueError, a sentence."""
    if not args.url.isprintable() or " " in args.url:
        raise ValueError("expected a URL without spaces and control characters")
    url = urlsplit(args.url)
    ports = {"http": 80, "https": 443}
    if url.scheme not in ports or not url.hostname:
        raise ValueError(f"expected a URL like http://localhost:8081/v1/completions, found {args.url!r}")
    try:
        port = url.port if url.port is not None else ports[url.scheme]
    except ValueError:
        raise ValueError(f"expected a port from 1 to 65535 in {args.url!r}") from None
    headers = tuple(_header(text) for text in args.header or ())
    host = next((value for name, value in headers if name.lower() == "host"), url.netloc.rpartition("@")[2])
    method = args.method or ("POST" if args.body is not None else "GET")
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    return Request(method, host, path, tuple(each for each in headers if each[0].lower() != "host")), port


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip() or not text.isprintable():
        raise ValueError(f"expected a header like 'x-session: s1', found {text!r}")
    return name.strip(), value.strip()


def _check(args: argparse.Namespace) -> None:
    for name in ("loads", "controller_name"):
        if getattr(args, name) and args.config is None:
            raise ValueError(f"--{name.replace('_', '-')} goes with --config")
    for address in (args.server_status, args.picker_status):
        bootstrap.split_address(address)


def _read_body(name: str | None) -> bytes:
    if name is None:
        return b""
    try:
        if name == "-":
            body = sys.stdin.buffer.read(MAX_POSTED + 1)
        else:
            with Path(name).open("rb") as file:
                body = file.read(MAX_POSTED + 1)
    except OSError as error:
        raise ExplainError(f"cannot read {name}: {error.strerror}") from None
    if len(body) > MAX_POSTED:
        raise ExplainError(f"{name} is larger than {MAX_POSTED >> 20} MiB, more than can be explained")
    return body


def _source(args: argparse.Namespace) -> Source:
    if args.config is None:
        return Running(args.server_status, args.picker_status)
    loads = None
    if args.loads is not None:
        try:
            loads = read_loads(args.loads.read_text())
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ExplainError(f"cannot read {args.loads}: {why}") from None
        except ExplainError as error:
            raise ExplainError(f"{args.loads}: {error}") from None
    return Directory(args.config, tuple(args.controller_name or CONTROLLER_NAMES), loads)
