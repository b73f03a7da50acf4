"""Hostile bytes: each parser's target in its short form, and that the fuzzer finds what there is to find."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable
from pathlib import Path
from random import Random

import pytest
from structlog.testing import capture_logs

from tests.fuzz.__main__ import main
from tests.fuzz.engine import Form, Target, fuzz, replay
from tests.fuzz.mutate import JSON, MESSAGE, decode, encode, words
from tests.fuzz.script import dump, pure, steps
from tests.fuzz.targets import TARGETS

Run = Iterable[Hashable]


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_breaks_a_parser(name: str) -> None:
    """Some hundred inputs, the same each time: nothing raises, none takes long, each target's invariants hold."""
    target = TARGETS[name]
    with capture_logs():
        result = fuzz(target, Random(0), inputs=target.short)
    assert [finding.text for finding in result.findings.values()] == []
    assert result.inputs >= target.short
    assert result.kept >= min(target.short, len(target.seeds))
    assert result.lines > 10


def _target(run: object, form: Form, *seeds: bytes, seconds: float = 1.0) -> Target:
    return Target("planted", pure(run), seeds, form, seconds)  # type: ignore[arg-type]


def test_an_exception_deep_in_a_format_is_found_once() -> None:
    """A number in a message in a message has to be just so; what is reported does it again, the seed does not."""

    def run(data: bytes) -> Run:
        for number, _, value in decode(data):
            for inner, _, deepest in decode(value) if number == 2 and isinstance(value, bytes) else ():
                if inner == 3 and isinstance(deepest, int) and deepest >= 2**31:
                    raise ZeroDivisionError("found")
                yield inner

    seed = encode([(1, 2, b"text"), (2, 2, encode([(1, 0, 7), (3, 0, 5), (4, 2, b"x")]))])
    target = _target(run, MESSAGE, seed)
    result = fuzz(target, Random(1), inputs=500)
    (finding,) = result.findings.values()
    assert finding.where.startswith("ZeroDivisionError at test_fuzz.py:")
    again = replay(target, finding.data)
    assert again is not None
    assert again.where == finding.where
    assert replay(target, seed) is None


def test_a_finding_is_made_small() -> None:
    """What is reported is no more than what is wrong."""

    def run(data: bytes) -> Run:
        assert not (b"<" in data and data.endswith(b">"))
        return [b"<" in data]

    result = fuzz(_target(run, words(b"<", b">"), b"a long text " * 20), Random(1), inputs=500)
    assert [finding.data for finding in result.findings.values()] == [b"<>"]


def test_new_outcomes_lead_from_one_to_the_next() -> None:
    """Eight steps in the right order are out of reach by chance, and not when each is kept as something new."""
    wanted = "stepwise"

    def guided(data: bytes) -> Run:
        done = 0
        for word, _ in steps(data):
            done += word == wanted[done]
            assert done < len(wanted)
            yield done

    def blind(data: bytes) -> Run:
        list(guided(data))
        return ()

    seed = dump([[letter] for letter in sorted(wanted)])
    assert fuzz(_target(guided, JSON, seed), Random(1), inputs=1000).findings
    assert not fuzz(_target(blind, JSON, seed), Random(1), inputs=1000).findings


def test_a_slow_input_is_a_finding() -> None:
    """Also one that would never end; an input is not blamed for what another process takes."""

    def run(data: bytes) -> Run:
        time.sleep(0.02)
        while b"loop" in data:
            pass
        return ()

    calm = fuzz(_target(run, words(b"x"), b"a", seconds=0.01), Random(1), inputs=5)
    assert calm.findings == {}
    found = fuzz(_target(run, words(), b"loop", seconds=0.01), Random(1), inputs=1)
    assert list(found.findings) == ["Slow at test_fuzz.py:" + next(iter(found.findings)).rpartition(":")[2]]


def test_a_run_can_be_repeated() -> None:
    """Equal randomness gives equal inputs, whatever has run before."""

    def inputs(seed: int) -> list[bytes]:
        seen: list[bytes] = []

        def run(data: bytes) -> Run:
            seen.append(data)
            return ()

        fuzz(_target(run, JSON, dump({"a": [1, "x"]})), Random(seed), inputs=50)
        return seen

    assert inputs(3) == inputs(3) != inputs(4)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints a row for a target, and says that an input on file is all right; an unknown target is wrong usage."""
    assert main(["metrics", "--seconds", "0.05", "--findings", str(tmp_path / "findings")]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "target"
    assert row.split()[0] == "metrics"
    assert not (tmp_path / "findings").exists()
    (tmp_path / "input").write_bytes(b"\xff")
    assert main(["documents", "--replay", str(tmp_path / "input")]) == 0
    assert capsys.readouterr().out == "nothing is wrong\n"
    with pytest.raises(SystemExit, match="2"):
        main(["no-such-target"])


def test_the_command_reports_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, the trace, and a file that has the input again."""

    def run(_: bytes) -> Run:
        raise ZeroDivisionError("found")

    monkeypatch.setitem(TARGETS, "planted", _target(run, words(), b"x"))
    assert main(["planted", "--seconds", "0.01", "--findings", str(tmp_path)]) == 1
    assert "ZeroDivisionError: found" in capsys.readouterr().out
    (found,) = tmp_path.iterdir()
    assert main(["planted", "--replay", str(found)]) == 1
