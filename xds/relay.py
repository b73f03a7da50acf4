"""Hands what each picker tells to every other one: bytes that are not looked into (pure).

    a picker's batch --say--> the queue of each other picker --take--> one message with all that waits there

Queues are bounded, and the oldest batch gives way: a picker that does not read misses batches, and holds up nobody. One
message to a picker has all that came within GAP, so that many pickers are not many messages each.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from xds.wire import exchange_pb2 as pb

GAP = 0.05  # seconds between messages of a picker, and to it: it says something each 0.1 s at most
HEARTBEAT = 1.0  # seconds between messages to a picker when there is nothing to tell
MAX_BATCH = 65_536  # bytes
MAX_QUEUE = 262_144  # bytes that wait for one picker
MAX_QUEUES = 1 << 20  # bytes that wait for all of them: so 20 MB in a second at the most
MAX_MEMBERS = 256  # streams


class RelayError(Exception):
    """A picker asks for more than there is for one; the text says what."""


@dataclass(eq=False, slots=True)
class Member:
    """One stream of a picker. Mutable."""

    picker: int
    deaf: bool  # it only speaks
    queue: deque[bytes] = field(default_factory=deque)
    waiting: int = 0  # bytes in the queue


class Relay:
    """The streams of all pickers. Mutable."""

    def __init__(self) -> None:
        self._members: dict[Member, None] = {}  # in the order they came
        self.dropped = 0  # batches that gave way, since the start

    @property
    def pickers(self) -> int:
        """Pickers that have a stream, or several."""
        return len({member.picker for member in self._members})

    def join(self, picker: int, *, deaf: bool = False) -> Member:
        """A stream more of this picker. RelayError: there are too many."""
        if len(self._members) >= MAX_MEMBERS:
            raise RelayError(f"{MAX_MEMBERS} streams are open already")
        member = Member(picker, deaf)
        self._members[member] = None
        return member

    def leave(self, member: Member) -> None:
        del self._members[member]

    def say(self, member: Member, batch: bytes) -> list[Member]:
        """Take a batch; those that have something to be told now. RelayError: it is too long."""
        if len(batch) > MAX_BATCH:
            raise RelayError(f"a batch of {len(batch)} bytes")
        others = [each for each in self._members if each.picker != member.picker and not each.deaf]
        room = min(MAX_QUEUE, MAX_QUEUES // max(1, len(others)))
        for other in others:
            other.queue.append(batch)
            other.waiting += len(batch)
            while other.waiting > room:
                other.waiting -= len(other.queue.popleft())
                self.dropped += 1
        return others

    def take(self, member: Member) -> bytes:
        """The next message for this stream."""
        message = pb.Heard(others=self.pickers - 1, batches=member.queue).SerializeToString()
        member.queue.clear()
        member.waiting = 0
        return message
