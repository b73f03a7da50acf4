"""bench/kv_cache.py: paged blocks, chained hashes, LRU."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.kv_cache import KVCache, block_hashes

TEXTS = st.lists(st.sampled_from((b"aaaaaaaa", b"bbbbbbbb", b"cc")), max_size=6).map(b"".join)


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_hashes_agree_exactly_as_far_as_the_texts_do(one: bytes, other: bytes) -> None:
    """Block i of two texts has one hash if and only if everything up to its end is equal."""
    hashes, others = block_hashes(one, 2), block_hashes(other, 2)
    assert len(hashes) == len(one) // 8
    for index, (a, b) in enumerate(zip(hashes, others, strict=False)):
        end = (index + 1) * 8
        assert (a == b) == (one[:end] == other[:end])


def test_a_seed_separates_everything() -> None:
    """A cache salt or adapter shares no block with another one."""
    text = b"x" * 64
    assert not set(block_hashes(text, 4, seed="one")) & set(block_hashes(text, 4, seed="two"))


def test_idle_content_is_kept_until_its_room_is_needed_oldest_first() -> None:
    """Blocks of a finished sequence stay findable; taking room evicts the least recently used, tail before prefix."""
    cache = KVCache(5)
    assert cache.take(2)
    cache.publish((1, 2))
    cache.release((1, 2), 0)
    assert cache.take(1)
    cache.publish((3,))
    cache.release((3,), 0)
    assert cache.usage == 0.0
    assert cache.take(2)  # one blank block is left, so one idle one has to go
    assert (cache.match((1, 2), 9), cache.match((3,), 9)) == (1, 1)
    assert cache.take(1)
    assert (cache.match((1,), 9), cache.match((3,), 9)) == (0, 1)


def test_taking_too_much_changes_nothing() -> None:
    """A refused take evicts no content and leaves every block free."""
    cache = KVCache(4)
    assert cache.take(1)
    cache.publish((7,))
    cache.release((7,), 0)
    assert not cache.take(4)
    assert (cache.free, cache.match((7,), 9)) == (3, 1)


def test_a_block_published_twice_is_held_once() -> None:
    """Two sequences that computed the same content share one block, which is free when both have let go."""
    cache = KVCache(4)
    for _ in range(2):
        assert cache.take(1)
        cache.publish((7,))
    assert cache.free == 2
    cache.release((7,), 0)
    assert cache.free == 2
    cache.release((7,), 0)
    assert cache.free == 3


def test_a_cache_without_room_is_refused() -> None:
    """One block is the null block alone: the constructor says so."""
    with pytest.raises(ValueError, match="null block"):
        KVCache(1)
