"""The server's end of one HTTP/2 connection that carries unary gRPC calls. Pure: bytes in, calls and bytes out.

    connection = Connection(limits, memory, now)
    for call in connection.receive(data, now):       # what has become complete
        connection.answer(call.stream_id, message)   # or fail(stream_id, status, text)
    transport.write(connection.take())               # always, also after receive() has returned nothing
    if connection.ended: transport.close()

The rules (RFC 9113, and gRPC over HTTP/2):

- A stream is one call: HEADERS, then one message in DATA. It is over with our answer, whether or not the client has
  ended its side: Envoy never does, and resets the stream when it has the answer. What comes for a stream that is over,
  or that we have refused, is skipped.
- Nothing a client sends makes this raise. What breaks the protocol is answered with GOAWAY, and `ended` is true; what
  breaks one stream only, with RST_STREAM; a call that cannot be served, with its gRPC status.
- The windows we grant are so large that they never hold a client up. Memory is bounded by refusing calls instead
  (RESOURCE_EXHAUSTED): the picker's client fails open, and must not wait. See `Limits`.
- The client's windows are kept: what does not fit waits, up to `Limits.waiting`.
- Frames that bring no call forward (pings, settings, resets, empty or tiny DATA) have a budget. A client that exceeds
  it wants to keep us busy, and is sent away (ENHANCE_YOUR_CALM).
- `expire` ends what is too slow: streams without a whole message, connections without a preface.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from picker import headers
from picker.answers import Answers
from picker.frames import (
    ACK,
    CONTINUATION,
    DATA,
    DEFAULT_FRAME,
    DEFAULT_WINDOW,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEAD,
    HEAD_BYTES,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    LARGEST_FRAME,
    LARGEST_WINDOW,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    MAX_HEADER_LIST_SIZE,
    PADDED,
    PING,
    PREFACE,
    PRIORITISED,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTING,
    SETTINGS,
    STREAM_ID,
    WINDOW_UPDATE,
    WORD,
    Code,
    frame,
    goaway,
    rst_stream,
    settings,
    window_update,
)
from picker.headers import BlockError, HeaderReader
from picker.messages import INTERNAL, MESSAGE_HEAD, Budget, MessageError, Pieces

TINY = 1024  # bytes: DATA below it that completes nothing is work without progress
MAX_CONTINUATIONS = 8  # frames of one block, which is no longer than headers.MAX_BLOCK


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may ask of us."""

    message: int = 40 << 20  # bytes of a call's: above the 32 MiB Envoy buffers of a body
    buffered: int = 256 << 20  # bytes of incomplete messages, of one connection: eight such bodies at once
    waiting: int = 256 << 20  # bytes of answers the client leaves no window for
    streams: int = 1024  # calls without an answer: Envoy's breaker lets 256 wait
    seconds: float = 10.0  # for a message or a preface to be complete: Envoy gives up after 0.2
    idle_frames: int = 2000  # a second, that bring no call forward; a call that is answered gives IDLE_CREDIT more


IDLE_CREDIT = 4  # frames: a reset and some window updates and pings are usual with each call


class Call(NamedTuple):
    """A complete request: the method's path and the message's bytes."""

    stream_id: int
    path: str
    message: bytes


@dataclass(slots=True)
class _Stream:
    path: str
    opened: float  # seconds
    window: int  # bytes the client takes of our answer
    pieces: Pieces
    complete: bool = False


class _ProtocolError(Exception):
    def __init__(self, code: Code, why: str) -> None:
        super().__init__(why)
        self.code = code


class Connection:
    """One connection. Mutable. `now` is in seconds, here and everywhere."""

    def __init__(self, limits: Limits, memory: Budget, now: float) -> None:
        """`memory` is for the incomplete messages of all connections that share it."""
        self._limits = limits
        self._budget = Budget(limits.buffered, memory)
        self._headers = HeaderReader()
        self._opened = now
        self._greeted = False  # the client's preface has come
        self._settled = False  # and its first SETTINGS
        self._rest = b""
        self._block: tuple[int, int, bytearray] | None = None  # of HEADERS without END_HEADERS: stream, flags, block
        self._continuations = 0
        self._streams: dict[int, _Stream] = {}  # by age
        self._last_stream = 0
        self._received = 0  # bytes of DATA since we last widened the connection's window
        self._stream_window = DEFAULT_WINDOW  # what the client takes on a new stream
        self._answers = Answers(limits.waiting)
        self._idle_frames = limits.idle_frames
        self._idle_since = now
        self.ended = False
        self.error: tuple[Code, str] | None = None  # what the client did wrong, in a few words
        self._out = self._answers.out
        self._out += (
            settings(
                (
                    (HEADER_TABLE_SIZE, 0),
                    (MAX_CONCURRENT_STREAMS, limits.streams),
                    (INITIAL_WINDOW_SIZE, LARGEST_WINDOW),
                    (MAX_HEADER_LIST_SIZE, headers.MAX_BLOCK),
                )
            ),
            window_update(0, LARGEST_WINDOW - DEFAULT_WINDOW),
        )

    @property
    def busy(self) -> bool:
        """Whether a call is without its whole answer."""
        return bool(self._streams or self._answers)

    def take(self) -> bytes:
        """The bytes to be sent, which are not given again."""
        data = b"".join(self._out)
        self._out.clear()
        return data

    def receive(self, data: bytes, now: float) -> list[Call]:
        """The calls that `data`, the next bytes of the connection, makes complete, in their order."""
        calls: list[Call] = []
        if self.ended:
            return calls
        if self._rest:
            data = self._rest + data
        position = 0
        try:
            if not self._greeted:
                position = self._greet(data)
            size = len(data) if self._greeted else 0
            while size - position >= HEAD_BYTES:
                length_kind, flags, stream_id = HEAD.unpack_from(data, position)
                start = position + HEAD_BYTES
                end = start + (length_kind >> 8)
                if end > size:
                    self._check_frame(end - start)
                    break
                position = end
                self._frame_received(length_kind & 0xFF, flags, stream_id & STREAM_ID, data[start:end], now, calls)
        except _ProtocolError as error:
            self._end(error.code, str(error))
            return calls
        self._rest = data[position:]
        return calls

    def answer(self, stream_id: int, message: bytes) -> None:
        """Answer a call with OK and `message`; nothing when its client has given it up."""
        stream = self._streams.pop(stream_id, None)
        if stream is None or self.ended:
            return
        self._idle_frames = min(self._idle_frames + IDLE_CREDIT, self._limits.idle_frames)
        self._answers.send(stream_id, message, stream.window, stream.opened)

    def fail(self, stream_id: int, status: int, text: str) -> None:
        """Answer a call with a gRPC status other than OK; `text` is plain ASCII without a percent sign."""
        if self._forget(stream_id) and not self.ended:
            block = headers.failure_block(status, text)
            self._out.append(frame(HEADERS, END_HEADERS | END_STREAM, stream_id, block))

    def finish(self) -> None:
        """Ask the client to open no more calls here; those it has opened are still answered."""
        if not self.ended:
            self._out.append(goaway(STREAM_ID, Code.NO_ERROR, "draining"))

    def expire(self, now: float) -> None:
        """End what has taken too long; to be called each second or so."""
        limit = now - self._limits.seconds
        if self.ended:
            return
        if not self._settled and self._opened < limit:
            self._end(Code.PROTOCOL_ERROR, "nothing came")
            return
        late = [stream_id for stream_id, stream in self._streams.items() if stream.opened < limit]
        for stream_id in late + self._answers.late(limit):
            self._reset(stream_id, Code.CANCEL)

    def close(self) -> None:
        """The connection is gone: give back what it holds."""
        self.ended = True
        for stream in self._streams.values():
            stream.pieces.drop()
        self._streams.clear()
        self._answers.clear()

    # --- frames ---

    def _greet(self, data: bytes) -> int:
        """How many bytes of the client's preface `data` begins with: all of them, or none yet."""
        if not PREFACE.startswith(data[: len(PREFACE)]):
            raise _ProtocolError(Code.PROTOCOL_ERROR, "this is not HTTP/2")
        self._greeted = len(data) >= len(PREFACE)
        return len(PREFACE) if self._greeted else 0

    def _frame_received(
        self, kind: int, flags: int, stream_id: int, payload: bytes, now: float, calls: list[Call]
    ) -> None:
        self._check_frame(len(payload))
        if self._block is not None and kind != CONTINUATION:
            raise _ProtocolError(Code.PROTOCOL_ERROR, "a header block was interrupted")
        if not self._settled and kind != SETTINGS:
            raise _ProtocolError(Code.PROTOCOL_ERROR, "the first frame has to be SETTINGS")
        if kind == DATA:
            self._data_received(flags, stream_id, payload, now, calls)
        elif kind == HEADERS:
            self._headers_received(flags, stream_id, payload, now)
        elif kind == CONTINUATION:
            self._continued(flags, stream_id, payload, now)
        elif kind == PUSH_PROMISE:
            raise _ProtocolError(Code.PROTOCOL_ERROR, "a client cannot push")
        else:
            self._idle(now)
            self._control_received(kind, flags, stream_id, payload)

    def _control_received(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == RST_STREAM:
            self._check_length(payload, 4)
            self._check_opened(stream_id)
            self._forget(stream_id)
        elif kind == WINDOW_UPDATE:
            self._window_updated(stream_id, payload)
        elif kind == SETTINGS:
            self._settings_received(flags, stream_id, payload)
        elif kind == PING:
            self._check_length(payload, 8)
            self._check_connection(stream_id)
            if not flags & ACK:
                self._out.append(frame(PING, ACK, 0, payload))
        elif kind == PRIORITY:  # changes nothing
            self._check_length(payload, 5)
            self._check_stream(stream_id)
        elif kind == GOAWAY:  # asks nothing of us; unknown types are to be ignored (section 4.1)
            self._check_connection(stream_id)

    def _data_received(self, flags: int, stream_id: int, payload: bytes, now: float, calls: list[Call]) -> None:
        self._received += len(payload)
        if self._received > LARGEST_WINDOW // 2:
            self._out.append(window_update(0, self._received))
            self._received = 0
        stream = self._streams.get(stream_id)
        if flags & PADDED:
            payload = _unpadded(payload)
        if stream is None or stream.complete:
            self._check_opened(stream_id)
            self._idle(now)
            return
        if not stream.pieces.size and len(payload) >= MESSAGE_HEAD.size:
            compressed, size = MESSAGE_HEAD.unpack_from(payload)
            if size + MESSAGE_HEAD.size <= len(payload) and not compressed:
                stream.complete = True
                calls.append(Call(stream_id, stream.path, payload[MESSAGE_HEAD.size : MESSAGE_HEAD.size + size]))
                return
        try:
            message = stream.pieces.add(payload, self._limits.message)
        except MessageError as error:
            self.fail(stream_id, error.status, str(error))
            return
        if message is not None:
            stream.complete = True
            calls.append(Call(stream_id, stream.path, message))
        elif flags & END_STREAM:
            self.fail(stream_id, INTERNAL, "the message is incomplete")
        elif len(payload) < TINY:
            self._idle(now)

    def _headers_received(self, flags: int, stream_id: int, payload: bytes, now: float) -> None:
        self._check_stream(stream_id)
        if flags & PADDED:
            payload = _unpadded(payload)
        if flags & PRIORITISED:
            if len(payload) < 5:
                raise _ProtocolError(Code.FRAME_SIZE_ERROR, "HEADERS are too short for their priority")
            payload = payload[5:]
        if flags & END_HEADERS:
            self._block_received(flags, stream_id, payload, now)
        else:
            self._continuations = 0
            self._block = (stream_id, flags, bytearray(payload))
            self._check_block(len(payload))

    def _continued(self, flags: int, stream_id: int, payload: bytes, now: float) -> None:
        if self._block is None or self._block[0] != stream_id:
            raise _ProtocolError(Code.PROTOCOL_ERROR, "CONTINUATION of nothing")
        _, first_flags, block = self._block
        self._continuations += 1
        block += payload
        self._check_block(len(block))
        if flags & END_HEADERS:
            self._block = None
            self._block_received(first_flags, stream_id, bytes(block), now)

    def _check_block(self, size: int) -> None:
        if size > headers.MAX_BLOCK or self._continuations > MAX_CONTINUATIONS:
            raise _ProtocolError(Code.ENHANCE_YOUR_CALM, "a header block is too large")

    def _block_received(self, flags: int, stream_id: int, block: bytes, now: float) -> None:
        try:
            head = self._headers.read(block)
        except BlockError as error:
            raise _ProtocolError(Code.COMPRESSION_ERROR, str(error)) from None
        if stream_id <= self._last_stream:  # trailers, which say nothing to us
            self._idle(now)
            if stream_id in self._streams and not self._streams[stream_id].complete:
                if flags & END_STREAM:
                    self.fail(stream_id, INTERNAL, "the message is incomplete")
                else:
                    self._reset(stream_id, Code.PROTOCOL_ERROR)
            return
        if not stream_id & 1:
            raise _ProtocolError(Code.PROTOCOL_ERROR, "a client's streams have odd numbers")
        self._last_stream = stream_id
        if len(self._streams) + len(self._answers) >= self._limits.streams:
            self._idle(now)
            self._out.append(rst_stream(stream_id, Code.REFUSED_STREAM))
        elif head.path:
            self._streams[stream_id] = _Stream(head.path, now, self._stream_window, Pieces(self._budget))
            if flags & END_STREAM:
                self.fail(stream_id, INTERNAL, "there is no message")
        elif head.status:
            self._idle(now)
            self._out.append(frame(HEADERS, END_HEADERS | END_STREAM, stream_id, headers.status_block(head.status)))
        else:
            self._idle(now)
            self._out.append(rst_stream(stream_id, Code.PROTOCOL_ERROR))

    def _settings_received(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._check_connection(stream_id)
        if flags & ACK:
            self._check_length(payload, 0)
            self._headers.no_table()
            return
        if len(payload) % SETTING.size:
            raise _ProtocolError(Code.FRAME_SIZE_ERROR, "SETTINGS have six bytes each")
        for name, value in SETTING.iter_unpack(payload):
            if name == INITIAL_WINDOW_SIZE:
                self._widen_streams(value)
            elif name == MAX_FRAME_SIZE:
                if not DEFAULT_FRAME <= value <= LARGEST_FRAME:
                    raise _ProtocolError(Code.PROTOCOL_ERROR, "MAX_FRAME_SIZE is out of range")
                self._answers.frame = value
            elif name == ENABLE_PUSH and value > 1:
                raise _ProtocolError(Code.PROTOCOL_ERROR, "ENABLE_PUSH is 0 or 1")
        self._settled = True
        self._out.append(frame(SETTINGS, ACK, 0, b""))
        self._answers.go_on()

    def _widen_streams(self, window: int) -> None:
        """INITIAL_WINDOW_SIZE also changes the windows of open streams, which may become negative (section 6.9.2)."""
        if window > LARGEST_WINDOW:
            raise _ProtocolError(Code.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE is out of range")
        change, self._stream_window = window - self._stream_window, window
        within = self._answers.widen_streams(change)
        for stream in self._streams.values():
            stream.window += change
            within = within and stream.window <= LARGEST_WINDOW
        if not within:
            raise _ProtocolError(Code.FLOW_CONTROL_ERROR, "a stream's window is too large")

    def _window_updated(self, stream_id: int, payload: bytes) -> None:
        self._check_length(payload, 4)
        increment = WORD.unpack(payload)[0] & STREAM_ID
        if not stream_id:
            if not increment:
                raise _ProtocolError(Code.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
            if not self._answers.widen(increment):
                raise _ProtocolError(Code.FLOW_CONTROL_ERROR, "the connection's window is too large")
        else:
            self._check_opened(stream_id)
            within = self._answers.widen_stream(stream_id, increment)
            if stream_id in self._streams:
                stream = self._streams[stream_id]
                stream.window += increment
                within = stream.window <= LARGEST_WINDOW
            if not (increment and within):
                self._reset(stream_id, Code.FLOW_CONTROL_ERROR if increment else Code.PROTOCOL_ERROR)
        self._answers.go_on()

    # --- what is checked in several places ---

    def _check_frame(self, size: int) -> None:
        if size > DEFAULT_FRAME:
            raise _ProtocolError(Code.FRAME_SIZE_ERROR, "a frame is larger than was allowed")

    def _check_length(self, payload: bytes, size: int) -> None:
        if len(payload) != size:
            raise _ProtocolError(Code.FRAME_SIZE_ERROR, "a frame has the wrong size")

    def _check_connection(self, stream_id: int) -> None:
        if stream_id:
            raise _ProtocolError(Code.PROTOCOL_ERROR, "a frame of the connection has a stream's number")

    def _check_stream(self, stream_id: int) -> None:
        if not stream_id:
            raise _ProtocolError(Code.PROTOCOL_ERROR, "a frame of a stream has no stream's number")

    def _check_opened(self, stream_id: int) -> None:
        self._check_stream(stream_id)
        if stream_id > self._last_stream:
            raise _ProtocolError(Code.PROTOCOL_ERROR, "a frame of a stream that was not opened")

    def _idle(self, now: float) -> None:
        """Count a frame that brings no call forward."""
        if now - self._idle_since >= 1.0:
            self._idle_since = now
            self._idle_frames = self._limits.idle_frames
        self._idle_frames -= 1
        if self._idle_frames < 0:
            raise _ProtocolError(Code.ENHANCE_YOUR_CALM, "too many frames that bring nothing forward")

    # --- ends ---

    def _forget(self, stream_id: int) -> bool:
        """Whether there was such a stream."""
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            stream.pieces.drop()
            return True
        return self._answers.forget(stream_id)

    def _reset(self, stream_id: int, code: Code) -> None:
        if self._forget(stream_id):
            self._out.append(rst_stream(stream_id, code))

    def _end(self, code: Code, why: str) -> None:
        self.error = code, why
        self._out.append(goaway(self._last_stream, code, why))
        self._rest = b""
        self.close()


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise _ProtocolError(Code.PROTOCOL_ERROR, "a frame is all padding")
    return payload[1 : len(payload) - payload[0]]
