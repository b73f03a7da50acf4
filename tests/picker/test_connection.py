"""picker/connection.py: against the h2 library as its client, byte by byte, and against what breaks the rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    PingAckReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes, Settings
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.connection import MAX_CONTINUATIONS, Connection, Limits
from picker.frames import (
    ACK,
    CONTINUATION,
    DATA,
    DEFAULT_FRAME,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEAD,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    LARGEST_WINDOW,
    MAX_FRAME_SIZE,
    PADDED,
    PING,
    PREFACE,
    PRIORITISED,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Code,
    frame,
    window_update,
)
from picker.frames import settings as settings_frame
from picker.messages import INTERNAL, MESSAGE_HEAD, RESOURCE_EXHAUSTED, UNIMPLEMENTED, Budget
from tests.picker.test_headers import REQUEST, encode

GREETING = PREFACE + settings_frame(())
BLOCK = encode(REQUEST)
PATH = REQUEST[":path"]


def message(content: bytes, *, compressed: bool = False) -> bytes:
    return MESSAGE_HEAD.pack(compressed, len(content)) + content


def call(stream_id: int, content: bytes) -> bytes:
    """A whole call in small frames; like Envoy it does not end its side."""
    data = message(content)
    parts = [data[start : start + DEFAULT_FRAME] for start in range(0, len(data), DEFAULT_FRAME)]
    return frame(HEADERS, END_HEADERS, stream_id, BLOCK) + b"".join(frame(DATA, 0, stream_id, part) for part in parts)


def frames(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """(type, flags, stream, payload) of each frame; `data` has to end with one."""
    found = []
    while data:
        length_kind, flags, stream_id = HEAD.unpack_from(data)
        end = HEAD.size + (length_kind >> 8)
        assert len(data) >= end
        found.append((length_kind & 255, flags, stream_id, data[HEAD.size : end]))
        data = data[end:]
    return found


class Server:
    """A connection that echoes, and what it has sent."""

    def __init__(self, limits: Limits | None = None, memory: Budget | None = None, answer: bytes | None = None) -> None:
        self.memory = memory or Budget(1 << 30)
        self.connection = Connection(limits or Limits(), self.memory, 0.0)
        self.connection.take()  # its settings
        self.calls: list[tuple[int, str, bytes]] = []
        self._answer = answer

    def send(self, data: bytes, now: float = 0.0) -> bytes:
        for called in self.connection.receive(data, now):
            self.calls.append((called.stream_id, called.path, called.message))
            self.connection.answer(called.stream_id, called.message if self._answer is None else self._answer)
        return self.connection.take()

    def goaway(self, data: bytes) -> tuple[Code, str]:
        """What ended the connection, which has to be the last it sent."""
        *_, (kind, _, _, payload) = frames(self.send(GREETING + data))
        assert kind == GOAWAY
        assert self.connection.ended
        assert self.send(call(99, b"x")) == b""  # and nothing more is served
        assert self.memory.used == 0
        return Code(int.from_bytes(payload[4:8], "big")), payload[8:].decode()


class Client:
    """The h2 library: it raises when we break the protocol."""

    def __init__(self, server: Server, **initial: int) -> None:
        self.server = server
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        values = {SettingCodes[name]: value for name, value in initial.items()}
        self.h2.local_settings = Settings(client=True, initial_values=values)
        self.h2.initiate_connection()
        fresh = Connection(Limits(), Budget(1), 0.0)  # the settings `server` has given away
        self.h2.receive_data(fresh.take())
        self.events: list[Event] = []

    def exchange(self, cuts: Iterable[int] = ()) -> None:
        """All that h2 has to say, cut in pieces; and the answers."""
        data = self.h2.data_to_send()
        for start, end in pairwise([0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]):
            self.events += self.h2.receive_data(self.server.send(data[start:end]))

    def answer(self, stream_id: int) -> tuple[bytes, dict[str, str]]:
        """The stream's DATA, and its headers and trailers together."""
        body, fields = b"", dict[str, str]()
        for event in self.events:
            if getattr(event, "stream_id", None) == stream_id:
                if isinstance(event, DataReceived):
                    body += event.data
                elif isinstance(event, ResponseReceived | TrailersReceived):
                    fields.update({str(name): str(value) for name, value in event.headers})
        return body, fields


OK = {":status": "200", "content-type": "application/grpc", "grpc-status": "0"}
SIZES = st.integers(0, 40) | st.integers(0, 70_000)  # bytes of a message: of one frame, and of several


# --- calls ---


@settings(max_examples=60)
@given(st.lists(SIZES, min_size=1, max_size=4), st.lists(st.integers(0, 1 << 20), max_size=12), st.booleans())
def test_calls_of_an_independent_client(sizes: list[int], cuts: list[int], end: bool) -> None:
    """Whatever the sizes and wherever the stream of bytes is cut: each call once, in order, and h2 accepts the answers.

    Several open at once, from before our settings are acknowledged; with the client's side ended and not.
    """
    server = Server()
    client = Client(server, INITIAL_WINDOW_SIZE=1 << 20)
    bodies = [bytes(range(256)) * (size // 256) + bytes(size % 256) for size in sizes]
    streams = [1 + 2 * turn for turn in range(len(bodies))]
    client.h2.increment_flow_control_window(1 << 20)
    for stream_id, body in zip(streams, bodies, strict=True):
        client.h2.send_headers(stream_id, list(REQUEST.items()))
        data = message(body)
        for start in range(0, len(data), DEFAULT_FRAME):
            last = end and start + DEFAULT_FRAME >= len(data)
            client.h2.send_data(stream_id, data[start : start + DEFAULT_FRAME], end_stream=last)
    client.exchange(cuts)
    assert server.calls == [(stream_id, PATH, body) for stream_id, body in zip(streams, bodies, strict=True)]
    for stream_id, body in zip(streams, bodies, strict=True):
        assert client.answer(stream_id) == (message(body), OK)
    assert server.memory.used == 0


def test_a_block_that_comes_again() -> None:
    """As Envoy's do: read from memory, and still a call each time."""
    server = Server()
    server.send(GREETING + frame(SETTINGS, ACK, 0, b"") + frame(HEADERS, END_HEADERS, 1, b"\x20" + BLOCK))
    for stream_id in range(3, 9, 2):
        assert server.send(call(stream_id, b"x"))
    assert server.calls == [(stream_id, PATH, b"x") for stream_id in range(3, 9, 2)]


def test_padding_priorities_and_continuations() -> None:
    """They change nothing; nor do trailers, a second message, frames of types nobody knows, and a late reset."""
    server = Server()
    first = bytes([3]) + bytes(5) + BLOCK[:7] + bytes(3)
    sent = [
        frame(HEADERS, PADDED | PRIORITISED, 1, first),
        frame(CONTINUATION, 0, 1, BLOCK[7:9]),
        frame(CONTINUATION, END_HEADERS, 1, BLOCK[9:]),
        frame(DATA, PADDED, 1, bytes([2]) + message(b"abc")[:6] + bytes(2)),
        frame(PRIORITY, 0, 1, bytes(5)),
        frame(0xFA, 0xFF, 1, b"?"),
        frame(DATA, 0, 1, message(b"abc")[6:] + message(b"again")),
        frame(DATA, 0, 1, b"more"),
        frame(HEADERS, END_HEADERS | END_STREAM, 1, encode({"x": "trailer"})),
        frame(RST_STREAM, 0, 1, bytes(4)),
        frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\1"),
        frame(GOAWAY, 0, 0, bytes(8)),
    ]
    server.send(GREETING + b"".join(sent))
    assert server.calls == [(1, PATH, b"abc")]
    assert not server.connection.ended
    assert not server.connection.busy


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (frame(HEADERS, END_HEADERS | END_STREAM, 1, BLOCK), INTERNAL),
        (frame(HEADERS, END_HEADERS, 1, BLOCK) + frame(DATA, END_STREAM, 1, b""), INTERNAL),
        (frame(HEADERS, END_HEADERS, 1, BLOCK) + frame(DATA, END_STREAM, 1, message(b"abc")[:-1]), INTERNAL),
        (
            frame(HEADERS, END_HEADERS, 1, BLOCK)
            + frame(DATA, 0, 1, message(b"abc")[:-1])
            + frame(HEADERS, END_HEADERS | END_STREAM, 1, encode({"x": "trailer"})),
            INTERNAL,
        ),
        (
            frame(HEADERS, END_HEADERS, 1, BLOCK) + frame(DATA, 0, 1, message(b"abc", compressed=True)),
            UNIMPLEMENTED,
        ),
        (frame(HEADERS, END_HEADERS, 1, BLOCK) + frame(DATA, 0, 1, b"\0\xff\xff\xff\xff"), RESOURCE_EXHAUSTED),
    ],
)
def test_a_call_that_cannot_be_served_has_its_status(sent: bytes, status: int) -> None:
    """Without a call, without harm to the connection, and what comes late is skipped."""
    server = Server()
    client = Client(server)
    client.h2.send_headers(1, list(REQUEST.items()))  # so that h2 knows the stream
    client.h2.clear_outbound_data_buffer()
    client.events += client.h2.receive_data(server.send(GREETING + sent))
    assert client.answer(1)[1]["grpc-status"] == str(status)
    assert server.calls == []
    server.send(frame(DATA, 0, 1, b"late") + call(3, b"next"))
    assert server.calls == [(3, PATH, b"next")]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [({":method": "GET"}, HEADERS), ({"content-type": "text/html"}, HEADERS), ({"connection": "x"}, RST_STREAM)],
)
def test_what_is_no_grpc(changes: dict[str, str], kind: int) -> None:
    """An HTTP status, or a reset for what is malformed; the connection goes on."""
    server = Server()
    out = frames(server.send(GREETING + frame(HEADERS, END_HEADERS, 1, encode(REQUEST | changes))))
    assert [found[0] for found in out] == [SETTINGS, kind]
    server.send(call(3, b"next"))
    assert server.calls == [(3, PATH, b"next")]


# --- the client's windows ---


@settings(max_examples=40)
@given(st.integers(0, 3_000), st.lists(st.integers(1, 90_000), min_size=1, max_size=40), st.integers(0, 500))
def test_the_clients_windows_are_kept(window: int, grants: list[int], length: int) -> None:
    """h2 raises when one is exceeded; with windows granted bit by bit the whole answer comes, then its trailers."""
    answer = bytes(range(256)) * length
    server = Server(answer=answer)
    client = Client(server, INITIAL_WINDOW_SIZE=window)
    client.h2.send_headers(1, list(REQUEST.items()))
    client.h2.send_data(1, message(b"?"))
    client.exchange()
    for grant in grants if not any(isinstance(event, StreamEnded) for event in client.events) else ():
        client.h2.increment_flow_control_window(grant, 1)
        client.h2.increment_flow_control_window(grant)
        client.exchange()
        if any(isinstance(event, StreamEnded) for event in client.events):
            break
    if server.connection.busy:
        client.h2.increment_flow_control_window(1 << 20, 1)
        client.h2.increment_flow_control_window(1 << 20)
        client.exchange()
    assert client.answer(1) == (message(answer), OK)
    assert not server.connection.busy
    assert server.connection._answers._bytes == 0


def test_the_connections_window_is_kept() -> None:
    """Over all streams, small answers and large: what is granted is used, and h2 raises when it is exceeded."""
    server = Server(answer=bytes(10_000))
    client = Client(server, INITIAL_WINDOW_SIZE=1 << 20)
    streams = range(1, 21, 2)
    for stream_id in streams:
        client.h2.send_headers(stream_id, list(REQUEST.items()))
        client.h2.send_data(stream_id, message(b"?"))
    client.exchange()
    assert sum(len(client.answer(stream_id)[0]) for stream_id in streams) == 65_535
    for granted in range(1, 35):
        client.h2.increment_flow_control_window(1_000)
        client.exchange()
        assert sum(len(client.answer(stream_id)[0]) for stream_id in streams) == min(65_535 + 1_000 * granted, 100_050)
    client.h2.increment_flow_control_window(1_000)
    client.exchange()
    assert [client.answer(stream_id) for stream_id in streams] == [(message(bytes(10_000)), OK)] * 10


def test_settings_change_the_windows_of_open_streams() -> None:
    """Down, below zero, and up again; and frames as large as the client takes."""
    server = Server(answer=bytes(100_000))
    client = Client(server)
    client.h2.send_headers(1, list(REQUEST.items()))
    client.h2.send_data(1, message(b"?"))
    client.exchange()
    assert len(client.answer(1)[0]) == 65_535
    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 10, SettingCodes.MAX_FRAME_SIZE: 50_000})
    client.exchange()
    client.h2.increment_flow_control_window(1 << 20)
    client.exchange()
    assert len(client.answer(1)[0]) == 65_535
    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20})
    client.exchange()
    assert client.answer(1) == (message(bytes(100_000)), OK)
    assert max(len(event.data) for event in client.events if isinstance(event, DataReceived)) > 30_000


def test_a_client_that_never_reads() -> None:
    """Answers wait up to a limit, then their streams are reset; given up, they leave nothing behind."""
    server = Server(Limits(waiting=200_000), answer=bytes(90_000))
    server.send(GREETING + frame(SETTINGS, 0, 0, (INITIAL_WINDOW_SIZE).to_bytes(2, "big") + bytes(4)))
    resets = []
    for stream_id in range(1, 9, 2):
        out = frames(server.send(call(stream_id, b"?")))
        resets += [found[2] for found in out if found[0] == RST_STREAM]
    assert resets == [5, 7]
    server.send(frame(RST_STREAM, 0, 1, bytes(4)))
    server.connection.expire(1e9)
    assert [found[::2] for found in frames(server.connection.take())] == [(RST_STREAM, 3)]
    assert server.connection._answers._bytes == 0
    assert not server.connection.busy


# --- our windows and limits ---


def test_our_window_does_not_run_out() -> None:
    """Gigabytes through one connection: it is widened again long before it is used up."""
    server = Server()
    server.send(GREETING + frame(HEADERS, END_HEADERS, 1, BLOCK) + frame(RST_STREAM, 0, 1, bytes(4)))
    big, used, widened = frame(DATA, 0, 1, bytes(DEFAULT_FRAME)) * 1000, 0, 0
    for turn in range(400):  # six gigabytes for a stream that is over
        out = server.send(big, now=float(turn))
        used += 1000 * DEFAULT_FRAME
        for kind, _, stream_id, payload in frames(out):
            assert (kind, stream_id) == (WINDOW_UPDATE, 0)
            widened += int.from_bytes(payload, "big")
        assert 0 <= used - widened < LARGEST_WINDOW
    assert widened > 0
    assert not server.connection.ended


def test_incomplete_messages_are_bounded() -> None:
    """By connection and over all of them: the call that exceeds it is refused, and what it held is free again."""

    def begun(stream_id: int) -> bytes:
        part = MESSAGE_HEAD.pack(0, 1 << 20) + bytes(10_000 - MESSAGE_HEAD.size)
        return frame(HEADERS, END_HEADERS, stream_id, BLOCK) + frame(DATA, 0, stream_id, part)

    memory = Budget(55_000)
    servers = [Server(Limits(buffered=25_000), memory) for _ in range(3)]
    for server in servers:
        server.send(GREETING)
    refused = []
    for turn in range(3):
        for number, server in enumerate(servers):
            out = frames(server.send(begun(2 * turn + 1)))
            refused += [(number, turn) for found in out if found[0] == HEADERS]
    assert refused == [(2, 1), (0, 2), (1, 2), (2, 2)]
    assert memory.used == 5 * (10_000 - MESSAGE_HEAD.size)  # at most two calls of a connection
    for server in servers:
        server.connection.close()
    assert memory.used == 0


def test_more_calls_than_were_allowed() -> None:
    """Refused, so that the client may ask elsewhere; the others are served."""
    server = Server(Limits(streams=2))
    opened = b"".join(frame(HEADERS, END_HEADERS, stream_id, BLOCK) for stream_id in (1, 3, 5))
    (_, (kind, _, stream_id, code)) = frames(server.send(GREETING + opened))
    assert (kind, stream_id, code) == (RST_STREAM, 5, bytes([0, 0, 0, Code.REFUSED_STREAM]))
    server.send(b"".join(frame(DATA, 0, stream_id, message(b"x")) for stream_id in (1, 3, 5)))
    assert [called[0] for called in server.calls] == [1, 3]


def test_what_is_slow_ends() -> None:
    """A message that does not come is reset after a while, a connection without a preface closed; others go on."""
    server = Server(Limits(seconds=10))
    server.send(GREETING + frame(HEADERS, END_HEADERS, 1, BLOCK) + frame(DATA, 0, 1, message(b"abc")[:-1]), 1.0)
    server.send(frame(HEADERS, END_HEADERS, 3, BLOCK), 5.0)
    server.connection.expire(11.0)
    assert server.connection.take() == b""
    server.connection.expire(12.0)
    assert [found[::2] for found in frames(server.connection.take())] == [(RST_STREAM, 1)]
    assert server.memory.used == 0
    server.send(frame(DATA, 0, 1, b"c") + frame(DATA, 0, 3, message(b"x")), 12.0)
    assert [called[0] for called in server.calls] == [3]
    for greeting in (b"", PREFACE[:10], PREFACE):
        silent = Server(Limits(seconds=10))
        silent.send(greeting)
        silent.connection.expire(11.0)
        assert silent.connection.ended


FLOODS: dict[str, Callable[[int], bytes]] = {
    "pings": lambda _: frame(PING, 0, 0, bytes(8)),
    "settings": lambda _: settings_frame(()),
    "resets": lambda turn: (
        frame(HEADERS, END_HEADERS, 2 * turn + 1, BLOCK) + frame(RST_STREAM, 0, 2 * turn + 1, bytes(4))
    ),
    "priorities": lambda _: frame(PRIORITY, 0, 1, bytes(5)),
    "window updates": lambda _: window_update(0, 1),
    "what is no call": lambda turn: frame(HEADERS, END_HEADERS, 2 * turn + 1, encode(REQUEST | {":method": "GET"})),
    "unknown frames": lambda _: frame(0xFA, 0, 0, b""),
    "empty data": lambda turn: (b"" if turn else frame(HEADERS, END_HEADERS, 1, BLOCK)) + frame(DATA, 0, 1, b""),
    "data after the answer": lambda turn: (b"" if turn else call(1, b"x")) + frame(DATA, 0, 1, b"x" * 2000),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_floods_end_the_connection(flood: Callable[[int], bytes]) -> None:
    """What brings nothing forward has a rate; below it, for however long, the connection lives."""
    patient = Server(Limits(idle_frames=20))
    patient.send(GREETING)
    for turn in range(100):
        patient.send(flood(turn), now=turn / 15)
    assert not patient.connection.ended
    code, _ = Server(Limits(idle_frames=20)).goaway(b"".join(map(flood, range(50))))
    assert code is Code.ENHANCE_YOUR_CALM


def test_busy_clients_are_no_flood() -> None:
    """Envoy resets each stream when it has the answer; thousands a second are usual."""
    server = Server(Limits(idle_frames=20))
    server.send(GREETING)
    for stream_id in range(1, 4001, 2):
        server.send(call(stream_id, b"x"))
        server.send(frame(RST_STREAM, 0, stream_id, bytes(4)) + frame(PING, 0, 0, bytes(8)))
    assert len(server.calls) == 2000
    assert not server.connection.ended


# --- what breaks the protocol ---

OPENED = frame(HEADERS, END_HEADERS, 1, BLOCK)
BROKEN = {
    "a frame too large": (HEAD.pack((DEFAULT_FRAME + 1) << 8, 0, 1), Code.FRAME_SIZE_ERROR),
    "data of no stream": (frame(DATA, 0, 0, b"x"), Code.PROTOCOL_ERROR),
    "data of a stream not opened": (frame(DATA, 0, 1, b"x"), Code.PROTOCOL_ERROR),
    "headers of no stream": (frame(HEADERS, END_HEADERS, 0, BLOCK), Code.PROTOCOL_ERROR),
    "headers of an even stream": (frame(HEADERS, END_HEADERS, 2, BLOCK), Code.PROTOCOL_ERROR),
    "a block that cannot be decoded": (frame(HEADERS, END_HEADERS, 1, b"\xff"), Code.COMPRESSION_ERROR),
    "headers all padding": (frame(HEADERS, END_HEADERS | PADDED, 1, b"\x05abc"), Code.PROTOCOL_ERROR),
    "data all padding": (OPENED + frame(DATA, PADDED, 1, b""), Code.PROTOCOL_ERROR),
    "a priority too short": (frame(HEADERS, END_HEADERS | PRIORITISED, 1, b"abc"), Code.FRAME_SIZE_ERROR),
    "an interrupted block": (frame(HEADERS, 0, 1, BLOCK) + frame(PING, 0, 0, bytes(8)), Code.PROTOCOL_ERROR),
    "a block of two streams": (frame(HEADERS, 0, 1, BLOCK) + frame(CONTINUATION, 4, 3, b""), Code.PROTOCOL_ERROR),
    "a continuation of nothing": (frame(CONTINUATION, END_HEADERS, 1, BLOCK), Code.PROTOCOL_ERROR),
    "a block too large": (frame(HEADERS, 0, 1, bytes(9000)), Code.ENHANCE_YOUR_CALM),
    "a block in too many pieces": (
        frame(HEADERS, 0, 1, b"") + frame(CONTINUATION, 0, 1, b"") * (MAX_CONTINUATIONS + 1),
        Code.ENHANCE_YOUR_CALM,
    ),
    "a push": (frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4) + BLOCK), Code.PROTOCOL_ERROR),
    "a short ping": (frame(PING, 0, 0, b"x"), Code.FRAME_SIZE_ERROR),
    "a stream's ping": (frame(PING, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "a short reset": (OPENED + frame(RST_STREAM, 0, 1, b"x"), Code.FRAME_SIZE_ERROR),
    "a reset of a stream not opened": (frame(RST_STREAM, 0, 1, bytes(4)), Code.PROTOCOL_ERROR),
    "a short priority": (frame(PRIORITY, 0, 1, b"x"), Code.FRAME_SIZE_ERROR),
    "a priority of no stream": (frame(PRIORITY, 0, 0, bytes(5)), Code.PROTOCOL_ERROR),
    "a stream's goaway": (frame(GOAWAY, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "a stream's settings": (frame(SETTINGS, 0, 1, b""), Code.PROTOCOL_ERROR),
    "half a setting": (frame(SETTINGS, 0, 0, b"abc"), Code.FRAME_SIZE_ERROR),
    "an acknowledgement that says something": (frame(SETTINGS, ACK, 0, bytes(6)), Code.FRAME_SIZE_ERROR),
    "a window setting too large": (settings_frame([(INITIAL_WINDOW_SIZE, 1 << 31)]), Code.FLOW_CONTROL_ERROR),
    "a frame setting too small": (settings_frame([(MAX_FRAME_SIZE, 1)]), Code.PROTOCOL_ERROR),
    "a push setting of 2": (settings_frame([(2, 2)]), Code.PROTOCOL_ERROR),
    "a window update of nothing": (window_update(0, 0), Code.PROTOCOL_ERROR),
    "a window too large": (window_update(0, LARGEST_WINDOW), Code.FLOW_CONTROL_ERROR),
    "a stream's window made too large by settings": (
        OPENED + window_update(1, LARGEST_WINDOW - 65_535) + settings_frame([(INITIAL_WINDOW_SIZE, 65_536)]),
        Code.FLOW_CONTROL_ERROR,
    ),
    "a short window update": (frame(WINDOW_UPDATE, 0, 0, b"x"), Code.FRAME_SIZE_ERROR),
    "a window update of a stream not opened": (window_update(1, 1), Code.PROTOCOL_ERROR),
}


@pytest.mark.parametrize(("sent", "code"), BROKEN.values(), ids=BROKEN)
def test_broken_rules_end_the_connection(sent: bytes, code: Code) -> None:
    """GOAWAY says which and why, and is the last frame; the same when it comes byte by byte."""
    assert Server().goaway(sent)[0] is code
    slow = Server()
    out = b"".join(slow.send(bytes([byte])) for byte in GREETING + sent)
    assert frames(out)[-1][0] == GOAWAY
    assert slow.connection.ended


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n", PREFACE + frame(PING, 0, 0, bytes(8)), b"\x16\x03\x01"])
def test_what_is_no_http2(sent: bytes) -> None:
    """HTTP/1, TLS at a plaintext port, and a first frame that is none of SETTINGS."""
    server = Server()
    assert frames(server.send(sent))[-1][0] == GOAWAY
    assert server.connection.ended


@pytest.mark.parametrize("increment", [0, LARGEST_WINDOW])
def test_a_streams_window_that_breaks_the_rules(increment: int) -> None:
    """Ends that stream alone."""
    server = Server()
    client = Client(server)
    client.h2.send_headers(1, list(REQUEST.items()))
    client.exchange()
    client.events += client.h2.receive_data(server.send(window_update(1, increment)))
    assert [event.stream_id for event in client.events if isinstance(event, StreamReset)] == [1]
    server.send(call(3, b"next"))
    assert [called[0] for called in server.calls] == [3]


def test_pings_and_a_graceful_end() -> None:
    """A ping comes back with its bytes; `finish` tells the client to go, and its open calls are still served."""
    server = Server()
    client = Client(server)
    client.h2.ping(b"12345678")
    client.h2.send_headers(1, list(REQUEST.items()))
    client.exchange()
    assert [event.ping_data for event in client.events if isinstance(event, PingAckReceived)] == [b"12345678"]
    server.connection.finish()
    assert server.connection.busy
    out = server.connection.take() + server.send(frame(DATA, 0, 1, message(b"x")))
    assert [found[0] for found in frames(out)] == [GOAWAY, HEADERS, DATA, HEADERS]
    (ended,) = (event for event in client.h2.receive_data(out[:25]) if isinstance(event, ConnectionTerminated))
    assert (ended.error_code, ended.last_stream_id) == (Code.NO_ERROR, LARGEST_WINDOW)


CONVERSATION = (
    GREETING
    + frame(SETTINGS, ACK, 0, b"")
    + call(1, b"abc")
    + frame(PING, 0, 0, bytes(8))
    + window_update(0, 5)
    + frame(RST_STREAM, 0, 1, bytes(4))
    + frame(HEADERS, 0, 3, BLOCK[:9])
    + frame(CONTINUATION, END_HEADERS, 3, BLOCK[9:])
    + frame(DATA, END_STREAM, 3, message(b"x"))
    + call(5, bytes(20_000))
)
EDITS = st.lists(
    st.tuples(st.integers(0, len(CONVERSATION)), st.integers(0, 3), st.binary(min_size=1, max_size=4)), max_size=6
)


@settings(max_examples=300)
@given(EDITS, st.lists(st.integers(0, len(CONVERSATION)), max_size=5), st.booleans())
def test_garbage_never_raises(edits: list[tuple[int, int, bytes]], cuts: list[int], small: bool) -> None:
    """Bytes of a conversation changed, lost and added, cut anywhere: frames come back, and memory is given back."""
    data = CONVERSATION
    for position, lost, added in edits:
        data = data[:position] + added + data[position + lost :]
    server = Server(Limits(message=100, buffered=200, waiting=50, streams=1) if small else None)
    out = b""
    for start, end in pairwise([0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]):
        out += server.send(data[start:end])
    server.connection.expire(1e9)
    kinds = [found[0] for found in frames(out + server.connection.take())]
    assert kinds.count(GOAWAY) == server.connection.ended
    assert GOAWAY not in kinds[:-1]
    server.connection.close()
    assert server.memory.used == 0
    if not edits and not small:
        assert [called[0] for called in server.calls] == [1, 3, 5]


@given(st.binary(max_size=400))
def test_noise_never_raises(noise: bytes) -> None:
    """Anything at all behind a good greeting."""
    server = Server()
    server.send(GREETING + noise)
    server.connection.close()
    assert server.memory.used == 0
