"""`python -m tests.fuzz [--seconds N] [TARGET...]`: fuzz every parser of outside bytes; exit code 1 for a finding.

An input that breaks something is written to --findings DIR; `python -m tests.fuzz TARGET --replay FILE` runs it again.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import structlog

from tests.fuzz.engine import Finding, Result, fuzz, replay
from tests.fuzz.targets import TARGETS

SHOWN = 400  # bytes of a finding's input that are printed; all of them are in its file
HEADER = "target         inputs  large  kept  lines  slowest ms   large ms  findings    MB"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", epilog=f"targets: {', '.join(TARGETS)}")
    parser.add_argument("targets", metavar="TARGET", nargs="*", help="default: all, for an equal time each")
    parser.add_argument("--seconds", type=float, default=60.0, help="of CPU, for all targets together")
    parser.add_argument("--seed", type=int, default=0, help="of the randomness: another one tries other inputs")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), metavar="DIR")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run the one input in FILE instead")
    args = parser.parse_args(argv)
    if unknown := set(args.targets) - TARGETS.keys():
        parser.error(f"no target {', '.join(sorted(unknown))}")
    chosen = [TARGETS[name] for name in args.targets or TARGETS]
    findings: list[Finding] = []
    if args.replay:
        findings = [found for target in chosen if (found := replay(target, args.replay.read_bytes()))]
        print(*[each.text for each in findings] if findings else ["nothing is wrong"], sep="\n")
    else:
        print(HEADER)
        for target in chosen:
            result = fuzz(target, Random(args.seed), seconds=args.seconds / len(chosen))
            print(row(result), flush=True)
            findings += result.findings.values()
            for each in result.findings.values():
                save(each, args.findings)
    return 1 if findings else 0


def row(result: Result) -> str:
    """Under HEADER; the memory is the most the process has had so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return (
        f"{result.target:12} {result.inputs:8} {result.large:6} {result.kept:5} {result.lines:6} "
        f"{1000 * result.slowest:11.1f} {1000 * result.slowest_large:10.1f} {len(result.findings):9} {most:5}"
    )


def save(finding: Finding, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    path = directory / f"{finding.target}-{hashlib.sha256(finding.data).hexdigest()[:8]}"
    path.write_bytes(finding.data)
    print(f"\n{finding.target}: {finding.where}\n{path}: {finding.data[:SHOWN]!r}\n{finding.text}", flush=True)


if __name__ == "__main__":
    # Hostile input is logged by the product and by aiohttp.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.disable()
    sys.exit(main(sys.argv[1:]))
