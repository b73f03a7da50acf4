"""What the picker reads from a connection: HTTP/2 frames, header blocks, gRPC messages."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from picker.connection import Connection, Limits
from picker.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEAD,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    PADDED,
    PING,
    PREFACE,
    PRIORITISED,
    RST_STREAM,
    SETTING,
    SETTINGS,
    WINDOW_UPDATE,
    WORD,
    frame,
)
from picker.messages import MESSAGE_HEAD, Budget
from tests.fuzz.engine import Target
from tests.fuzz.mutate import BYTES, MESSAGE, VARINT, decode, encode
from tests.fuzz.script import pure
from tests.picker import test_headers

SMALL = Limits(message=100, buffered=200, waiting=50, streams=2, idle_frames=20)
LIMITS = (Limits(), SMALL)
SHARED = 1 << 20  # bytes of incomplete messages, of all connections together
FRAME, RAW, LATER, FAIL = 1, 2, 3, 4  # an input's fields: a frame, bytes as they are, seconds that pass, a call to fail
KIND, FLAGS, STREAM, PAYLOAD = 1, 2, 3, 4  # a frame's fields
BLOCK = test_headers.encode(test_headers.REQUEST)
HELLO = MESSAGE_HEAD.pack(0, 5) + b"hello"


def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> tuple[int, int, bytes]:
    fields = [(KIND, VARINT, kind), (FLAGS, VARINT, flags), (STREAM, VARINT, stream_id), (PAYLOAD, BYTES, payload)]
    return FRAME, BYTES, encode(fields)


STARTED = [(RAW, BYTES, PREFACE), _frame(SETTINGS, 0, 0, SETTING.pack(INITIAL_WINDOW_SIZE, 65_535))]
CONNECTIONS = (
    encode([*STARTED, _frame(HEADERS, END_HEADERS, 1, BLOCK), _frame(DATA, 0, 1, HELLO), (LATER, VARINT, 20)]),
    encode(
        [
            *STARTED,
            _frame(SETTINGS, ACK, 0, b""),
            _frame(HEADERS, PADDED | PRIORITISED, 1, b"\1" + bytes(5) + BLOCK[:9] + b"\0"),
            _frame(CONTINUATION, END_HEADERS, 1, BLOCK[9:]),
            _frame(DATA, PADDED, 1, b"\2" + HELLO[:7] + b"\0\0"),
            _frame(HEADERS, END_HEADERS | END_STREAM, 3, BLOCK),
            _frame(DATA, END_STREAM, 1, HELLO[7:]),
        ]
    ),
    encode(
        [
            *STARTED,
            _frame(PING, 0, 0, bytes(8)),
            _frame(HEADERS, END_HEADERS, 5, BLOCK),
            _frame(WINDOW_UPDATE, 0, 5, WORD.pack(9)),
            (FAIL, VARINT, 5),
            _frame(RST_STREAM, 0, 5, WORD.pack(8)),
            _frame(GOAWAY, 0, 0, bytes(8)),
            _frame(HEADERS, END_HEADERS, 7, BLOCK),
            _frame(DATA, 0, 7, MESSAGE_HEAD.pack(0, 1000) + bytes(900)),
        ]
    ),
)


def http2(data: bytes) -> Iterable[Hashable]:
    """Any frames and bytes: what comes back is frames, bounds hold, and an ended connection gives its memory back."""
    outcomes: set[Hashable] = set()
    for limits in LIMITS:
        shared, now, out, calls = Budget(SHARED), 0.0, bytearray(), 0
        connection = Connection(limits, shared, now)
        for number, kind, value in decode(data):
            match number, kind:
                case (1, _) if kind == BYTES:
                    given = _framed(value)
                case (2, _) if kind == BYTES:
                    given = value
                case (3, _) if kind == VARINT:
                    now += value % 3600
                    connection.expire(now)
                    continue
                case (4, _) if kind == VARINT:
                    connection.fail(value % (1 << 31), 13, "no")
                    continue
                case _:
                    continue
            for call in connection.receive(given, now):
                calls += 1
                assert len(call.message) <= limits.message
                connection.answer(call.stream_id, call.message)
            out += connection.take()
            assert len(connection._streams) <= limits.streams
            assert shared.used <= min(limits.buffered, SHARED)
        connection.expire(now + 100)
        out += connection.take()
        outcomes |= {("calls", calls.bit_length()), ("error", connection.error and connection.error[0])}
        kinds = list(_kinds(bytes(out)))
        assert kinds.count(GOAWAY) == connection.ended
        assert GOAWAY not in kinds[:-1]
        outcomes.update(kinds)
        connection.close()
        assert shared.used == 0
    return outcomes


def _framed(value: bytes) -> bytes:
    found: dict[int, int] = {}
    payload = b""
    for number, kind, field in decode(value):
        if kind == VARINT:
            found[number] = field
        elif number == PAYLOAD and kind == BYTES:
            payload = field
    return frame(found.get(KIND, 0) & 255, found.get(FLAGS, 0) & 255, found.get(STREAM, 0) % (1 << 32), payload)


def _kinds(data: bytes) -> Iterable[int]:
    """The types of the frames in `data`, which has to end with a whole one."""
    while data:
        length_kind, _, _ = HEAD.unpack_from(data)
        end = HEAD.size + (length_kind >> 8)
        assert len(data) >= end
        yield length_kind & 255
        data = data[end:]


TARGETS = (Target("http2", pure(http2), CONNECTIONS, MESSAGE, short=150),)
