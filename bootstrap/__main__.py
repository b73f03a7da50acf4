"""`vllm-xds bootstrap`: print the static bootstrap of an Envoy."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import bootstrap

EPILOG = """\
example:
  vllm-xds bootstrap --server xds.gateway.svc:18000 --node-id "$HOSTNAME" > envoy.yaml
  envoy -c envoy.yaml --component-log-level ext_proc:error --drain-time-s 3600

with mutual TLS, on Envoy's machine:
  vllm-xds bootstrap --server xds.gateway.svc:18000 --tls-sds /run/envoy \\
    --tls-cert /tls/tls.crt --tls-key /tls/tls.key --tls-ca /tls/ca.crt > /run/envoy/envoy.yaml
"""

TLS_OPTIONS = {
    "--tls-cert": "Envoy's certificate (chain) in PEM for mutual TLS, where Envoy finds it; reloaded when moved there",
    "--tls-key": "its key, without a password",
    "--tls-ca": "the CA that the certificates of management server and picker have to be of",
    "--tls-sds": "directory to write two files to, by which Envoy watches those three",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--server",
        metavar="HOST:PORT",
        default=bootstrap.DEFAULT_SERVER,
        help="the management server, as Envoy reaches it",
    )
    parser.add_argument("--node-id", default=bootstrap.DEFAULT_NODE_ID, help="this Envoy's name in logs and metrics")
    parser.add_argument(
        "--node-cluster",
        default=bootstrap.DEFAULT_NODE_CLUSTER,
        help="the group of Envoys it is one of; a Gateway annotated vllm-xds/nodes is for the groups it names",
    )
    parser.add_argument(
        "--admin", metavar="HOST:PORT", default=bootstrap.DEFAULT_ADMIN, help="where Envoy's admin API listens"
    )
    parser.add_argument(
        "--status",
        metavar="HOST:PORT",
        help="where Envoy answers GET /ready and /stats/prometheus, and nothing else of its admin API",
    )
    parser.add_argument(
        "--sotw", action="store_true", help="ask by the state-of-the-world protocol; the incremental one costs less"
    )
    for option, text in TLS_OPTIONS.items():
        parser.add_argument(option, metavar="DIR" if option == "--tls-sds" else "FILE", type=_absolute, help=text)


def _absolute(text: str) -> Path:
    """Envoy may be started in another directory."""
    return Path(text).absolute()


def run(args: argparse.Namespace) -> int:
    tls: list[Path | None] = [args.tls_cert, args.tls_key, args.tls_ca, args.tls_sds]
    missing = [option for option, path in zip(TLS_OPTIONS, tls, strict=True) if path is None]
    if 0 < len(missing) < len(tls):
        print(f"vllm-xds bootstrap: {', '.join(TLS_OPTIONS)} belong together: {missing[0]} is missing", file=sys.stderr)
        return 2
    try:
        text = bootstrap.render(
            *(args.server, args.node_id, args.node_cluster, args.admin),
            delta=not args.sotw,
            tls_sds=None if args.tls_sds is None else str(args.tls_sds),
            status=args.status,
        )
        if args.tls_sds is not None:
            args.tls_sds.mkdir(parents=True, exist_ok=True)
            for name, secret in bootstrap.secrets(str(args.tls_cert), str(args.tls_key), str(args.tls_ca)).items():
                (args.tls_sds / name).write_text(secret)
    except ValueError as error:
        print(f"vllm-xds bootstrap: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"vllm-xds bootstrap: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    print(text, end="")
    return 0
