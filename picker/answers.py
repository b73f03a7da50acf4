"""What goes back on one connection, as far as the client's windows allow (RFC 9113, section 5.2). Pure."""

from __future__ import annotations

from dataclasses import dataclass

from picker import headers
from picker.frames import (
    DATA,
    DEFAULT_FRAME,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    HEAD,
    HEAD_BYTES,
    HEADERS,
    LARGEST_WINDOW,
    WORD,
    Code,
    frame,
    rst_stream,
)
from picker.messages import MESSAGE_HEAD


@dataclass(slots=True)
class _Waiting:
    """The rest of an answer: DATA that waits for a window, then trailers."""

    data: memoryview
    window: int
    opened: float  # seconds: when the stream was


class Answers:
    """All answers of a connection, and every other frame that is sent, in `out`. Mutable."""

    def __init__(self, limit: int) -> None:
        """At most `limit` bytes wait for windows; a further answer is a reset of its stream."""
        self.out: list[bytes] = []
        self.frame = DEFAULT_FRAME  # bytes: the largest payload the client takes
        self._limit = limit
        self._window = DEFAULT_WINDOW  # bytes the client takes on this connection
        self._waiting: dict[int, _Waiting] = {}
        self._bytes = 0  # in them

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def send(self, stream_id: int, message: bytes, window: int, opened: float) -> None:
        """Headers, `message` and trailers, on a stream that takes `window` bytes."""
        size = MESSAGE_HEAD.size + len(message)
        if size <= min(self._window, window, self.frame):
            self._window -= size
            number = WORD.pack(stream_id)
            self.out += (
                _ANSWER[0], number, _ANSWER[1],
                HEAD.pack(size << 8 | DATA, 0, stream_id), MESSAGE_HEAD.pack(0, len(message)), message,
                _OK[0], number, _OK[1],
            )  # fmt: skip
        elif self._bytes + size > self._limit:
            self.out.append(rst_stream(stream_id, Code.ENHANCE_YOUR_CALM))
        else:
            self.out.append(frame(HEADERS, END_HEADERS, stream_id, headers.ANSWER))
            data = memoryview(MESSAGE_HEAD.pack(0, len(message)) + message)
            self._waiting[stream_id] = _Waiting(data, window, opened)
            self._bytes += size
            self.go_on()

    def go_on(self) -> None:
        """Send what the windows now allow."""
        for stream_id, waiting in list(self._waiting.items()):
            while waiting.data and (room := min(self._window, waiting.window, self.frame)) > 0:
                part = waiting.data[:room]
                self.out += (HEAD.pack(len(part) << 8 | DATA, 0, stream_id), bytes(part))
                waiting.data = waiting.data[room:]
                waiting.window -= len(part)
                self._window -= len(part)
                self._bytes -= len(part)
            if not waiting.data:
                del self._waiting[stream_id]
                self.out.append(frame(HEADERS, END_HEADERS | END_STREAM, stream_id, headers.OK))

    def widen(self, increment: int) -> bool:
        """The client takes so much more on the connection; whether that is still a window."""
        self._window += increment
        return self._window <= LARGEST_WINDOW

    def widen_stream(self, stream_id: int, increment: int) -> bool:
        """The same for a stream whose answer waits, if it does."""
        waiting = self._waiting.get(stream_id)
        if waiting is None:
            return True
        waiting.window += increment
        return waiting.window <= LARGEST_WINDOW

    def widen_streams(self, change: int) -> bool:
        """The same for all of them; a window may become negative."""
        return all(self.widen_stream(stream_id, change) for stream_id in self._waiting)

    def late(self, before: float) -> list[int]:
        """Streams with an answer that waits and that were opened before then."""
        return [stream_id for stream_id, waiting in self._waiting.items() if waiting.opened < before]

    def forget(self, stream_id: int) -> bool:
        """Whether the stream's answer waited; it is not sent."""
        waiting = self._waiting.pop(stream_id, None)
        if waiting is not None:
            self._bytes -= len(waiting.data)
        return waiting is not None

    def clear(self) -> None:
        self._waiting.clear()
        self._bytes = 0


def _around(flags: int, block: bytes) -> tuple[bytes, bytes]:
    """A HEADERS frame, cut where its stream's number belongs."""
    whole = frame(HEADERS, flags, 0, block)
    return whole[:5], whole[HEAD_BYTES:]


_ANSWER = _around(END_HEADERS, headers.ANSWER)
_OK = _around(END_HEADERS | END_STREAM, headers.OK)
