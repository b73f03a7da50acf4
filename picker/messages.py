"""A gRPC message that comes in pieces, and how much of such may be held. Pure.

A message is one byte that says whether it is compressed, four with its length, and its bytes; DATA frames cut it
anywhere (https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

MESSAGE_HEAD = Struct(">BI")
# gRPC statuses (https://grpc.github.io/grpc/core/md_doc_statuscodes.html)
NOT_FOUND, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL = 5, 8, 12, 13


class MessageError(Exception):
    """This message is not accepted: the gRPC status to answer, and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass(slots=True)
class Budget:
    """Bytes that may be held: of one connection, within those of all. Mutable."""

    limit: int
    whole: Budget | None = None
    used: int = 0

    def take(self, size: int) -> bool:
        """Count `size` bytes more; whether they are within the limits."""
        self.used += size
        within = self.whole.take(size) if self.whole is not None else True
        return self.used <= self.limit and within

    def give(self, size: int) -> None:
        """So many bytes are no longer held."""
        self.used -= size
        if self.whole is not None:
            self.whole.give(size)


class Pieces:
    """Those of one message. Mutable."""

    __slots__ = ("_budget", "_needed", "_parts", "size")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._parts: list[bytes] = []  # without the message's head, once that is known
        self._needed = -1  # bytes of the message; -1 until its head is there
        self.size = 0  # bytes held

    def add(self, piece: bytes, limit: int) -> bytes | None:
        """The message, when this completes it; raises MessageError, also when it is longer than `limit`."""
        if self._needed < 0:
            piece = b"".join((*self._parts, piece))
            self.drop()
            if len(piece) >= MESSAGE_HEAD.size:
                compressed, self._needed = MESSAGE_HEAD.unpack_from(piece)
                piece = piece[MESSAGE_HEAD.size :]
                if compressed:
                    raise MessageError(UNIMPLEMENTED, "compressed messages are not understood")
                if self._needed > limit:
                    raise MessageError(RESOURCE_EXHAUSTED, "the message is too large")
        self._parts.append(piece)
        self.size += len(piece)
        within = self._budget.take(len(piece))
        if 0 <= self._needed <= self.size:
            whole = b"".join(self._parts)
            self.drop()
            return whole[: self._needed]
        if not within:
            raise MessageError(RESOURCE_EXHAUSTED, "too many messages are incomplete")
        return None

    def drop(self) -> None:
        """Give back what is held."""
        self._budget.give(self.size)
        self._parts, self.size = [], 0
