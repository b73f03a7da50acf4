"""picker/prompt.py: the canonical text of a request."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.prompt import MAX_BODY, MAX_PIECES, MEDIA_TOKENS, Prompt, read_prompt

KEYS = st.sampled_from(
    ["model", "messages", "prompt", "input", "tools", "system", "role", "content", "text", "type", "max_tokens"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"])},
    optional={
        "content": st.text()
        | st.none()
        | st.lists(st.builds(lambda text: {"type": "text", "text": text}, st.text()), max_size=3),
        "tool_calls": st.lists(st.builds(lambda name: {"function": {"name": name}}, st.text()), max_size=2),
    },
)


def read(**request: Any) -> Prompt:
    prompt = read_prompt(json.dumps(request).encode())
    assert prompt is not None
    return prompt


def test_chat_is_tools_then_system_then_messages() -> None:
    """The order of a chat template, whatever the order of the fields: the shared part comes first."""
    prompt = read(
        messages=[
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [{"type": "text", "text": "yo"}]},
        ],
        system="be kind",
        model="qwen",
        tools=[{"name": "ls", "b": 1, "a": 2}],
        cache_salt="tenant",
        max_completion_tokens=7,
    )
    text = b'\0tools\0[{"name":"ls","b":1,"a":2}]\0system\0be kind\0user\0hi\0assistant\0yo'
    assert prompt == Prompt("qwen", "tenant", text, 7)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("hé", "hé".encode()),
        (["one", "two"], b"one\0two"),
        ([1, 256, 2**32 - 1], b"\1\0\0\0\0\1\0\0\xff\xff\xff\xff"),
        ([[1], [2]], b"\1\0\0\0\0\2\0\0\0"),
    ],
)
def test_completion_prompts(prompt: Any, text: bytes) -> None:
    """A text, a batch, token ids at four bytes each, a batch of those."""
    assert read(prompt=prompt).text == text


def test_responses_and_messages_bodies() -> None:
    """/v1/responses puts its prompt into `instructions` and `input`, /v1/messages its blocks into parts."""
    assert read(instructions="be kind", input="hi").text == b"\0system\0be kind\0hi"
    call = {"type": "function_call", "name": "ls"}
    items = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}, call]
    assert read(input=items).text == b'\0user\0hi\0{"type":"function_call","name":"ls"}'
    block = {"type": "tool_use", "name": "ls", "cache_control": {"type": "ephemeral"}}
    assert read(messages=[{"role": "assistant", "content": [block]}]).text == (
        b'\0assistant\0{"type":"tool_use","name":"ls"}'
    )


def test_a_wandering_cache_control_changes_nothing() -> None:
    """Agents mark the last part of each turn; the mark must not change the text of earlier turns."""
    part = {"type": "text", "text": "hi"}
    marked = part | {"cache_control": {"type": "ephemeral"}}
    assert read(messages=[{"role": "user", "content": [part]}]) == read(
        messages=[{"role": "user", "content": [marked]}]
    )


def test_an_image_is_its_digest() -> None:
    """A megabyte of base64 counts as an image's tokens; the same image is the same text, another is another."""

    def image(url: str) -> Prompt:
        return read(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])

    cat = image("data:image/png;base64," + "A" * 1_000_000)
    assert cat == image("data:image/png;base64," + "A" * 1_000_000)
    assert cat != image("data:image/png;base64," + "A" * 999_999 + "B")
    assert MEDIA_TOKENS <= cat.tokens <= MEDIA_TOKENS + 10


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b'{"model":"m"}',
        b'{"messages":[]}',
        b'{"prompt":""}',
        b'{"prompt":{}}',
        b'{"prompt":[-1]}',
        b'{"prompt":[4294967296]}',
        b'{"prompt":[1,"a"]}',
        b'{"prompt":"\\ud800"}',
    ],
)
def test_nothing_to_key_on(body: bytes) -> None:
    """What is no LLM request, or has no prompt, is None and not an error."""
    assert read_prompt(body) is None


def test_a_prompt_of_too_many_pieces_is_read_to_the_bound() -> None:
    """A marker and a text for each message; in a batch of prompts one piece each."""
    assert read(messages=[""] * 2 * MAX_PIECES).text == b"\0" * (MAX_PIECES // 2)
    assert read(prompt=["a"] * 2 * MAX_PIECES).text == b"\0".join([b"a"] * MAX_PIECES)


def test_a_cut_body_is_read_as_far_as_it_goes() -> None:
    """JSON that ends early still has its first part: the key of a body longer than MAX_BODY."""
    cut = read_prompt(b'{"model":"m","prompt":"abc')
    assert cut == Prompt("m", "", b"abc")
    long = read_prompt(b'{"model":"m","prompt":"' + b"a" * MAX_BODY + b'","max_tokens":1}')
    assert long is not None
    assert MAX_BODY - 30 < len(long.text) < MAX_BODY
    assert long.max_tokens is None


@pytest.mark.parametrize(
    ("given_limit", "limit"), [(5, 5), (0, None), (-1, None), (True, None), ("5", None), (1.5, None), (None, None)]
)
def test_max_tokens_is_a_positive_integer_or_none(given_limit: Any, limit: int | None) -> None:
    """Anything else is as if not given."""
    assert read(prompt="a", max_tokens=given_limit).max_tokens == limit


@given(st.lists(MESSAGE, min_size=1, max_size=6), st.lists(MESSAGE, max_size=4), st.text())
def test_the_next_turn_begins_with_this_one(turn: list[Any], more: list[Any], system: str) -> None:
    """The text of turn n is a prefix of turn n+1's: the law every prefix hash rests on."""
    before = read(messages=turn, system=system, model="m").text
    assert read(messages=turn + more, system=system, model="m").text.startswith(before)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_body_raises(body: bytes) -> None:
    """Any bytes, and any JSON dressed as a request, give a prompt or None."""
    for one in (body, b'{"messages":[' + body + b"]}", b'{"prompt":[' + body + b"]}", b'{"prompt":"a","tools":' + body):
        prompt = read_prompt(one)
        assert prompt is None or prompt.text


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages":[' + b"[]," * (8 << 20),
        b'{"prompt":[' + b"1," * (12 << 20),
        b'{"messages":' + b"[" * (20 << 20),
        b'{"tools":' + b'{"a":' * (4 << 20),
        b'{"tools":[' + b"9" * (20 << 20) + b'],"prompt":"a"}',
        b'{"messages":["' + b"\\u0061" * (4 << 20),
        b'{"messages":[' + b'{"content":[{}]},' * (1 << 20),
    ],
    ids=["lists", "tokens", "deep lists", "deep objects", "digits", "escapes", "parts"],
)
def test_a_hostile_body_is_bounded(body: bytes) -> None:
    """Some 24 MB made to cost the most end in a fraction of a second (the bound is loose: a loaded machine)."""
    start = time.process_time()
    read_prompt(body)
    assert time.process_time() - start < 2
