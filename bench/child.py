"""Child processes that never outlive this one."""

from __future__ import annotations

import asyncio
import os
import sys

STOP_GRACE = 5.0  # seconds between SIGTERM and SIGKILL


def with_parent(*command: str) -> tuple[str, ...]:
    """`command`, so started that its process ends when this one does, however this one ends (PR_SET_PDEATHSIG).

    A preexec_fn would do the same in a forked copy of this process, where gRPC's fork handlers may hang.
    """
    return (sys.executable, "-c", _SHIM, str(os.getpid()), *command)


# The parent may have ended before prctl(PR_SET_PDEATHSIG, SIGKILL) was called: then another process is it now.
_SHIM = """\
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


async def end(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, and after STOP_GRACE SIGKILL; returns when the process has ended."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_GRACE)
    except TimeoutError:
        process.kill()
        await process.wait()
