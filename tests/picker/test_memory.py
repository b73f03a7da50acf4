"""picker/memory.py: what pods have been sent, shared without a lock."""

from __future__ import annotations

from collections import OrderedDict
from random import Random
from typing import Any

import mmh3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.memory import (
    EPOCH,
    GENERATIONS,
    MAX_PEERS,
    ROWS,
    SILENT,
    SIZE,
    TAG_BITS,
    TOKEN_BITS,
    UNUSED,
    WAYS,
    Key,
    Memory,
    PodMemory,
    keys,
)

START = 1.7e9  # unix seconds


def prompt(name: object, chunks: int) -> list[Key]:
    """Of a prompt of `chunks` chunks; prompts share as many as their names share letters."""
    whole = str(name)
    names = [whole[: i + 1] if i < len(whole) else f"{whole}-{i}" for i in range(chunks)]
    return keys([mmh3.mmh3_x64_128_digest(each.encode())[:8] for each in names])


def unlike(name: object, chunks: int) -> list[Key]:
    """Of a prompt that shares nothing with others."""
    return keys([mmh3.mmh3_x64_128_digest(f"{name}/{i}".encode())[:8] for i in range(chunks)])


def pod(memory: Memory, name: str = "pool\0a", capacity: int = 1000, now: float = 0.0) -> PodMemory:
    made = memory.pod(name, now)
    made.report("10.0.0.1", START, capacity, now)
    return made


# --- chunks ---


def test_what_was_sent_is_there() -> None:
    """The longest prefix of another prompt that this pod has; a pod that was sent nothing has none."""
    memory = Memory()
    one, other = pod(memory), pod(memory, "pool\0b")
    one.touch(prompt("abcdef", 6), 1.0)
    lengths = {name: one.longest_prefix(prompt(name, 6)) for name in ("abcdef", "abcdxy", "axyzzy", "xyzxyz")}
    assert lengths == {"abcdef": 6, "abcdxy": 4, "axyzzy": 1, "xyzxyz": 0}
    assert one.longest_prefix([]) == 0
    assert one.longest_prefix(prompt("abcdef", 40)) == 6
    assert other.longest_prefix(prompt("abcdef", 6)) == 0
    assert (len(one), len(other)) == (6, 0)


def test_the_oldest_is_forgotten_first_and_in_time() -> None:
    """New prompts displace what was not touched for a capacity's worth of them, and nothing sooner than 15/16 of it."""
    one = pod(Memory(), capacity=1000)
    for turn in range(300):
        one.touch(unlike(turn, 10), float(turn))
    held = [one.longest_prefix(unlike(turn, 10)) for turn in range(300)]
    assert held[:200] == [0] * 200
    assert held[-93:] == [10] * 93
    assert len(one) == 1000


def test_what_is_used_again_stays() -> None:
    """However much comes in between, as long as it is less than the cache."""
    one = pod(Memory(), capacity=1000)
    for turn in range(300):
        one.touch(unlike(turn, 20), float(turn))
        if turn % 30 == 0:
            one.touch(prompt("again", 50), turn + 0.5)
        assert one.longest_prefix(prompt("again", 50)) == 50


def test_the_end_of_a_prompt_is_forgotten_before_its_beginning() -> None:
    """As vLLM frees blocks: what is left of an old prompt is still usable as a prefix."""
    one = pod(Memory(), capacity=320)
    one.touch(prompt("old", 200), 10.0)
    lengths = []
    for turn in range(700):  # quick ones, so that a prompt's chunks fall into several generations
        one.touch(unlike(turn, 1), 10.0 + turn / 800)
        lengths.append(one.longest_prefix(prompt("old", 200)))
    assert lengths == sorted(lengths, reverse=True)
    assert (lengths[0], lengths[-1]) == (200, 0)
    assert len(set(lengths)) > 4


@pytest.mark.parametrize(("capacity", "families"), [(300, 40), (1000, 100), (3000, 100)])
def test_it_is_nearly_an_lru(capacity: int, families: int) -> None:
    """Against one: the same answer within a tenth of a prompt in 95 of 100 cases, where some prompts are popular."""
    rng = Random(1)
    one, exact = pod(Memory(), capacity=capacity), OrderedDict[Key, None]()
    lengths = [rng.randint(5, 60) for _ in range(families)]
    wrong = 0
    for turn in range(4000):
        family = int(rng.random() ** 2 * families)
        asked = prompt(f"{family:04}", lengths[family])
        held = 0
        while held < len(asked) and asked[held] in exact:
            held += 1
        wrong += abs(one.longest_prefix(asked) - held) > len(asked) / 10
        one.touch(asked, turn / 10)
        for chunk in reversed(asked):
            exact[chunk] = None
            exact.move_to_end(chunk)
        while len(exact) > capacity:
            exact.popitem(last=False)
    assert wrong < 200


def test_a_smaller_cache_forgets_with_what_comes() -> None:
    """And a tiny one does not take long about it."""
    one = pod(Memory(), capacity=1 << 20)
    one.touch(prompt("old", 250), 1.0)
    one.report("10.0.0.1", START, 1, 2.0)
    one.touch(prompt("new", 1), 3.0)
    assert one.longest_prefix(prompt("old", 250)) == 0
    assert one.longest_prefix(prompt("new", 1)) == 1
    assert len(one) == 1


def test_a_full_table_loses_the_longest_untouched() -> None:
    """Its size is fixed, whatever comes: in a set that is full the oldest chunk goes, and a lookup never misleads."""
    one = pod(Memory(bytearray(SIZE)), capacity=1 << 20)
    same = [(bytes([turn, 1, 1]), 64) for turn in range(WAYS + 1)]  # chunks of one set
    for turn, chunk in enumerate(same):
        one.touch([chunk], float(turn))
    assert [one.longest_prefix([chunk]) for chunk in same] == [0] + [1] * WAYS


def test_a_tag_among_others_bytes_is_not_found() -> None:
    """Only where a word has its tag."""
    one = pod(Memory())
    one.touch([(b"abc", 64)], 1.0)
    stamp = int(1.0 * 1000) + EPOCH
    inside = (int.from_bytes(b"abc", "little") | stamp << TAG_BITS).to_bytes(8, "little")[1:4]
    assert one.longest_prefix([(inside, 64)]) == 0
    assert one.longest_prefix([(b"abc", 64)]) == 1


# --- pods ---


@pytest.mark.parametrize(
    ("address", "start", "forgets"),
    [
        ("10.0.0.1", START, False),
        ("10.0.0.1", 0.0, False),
        ("10.0.0.1", START + 9, True),
        ("10.0.0.2", START, True),
        ("10.0.0.2", 0.0, True),
    ],
)
def test_a_restart_empties(address: str, start: float, forgets: bool) -> None:
    """Another start time or address; an unknown start time says nothing, and what was known before stays known."""
    memory = Memory()
    one = pod(memory)
    one.touch(prompt("abc", 5), 2.0)
    one.busy_until = 7.0
    assert one.report(address, start, 100, 3.0) is forgets
    assert (one.longest_prefix(prompt("abc", 5)), one.busy_until) == ((0, 0.0) if forgets else (5, 7.0))
    assert not one.report(address, start, 100, 4.0)
    assert one.report(address, START + 99, 100, 5.0)


def test_a_pod_that_was_away() -> None:
    """Back soon it has its row; after a while it has nothing, since nobody watched what became of it."""
    memory = Memory()
    pod(memory).touch(prompt("abc", 5), 1.0)
    assert pod(memory, now=30.0).longest_prefix(prompt("abc", 5)) == 5
    assert pod(memory, now=31.0 + UNUSED / 1000).longest_prefix(prompt("abc", 5)) == 0


def test_rows_are_bounded_and_given_to_others() -> None:
    """A thousand pods have a row each; when they have gone, others have; more than there are rows still work."""
    memory = Memory()
    first = [pod(memory, f"first\0{index}") for index in range(1000)]
    assert len({each._row for each in first}) == 1000
    assert all(each.mine for each in first)
    later = 1.0 + UNUSED / 1000
    second = [pod(memory, f"second\0{index}", now=later) for index in range(ROWS)]
    assert sum(each.mine for each in second) > 0.9 * ROWS
    for each in second:
        each.touch(prompt("abc", 3), later)
    assert memory.pod("a third", later + 1).longest_prefix(prompt("abc", 3)) == 0


# --- sharing ---


def test_two_processes_are_one() -> None:
    """On one buffer: what one sends the other finds, a third that starts later as well, and a restart counts once."""
    buffer = bytearray(SIZE)
    one, other = pod(Memory(buffer)), pod(Memory(buffer))
    one.touch(prompt("abc", 5), 1.0)
    one.send(700)
    other.send(50)
    other.busy_until = 3.5
    third = pod(Memory(buffer), now=2.0)
    for each in (one, other, third):
        assert each.longest_prefix(prompt("abc", 5)) == 5
        assert (each.sent, each.busy_until) == ((2 << TOKEN_BITS) + 750, 3.5)
    assert one.report("10.0.0.1", START + 1, 1000, 4.0)
    third.touch(prompt("abc", 5), 4.1)
    assert not other.report("10.0.0.1", START + 1, 1000, 4.2)
    assert one.longest_prefix(prompt("abc", 5)) == 5


def test_others_are_heard_until_they_are_silent() -> None:
    """By all processes; then it is still known how many they were. One word, whatever it is told."""
    buffer = bytearray(SIZE)
    one, other = Memory(buffer), Memory(buffer)
    assert one.peers(0.0) == (0, 0)
    one.note_peers(3, 10.0)
    assert other.peers(10.0 + SILENT / 1000) == (3, 3)
    assert other.peers(10.002 + SILENT / 1000) == (3, 0)
    other.note_peers(MAX_PEERS + 5, 20.0)
    assert one.peers(20.0) == (MAX_PEERS, MAX_PEERS)
    one.note_peers(0, 21.0)
    assert one.peers(99.0) == (0, 0)


def test_what_was_sent_wraps() -> None:
    """A day's requests and more: differences stay right."""
    one = pod(Memory())
    before = one.sent
    for _ in range(20):
        one.send((1 << TOKEN_BITS) - 1)
    one._words[one._row + 4] = (1 << 64) - 1
    one.send(5)
    assert one.sent == (1 << TOKEN_BITS) + 4
    assert before == 0


class Dying:
    """Words whose owner is killed before its store number `left`."""

    def __init__(self, words: Any, left: int) -> None:
        self._words, self._left = words, left

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, index: Any) -> Any:
        return self._words[index]

    def __setitem__(self, index: int, value: int | float) -> None:
        if not self._left:
            raise InterruptedError
        self._left -= 1
        self._words[index] = value


@settings(max_examples=80)
@given(st.integers(0, 150), st.booleans())
def test_killed_at_any_instruction(left: int, claimed: bool) -> None:
    """Whichever store was the last: others, and the one that takes its place, go on, and find whole prefixes."""
    buffer = bytearray(SIZE)
    if claimed:
        pod(Memory(buffer)).touch(prompt("before", 8), 1.0)
    memory = Memory(buffer)
    memory.words, memory.floats = Dying(memory.words, left), memory.floats  # type: ignore[assignment]
    try:
        killed = memory.pod("pool\0a", 2.0)
        killed.report("10.0.0.2", START + 1, 40, 2.0)
        for turn in range(5):
            killed.touch(prompt(f"{turn}killed", 9), 3.0 + turn)
            killed.send(10)
    except InterruptedError:
        pass
    after = Memory(buffer).pod("pool\0a", 9.0)
    after.report("10.0.0.2", START + 1, 40, 9.0)
    assert after.mine
    assert 0 <= after.longest_prefix(prompt("before", 8)) <= 8
    for turn in range(5):
        after.touch(prompt(f"{turn}after", 9), 10.0 + turn)
        assert after.longest_prefix(prompt(f"{turn}after", 9)) == 9
    assert after.longest_prefix(prompt("before", 8)) == 0
    assert len(after) <= 40
    after.send(10)
    assert after.sent >> TOKEN_BITS >= 1


@settings(max_examples=30)
@given(st.integers(0, 1 << 32))
def test_nonsense_in_memory_raises_nothing(seed: int) -> None:
    """Whatever a stranger has written there."""
    rng = Random(seed)
    buffer = bytearray(SIZE)
    memory = Memory(buffer)
    first = memory.pod("pool\0a", 0.0)
    row = first._row * 8
    buffer[row + 32 : row + 512] = rng.randbytes(480)
    start = memory.table * 8
    buffer[start : start + (1 << 16)] = rng.randbytes(1 << 16)
    one = memory.pod("pool\0a", 1.0)
    one.report("10.0.0.1", START, 40, 1.0)
    for turn in range(3 * GENERATIONS):
        one.touch(prompt(turn, 3), 2.0 + turn)
        one.send(1 << 50)
        one.longest_prefix(prompt(turn, 5))
    assert len(one) <= 40
