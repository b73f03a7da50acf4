"""picker/prefix.py: chained chunk hashes."""

import struct

import mmh3
from hypothesis import given
from hypothesis import strategies as st

from picker.prefix import CHUNK, MAX_CHUNKS, chunk_hashes
from picker.prompt import Prompt

TEXTS = st.tuples(st.binary(min_size=1, max_size=40), st.integers(0, 4 * CHUNK)).map(lambda t: (t[0] * CHUNK)[: t[1]])
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def test_the_hashes_are_the_specified_ones() -> None:
    """Written out a second time with the tuple form of the hash, and pinned: other implementations rely on them."""

    def digest(value: bytes) -> bytes:
        return struct.pack("<Q", mmh3.hash64(value, seed=0, x64arch=True, signed=False)[0])

    text = bytes(range(256)) * 17  # 4,352 bytes: two chunks and a rest
    root = digest(digest(b"qwen") + b"salt")
    first = digest(root + text[:2048])
    second = digest(first + text[2048:4096])
    assert chunk_hashes(Prompt("qwen", "salt", text)) == [first, second]
    assert [first.hex(), second.hex()] == ["a92cb2f9485e9484", "e70db8b4bf26cf3a"]


@given(TEXTS, TEXTS, NAMES, NAMES)
def test_a_longer_text_contains_every_chunk(text: bytes, more: bytes, model: str, salt: str) -> None:
    """Turn n+1 has all of turn n's hashes, in place, whatever was left over after turn n's last full chunk."""
    before = chunk_hashes(Prompt(model, salt, text))
    assert len(before) == len(text) // CHUNK
    assert chunk_hashes(Prompt(model, salt, text + more))[: len(before)] == before


@given(TEXTS, st.tuples(NAMES, NAMES), st.tuples(NAMES, NAMES))
def test_model_and_salt_keep_caches_apart(text: bytes, one: tuple[str, str], other: tuple[str, str]) -> None:
    """Another model or cache_salt shares no hash, also when the two joined read the same."""
    shared = set(chunk_hashes(Prompt(*one, text))) & set(chunk_hashes(Prompt(*other, text)))
    assert not shared or one == other


def test_a_changed_first_byte_changes_every_hash() -> None:
    """Hashes are chained: an equal chunk behind a different one is not the same chunk."""
    one, other = (chunk_hashes(Prompt("", "", first + b"x" * 3 * CHUNK)) for first in (b"a", b"b"))
    assert len(one) == 3
    assert not set(one) & set(other)


def test_a_long_text_is_hashed_to_the_limit() -> None:
    """A text of many megabytes has as many hashes as a full context."""
    assert len(chunk_hashes(Prompt("", "", bytes(CHUNK * (MAX_CHUNKS + 100))))) == MAX_CHUNKS
    assert chunk_hashes(Prompt("", "", bytes(CHUNK - 1))) == []
