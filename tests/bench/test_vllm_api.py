"""bench/vllm_api.py: bodies in; replies, events and errors out."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.vllm_api import ApiError, ApiRequest, Envelope, filler, http_chunk, parse, token_count


def chat(*messages: tuple[str, object]) -> bytes:
    """The canonical prompt of (role, content) messages."""
    body = {"messages": [{"role": role, "content": content} for role, content in messages]}
    request = parse(json.dumps(body).encode(), chat=True)
    assert isinstance(request, ApiRequest)
    return request.prompts[0]


@settings(deadline=None)
@given(st.binary(max_size=60), st.booleans())
def test_no_body_raises(body: bytes, is_chat: bool) -> None:
    """Whatever bytes come, the answer is a value."""
    assert isinstance(parse(body, chat=is_chat), ApiRequest | ApiError)


SCALARS = st.none() | st.booleans() | st.integers(-5, 2**40) | st.text(max_size=3)
MESSAGES = st.lists(st.dictionaries(st.sampled_from(("role", "content", "text", "tool_calls")), SCALARS), max_size=3)
JSON = SCALARS | st.lists(SCALARS, max_size=3) | MESSAGES | st.lists(MESSAGES.map(lambda parts: {"content": parts}))
FIELDS = ("prompt", "messages", "model", "max_tokens", "stream", "stream_options", "tools", "cache_salt")


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.booleans())
def test_no_field_raises(body: dict[str, object], is_chat: bool) -> None:
    """Nor does any JSON value in any field, and the reply's length follows from what was accepted."""
    request = parse(json.dumps(body).encode(), chat=is_chat)
    if isinstance(request, ApiRequest):
        for prompt in request.prompts:
            output = request.output(prompt, 1000)
            assert isinstance(output, ApiError) or 1 <= output[0] <= 1000 - token_count(prompt)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("abcd", (b"abcd",)),
        (["ab", "cd"], (b"ab", b"cd")),
        ([1, 258], (b"\1\0\0\0\2\1\0\0",)),
        ([[1], [2]], (b"\1\0\0\0", b"\2\0\0\0")),
    ],
)
def test_every_form_of_a_prompt(prompt: object, prompts: tuple[bytes, ...]) -> None:
    """A string, strings, token ids, lists of those; a token id takes one token's four bytes."""
    request = parse(json.dumps({"prompt": prompt}).encode(), chat=False)
    assert isinstance(request, ApiRequest)
    assert request.prompts == prompts


@pytest.mark.parametrize("prompt", [None, [], 7, {"a": 1}, [1, "a"], ["a", 1], [-1], [2**40], [None]])
def test_what_is_no_prompt_is_refused(prompt: object) -> None:
    """400, with the field's place as pydantic names it."""
    error = parse(json.dumps({"prompt": prompt}).encode(), chat=False)
    assert isinstance(error, ApiError)
    assert (error.status, "('body', 'prompt')" in error.message) == (400, True)


def test_the_next_turn_begins_with_the_last_one_and_its_reply() -> None:
    """So a conversation hits its own KV blocks, the generated ones too."""
    first = chat(("system", "be brief"), ("user", "hello"))
    said = filler(7)
    second = chat(("system", "be brief"), ("user", "hello"), ("assistant", said.decode()), ("user", "more"))
    assert second.startswith(first + said)
    assert len(said) == 7 * 4


def test_content_in_parts_is_its_text() -> None:
    """Text parts join to the same prompt as a string; an image stands for itself."""
    assert chat(("user", [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}])) == chat(("user", "hello"))
    assert b"http://x" in chat(("user", [{"type": "image_url", "image_url": {"url": "http://x"}}]))


def test_how_long_a_reply_is() -> None:
    """max_tokens when it comes first, else the made-up model's own end; `ignore_eos` goes to the limit."""
    prompt = b"x" * 400
    assert ApiRequest(False, (prompt,)).output(prompt, 5000) == (16, "length")
    assert ApiRequest(True, (prompt,), max_tokens=5).output(prompt, 5000) == (5, "length")
    natural = ApiRequest(True, (prompt,)).output(prompt, 5000)
    assert isinstance(natural, tuple)
    assert natural[1] == "stop"
    assert ApiRequest(True, (prompt,), max_tokens=4000).output(prompt, 5000) == natural
    assert ApiRequest(True, (prompt,), max_tokens=4000, ignore_eos=True).output(prompt, 5000) == (4000, "length")
    assert isinstance(ApiRequest(True, (prompt,), max_tokens=4901).output(prompt, 5000), ApiError)


@pytest.mark.parametrize("is_chat", [True, False])
def test_frames_are_whole_http_chunks(is_chat: bool) -> None:
    """Each token's bytes are chunks of the size they say, and their text is the reply's."""
    frames = Envelope(is_chat, "id-1", "m", 1).frames(2, "stop")
    text, finish = "", []
    for number in range(1, 20):
        data = frames.token(number, last=number == 19)
        while data:
            size, _, rest = data.partition(b"\r\n")
            event, data = rest[: int(size, 16)], rest[int(size, 16) + 2 :]
            assert http_chunk(event) == size + b"\r\n" + event + b"\r\n"
            choice = json.loads(event.removeprefix(b"data: "))["choices"][0]
            assert choice["index"] == 2
            text += choice["delta"]["content"] if is_chat else choice["text"]
            finish.append(choice["finish_reason"])
    assert text.encode() == filler(19)
    assert finish == [None] * (len(finish) - 1) + ["stop"]
