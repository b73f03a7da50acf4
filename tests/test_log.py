"""The two forms of a log line."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest
import structlog

from xds import log


class Terminal(io.StringIO):
    """Text that says it goes to a person."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Logging is configured for the process: leave it as it was."""
    yield
    structlog.reset_defaults()


def written(stream: io.StringIO, fmt: str = "auto", level: str = "info") -> str:
    log.configure(fmt, level, stream)
    structlog.get_logger().info("weight changed", pool="pool/default/llm", old=100, new=80)
    return stream.getvalue()


@pytest.mark.parametrize(("fmt", "stream"), [("auto", io.StringIO()), ("json", Terminal())])
def test_a_machine_gets_one_json_object_a_line(fmt: str, stream: io.StringIO) -> None:
    """The event, its fields with their types, the level and a UTC time."""
    line = written(stream, fmt)
    assert line.count("\n") == 1
    fields = json.loads(line)
    assert fields.pop("timestamp").endswith("Z")
    expected = {"event": "weight changed", "level": "info", "pool": "pool/default/llm", "old": 100, "new": 80}
    assert fields == expected


@pytest.mark.parametrize(("fmt", "stream"), [("auto", Terminal()), ("console", io.StringIO())])
def test_a_person_gets_a_readable_line(fmt: str, stream: io.StringIO) -> None:
    """In a terminal with colours, and without them where it is asked for elsewhere."""
    line = written(stream, fmt)
    assert "weight changed" in line
    assert ("\x1b[" in line) is stream.isatty()
    assert not line.startswith("{")


def test_the_level_is_the_least_that_is_logged() -> None:
    """A warning's level leaves information out."""
    assert written(io.StringIO(), level="warning") == ""
    assert written(io.StringIO(), level="debug") != ""


def test_hostile_text_stays_within_its_line() -> None:
    """Whatever a client or an object is called, it makes no line of its own."""
    stream = io.StringIO()
    log.configure("json", "info", stream)
    structlog.get_logger().info("client connected", node='x\n{"event": "server stopped"}')
    assert stream.getvalue().count("\n") == 1


@pytest.mark.parametrize("fmt", ["json", "console"])
def test_a_traceback_has_no_variables(fmt: str) -> None:
    """They hold what requests say, as long as it may be: the frames are there, and none of that."""
    stream = io.StringIO()
    log.configure(fmt, "info", stream)

    def read(prompt: str) -> int:
        return int(f"{prompt[:0]}boom")

    try:
        read("tercesa"[::-1])
    except ValueError:
        structlog.get_logger().exception("task failed")
    assert "boom" in stream.getvalue()
    assert "in read" in stream.getvalue() or '"name": "read"' in stream.getvalue()
    assert "asecret" not in stream.getvalue()


def test_an_exception_is_part_of_the_object() -> None:
    """A traceback over many lines could not be parsed line by line."""
    stream = io.StringIO()
    log.configure("json", "info", stream)
    try:
        int("boom")
    except ValueError:
        structlog.get_logger().exception("task failed")
    fields = json.loads(stream.getvalue())
    assert fields["exception"][0]["exc_type"] == "ValueError"
