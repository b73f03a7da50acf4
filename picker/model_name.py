"""The model's name in a request's body: where it stands, and another one in its place. Pure.

Only the bytes of the name are replaced: key order, white space, numbers beyond 64 bits and all else stay as the client
sent them. The body is not parsed: its strings are found, and the brackets between them say how deep each one is. So it
does not matter how long it is, whether it is cut short, or whether our parser would take it.

    {"messages": [{"model": "no"}], "model": "yes"}     the key `model` of the outermost object alone,
    {"mod\\u0065l": "yes", "model" : "yes"}             however it is spelled, and every time it is there

JSON's readers let the last of equal keys win, and replacing each one makes it the same for those that do not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

MAX_STRINGS = 200_000  # keys and values of a body: 0.1 s of our time; an agent's of 2 MB has some 20,000

_KEY = "model"
_SPELLED = b'"model"'


@dataclass(frozen=True, slots=True)
class ModelName:
    """`name` is what is asked for, "" when nothing is; `places` are (start, end) of each time, quotes included."""

    name: str
    places: tuple[tuple[int, int], ...]


def find_model(body: bytes) -> ModelName | None:
    """The model's name in `body`; None when it has too many strings to look at, or a name that is no text."""
    masked = body.replace(b"\\\\", b"__").replace(b'\\"', b"__")  # what is left of quotes begins or ends a string
    if masked.count(b'"') > 2 * MAX_STRINGS:
        return None
    parts = masked.split(b'"')  # outside, inside, outside, ...
    name, places = "", []
    depth = end = 0
    for i in range(0, len(parts) - 2, 2):
        outside, inside, after = parts[i : i + 3]
        depth += _opened(outside)
        start = end + len(outside)
        end = start + len(inside) + 2
        if depth != 1 or len(inside) < len(_KEY) or after.lstrip()[:1] != b":" or not _is_model(body[start:end]):
            continue
        if after.strip() != b":" or i + 4 >= len(parts):  # not a string
            name = ""
            continue
        value = (end + len(after), end + len(after) + len(parts[i + 3]) + 2)
        found = _decoded(body[slice(*value)])
        if found is None:
            return None
        name = found
        places.append(value)
    return ModelName(name, tuple(places))


def rename(body: bytes, places: Sequence[tuple[int, int]], name: str) -> bytes:
    """`body` with `name` in all these places, which are in order."""
    new, pieces, end = json.dumps(name, ensure_ascii=False).encode(), [], 0
    for start, after in places:
        pieces += [body[end:start], new]
        end = after
    return b"".join([*pieces, body[end:]])


def _opened(outside: bytes) -> int:
    """How many more objects and lists are open behind these bytes, which are in no string, than before them."""
    if outside in _PLAIN:
        return 0
    return outside.count(b"{") + outside.count(b"[") - outside.count(b"}") - outside.count(b"]")


_PLAIN = frozenset({b":", b",", b": ", b", "})  # what stands between most strings


def _is_model(key: bytes) -> bool:
    return key == _SPELLED or (b"\\" in key and _decoded(key) == _KEY)


def _decoded(string: bytes) -> str | None:
    try:
        text: str = json.loads(string)
        text.encode()
    except ValueError:  # no UTF-8, a broken escape, half of a surrogate pair
        return None
    return text
