"""xds/relay.py: what one picker tells reaches every other one, or gives way."""

from __future__ import annotations

import pytest

from xds.relay import MAX_BATCH, MAX_MEMBERS, MAX_QUEUE, MAX_QUEUES, Member, Relay, RelayError
from xds.wire.exchange_pb2 import Heard


def told(relay: Relay, member: Member) -> tuple[int, list[bytes]]:
    """Other pickers, and batches, of the next message to this stream."""
    message = Heard.FromString(relay.take(member))
    return message.others, list(message.batches)


def test_all_others_are_told_once() -> None:
    """In order, from all workers of a picker; the picker itself and the workers that do not listen are told nothing."""
    relay = Relay()
    one, deaf = relay.join(1), relay.join(1, deaf=True)
    two, three = relay.join(2), relay.join(3)
    assert relay.say(one, b"a") == [two, three]
    assert relay.say(deaf, b"b") == [two, three]
    assert relay.say(two, b"c") == [one, three]
    assert told(relay, one) == (2, [b"c"])
    assert told(relay, deaf) == (2, [])
    assert told(relay, two) == (2, [b"a", b"b"])
    assert told(relay, three) == (2, [b"a", b"b", b"c"])
    assert told(relay, three) == (2, [])
    relay.leave(two)
    assert told(relay, three) == (1, [])
    assert relay.pickers == 2
    assert relay.dropped == 0


@pytest.mark.parametrize(("listeners", "room"), [(1, MAX_QUEUE), (20, MAX_QUEUES // 20)])
def test_who_does_not_read_misses_the_oldest(listeners: int, room: int) -> None:
    """What waits is bounded for each and for all; one who reads misses nothing of it."""
    relay = Relay()
    speaker, reader, *_ = relay.join(0), *(relay.join(number) for number in range(1, listeners + 1))
    batches = [bytes([number]) * 10_000 for number in range(60)]
    kept = room // 10_000
    for batch in batches[:kept]:
        relay.say(speaker, batch)
    assert relay.dropped == 0
    assert told(relay, reader) == (listeners, batches[:kept])
    for batch in batches:
        relay.say(speaker, batch)
    assert told(relay, reader)[1] == batches[-kept:]
    assert relay.dropped == listeners * (60 - kept) + (listeners - 1) * kept


def test_what_is_asked_for_is_bounded() -> None:
    """A batch that is too long is handed to nobody; of streams there are so many, until one is given up."""
    relay = Relay()
    first = relay.join(0)
    other = relay.join(1)
    with pytest.raises(RelayError, match="a batch of 65537 bytes"):
        relay.say(first, bytes(MAX_BATCH + 1))
    assert told(relay, other) == (1, [])
    assert relay.say(first, bytes(MAX_BATCH)) == [other]
    for _ in range(MAX_MEMBERS - 2):
        relay.join(2)
    with pytest.raises(RelayError, match="256 streams"):
        relay.join(3)
    relay.leave(other)
    relay.join(3)
    assert relay.pickers == 3
