"""`vllm-xds bootstrap`: print the static bootstrap of an Envoy."""

from __future__ import annotations

import argparse
import sys

import bootstrap

EPILOG = """\
example:
  vllm-xds bootstrap --server xds.gateway.svc:18000 --node-id "$HOSTNAME" > envoy.yaml
  envoy -c envoy.yaml --component-log-level ext_proc:error --drain-time-s 3600
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--server",
        metavar="HOST:PORT",
        default=bootstrap.DEFAULT_SERVER,
        help="the management server, as Envoy reaches it",
    )
    parser.add_argument("--node-id", default=bootstrap.DEFAULT_NODE_ID, help="this Envoy's name in logs and metrics")
    parser.add_argument(
        "--node-cluster", default=bootstrap.DEFAULT_NODE_CLUSTER, help="the group of Envoys it is one of"
    )
    parser.add_argument(
        "--admin", metavar="HOST:PORT", default=bootstrap.DEFAULT_ADMIN, help="where Envoy's admin API listens"
    )
    parser.add_argument(
        "--sotw", action="store_true", help="ask by the state-of-the-world protocol; the incremental one costs less"
    )


def run(args: argparse.Namespace) -> int:
    try:
        text = bootstrap.render(args.server, args.node_id, args.node_cluster, args.admin, delta=not args.sotw)
    except ValueError as error:
        print(f"vllm-xds bootstrap: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0
