"""picker/prefix.py: chained chunk hashes, and the hint's."""

import json
import struct
from pathlib import Path
from typing import Any

import mmh3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.prefix import CHUNK, MAX_CHUNKS, chunk_hashes, hint_hash
from picker.prompt import Prompt, read_prompt

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_bytes())["vectors"]

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


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_vectors(vector: dict[str, Any]) -> None:
    """Whole requests and their hashes, which other implementations are to give: a change of one breaks every picker's
    agreement with the others."""
    prompt = read_prompt(vector["body"].replace("%FILL%", "0123456789abcdef" * 128).encode())
    assert prompt is not None
    assert len(prompt.text) == vector["text_bytes"]
    assert [each.hex() for each in chunk_hashes(prompt)] == vector["hashes"]
    hint = hint_hash(prompt, vector["session"])
    assert (hint.hex() if hint else None) == vector["hint"]


# Messages of a few bytes to a few chunks, as each API has them; what a turn appends.
LONG = st.tuples(st.text(min_size=1, max_size=8), st.integers(0, 2 * CHUNK)).map(lambda t: (t[0] * CHUNK)[: t[1]])
BLOCKS = st.lists(
    LONG.map(lambda text: {"type": "text", "text": text})
    | LONG.map(lambda text: {"type": "image", "source": {"data": text}})
    | LONG.map(lambda text: {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": text}]}),
    max_size=3,
)
CALLS = st.lists(
    LONG.map(lambda text: {"id": "1", "function": {"name": "f", "arguments": text}}), min_size=1, max_size=2
)
CHAT = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
        "content": LONG | BLOCKS | st.none(),
    },
    optional={"tool_calls": CALLS},
)
ITEM = CHAT | st.builds(lambda text: {"type": "function_call_output", "call_id": "1", "output": text}, LONG | BLOCKS)
TURNS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "chat": ("messages", CHAT, {}),
    "messages": ("messages", CHAT, {"system": [{"type": "text", "text": "s" * CHUNK}], "tools": [{"name": "ls"}]}),
    "responses": ("input", ITEM, {"instructions": "s" * CHUNK}),
}


def read(request: dict[str, Any]) -> Prompt:
    prompt = read_prompt(json.dumps(request).encode())
    assert prompt is not None
    return prompt


@pytest.mark.parametrize("api", TURNS)
@given(data=st.data())
def test_the_next_turn_has_every_chunk_of_this_one(api: str, data: st.DataObject) -> None:
    """Whatever a conversation consists of, in each API: turn n's text and hashes begin turn n+1's."""
    field, message, fixed = TURNS[api]
    before: list[Any] = data.draw(st.lists(message, min_size=1, max_size=4))
    after: list[Any] = data.draw(st.lists(message, min_size=1, max_size=3))
    turn, following = read({"model": "m", field: before, **fixed}), read({**fixed, field: before + after, "model": "m"})
    assert following.text.startswith(turn.text)
    assert chunk_hashes(following)[: len(turn.text) // CHUNK] == chunk_hashes(turn)


def test_a_first_text_is_the_first_item() -> None:
    """/v1/responses may be asked with a text first and with items from then on."""
    text = "x" * 3 * CHUNK
    turn = chunk_hashes(read({"input": text}))
    assert len(turn) == 3
    items = [{"role": "user", "content": [{"type": "input_text", "text": text}]}, {"role": "assistant", "content": "y"}]
    assert chunk_hashes(read({"input": items}))[:3] == turn


def test_a_hint_is_the_header_or_the_cache_key() -> None:
    """The header's value counts before the body's; another model or salt is another hint, and none is none."""
    prompt = Prompt("m", "", b"hi", cache_key="app")
    hints = [
        hint_hash(prompt, "s"),
        hint_hash(prompt, ""),
        hint_hash(Prompt("n", "", b"hi", cache_key="app"), ""),
        hint_hash(Prompt("m", "salt", b"hi", cache_key="app"), ""),
    ]
    assert len(set(hints)) == 4
    assert hint_hash(Prompt("m", "", b"other", cache_key="app"), "") == hints[1]
    assert hint_hash(Prompt("m", "", b"hi"), "") is None


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
