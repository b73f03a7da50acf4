"""`vllm-xds picker`: the ext_proc service Envoy asks for each request to a PREFIX_CACHE pool."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvloop

from picker.listen import UNIX, AddressError
from picker.memory import Memory
from picker.metrics import PickerMetrics
from picker.server import PickerServer
from picker.worker import Settings, explaining, on_signals, work
from picker.workers import WorkerError, supervise
from xds import tls
from xds.log import FORMATS, LEVELS, configure
from xds.status import serve_status

DESCRIPTION = """\
Answers Envoy's ext_proc filter: reads a request's prompt, picks the pod where it costs least (prefix cache, load),
and names it in one header that Envoy's ring_hash lands on. Envoy fails open: without a picker requests are spread
by the pods' weights. Pods and loads come from the management server; without it the key is the prompt's hot prefix.
"""
NO_EXCHANGE = "none"
EPILOG = """\
examples:
  vllm-xds picker                                            beside `vllm-xds serve`, with its defaults
  vllm-xds picker --listen unix:/run/picker/0.sock           a sidecar of Envoy
  vllm-xds picker --workers 4                                on four cores, with `vllm-xds serve --picker-workers 4`
  vllm-xds picker --server xds:18000 --listen 0.0.0.0:18001 --tls-cert tls.crt --tls-key tls.key --tls-ca ca.crt
                                                             one service for several Envoys
"""


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if text.startswith(UNIX + "/") or (host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither HOST:PORT nor unix:/PATH")


def _tcp_address(text: str) -> str:
    if text.startswith(UNIX):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return _address(text)


def _server(text: str) -> str:
    return text if text == NO_EXCHANGE else _tcp_address(text)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, 1 or more")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options on `parser`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--server", type=_tcp_address, default="127.0.0.1:18000", metavar="HOST:PORT",
        help="management server to learn pods and loads from (default %(default)s)")  # fmt: skip
    add("--listen", type=_address, action="append", metavar="ADDRESS",
        help="HOST:PORT or unix:/PATH to answer Envoy on; may be given again (default 127.0.0.1:18001)")  # fmt: skip
    add("--metrics-address", type=_tcp_address, default="127.0.0.1:19002", metavar="HOST:PORT",
        help="where /metrics, /healthz and /readyz are served, and for `vllm-xds explain` on this machine /debug/pick "
        "(default %(default)s)")  # fmt: skip
    add("--pickers", type=_count, default=1, metavar="N",
        help="pickers for the same pools, this one included, if some do not hear others: these are taken to send what "
        "this one sends, and all lean on a primary pod for each prefix (default: as many as are heard)")  # fmt: skip
    add("--exchange", type=_server, action="append", metavar="HOST:PORT",
        help="management server through which pickers tell one another what they send where, and so pick as one; with "
        "several servers name each; none: do without (default: that of --server)")  # fmt: skip
    add("--workers", type=_count, default=1, metavar="N",
        help="processes that share what they know and are one picker; each answers at an address of its own: the ports "
        "from that of --listen on, or PATH.0, PATH.1, ... (default %(default)s)")  # fmt: skip
    tls.add_arguments(parser)
    add("--log-format", choices=FORMATS, default="auto", help="auto is console in a terminal, else json")
    add("--log-level", choices=LEVELS, default="info", help="least level that is logged (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit code: 0, 1 for an address or files that cannot be used, 2 wrong usage."""
    args.listen = args.listen or ["127.0.0.1:18001"]
    exchange = args.exchange or [args.server]
    try:
        files = tls.chosen(args, args.listen)
    except ValueError as error:
        sys.stderr.write(f"vllm-xds picker: {error}\n")
        return 2
    configure(args.log_format, args.log_level)
    settings = Settings(
        server=args.server,
        listen=tuple(args.listen),
        pickers=args.pickers,
        exchange=() if NO_EXCHANGE in exchange else tuple(dict.fromkeys(exchange)),
        picker=secrets.randbits(64),
        tls=(str(files.cert), str(files.key), str(files.ca)) if files else None,
        log_format=args.log_format,
        log_level=args.log_level,
    )
    host, _, port = args.metrics_address.rpartition(":")
    host = host.strip("[]")
    try:
        if args.workers == 1:
            uvloop.run(_alone(settings, host, int(port)))
        else:
            asyncio.run(supervise(settings, args.workers, host, int(port)))  # uvloop makes no process groups
    except WorkerError:  # it has said why
        return 1
    except (AddressError, tls.TlsError, OSError, ValueError) as error:
        sys.stderr.write(f"vllm-xds picker: {error}\n")
        return 2 if isinstance(error, ValueError) else 1
    return 0


async def _alone(settings: Settings, host: str, port: int) -> None:
    @asynccontextmanager
    async def status(metrics: PickerMetrics, server: PickerServer) -> AsyncIterator[str]:
        async def explain(*asked: Any) -> dict[str, Any]:
            return server.explain(*asked)

        posted = explaining(explain)
        async with serve_status(host, port, metrics.registry, lambda: server.serving, posted=posted) as chosen:
            yield f"{host}:{chosen}"

    asked = asyncio.Event()
    on_signals(asked)
    await work(settings, Memory(), status, asked)


def main() -> int:
    """`python -m picker`."""
    parser = argparse.ArgumentParser(prog="vllm-xds picker")
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
