"""The figures of docs/benchmarks.md: `python -m bench.figures`, some ten minutes. `make bench` is the same.

Two take minutes more and are commands of their own: bench.many_clients and bench.api_scale.
"""

from __future__ import annotations

import subprocess
import sys
import time

from bench.report import machine, progress

MODULES = (
    "bench.route_latency",
    "bench.request_cpu",
    "bench.server_cost",
    "bench.worker_hits",
    "bench.exchange_cost",
    "bench.picker_memory",
    "bench.page_cost",
    "bench.change_ack",
)


def main(modules: tuple[str, ...] = MODULES) -> int:
    """Run each in a process of its own, so that none inherits another's memory; 1 when one fails."""
    print(f"{machine()}\n", flush=True)
    began, failed = time.monotonic(), []
    for module in modules:
        print(f"`python -m {module}`\n", flush=True)
        if subprocess.run([sys.executable, "-m", module], check=False).returncode:  # noqa: S603 - ours
            failed.append(module)
    progress(f"{time.monotonic() - began:.0f} s")
    for module in failed:
        print(f"{module} FAILED", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
