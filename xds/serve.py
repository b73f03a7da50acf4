"""`vllm-xds serve`: the management server as a process."""

from __future__ import annotations

import argparse
import asyncio
import gc
import re
import resource
import signal
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import structlog
import uvloop

import bootstrap
from xds import debug, log, tls
from xds.control import Control
from xds.directory import DirectoryError, DirectorySource
from xds.envoy import Options
from xds.exchange import Exchange
from xds.kube import KubernetesSource
from xds.kube_client import KubeError, connect, own_namespace
from xds.kube_writer import Options as WriterOptions
from xds.kube_writer import StatusWriter, observes
from xds.load_reports import LoadReports
from xds.metrics import Metrics
from xds.model import CORE, ObjectRef
from xds.resolve import CONTROLLER_NAME, CONTROLLER_NAMES
from xds.scrape import INTERVAL, Scraper
from xds.server import ManagementServer
from xds.status import DEFAULT_ADDRESS, serve_status
from xds.status_patch import read_address

EPILOG = """\
The objects are Gateway API's and the inference extension's: GatewayClass, Gateway, HTTPRoute, InferencePool,
InferenceModel, InferenceModelRewrite, InferenceObjective, Service, EndpointSlice, Pod, Namespace, Secret,
ReferenceGrant and BackendTrafficPolicy.

--config DIR: YAML as you would `kubectl apply` it. The directory is watched: a saved file reaches Envoy within two
seconds, and one bad object leaves the others served.

--kubernetes: the API server's, in every version it serves; a CRD that is not installed is waited for. The credentials
are those of the first there is: --kubeconfig, $KUBECONFIG, the pod's ServiceAccount, ~/.kube/config. The user needs
`list` and `watch` on these resources. Nothing is served before all of them are read; from then on an API server that is
away changes nothing.

In a cluster the objects' statuses are written, by the replica that holds a Lease: the user also needs `patch` on
gatewayclasses/status, gateways/status, httproutes/status, inferencepools/status, inferencemodels/status,
inferencemodelrewrites/status and inferenceobjectives/status, `get`, `create` and `patch` on leases, `create` on events
of events.k8s.io, and may `get` the CustomResourceDefinition gatewayclasses.gateway.networking.k8s.io.
To try it:  vllm-xds serve --kubernetes --log-format console
"""

LEASE_NAME = "vllm-xds"
_HOSTNAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_NAMESPACED = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?/[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
GC_THRESHOLD = (50_000, 20, 100)  # objects, then collections: of 1,000 clients each takes 0.1 s, and finds nothing
MOST_FILES = 65_536  # three for each client and pod there may be

STOP_GRACE = 1.0  # seconds for streams to close: an Envoy without its server serves on, so there is nothing to wait for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="DIR", type=Path, help="read the objects from a directory of YAML, watched")
    source.add_argument("--kubernetes", action="store_true", help="read the objects from a Kubernetes API server")
    parser.add_argument("--kubeconfig", metavar="FILE", help="with --kubernetes: whom to ask, and as whom")
    parser.add_argument("--context", metavar="NAME", help="with --kubernetes: a context of the kubeconfig")
    parser.add_argument(
        "--namespace",
        metavar="NAME",
        action="append",
        help="with --kubernetes: read only this namespace, repeatable (default: every one)",
    )
    parser.add_argument(
        "--gateway-address",
        metavar="ADDRESS",
        action="append",
        help="with --kubernetes: an IP address or host name of the Envoys, for the Gateways' status, repeatable",
    )
    parser.add_argument(
        "--gateway-service",
        metavar="NAMESPACE/NAME",
        help="with --kubernetes: the Envoys' Service: its load balancer's addresses, or its own, for the same",
    )
    parser.add_argument(
        "--lease",
        metavar="NAMESPACE/NAME",
        help="with --kubernetes: the Lease whose holder among the replicas writes statuses "
        f"(default: {LEASE_NAME} in the namespace of this pod; outside a cluster none, and no status is written)",
    )
    parser.add_argument("--no-status", action="store_true", help="with --kubernetes: write no status, Event or Lease")
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        action="append",
        help=f"where Envoys and pickers connect, repeatable (default: {bootstrap.DEFAULT_SERVER})",
    )
    parser.add_argument(
        "--status",
        metavar="HOST:PORT",
        default=DEFAULT_ADDRESS,
        help="where /metrics, /healthz, /readyz and /debug/ are served",
    )
    parser.add_argument(
        "--bind", metavar="ADDRESS", default=Options().bind, help="address Envoy's listeners bind, for every Gateway"
    )
    parser.add_argument(
        "--picker",
        metavar="ADDRESS",
        action="append",
        help="a picker as Envoy reaches it, HOST:PORT or unix:/path, repeatable (default: 127.0.0.1:18001)",
    )
    parser.add_argument(
        "--picker-workers",
        metavar="N",
        type=count,
        default=1,
        help="each of them runs with `--workers N`: at N ports from that one on, or at PATH.0, PATH.1, ...",
    )
    parser.add_argument(
        "--picker-tls-sds",
        metavar="DIR",
        help="mutual TLS between Envoy and picker: where `vllm-xds bootstrap --tls-sds` wrote its files on each Envoy",
    )
    parser.add_argument(
        "--picker-timeout",
        metavar="SECONDS",
        type=positive,
        default=Options().picker_timeout,
        help="what a hung picker may cost a request before it goes on without a pick",
    )
    parser.add_argument(
        "--access-log",
        action="store_true",
        help="Envoys write a line of JSON for each request to their standard output: which pod was picked, which has "
        "served (docs/explain.md)",
    )
    parser.add_argument(
        "--debug-headers",
        action="store_true",
        help="answers tell their clients the same in x-vllm-route, x-vllm-reason, x-vllm-picked and x-vllm-pod",
    )
    parser.add_argument(
        "--scrape-interval",
        metavar="SECONDS",
        type=positive,
        default=INTERVAL,
        help="time between two reads of a pod's /metrics",
    )
    parser.add_argument(
        "--controller-name",
        metavar="NAME",
        action="append",
        help="serve GatewayClasses of this controller, repeatable (default: "
        f"{CONTROLLER_NAME}, and with --config {CONTROLLER_NAMES[1]} too)",
    )
    tls.add_arguments(parser)
    add_log_arguments(parser)


def add_log_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-format", choices=log.FORMATS, default="auto", help="auto: for people in a terminal, else JSON"
    )
    parser.add_argument("--log-level", choices=log.LEVELS, default="info", help="the least of what is logged")


def count(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number, 1 or more, found {text}")
    return int(text)


def positive(text: str) -> float:
    """A number of seconds above 0."""
    value = float(text)
    if not 0 < value < 86400:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, found {text}")
    return value


def run(args: argparse.Namespace) -> int:
    args.listen = args.listen or [bootstrap.DEFAULT_SERVER]
    try:
        served, files = _check(args)
    except ValueError as error:
        print(f"vllm-xds serve: {error}", file=sys.stderr)
        return 2
    log.configure(args.log_format, args.log_level)
    raise_file_limit()
    try:
        uvloop.run(_serve(args, served, files))
    except (DirectoryError, KubeError, tls.TlsError, OSError, RuntimeError) as error:
        print(f"vllm-xds serve: {error}", file=sys.stderr)
        return 1
    return 0


def _check(args: argparse.Namespace) -> tuple[Options, tls.TlsFiles | None]:
    """What Envoys are told, and the TLS files to serve with. ValueError with a sentence: wrong usage."""
    _check_kubernetes(args)
    for address in (args.status, *args.listen):
        bootstrap.split_address(address)
    chosen = options(args)
    for address in chosen.pickers:
        if args.picker_tls_sds and address.startswith("unix:/"):
            raise ValueError(f"--picker-tls-sds is for pickers at HOST:PORT, not {address}")
    for text in (*chosen.pickers, args.picker_tls_sds or ""):
        text.encode()  # what is no UTF-8 can not be sent to an Envoy: UnicodeEncodeError is a ValueError
    return chosen, tls.chosen(args, args.listen)


def controller_names(args: argparse.Namespace) -> tuple[str, ...]:
    """Whose GatewayClasses are served: in a cluster ours alone, for two controllers of one class undo each other."""
    return tuple(args.controller_name or ((CONTROLLER_NAME,) if args.kubernetes else CONTROLLER_NAMES))


def _check_kubernetes(args: argparse.Namespace) -> None:
    for name in ("kubeconfig", "context", "namespace", "gateway_address", "gateway_service", "lease", "no_status"):
        if getattr(args, name) and not args.kubernetes:
            raise ValueError(f"--{name.replace('_', '-')} goes with --kubernetes")
    if args.no_status and args.lease:
        raise ValueError("--lease is for writing statuses, and --no-status for not")
    for name in ("lease", "gateway_service"):
        if getattr(args, name) and not _NAMESPACED.fullmatch(getattr(args, name)):
            raise ValueError(f"--{name.replace('_', '-')}: expected NAMESPACE/NAME, found {getattr(args, name)}")
    for address in args.gateway_address or ():
        if read_address(address)[0] == "Hostname" and not _HOSTNAME.fullmatch(address):
            raise ValueError(f"--gateway-address: expected an IP address or a lower-case host name, found {address}")
    service = (args.gateway_service or "").partition("/")[0]
    if args.namespace and service not in ("", *args.namespace):
        raise ValueError(f"--gateway-service: namespace {service} is not read: add --namespace {service}")


def options(args: argparse.Namespace) -> Options:
    """What the operator says about the Envoys; every worker of every picker is one to them. ValueError, a sentence."""
    workers = (bootstrap.worker_addresses(address, args.picker_workers) for address in args.picker or Options().pickers)
    return Options(
        args.bind,
        tuple(chain.from_iterable(workers)),
        args.picker_timeout,
        args.picker_tls_sds,
        access_log=args.access_log,
        debug_headers=args.debug_headers,
    )


async def _serve(args: argparse.Namespace, served: Options, files: tls.TlsFiles | None) -> None:
    events = structlog.get_logger()
    metrics = Metrics()
    server = ManagementServer(metrics)
    reports = LoadReports(metrics)
    control = Control(
        server,
        Scraper(metrics, args.scrape_interval),
        metrics,
        interval=args.scrape_interval,
        options=served,
        controller_names=controller_names(args),
        in_flight=reports.in_flight,
    )

    async with _source(args, metrics, control) as (source, writer):

        async def work() -> None:
            async with aclosing(source.configs()) as configs:
                await control.configure(await anext(configs))  # until then no request is answered
                calm_collector()
                events.info("server started", config=str(source), listen=args.listen, status=args.status)
                async with asyncio.TaskGroup() as group:
                    if writer is not None:
                        group.create_task(writer.run(), name="writer")
                    await control.run(configs)

        host, port = bootstrap.split_address(args.status)
        pages, posted = debug.pages(control, writer), debug.posted(control)
        async with serve_status(host, port, metrics.registry, lambda: control.snapshot is not None, pages, posted):
            await server.start(args.listen, files, [reports.handler(), Exchange(metrics).handler()])
            try:
                await until_signal(work())
                events.info("server stopped")
            finally:
                await server.stop(STOP_GRACE)


def writer_options(args: argparse.Namespace) -> WriterOptions | None:
    """What to write to the API server; None: nothing."""
    namespace = own_namespace()
    lease = args.lease or (f"{namespace}/{LEASE_NAME}" if namespace else "")
    if args.no_status or not lease:
        return None
    service = None
    if args.gateway_service:
        service = ObjectRef(CORE, "Service", *args.gateway_service.split("/"))
    return WriterOptions(
        lease=tuple(lease.split("/")),
        identity=f"{socket.gethostname()}_{uuid.uuid4()}",
        controllers=controller_names(args),
        addresses=tuple(map(read_address, args.gateway_address or ())),
        service=service,
    )


@asynccontextmanager
async def _source(
    args: argparse.Namespace, metrics: Metrics, control: Control
) -> AsyncIterator[tuple[DirectorySource | KubernetesSource, StatusWriter | None]]:
    """Where the objects come from, and what is told of their statuses in return."""
    if not args.kubernetes:
        yield DirectorySource(args.config), None
        return
    options = writer_options(args)
    async with aclosing(await connect(args.kubeconfig or "", args.context or "")) as client:
        if options is None:
            yield KubernetesSource(client, metrics, args.namespace or ()), None
            return
        source = KubernetesSource(client, metrics, args.namespace or (), observe=observes(options.service))
        writer = StatusWriter(client, source.live, options, metrics)
        source.follow_live(writer.observed)
        control.follow_statuses(writer.follow)
        yield source, writer


def calm_collector() -> None:
    """Keep collections from the 100,000 objects that are loaded by now, and from the streams, which leave no cycles."""
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)


def raise_file_limit() -> None:
    """Let this process open the files it may: each client and each pod is one, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def until_signal(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` until it ends or SIGINT or SIGTERM asks this process to."""
    task = asyncio.ensure_future(work)
    asked = False

    def stop() -> None:
        nonlocal asked
        asked = True
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not asked:
            raise
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
