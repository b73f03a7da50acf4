"""`vllm-xds picker`: the ext_proc service Envoy asks for each request to a PREFIX_CACHE pool."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import signal
import sys
import time
from contextlib import suppress

import structlog
import uvloop

from picker.listen import UNIX, AddressError
from picker.loads import LoadsClient, watch
from picker.metrics import PickerMetrics
from picker.pick import Picker
from picker.server import PickerServer
from xds import tls
from xds.log import FORMATS, LEVELS, configure
from xds.status import serve_status

DESCRIPTION = """\
Answers Envoy's ext_proc filter: reads a request's prompt, picks the pod where it costs least (prefix cache, load),
and names it in one header that Envoy's ring_hash lands on. Envoy fails open: without a picker requests are spread
by the pods' weights. Pods and loads come from the management server; without it the key is the prompt's hot prefix.
"""
EPILOG = """\
examples:
  vllm-xds picker                                            beside `vllm-xds serve`, with its defaults
  vllm-xds picker --listen unix:/run/picker/0.sock           a sidecar of Envoy
  vllm-xds picker --server xds:18000 --listen 0.0.0.0:18001 --tls-cert tls.crt --tls-key tls.key --tls-ca ca.crt
                                                             one service for several Envoys
"""
GC_THRESHOLD = (50_000, 20, 100)  # objects, then collections: a large body is many objects, and none is in a cycle
DRAIN = 1.5  # seconds between "not serving" and the end: Envoy's health check, each second, sees it first
GRACE = 0.5  # seconds for the requests then open: an answer takes a millisecond

log = structlog.get_logger()


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if text.startswith(UNIX + "/") or (host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither HOST:PORT nor unix:/PATH")


def _tcp_address(text: str) -> str:
    if text.startswith(UNIX):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return _address(text)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of pickers, 1 or more")
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
        help="where /metrics, /healthz and /readyz are served (default %(default)s)")  # fmt: skip
    add("--pickers", type=_count, default=1, metavar="N",
        help="independent pickers for the same pools, this one included: each sees 1/N of the requests, so with more "
        "than one they lean on a primary pod for each prefix (default %(default)s)")  # fmt: skip
    tls.add_arguments(parser)
    add("--log-format", choices=FORMATS, default="auto", help="auto is console in a terminal, else json")
    add("--log-level", choices=LEVELS, default="info", help="least level that is logged (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit code: 0, 1 for an address or files that cannot be used, 2 wrong usage."""
    args.listen = args.listen or ["127.0.0.1:18001"]
    try:
        files = tls.chosen(args, args.listen)
    except ValueError as error:
        sys.stderr.write(f"vllm-xds picker: {error}\n")
        return 2
    configure(args.log_format, args.log_level)
    try:
        uvloop.run(_serve(args, files))
    except (AddressError, tls.TlsError, OSError) as error:
        sys.stderr.write(f"vllm-xds picker: {error}\n")
        return 1
    return 0


async def _serve(args: argparse.Namespace, files: tls.TlsFiles | None) -> None:
    metrics = PickerMetrics()
    picker = Picker(random.random, args.pickers)
    server = PickerServer(picker, metrics, time.monotonic, files)
    node_id = f"picker-{os.uname().nodename}-{os.getpid()}"
    client = LoadsClient(
        args.server, picker, metrics, node_id=node_id, clock=time.monotonic, random=random.random, tls=files
    )
    signals = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signals.set)
    host, _, port = args.metrics_address.rpartition(":")
    async with serve_status(host.strip("[]"), int(port), metrics.registry, lambda: server.serving) as metrics_port:
        try:
            listening = await server.start(args.listen)
            log.info(
                "picker started", listen=listening, metrics=f"{host}:{metrics_port}", server=args.server, node=node_id
            )
            gc.freeze()  # what is loaded by now stays: collections need not look at it
            gc.set_threshold(*GC_THRESHOLD)
            async with asyncio.TaskGroup() as tasks:
                background = [
                    tasks.create_task(client.run()),
                    tasks.create_task(watch(picker, metrics, time.monotonic)),
                ]
                await signals.wait()
                signals.clear()
                server.drain()
                log.info("picker draining", seconds=DRAIN)
                with suppress(TimeoutError):  # a second signal ends the wait
                    await asyncio.wait_for(signals.wait(), DRAIN)
                for task in background:
                    task.cancel()
            log.info("picker stopped")
        finally:
            await server.stop(GRACE)


def main() -> int:
    """`python -m picker`."""
    parser = argparse.ArgumentParser(prog="vllm-xds picker")
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
