"""From the body of a request to the text its prefix cache is keyed on. Pure; no bytes from outside make it raise.

What is read: `/v1/completions` (`prompt`: text, token ids, or a list of either), `/v1/chat/completions` and
`/v1/messages` (`messages`, `system`, `tools`), `/v1/responses` (`input`, `instructions`, `tools`). Anything else is
None: such a request is routed without a key.

The canonical text is written in the order a chat template writes it, tools first, then the system prompt, then the
messages; each piece *opens* with a marker and none is closed, so the text of one turn is a prefix of the next turn's:

    \\0tools\\0<JSON>   \\0system\\0<text>   \\0<role>\\0<text>[\\0<JSON of tool_calls>]   ...

JSON is compact, its keys in the order sent (a template prints them so). Of a content part counts its `text`; an image,
audio, video or file is its digest, repeated to the length of the tokens it stands for; any other part is its JSON
without `cache_control`, which clients move from message to message. Token ids are four bytes each, little-endian.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jiter
import mmh3

BYTES_PER_TOKEN = 4  # of English text and of code under current tokenizers; exact for token ids as encoded here
MAX_BODY = 2 << 20  # bytes: a longer body is read as if it ended here, so that a bomb of `[],[],` costs 0.1 s and 60 MB
MAX_PIECES = 20_000  # markers, texts and parts of a prompt: the rest of a longer one is not read, for the same reason
MEDIA_TOKENS = 1024  # an image at common resolutions, within a factor of two
MEDIA = ("image", "audio", "video", "file")  # a part is media when its `type` contains one of these

_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request asks to be prefilled: `model` (or LoRA) and `cache_salt` keep caches apart, "" when not given.

    `max_tokens` is the client's bound on the answer, None when not given.
    """

    model: str
    cache_salt: str
    text: bytes
    max_tokens: int | None = None

    @property
    def tokens(self) -> int:
        """Length in tokens, an estimate."""
        return len(self.text) // BYTES_PER_TOKEN


def read_prompt(body: bytes) -> Prompt | None:
    """The prompt in a request's body; None when it has none, or none that can be read.

    jiter bounds what JSON can cost: 200 levels of nesting, 4,300 digits, no lone surrogates. A body that is cut short
    is read as far as it goes.
    """
    try:
        request = jiter.from_json(body[:MAX_BODY], cache_mode="keys", partial_mode="trailing-strings")
        text = _text(request) if isinstance(request, dict) else b""
    except (ValueError, struct.error):  # not JSON; token ids that are none
        return None
    if not text:
        return None
    model, cache_salt = request.get("model"), request.get("cache_salt")
    limits = (request.get(name) for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"))
    return Prompt(
        model if isinstance(model, str) else "",
        cache_salt if isinstance(cache_salt, str) else "",
        text,
        next((limit for limit in limits if type(limit) is int and limit > 0), None),
    )


def _text(request: dict[str, Any]) -> bytes:
    messages = request.get("messages", request.get("input"))
    if messages:
        pieces = _chat(request, messages if isinstance(messages, list) else [messages])
        return "".join(islice(pieces, MAX_PIECES)).encode()
    prompt = request.get("prompt")
    batch = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else [prompt]
    return b"\0".join(map(_completion, batch[:MAX_PIECES]))


def _completion(prompt: Any) -> bytes:
    """A text or a list of token ids."""
    if isinstance(prompt, str):
        return prompt.encode()
    return struct.pack(f"<{len(prompt)}I", *prompt) if isinstance(prompt, list) else b""


def _chat(request: dict[str, Any], messages: list[Any]) -> Iterator[str]:
    if tools := request.get("tools"):
        yield "\0tools\0"
        yield _json(tools)
    for name in ("system", "instructions"):
        if system := request.get(name):
            yield "\0system\0"
            yield from _content(system)
    for message in messages:
        if isinstance(message, dict) and "content" in message:
            yield f"\0{message.get('role', '')}\0"
            yield from _content(message["content"])
            if calls := message.get("tool_calls"):
                yield "\0"
                yield _json(calls)
        else:
            yield "\0"
            yield _part(message)


def _content(content: Any) -> Iterable[str]:
    """A message's content: a text, a list of parts, or null."""
    if isinstance(content, str):
        return (content,)
    return map(_part, content) if isinstance(content, list) else ()


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        return _json(part)
    text, kind = part.get("text"), part.get("type")
    if isinstance(text, str):
        return text
    rest = _json({name: value for name, value in part.items() if name != "cache_control"})
    if isinstance(kind, str) and any(media in kind for media in MEDIA):
        digest = mmh3.mmh3_x64_128_digest(rest.encode()).hex()
        return digest * (MEDIA_TOKENS * BYTES_PER_TOKEN // len(digest))
    return rest
