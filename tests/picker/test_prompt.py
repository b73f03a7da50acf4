"""picker/prompt.py: the canonical text of a request."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.prompt import MAX_BODY, MAX_PIECES, MEDIA_TOKENS, Prompt, read_opening, read_prompt

KEYS = st.sampled_from(
    ["model", "messages", "prompt", "input", "tools", "system", "role", "content", "text", "type", "max_tokens"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
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


def test_a_responses_body() -> None:
    """Instructions, then `input`: a text is one user message, so the next turn's items begin as it does."""
    assert read(instructions="be kind", input="hi").text == b"\0system\0be kind\0user\0hi"
    items: list[Any] = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    assert read(instructions="be kind", input=items) == read(instructions="be kind", input="hi")
    items += [
        {"type": "function_call", "call_id": "1", "name": "ls", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "a.txt"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "b.txt"}]},
        {"role": "developer", "content": "be brief"},
    ]
    assert read(input=items).text == (
        b'\0user\0hi\0{"type":"function_call","call_id":"1","name":"ls","arguments":"{}"}'
        b'\0{"type":"function_call_output","call_id":"1"}a.txt\0{"type":"function_call_output","call_id":"2"}b.txt'
        b"\0developer\0be brief"
    )


def test_an_anthropic_body() -> None:
    """The system's blocks, and a tool's use and result; where their cache_control stands changes nothing."""

    def body(mark: Any) -> Prompt:
        result = [{"type": "text", "text": "a.txt"}, {"type": "image", "source": {"data": "AA"}}]
        return read(
            system=[{"type": "text", "text": "be kind"} | mark],
            tools=[{"name": "ls", "input_schema": {"cache_control": 1}} | mark],
            messages=[
                {"role": "user", "content": "list"},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "ls"} | mark]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": result} | mark]},
            ],
        )

    assert body({}) == body({"cache_control": {"type": "ephemeral"}})
    text, image = body({}).text[: -MEDIA_TOKENS * 4], body({}).text[-MEDIA_TOKENS * 4 :]
    assert text == (
        b'\0tools\0[{"name":"ls","input_schema":{"cache_control":1}}]\0system\0be kind\0user\0list'
        b'\0assistant\0{"type":"tool_use","id":"1","name":"ls"}\0user\0{"type":"tool_result","tool_use_id":"1"}a.txt'
    )
    assert len(set(image)) > 1
    assert image == image[:32] * 128  # a megabyte of base64 in a tool's result is an image too


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("hi", b"\0user\0hi"),
        (["one", "two"], b"one\0two"),
        ([1, 2], b"\1\0\0\0\2\0\0\0"),
        ([[1], "a", 5, [2]], b"\1\0\0\0\0a\0\0\2\0\0\0"),
    ],
)
def test_an_embeddings_body(given: Any, text: bytes) -> None:
    """One text, or a batch of texts or token ids as for a completion; what is neither is empty."""
    assert read(input=given).text == text


def test_what_is_read_first() -> None:
    """Messages before input before prompt, and what is empty does not count."""
    messages = [{"role": "user", "content": "m"}]
    assert read(prompt="p", input="i", messages=messages).text == b"\0user\0m"
    assert read(prompt="p", input=["i"], messages=[]).text == b"i"
    assert read(prompt="p", input=[], messages="m").text == b"p"


def test_a_byte_order_mark_is_no_difference() -> None:
    """vLLM reads such a body as any other."""
    body = b'{"model":"m","prompt":"hi"}'
    assert read_prompt(b"\xef\xbb\xbf" + body) == read_prompt(body) == Prompt("m", "", b"hi")


def test_a_cache_key_is_a_text() -> None:
    """OpenAI's prompt_cache_key; what is none is as if it were not given."""
    assert read(prompt="hi", prompt_cache_key="app").cache_key == "app"
    assert read(prompt="hi", prompt_cache_key=5).cache_key == ""


def test_a_wandering_cache_control_changes_nothing() -> None:
    """Agents mark the last part of each turn; the mark must not change the text of earlier turns."""
    part = {"type": "text", "text": "hi"}
    marked = part | {"cache_control": {"type": "ephemeral"}}
    assert read(messages=[{"role": "user", "content": [part]}]) == read(
        messages=[{"role": "user", "content": [marked]}]
    )


@pytest.mark.parametrize(
    "part",
    [
        lambda data: {"type": "image_url", "image_url": {"url": data}},
        lambda data: {"type": "input_image", "image_url": data},
        lambda data: {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
        lambda data: {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
        lambda data: {"type": "file", "file": {"file_data": data}, "text": "not this"},
    ],
)
def test_media_are_their_digest(part: Any) -> None:
    """A megabyte of base64, or a URL, counts as an image's tokens; the same is the same text, another is another."""

    def read_part(data: str) -> Prompt:
        return read(messages=[{"role": "user", "content": [part(data)]}])

    cat = read_part("data:image/png;base64," + "A" * 1_000_000)
    assert cat == read_part("data:image/png;base64," + "A" * 1_000_000)
    assert cat != read_part("data:image/png;base64," + "A" * 999_999 + "B")
    assert cat.tokens == read_part("https://example.com/cat.png").tokens
    assert MEDIA_TOKENS <= cat.tokens <= MEDIA_TOKENS + 10
    other = read(messages=[{"role": "user", "content": [part("x") | {"type": "file_search_call"}]}])
    assert other.tokens < 100  # no medium


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
    ("request_", "opening"),
    [
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}, b"\0system\0s\0user\0u"),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "user", "content": "v"}], "system": "s"},
         b"\0system\0s\0user\0u"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, b"\0assistant\0a"),
        ({"input": "u", "instructions": "s"}, b"\0system\0s\0user\0u"),
        ({"input": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}, b"\0user\0u"),
        ({"prompt": "all of it"}, b"all of it"),
        ({"query": "q"}, b'{"query": "q"}'),
    ],
)  # fmt: skip
def test_an_opening_ends_with_the_first_message_of_a_user(request_: dict[str, Any], opening: bytes) -> None:
    """What a conversation's turns share; all of the text where there are no turns, the body where there is none."""
    assert read_opening(json.dumps(request_).encode()) == opening


def test_the_opening_of_what_is_no_request() -> None:
    """Its bytes."""
    for body in (b"", b"hello", b"[]", b'{"prompt":[-1]}'):
        assert read_opening(body) == body


@pytest.mark.parametrize(
    ("given_limit", "limit"), [(5, 5), (0, None), (-1, None), (True, None), ("5", None), (1.5, None), (None, None)]
)
def test_max_tokens_is_a_positive_integer_or_none(given_limit: Any, limit: int | None) -> None:
    """Anything else is as if not given."""
    assert read(prompt="a", max_tokens=given_limit).max_tokens == limit


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
