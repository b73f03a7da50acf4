"""Faults under load: the four that must never cost a request, with the real Envoy, and what counts as broken."""

from __future__ import annotations

import asyncio
import math
import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from bench.chaos import BEGIN, END, Result, judge, table, write
from bench.chaos_faults import COURSES, POD_KILLED, SERVER_KILLED, SHORT
from bench.chaos_traffic import Outcome

ROOT = Path(__file__).parents[2]
CALM = tuple(Outcome(due / 10, 0.01) for due in range(10))  # before the fault at 1.0


def result(*hit: Outcome, whole: float = 1.0, unmet: str = "") -> Result:
    return judge(SERVER_KILLED, (*CALM, *hit), fault=1.0, healed=4.0, whole=whole, unmet=unmet)


def test_what_is_promised_and_kept() -> None:
    """Requests as usual break nothing; counts and times are those of the requests."""
    kept = result(Outcome(1.1, 0.02), Outcome(3.9, 0.01))
    assert kept.broken() == []
    assert (kept.requests, kept.failed, kept.cut) == (12, 0, 0)
    assert (kept.usual, kept.before, kept.first, kept.later) == (0.01, 0.01, 0.02, 0.01)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (result(Outcome(1.1, 0.02, error="HTTP 503")), "1 requests failed"),
        (result(Outcome(0.95, 0.02, error="stream cut")), "1 requests under way were cut"),
        (result(Outcome(1.1, 0.5)), "0.500 s at first"),
        (result(Outcome(3.7, 0.01), Outcome(3.8, 0.01), Outcome(3.9, 0.5)), "0.500 s once"),
        (result(Outcome(3.8, 0.03), Outcome(3.9, 0.03)), "half of the requests took 0.030 s"),
        (result(whole=math.nan), "no full service"),
        (result(unmet="a wild weight"), "a wild weight"),
    ],
)
def test_each_promise_can_be_broken(broken: Result, words: str) -> None:
    """A failure, a cut answer, a late one at first or later, lateness that stays, no way back and what is said of the
    fault alone: each is named."""
    assert [words in text for text in broken.broken()] == [True]


def test_an_excuse_excuses_only_its_own() -> None:
    """What was under way may be lost with a pod, what is sent afterwards may not; nor may a pod that is out get any."""
    hit = (Outcome(0.95, 0.1, error="reset"), Outcome(1.1, 0.1, error="HTTP 503"))
    assert judge(POD_KILLED, (*CALM, *hit), 1.0, 4.0, 1.0).broken() == ["1 requests failed"]
    drained = replace(SERVER_KILLED, avoids="pod-1")
    assert judge(drained, (*CALM, Outcome(3.0, 0.01, "pod-1")), 1.0, 4.0, 1.0).strayed == 1
    assert judge(drained, (*CALM, Outcome(4.5, 0.01, "pod-1")), 1.0, 4.0, 1.0).strayed == 0


def test_what_stays_is_told_beside_the_table() -> None:
    """By how much the slowest exceed those before the fault once it is seen; rows where that is little go unnamed."""
    usual = (Outcome(3.7, 0.01), Outcome(3.8, 0.012))
    assert "10 ms longer than the slowest before the fault in every row." in str(table([result(*usual)]))
    late = str(table([result(*usual), result(*usual, Outcome(3.9, 0.07))]))
    assert f"except in these rows ({SERVER_KILLED.name}: 60 ms)." in late
    assert "the median is at most 2 ms above" in late


def test_every_fault_has_a_name_of_its_own() -> None:
    """A broken promise is found by it."""
    names = [scenario.name for course in COURSES for scenario in course.scenarios]
    assert len(set(names)) == len(names)


def test_the_table_replaces_the_one_before(tmp_path: Path) -> None:
    """What stands around the marks stays."""
    document = tmp_path / "doc.md"
    document.write_text(f"head\n{BEGIN}old\n{END}rest\n")
    write("new\n", document)
    assert document.read_text() == f"head\n{BEGIN}new\n{END}rest\n"


@pytest.mark.alone
@pytest.mark.envoy
@pytest.mark.timeout(120)
async def test_no_request_fails(tmp_path: Path) -> None:
    """The short form keeps every promise, names no failed request, and leaves no process behind."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.chaos", "--short"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    try:
        out = (await process.communicate())[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")][2:]
    assert process.returncode == 0, out
    assert [(row[0], row[2]) for row in rows] == [(scenario.name, "0") for scenario in SHORT.scenarios], out
    assert _processes_of(tmp_path) == []


def _processes_of(directory: Path) -> list[bytes]:
    """The command lines that name something below the directory, as those of every part of a gateway do."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            found.append(path.read_bytes())
    return [command for command in found if str(directory).encode() in command]
