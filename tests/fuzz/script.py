"""Inputs that are scripts: JSON, of which a target takes what it can use and leaves out the rest, so that any change of
one is another one; and what is left of any value when it has to be a text or a number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from tests.fuzz.engine import Run


def pure(run: Run) -> Callable[[], AbstractContextManager[Run]]:
    """The `open` of a target that needs nothing."""

    @contextmanager
    def opened() -> Iterator[Run]:
        yield run

    return opened


def dump(script: Any) -> bytes:
    return json.dumps(script).encode()


def load(data: bytes) -> Any:
    """The script in an input; None when it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def steps(data: bytes) -> Iterator[tuple[str, list[Any]]]:
    """A script's steps: lists of a word and its arguments."""
    script = load(data)
    for step in script if isinstance(script, list) else ():
        if isinstance(step, list) and step and isinstance(step[0], str):
            yield step[0], step[1:]


def number(value: Any, low: float, high: float) -> float:
    """A number within bounds; `low` for what is none."""
    is_one = isinstance(value, int | float) and low <= value
    return float(min(value, high)) if is_one else low


def text(value: Any) -> str:
    """A text in a form protobuf can carry; "" for what is none."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def texts(value: Any) -> list[str]:
    """The texts in a list, or the keys of a mapping."""
    return [text(each) for each in value if isinstance(each, str)] if isinstance(value, list | dict) else []


def mapping(value: Any) -> dict[str, Any]:
    """A mapping with its keys as texts; {} for what is none."""
    return {text(key): each for key, each in value.items()} if isinstance(value, dict) else {}
