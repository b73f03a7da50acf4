"""How an input becomes another one: as bytes, as JSON, as a protobuf message. Each takes the randomness, the input and
the corpus, from which parts are taken; what is not in its own form any more is changed as bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any

from tests.fuzz.engine import Form

PIECES = (
    *(b"", b"\0", b"\n", b"\r\n", b" ", b"\t", b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b":", b",", b"-", b"/", b"%"),
    *(b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"0", b"-1", b"1e400", b"NaN"),
    b"9" * 5000,
)
TEXTS = (
    *("", "a", "*", "-", "/", "//", "..", "a b", "\0", "\n", "\x7f", "\x85", "\u2028", "é", "\ud800", "\U0001f600"),
    *("%", "%2f", "a.b", "A", "1", "0.0.0.0", "::1", "fe80::1%x", "127.0.0.1:80", "true", "null", "x" * 300),
    *("x" * 5000, "(?=a)", "(a{9}){999}", "NaN", "1e400", "-0.0", "=", "{}", "\u0661", "${x}", "\x1b[31m"),
)
NUMBERS = (
    *(0, 1, -1, 2, 63, 64, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**400),
    *(0.5, -0.0, 1e-320, 1e16, 1e308, float("inf"), float("-inf"), float("nan")),
)
SCALARS: tuple[Any, ...] = (None, True, False, [], {}, *TEXTS, *NUMBERS)


MOST_CHANGES = 8  # of one input before it is tried
MOST_PLACES = 5000  # values of a script that is changed once more: copies of copies have millions


def words(*of_format: bytes) -> Form:
    """Changes bytes; `of_format` are what it is made of."""
    pieces = (*of_format, *PIECES)

    def mutate(random: Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
        for _ in range(random.randint(1, MOST_CHANGES)):
            data = change(random, data, corpus)
        return data

    def change(random: Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
        start = random.randrange(len(data) + 1)
        end = min(len(data), start + random.choice((0, 0, 1, 1, 2, 8, 64)))
        match random.randrange(7):
            case 0 | 1:
                middle = random.choice(pieces)
            case 2:
                middle = random.randbytes(random.randint(1, 4))
            case 3:
                middle = b""
            case 4:
                middle = data[start:end] * random.choice((2, 3, 100))
            case 5:
                other = random.choice(corpus)
                at = random.randrange(len(other) + 1)
                middle = other[at : at + random.choice((1, 4, 16, 64, 256))]
            case _:  # move a part
                at = random.randrange(len(data) + 1)
                middle = data[at : at + random.choice((1, 4, 16, 64))]
        return data[:start] + middle + data[end:]

    return Form(mutate, _repeat)


def _repeat(random: Random, data: bytes, size: int) -> bytes:
    """A part of the input, again and again."""
    start = random.randrange(len(data) + 1)
    part = data[start : start + random.choice((1, 2, 4, 16, 64, 256, 4096))] or b"0"
    return data[:start] + part * (size // len(part)) + data[start:]


_bytes = words().mutate

# --- JSON -------------------------------------------------------------------------------------------------------------


def _tree(random: Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """Changes JSON: its values, keys and nesting; now and then its bytes, for repeated keys and broken text."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _bytes(random, random.choice(corpus), corpus)
    if random.random() < 0.03:
        return _bytes(random, data, corpus)
    for _ in range(random.randint(1, MOST_CHANGES)):
        places = _places(value)
        value = _changed(random, value, places, corpus)
        if len(places) >= MOST_PLACES:
            break
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):  # an integer, or a nesting, beyond what Python prints
        return data


def _changed(random: Random, value: Any, places: list[Any], corpus: Sequence[bytes]) -> Any:
    """The value, with what is in one of its places changed."""
    container, key = random.choice(places) if places else (None, None)
    if container is None:
        return random.choice(SCALARS)
    here = container[key]
    match random.randrange(9):
        case 0:
            container[key] = random.choice(SCALARS)
        case 1 | 2:
            container[key] = _similar(random, here)
        case 3:
            del container[key]
        case 4:
            container[key] = random.choice(([here], {"a": here}, [here, here], [here] * 70))
        case 5 | 6:  # what another input has in the place of this name
            donors = _named(_other(random, corpus), key)
            container[key] = random.choice(donors) if donors else random.choice(SCALARS)
        case 7:  # a part of another input beside this one
            _, name, part = random.choice(list(_parts(_other(random, corpus))) or [(None, "a", None)])
            _add(container, name, part)
        case _:
            _add(container, key, json.loads(json.dumps(here)) if isinstance(here, list | dict) else here)
            if isinstance(container, list):
                random.shuffle(container)
    return value


def _grow(random: Random, data: bytes, size: int) -> bytes:
    """A text, a list or a mapping of the input, many times as long."""
    try:
        value = json.loads(data)
        large = [place for place in _places(value) if isinstance(place[0][place[1]], str | list | dict)]
        container, key = random.choice(large)
        here = container[key]
        times = size // max(1, len(json.dumps(here)))
        if isinstance(here, dict):
            container[key] = {f"{name}{i}": each for i in range(times) for name, each in here.items()}
        else:
            container[key] = here * times
        return json.dumps(value).encode()
    except (ValueError, RecursionError, IndexError):
        return _repeat(random, data, size)


def _similar(random: Random, value: Any) -> Any:
    """Another value of the same type."""
    match value:
        case bool() | None:
            return random.choice((True, False, None))
        case str():
            at = random.randrange(len(value) + 1)
            return value[:at] + random.choice((*TEXTS, value)) + value[at + random.choice((0, 0, 1, 4)) :]
        case int() | float():
            return random.choice((*NUMBERS, value + 1, value - 1, -value, value * 2))
        case list() if value:
            return [*value, random.choice(value)] if random.random() < 0.5 else value[1:]
        case dict() if value:
            name = random.choice(list(value))
            return {(_similar(random, name) if key == name else key): each for key, each in value.items()}
    return random.choice(SCALARS)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of the values within a value, of no more than some MOST_PLACES."""
    places: list[tuple[Any, Any]] = []
    pending = [value]
    while pending and len(places) < MOST_PLACES:
        container = pending.pop()
        if isinstance(container, dict | list):
            places += [
                (container, key) for key in (container if isinstance(container, dict) else range(len(container)))
            ]
            pending += container.values() if isinstance(container, dict) else container
    return places


def _parts(value: Any) -> Any:
    return ((container, key, container[key]) for container, key in _places(value))


def _named(value: Any, name: Any) -> list[Any]:
    return [part for _, key, part in _parts(value) if key == name]


def _other(random: Random, corpus: Sequence[bytes]) -> Any:
    try:
        return json.loads(random.choice(corpus)) if corpus else None
    except (ValueError, RecursionError):
        return None


def _add(container: Any, key: Any, part: Any) -> None:
    if isinstance(container, list):
        container.append(part)
    else:
        container[str(key)] = part


JSON = Form(_tree, _grow)

# --- protobuf ---------------------------------------------------------------------------------------------------------

Message = list[tuple[int, int, Any]]  # (field number, wire type, varint or bytes)
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED = {FIXED64: 8, FIXED32: 4}


def _message(random: Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    for _ in range(random.randint(1, MOST_CHANGES)):
        data = _field(random, data, corpus)
    return data


def _field(random: Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """Changes a protobuf message: its fields, at every depth, whatever its schema; JSON in a field as JSON."""
    fields = decode(data)
    if not fields or random.random() < 0.05:
        return _bytes(random, data, corpus)
    at = random.randrange(len(fields))
    number, kind, value = fields[at]
    match random.randrange(10):
        case 0:
            del fields[at]
        case 1:
            fields.insert(random.randrange(len(fields) + 1), fields[at])
        case 2:
            fields[at] = (random.randint(1, 12), kind, value)
        case 3:
            fields[at] = (number, VARINT, random.choice((0, 1, 127, 128, 2**31, 2**32 - 1, 2**63, 2**64 - 1)))
        case 4:
            other = decode(random.choice(corpus))
            fields.insert(at, random.choice(other or fields))
        case _:
            fields[at] = (number, kind, _payload(random, kind, value, corpus))
    return encode(fields)


def _payload(random: Random, kind: int, value: Any, corpus: Sequence[bytes]) -> Any:
    if kind == VARINT:
        return (value + random.choice((-1, 1, 2**31))) % 2**64
    if kind != BYTES:  # a number
        return random.choice((b"\0" * 8, b"\xff" * 8, b"\0" * 6 + b"\xf0\x7f", b"\xff" * 6 + b"\xef\x7f"))[: len(value)]
    if value[:1] in (b"{", b"["):
        return _tree(random, value, [value])
    inner = decode(value)
    if inner and random.random() < 0.8:
        return _field(random, value, [value, *corpus[-4:]])
    return _bytes(random, value, [value])


def _more(random: Random, data: bytes, size: int) -> bytes:
    """One of the fields, at any depth, many times, or its bytes many times as long."""
    fields = decode(data)
    if not fields:
        return _repeat(random, data, size)
    at = random.randrange(len(fields))
    number, kind, value = fields[at]
    if kind == BYTES and random.random() < 0.6:
        grow = JSON.inflate if value[:1] in (b"{", b"[") else _more if decode(value) else _repeat
        fields[at] = (number, kind, grow(random, value, size))
    else:
        fields[at:at] = [fields[at]] * (size // len(encode([fields[at]])))
    return encode(fields)


def decode(data: bytes) -> Message:
    """The fields of a message; [] when the bytes are none."""
    fields: Message = []
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        value: Any
        if kind == VARINT:
            value, at = _varint(data, at)
        elif kind == BYTES or kind in _FIXED:
            size, at = _varint(data, at) if kind == BYTES else (_FIXED[kind], at)
            value, at = data[at : at + size], at + size
        else:
            return []
        if at > len(data) or not number:
            return []
        fields.append((number, kind, value))
    return fields


def encode(fields: Message) -> bytes:
    """The bytes of these fields."""
    out = bytearray()
    for number, kind, value in fields:
        if kind == VARINT:
            out += _of_varint(number << 3 | VARINT) + _of_varint(value if isinstance(value, int) else 0)
        elif isinstance(value, bytes):
            out += _of_varint(number << 3 | kind) + (_of_varint(len(value)) if kind == BYTES else b"") + value
    return bytes(out)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    return 0, len(data) + 1


def _of_varint(value: int) -> bytes:
    out = bytearray()
    value %= 2**64
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


MESSAGE = Form(_message, _more)
