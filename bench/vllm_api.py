"""vLLM's OpenAI API as bytes: request bodies in; replies, server-sent events and errors out. Pure.

Tokens are made up: four bytes of the canonical prompt text are one, and every reply is the same sequence of
four-byte words. A conversation's next turn therefore continues the KV blocks of the last one's prompt and reply.
The parameter `n` is taken as 1, and sampling parameters are not looked at.
"""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jiter

from bench.kv_cache import BYTES_PER_TOKEN

WORDS = (" the", " sun", " was", " low", " and", " our", " old", " dog", " ran", " out", " for", " joy", " all", " day")
_WORDS = tuple(word.encode() for word in WORDS)
_CYCLE = b"".join(_WORDS)

COMPLETION_MAX_TOKENS = 16  # what /v1/completions generates when max_tokens is not given
_SHORTEST_REPLY, _REPLY_RANGE = 128, 512  # tokens, until the made-up model says stop; `ignore_eos` goes on

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class ApiError:
    """An error of the API: the HTTP status (also `code` in the body), and vLLM's error type and parameter."""

    status: int
    message: str
    type: str = "BadRequestError"
    param: str | None = None

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.status}
        return _dump({"error": error})


OVERLOADED = ApiError(503, "The engine's queue is full (max_num_queued_reqs). Try again later.", "ServiceUnavailable")
ENGINE_DEAD = ApiError(
    500, "EngineCore encountered an issue. See stack trace (above) for the root cause.", "InternalServerError"
)
NOT_FOUND = ApiError(404, "Not Found", "NotFoundError")


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """A valid body. `prompts` are canonical texts, one a choice; `model` "" and `max_tokens` None = not given."""

    chat: bool
    prompts: tuple[bytes, ...]
    model: str = ""
    max_tokens: int | None = None
    ignore_eos: bool = False
    stream: bool = False
    include_usage: bool = False
    cache_salt: str = ""

    def output(self, prompt: bytes, context_tokens: int) -> tuple[int, str] | ApiError:
        """How many tokens the reply to `prompt` has, and its finish_reason."""
        room = context_tokens - token_count(prompt)
        wanted = self.max_tokens
        if wanted is None:
            wanted = room if self.chat else min(room, COMPLETION_MAX_TOKENS)
        if wanted > room or room < 1:
            return ApiError(
                400,
                f"This model's maximum context length is {context_tokens} tokens. However, you requested {wanted} "
                f"output tokens and your prompt contains {context_tokens - room} input tokens. Please reduce the "
                "length of the input prompt or the number of requested output tokens.",
                param="input_tokens",
            )
        natural = _SHORTEST_REPLY + zlib.crc32(prompt) % _REPLY_RANGE
        if self.ignore_eos or wanted <= natural:
            return wanted, "length"
        return natural, "stop"


def parse(body: bytes, *, chat: bool) -> ApiRequest | ApiError:
    """Read the body of POST /v1/completions, or with `chat` of POST /v1/chat/completions."""
    try:
        data = jiter.from_json(body)
    except ValueError as error:
        return _invalid("json_invalid", (), f"JSON decode error: {error}")
    if not isinstance(data, dict):
        return _invalid("model_attributes_type", (), "Input should be a valid dictionary")
    for name, kind in _KINDS.items():
        value = data.get(name)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            return _invalid(f"{kind.__name__}_type", (name,), f"Input should be a valid {kind.__name__}")
    max_tokens = data.get("max_tokens")
    if chat and data.get("max_completion_tokens") is not None:
        max_tokens = data["max_completion_tokens"]
    if max_tokens is not None and max_tokens < 1:
        return ApiError(400, f"max_tokens must be at least 1, got {max_tokens}.", param="max_tokens")
    prompts = _chat_prompt(data) if chat else _prompts(data.get("prompt"))
    if isinstance(prompts, ApiError):
        return prompts
    return ApiRequest(
        chat=chat,
        prompts=prompts,
        model=data.get("model") or "",
        max_tokens=max_tokens,
        ignore_eos=bool(data.get("ignore_eos")),
        stream=bool(data.get("stream")),
        include_usage=bool((data.get("stream_options") or {}).get("include_usage")),
        cache_salt=data.get("cache_salt") or "",
    )


def token_count(prompt: bytes) -> int:
    return max(1, -(-len(prompt) // BYTES_PER_TOKEN))


def filler(tokens: int) -> bytes:
    """The reply's text of that many tokens."""
    return (_CYCLE * (tokens // len(WORDS) + 1))[: tokens * BYTES_PER_TOKEN]


def unknown_model(model: str) -> ApiError:
    return ApiError(404, f"The model `{model}` does not exist.", "NotFoundError", "model")


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """The `usage` object, with the details that vLLM gives under --enable-prompt-tokens-details."""
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all messages of one reply share. `created` in unix seconds."""

    chat: bool
    reply_id: str
    model: str
    created: int

    def reply(self, choices: Sequence[tuple[int, str]], usage: dict[str, Any]) -> bytes:
        """The JSON of a reply that is not streamed; `choices` are (tokens, finish_reason)."""
        body = []
        for index, (tokens, reason) in enumerate(choices):
            text = filler(tokens).decode()
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "tool_calls": []}
            content = {"message": message} if self.chat else {"text": text}
            body.append({"index": index, **content, "logprobs": None, "finish_reason": reason, "stop_reason": None})
        kind = "chat.completion" if self.chat else "text_completion"
        return _dump({**self._head(kind), "choices": body, "usage": usage})

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        """The event before [DONE] under `stream_options.include_usage`."""
        return sse(_dump({**self._head(self._stream_kind), "choices": [], "usage": usage}))

    def frames(self, index: int, finish_reason: str) -> Frames:
        """What is needed to stream choice `index`."""

        def event(delta: dict[str, str], finish: str | None) -> bytes:
            content = {"delta": delta} if self.chat else {"text": delta["content"]}
            end = {"stop_reason": None} if finish or not self.chat else {}
            choice = {"index": index, **content, "logprobs": None, "finish_reason": finish, **end}
            return sse(_dump({**self._head(self._stream_kind), "choices": [choice]}))

        first = http_chunk(event({"role": "assistant", "content": ""}, None)) if self.chat else b""
        word = WORDS[0]
        head, tail = http_chunk(event({"content": word}, None)).rsplit(_WORDS[0], 1)
        last_head, last_tail = http_chunk(event({"content": word}, finish_reason)).rsplit(_WORDS[0], 1)
        return Frames(first, head, tail, last_head, last_tail)

    @property
    def _stream_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.reply_id, "object": kind, "created": self.created, "model": self.model}


@dataclass(frozen=True, slots=True)
class Frames:
    """The bytes around each word of one streamed choice, as HTTP/1.1 chunks: every word is of the same length."""

    first: bytes  # before the first token: a chat reply's role
    head: bytes
    tail: bytes
    last_head: bytes
    last_tail: bytes

    def token(self, number: int, *, last: bool) -> bytes:
        """The chunk of token `number`, counted from 1."""
        word = _WORDS[(number - 1) % len(_WORDS)]
        data = self.last_head + word + self.last_tail if last else self.head + word + self.tail
        return self.first + data if number == 1 else data


def sse(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def http_chunk(data: bytes) -> bytes:
    """RFC 9112, section 7.1."""
    return b"%x\r\n%b\r\n" % (len(data), data)


# The types that vLLM's request models ask of the fields read here.
_KINDS: dict[str, type] = {
    "model": str,
    "max_tokens": int,
    "max_completion_tokens": int,
    "ignore_eos": bool,
    "stream": bool,
    "stream_options": dict,
    "cache_salt": str,
}


def _dump(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _invalid(kind: str, where: tuple[str, ...], message: str) -> ApiError:
    """What a body that pydantic refuses is answered with."""
    detail = {"type": kind, "loc": ("body", *where), "msg": message}
    return ApiError(400, f"1 validation error:\n  {detail}", "Bad Request")


def _prompts(prompt: object) -> tuple[bytes, ...] | ApiError:
    """`prompt` as a string, token ids, or a list of either; a token id takes the four bytes of one token."""
    if isinstance(prompt, str):
        return (_bytes(prompt),)
    if isinstance(prompt, list) and prompt:
        many = prompt if isinstance(prompt[0], str | list) else [prompt]
        try:
            return tuple(_bytes(one) if isinstance(one, str) else array("I", one).tobytes() for one in many)
        except (TypeError, OverflowError):
            pass  # not token ids: refused below
    return _invalid("string_type", ("prompt",), "Input should be a string, token ids, or a list of either")


def _chat_prompt(data: dict[str, Any]) -> tuple[bytes, ...] | ApiError:
    """ChatML as Qwen's template writes it: turn n + 1 begins with all of turn n and its reply."""
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        return _invalid("list_type", ("messages",), "Input should be a valid list of messages")
    parts = []
    if data.get("tools"):
        parts.append(f"<|im_start|>tools\n{_dump(data['tools']).decode()}<|im_end|>\n")
    for message in messages:
        calls = _dump(message["tool_calls"]).decode() if message.get("tool_calls") else ""
        parts.append(f"<|im_start|>{message.get('role')}\n{_content(message.get('content'))}{calls}<|im_end|>\n")
    parts.append("<|im_start|>assistant\n")
    return (_bytes("".join(parts)),)


def _content(content: object) -> str:
    """A message's text: a string, or parts, of which those that are not text stand for themselves as JSON."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = (part.get("text") if isinstance(part, dict) else None for part in content)
        return "".join(t if isinstance(t, str) else _dump(p).decode() for t, p in zip(texts, content, strict=True))
    return ""


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")
