"""Header blocks: what a request's says, and the few an answer has. Pure.

HPACK (RFC 7541) makes the meaning of a block depend on those before it, through a table both ends keep. We ask for a
table of size 0 (`SETTINGS_HEADER_TABLE_SIZE`). Once the client has agreed, a block stands for itself, so one that has
been read before need not be decoded again: Envoy's are the same bytes for every request.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hpack import Decoder, HPACKError

MAX_BLOCK = 8192  # bytes of an encoded block and of the list it stands for: Envoy's is 120, with tracing some 500
MAX_KNOWN = 256  # blocks remembered: one for each cluster and path, and room for what never comes again (trace ids)
_CONNECTION = {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}  # section 8.2.2
_PSEUDO = {b":method", b":scheme", b":path", b":authority"}


class BlockError(Exception):
    """A block that cannot be decoded: the two ends' tables differ from here on, and the connection is lost."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a block asks for: the gRPC method's `path`, or "" with the HTTP `status` to answer.

    Status 0 is a request that is malformed by HTTP/2's own rules (section 8.1.1).
    """

    path: str
    status: int = 200


class HeaderReader:
    """Reads the blocks of one connection, in their order. Mutable."""

    def __init__(self) -> None:
        self._decoder = Decoder(MAX_BLOCK)
        self._known: dict[bytes, Head] = {}

    def no_table(self) -> None:
        """The client has acknowledged that it may not keep a table: its next block has to say so, too."""
        self._decoder.max_allowed_table_size = 0

    def read(self, block: bytes) -> Head:
        """Raises BlockError."""
        known = self._known.get(block)
        if known is not None:
            return known
        try:
            head = _judge(self._decoder.decode(block, raw=True))
        except HPACKError:  # its text may quote the whole block
            raise BlockError("a header block cannot be decoded") from None
        if self._decoder.header_table_size == 0:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[block] = head
        return head


_MALFORMED = Head("", 0)


def _judge(fields: Iterable[tuple[bytes, bytes]]) -> Head:
    pseudo: dict[bytes, bytes] = {}
    content_type = b""
    regular = False
    for name, value in fields:
        if name.startswith(b":"):
            if regular or name in pseudo or name not in _PSEUDO:
                return _MALFORMED
            pseudo[name] = value
        elif name != name.lower() or name in _CONNECTION or (name == b"te" and value != b"trailers"):
            return _MALFORMED
        else:
            regular = True
            if name == b"content-type":
                content_type = value
    path = pseudo.get(b":path", b"")
    if not (path and pseudo.get(b":method") and pseudo.get(b":scheme")) or not path.isascii():
        return _MALFORMED
    if pseudo[b":method"] != b"POST":
        return Head("", 405)
    if content_type.partition(b";")[0].partition(b"+")[0] != b"application/grpc":
        return Head("", 415)
    return Head(path.decode())


# --- blocks of an answer: literals without indexing (RFC 7541, section 6.2.2), the names from the static table ---


def _literal(name: bytes, value: bytes) -> bytes:
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


_STATUS_200 = b"\x88"
_CONTENT_TYPE = b"\x0f\x10\x10application/grpc"
ANSWER = _STATUS_200 + _CONTENT_TYPE
OK = _literal(b"grpc-status", b"0")


def status_block(status: int) -> bytes:
    """Only `:status`, for what is not gRPC."""
    return b"\x08\x03%d" % status


def failure_block(status: int, message: str) -> bytes:
    """A gRPC answer that is its trailers alone; `message` is short and plain ASCII."""
    return ANSWER + _literal(b"grpc-status", b"%d" % status) + _literal(b"grpc-message", message.encode())
