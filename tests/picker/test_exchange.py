"""picker/exchange.py: what pickers tell one another, and what of it is believed."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from picker.cost import HEARD_BACKLOG, PodLoad, Pool, PoolLoad
from picker.exchange import (
    MAX_BATCH,
    MAX_PROMPT,
    MAX_REQUESTS,
    MAX_TOKENS,
    WORK,
    WORK_AT_ONCE,
    WORK_PLACED,
    Heard,
    Inbox,
    Loss,
    Outbox,
)
from picker.memory import SILENT, WORD, Memory, keys, read_keys, write_keys
from picker.pick import Picker
from tests.picker.test_cost import MANY, path, pods, send
from xds.relay import MAX_BATCH as RELAYED
from xds.wire import exchange_pb2 as pb

POOL = "pool/default/qwen"
A, B = "default/a", "default/b"


def message(*batches: bytes, others: int = 1) -> bytes:
    return pb.Heard(others=others, batches=batches).SerializeToString()


def placed(**fields: Any) -> bytes:
    """A batch of one pod."""
    return pb.Batch(placed=[{"pool": POOL, "hash_key": A, "requests": 1} | fields]).SerializeToString()


class Side:
    """A picker with its end of the exchange."""

    def __init__(self, pickers: int = 1) -> None:
        self.memory = Memory()
        self.outbox = Outbox()
        self.picker = Picker(lambda: 0.0, pickers, self.memory, self.outbox.tell)
        self.inbox = Inbox(self.picker)
        self.report(0.0)

    def report(self, now: float, busy: float = 0.0) -> None:
        """`busy` requests run on B."""
        loads = (PodLoad(name, kv_tokens=500_000, start_time=1.0, running=busy * (name == B)) for name in (A, B))
        self.picker.update(PoolLoad(POOL, tuple(loads)), now)

    def pick(self, text: str, now: float) -> str | None:
        body = json.dumps({"model": "m", "prompt": text}).encode()
        return self.picker.pick(POOL, body, now).pod

    def hear(self, *batches: bytes, now: float = 1.0) -> Heard:
        self.memory.note_peers(1, now)
        return self.inbox.hear(message(*batches), now)


LONG = "a prompt of several chunks " * 400


def test_what_one_sends_the_other_finds() -> None:
    """The pod where the prompt is, though a request runs there; without the exchange the other begins it elsewhere."""
    one, two, apart = Side(), Side(), Side()
    one.memory.note_peers(1, 1.0)
    loads = (PodLoad(A, kv_tokens=500_000, start_time=1.0, running=9.0), PodLoad(B, kv_tokens=500_000, start_time=1.0))
    one.picker.update(PoolLoad(POOL, loads), 1.0)
    assert one.pick(LONG, 1.0) == B
    assert two.hear(one.outbox.take()) == Heard(1, 1, {}, "")
    for side in (two, apart):
        side.report(2.0, busy=1.0)
    assert two.pick(LONG + "and more", 2.0) == B
    assert apart.pick(LONG + "and more", 2.0) == A
    assert one.outbox.take() == b""


def test_what_others_send_is_a_load() -> None:
    """A pod another picker has just filled is avoided, also for what nobody has sent anywhere."""
    one, two = Side(), Side()
    one.memory.note_peers(1, 1.0)
    taken = one.pick(LONG, 1.0)
    two.hear(one.outbox.take())
    assert two.pick("something else entirely " * 200, 1.0) not in (None, taken)
    assert two.picker.chunks > one.picker.chunks > 0


def test_nobody_is_told_while_nobody_hears() -> None:
    """Alone, and when the others are silent, a pick leaves nothing to be told."""
    one = Side()
    one.pick(LONG, 1.0)
    assert one.outbox.take() == b""
    one.memory.note_peers(2, 1.0)
    one.pick(LONG + "2", 1.0 + SILENT / 1000 + 0.01)
    assert one.outbox.take() == b""
    one.memory.note_peers(2, 5.0)
    one.pick(LONG + "3", 5.0)
    assert one.outbox.take() != b""


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.floats(0, 1), st.booleans()), min_size=1, max_size=40)
)
def test_pickers_that_hear_one_another_pick_as_one(events: list[tuple[int, int, float, bool]]) -> None:
    """Whoever of three gets which request: each pick is the one a lone picker would have made, load reports between."""
    alone, random = Pool(Random(1).random), Random(1)
    memories, outboxes = [Memory() for _ in range(3)], [Outbox() for _ in range(3)]
    pools = [
        Pool(random.random, 1, memory, "p", outbox.tell) for memory, outbox in zip(memories, outboxes, strict=True)
    ]
    now = 0.0
    report = PoolLoad("p", tuple(pods("abcd")))
    for each in (alone, *pools):
        each.update(report, MANY, now)
    for turn, (family, chunks, pause, reported) in enumerate(events):
        now += pause
        for memory in memories:
            memory.note_peers(2, now)
        if reported:
            report = PoolLoad("p", tuple(pods("abcd", running=float(turn), prefill_rate=1000.0 * (turn + 1))))
            for each in (alone, *pools):
                each.update(report, MANY, now)
        asked, chosen = path(str(family), chunks), (turn * 7 + family) % 3
        assert send(pools[chosen], asked, now) == send(alone, asked, now)
        (wire,) = pb.Batch.FromString(outboxes[chosen].take()).placed
        inboxes = [Inbox(_Only(pool)) for index, pool in enumerate(pools) if index != chosen]  # type: ignore[arg-type]
        batch = pb.Batch(placed=[wire]).SerializeToString()
        assert [inbox.hear(message(batch), now).requests for inbox in inboxes] == [1, 1]


class _Only:
    """A picker of one pool."""

    def __init__(self, pool: Pool) -> None:
        self.hear = pool.hear


# --- a picker that hears nobody ---


def test_silent_others_are_independent_pickers() -> None:
    """Whoever hears nobody any more picks as one that is told how many there are, and never was in an exchange."""
    lost, told, alone, heard = Side(), Side(pickers=3), Side(), Side()
    lost.memory.note_peers(2, 0.0)
    heard.memory.note_peers(2, 100.0)
    picks = []
    for side in (lost, told, alone, heard):
        side.report(100.0, busy=9.0)
        picks.append([side.pick(f"{number % 7} " * 1500, 100.0) for number in range(40)])
    assert picks[0] == picks[1] != picks[2] == picks[3]


def test_some_that_are_not_heard_count_in_proportion() -> None:
    """Of four pickers two are heard: each send of the three counts four thirds, and twice with one of them."""
    for heard, n in ((0, 4.0), (1, 2.0), (3, 1.0), (9, 1.0)):
        memory = Memory()
        memory.note_peers(heard, 0.0)
        pool = Pool(lambda: 0.0, 4, memory)
        pool.update(PoolLoad("p", tuple(pods("ab"))), MANY, 0.0)
        send(pool, path("x", 1))
        seen = [pod.busyness(max(4, 1 + heard) / (1 + heard))[0] for pod in pool._pods.values()]
        assert sorted(seen) == [0.0, n]


# --- what comes in ---


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"\xff\xff", "rror"),
        (placed(tokens=1, uncached=2), "1 requests of 1 tokens, 2 of them uncached, with 0 prompts"),
        (placed(requests=MAX_REQUESTS + 1), "10001 requests"),
        (placed(tokens=MAX_TOKENS + 1), "4294967297 tokens"),
        (placed(requests=0, prompts=[b"8 bytes."]), "0 requests of 0 tokens, 0 of them uncached, with 1 prompts"),
        (placed(prompts=[b"nine byte"]), "a prompt of 9 bytes"),
        (placed(prompts=[bytes(MAX_PROMPT + WORD)]), "a prompt of 2064 bytes"),
    ],
)
def test_what_can_not_be_true_is_refused(bad: bytes, reason: str) -> None:
    """And the batches beside it count; that pod has seen nothing of it."""
    side = Side()
    heard = side.hear(bad, placed(hash_key=B, tokens=5))
    assert (heard.requests, heard.lost) == (1, {Loss.REFUSED: 1})
    assert reason in heard.refusal
    assert side.picker.chunks == 0


def test_unknown_names_are_ignored() -> None:
    """A pool or a pod that is not here grows nothing; a message that is none says so."""
    side = Side()
    heard = side.hear(*(placed(pool=name) for name in ("", "nobody's", "\N{SNOWMAN}")), placed(hash_key="c"), placed())
    assert (heard.requests, heard.lost) == (1, {Loss.UNKNOWN: 4})
    assert list(side.picker.read_at()) == [POOL]
    with pytest.raises(DecodeError):
        side.inbox.hear(b"\xff", 1.0)


def test_what_is_noted_in_a_second_is_bounded() -> None:
    """Chunks and names alike: what is beyond it is lost, and later there is room again."""
    side = Side()
    prompts = [write_keys(keys(path(str(number), 200))) for number in range(20)]
    flood = placed(requests=20, prompts=prompts)
    noted = [side.hear(flood, now=1.0).requests for _ in range(5)]
    assert noted == [20, 20, 0, 0, 0]
    assert side.hear(flood, now=1.0 + WORK_AT_ONCE / WORK).requests == 20
    empty = pb.Batch(placed=[pb.Placed()] * 30_000).SerializeToString()
    names = side.hear(empty, empty, empty, now=10.0)
    assert names.lost == {Loss.UNKNOWN: WORK_AT_ONCE // WORK_PLACED, Loss.EXCESS: 3}


def test_a_lie_about_load_ends() -> None:
    """Whatever is told of a pod, it is avoided for HEARD_BACKLOG at most once a load report says that it is idle."""
    side = Side()
    lie = placed(requests=MAX_REQUESTS, tokens=MAX_TOKENS, uncached=MAX_TOKENS)
    assert side.hear(*[lie] * 100).requests == 100 * MAX_REQUESTS
    for now, picked in ((1.0, {B}), (1.0 + HEARD_BACKLOG, {A, B})):
        side.report(now)
        assert {side.pick(f"{number} at {now} " * 400, now) for number in range(9)} == picked


# --- what goes out ---


def test_a_batch_sums_up_and_is_bounded() -> None:
    """Requests of a pod are one entry; what does not fit is counted, and is no matter for the next batch."""
    outbox = Outbox()
    chunks = keys(path("x", 100))
    for _ in range(200):
        outbox.tell(POOL, A, 1000, 800, chunks)
    batch = outbox.take()
    (told,) = pb.Batch.FromString(batch).placed
    assert (told.pool, told.hash_key, told.requests, told.tokens, told.uncached) == (POOL, A, 200, 200_000, 160_000)
    assert (len(told.prompts), outbox.full) == (74, 126)
    assert set(told.prompts) == {write_keys(chunks)}
    assert len(batch) <= MAX_BATCH < RELAYED
    for number in range(3_000):
        outbox.tell(POOL, f"default/{number}", 1, 1, [])
    assert len(outbox.take()) <= MAX_BATCH
    assert outbox.full > 126
    outbox.tell(POOL, A, 1, 0, [])
    assert len(pb.Batch.FromString(outbox.take()).placed) == 1


def test_hashes_are_found_again() -> None:
    """What `write_keys` makes of keys, `read_keys` makes keys of: the same ones."""
    chunks = keys(path("x", 9))
    assert read_keys(write_keys(chunks)) == chunks
    assert len(write_keys(chunks)) == 9 * WORD
