"""`vllm-xds check DIR`: what `serve` would say of a directory, without serving it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TextIO

from xds.directory import DirectoryError, DirectorySource
from xds.envoy import Options
from xds.model import Criticality, Forward, Level, ModelRule, Rejection, Respond, Topology
from xds.resolve import CONTROLLER_NAMES, resolve
from xds.translate import translate

EPILOG = """\
exit codes: 0 everything is served as written (warnings apart), 1 something is not, 2 wrong usage
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="directory of YAML objects, as for `serve --config`"
    )
    parser.add_argument(
        "--controller-name", metavar="NAME", action="append", help="as for `serve`: whose GatewayClasses are served"
    )


def run(args: argparse.Namespace) -> int:
    try:
        return check(args.directory, tuple(args.controller_name or CONTROLLER_NAMES), sys.stdout)
    except DirectoryError as error:
        print(f"vllm-xds check: {error}", file=sys.stderr)
        return 1


def check(directory: Path, controller_names: tuple[str, ...], out: TextIO) -> int:
    """Print every rejection, then what would be served; return 1 if any is an error. Raises DirectoryError."""
    config = DirectorySource(directory).load()
    topology = resolve(config, controller_names)
    translate(topology, Options(), {})  # what can not be translated must show here, not in `serve`
    rejections = tuple(dict.fromkeys((*config.rejections, *topology.rejections)))
    for rejection in rejections:
        print(f"{rejection.level:7} {rejection}", file=out)
    errors = _count(rejections, Level.ERROR)
    for line in _served(topology):
        print(line, file=out)
    warnings = _count(rejections, Level.WARNING)
    print(f"{len(config.objects)} objects accepted, {errors} errors, {warnings} warnings", file=out)
    return 1 if errors else 0


def _count(rejections: tuple[Rejection, ...], level: Level) -> int:
    return sum(rejection.level is level for rejection in rejections)


def _served(topology: Topology) -> list[str]:
    """A line for each port, hostname and route, and one for each cluster."""
    lines = []
    for listener in topology.listeners:
        lines.append(
            f"port {listener.port}{', HTTPS' if listener.chains else ''}"
            + (f" of the Envoys {listener.group}" if listener.group else "")
        )
        for host in listener.all_virtual_hosts:
            lines += [f"  {host.hostname:20} {route.name:40} -> {_goal(route.action)}" for route in host.routes]
    for cluster in topology.clusters:
        strategy = cluster.strategy or "round robin"
        lines.append(f"cluster {cluster.name}: {strategy}, {len(cluster.endpoints)} endpoints")
        lines += [f"  model {rule.name or 'any other':34} -> {_targets(rule)}" for rule in cluster.models.rules]
        lines += [f"  objective {name:30} priority {priority}" for name, priority in cluster.models.objectives]
    return lines


def _targets(rule: ModelRule) -> str:
    targets = ", ".join(f"{name} ({weight})" for name, weight in rule.targets) or "as it is"
    return targets if rule.criticality is Criticality.STANDARD else f"{targets}, {rule.criticality.value}"


def _goal(action: object) -> str:
    match action:
        case Forward(clusters=clusters):
            return ", ".join(
                f"{name or '500'}" + (f" ({weight})" if len(clusters) > 1 else "") for name, weight, _ in clusters
            )
        case Respond(status=status):
            return str(status)
        case _:
            return "redirect"
