"""From the body of a request to the text its prefix cache is keyed on, as picker/prefix.py specifies it. Pure.

What is read is a JSON object with `messages` (chat completions, Anthropic's messages), `input` (responses, embeddings)
or `prompt` (completions), by its fields alone: the picker is not told the path. Anything else is None: such a request
is routed without a key. No bytes from outside make this raise, and what they can cost is bounded.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jiter
import mmh3

BYTES_PER_TOKEN = 4  # of English text and of code under current tokenizers; exact for token ids as encoded here
MAX_BODY = 2 << 20  # bytes: a longer body is read as if it ended here, so that a bomb of `[],[],` costs 0.1 s and 60 MB
MAX_PIECES = 20_000  # markers, texts and parts of a prompt: the rest of a longer one is not read, for the same reason
MEDIA_TOKENS = 1024  # an image at common resolutions, within a factor of two
MEDIA = frozenset(
    {
        "image",
        "image_url",
        "input_image",
        "image_embeds",
        "computer_screenshot",
        "audio",
        "audio_url",
        "input_audio",
        "video",
        "video_url",
        "input_video",
        "file",
        "input_file",
        "document",
    }
)
BOM = b"\xef\xbb\xbf"  # json.loads, which vLLM's HTTP front calls, takes it for UTF-8

_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request asks to be prefilled: `model` (or LoRA) and `cache_salt` keep caches apart, "" when not given.

    `max_tokens` is the client's bound on the answer, None when not given; `cache_key` its `prompt_cache_key`, or "".
    """

    model: str
    cache_salt: str
    text: bytes
    max_tokens: int | None = None
    cache_key: str = ""

    @property
    def tokens(self) -> int:
        """Length in tokens, an estimate."""
        return len(self.text) // BYTES_PER_TOKEN


def read_prompt(body: bytes) -> Prompt | None:
    """The prompt in a request's body; None when it has none, or none that can be read.

    jiter bounds what JSON can cost: 200 levels of nesting, 4,300 digits, no lone surrogates. A body that is cut short
    is read as far as it goes.
    """
    request = _parsed(body)
    text = _text(request)
    if not text:
        return None
    limits = (request.get(name) for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"))
    return Prompt(
        _string(request.get("model")),
        _string(request.get("cache_salt")),
        text,
        next((limit for limit in limits if type(limit) is int and limit > 0), None),
        _string(request.get("prompt_cache_key")),
    )


def read_opening(body: bytes) -> bytes:
    """The text up to the end of the first message of role `user`: what a conversation's turns share, and others do not.

    All of the text where there is no such message, and the body itself where there is no text.
    """
    request = _parsed(body)
    messages = _messages(request)
    for i, message in enumerate(messages, 1):
        if isinstance(message, dict) and message.get("role") == "user":
            return _text(request | {"messages": messages[:i]})
    return _text(request) or body


def _parsed(body: bytes) -> dict[str, Any]:
    """The request in a body, empty when there is none."""
    try:
        request = jiter.from_json(body[:MAX_BODY].removeprefix(BOM), cache_mode="keys", partial_mode="trailing-strings")
    except ValueError:
        return {}
    return request if isinstance(request, dict) else {}


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _text(request: dict[str, Any]) -> bytes:
    if messages := _messages(request):
        return "".join(islice(_conversation(request, messages), MAX_PIECES)).encode()
    prompt = request.get("input") or request.get("prompt")
    batch = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else [prompt]
    try:
        return b"\0".join(map(_completion, batch[:MAX_PIECES]))
    except struct.error:  # token ids that are none
        return b""


def _messages(request: dict[str, Any]) -> list[Any]:
    """The conversation's messages; empty when the request is none."""
    messages, given = request.get("messages"), request.get("input")
    if isinstance(messages, list) and messages:
        return messages
    if isinstance(given, str) and given:
        return [{"role": "user", "content": given}]
    return given if isinstance(given, list) and given and isinstance(given[0], dict) else []


def _completion(prompt: Any) -> bytes:
    """A text or a list of token ids."""
    if isinstance(prompt, str):
        return prompt.encode()
    return struct.pack(f"<{len(prompt)}I", *prompt) if isinstance(prompt, list) else b""


def _conversation(request: dict[str, Any], messages: list[Any]) -> Iterator[str]:
    """The pieces of a conversation's text, in order."""
    if tools := request.get("tools"):
        yield "\0tools\0"
        yield _json([_without(tool, "cache_control") for tool in tools] if isinstance(tools, list) else tools)
    for name in ("system", "instructions"):
        if system := request.get(name):
            yield "\0system\0"
            yield from _content(system)
    for message in messages:
        if isinstance(message, dict) and "content" in message:
            yield f"\0{_string(message.get('role'))}\0"
            yield from _content(message["content"])
            if calls := message.get("tool_calls"):
                yield "\0"
                yield _json(calls)
        else:
            yield "\0"
            yield from _part(message)


def _content(content: Any) -> Iterator[str]:
    """A message's content: a text, a list of parts, or nothing."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            yield from _part(part)


def _part(part: Any) -> Iterator[str]:
    if isinstance(part, str):
        yield part
        return
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in MEDIA:
        digest = mmh3.mmh3_x64_128_digest(_json(_without(part, "cache_control")).encode()).hex()
        yield digest * (MEDIA_TOKENS * BYTES_PER_TOKEN // len(digest))
    elif isinstance(part, dict) and isinstance(part.get("text"), str):
        yield part["text"]
    else:
        yield _json(_without(part, "cache_control", "content", "output"))
        if isinstance(part, dict):  # what a tool has returned: a text, or parts, with images among them
            yield from _content(part.get("content"))
            yield from _content(part.get("output"))


def _without(value: Any, *names: str) -> Any:
    """`value` without these fields, if it is an object."""
    if isinstance(value, dict) and not value.keys().isdisjoint(names):
        return {name: of for name, of in value.items() if name not in names}
    return value
