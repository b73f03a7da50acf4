r"""The prefix hash: what of a request is hashed, and how. Pure.

This is the specification; an implementation that follows it gives the same hashes. tests/picker/vectors.json has
requests with theirs. Two requests share their first k hashes exactly when their model, salt and first k chunks of text
are the same, and the text of a conversation's turn begins with the text of the turn before.

**Notation.** H(x) is the first 8 bytes of the 16-byte digest of MurmurHash3_x64_128 of x, seed 0, h1 before h2, both
little-endian (mmh3_x64_128_digest). `+` joins; `\0` is one zero byte; text is UTF-8. JSON(v) is v without white space:
keys in the order they were sent, of equal ones the last one's value in the place of the first; in strings the escapes
\" \\ \b \f \n \r \t, and \u00xx for the other characters below U+0020, nothing else; integers in decimal; of other
numbers the nearest double as Python's repr writes it (0.1, 5.0, 1e+16, 1e-05).

**Body.** A JSON object in UTF-8, with or without a byte order mark. Its first 2 MiB are read, as if it ended there: an
unfinished string counts as far as it goes. A body that is none, or has no text, has no hashes.

**Text.** Of these the first that there is, and is not empty:

- `messages`, a list: a conversation. `input`, a text: the conversation of one message, of role `user`. `input`, a list
  that begins with an object: a conversation.
- `input`, else `prompt`: a text is itself. A list of integers below 2^32 (token ids) is four little-endian bytes for
  each. A list that begins with a text or a list is these, joined by `\0`; what is neither among them is empty.

A conversation is, in this order, whatever the order of the fields (a chat template's order; empty fields are left out):

    \0tools\0 + JSON(tools)                          a list's objects without their own field cache_control
    \0system\0 + content(system)
    \0system\0 + content(instructions)
    \0 + role + \0 + content [+ \0 + JSON(tool_calls)]    for each message with a field `content`
    \0 + part                                        for each other one: an item of /v1/responses

Each piece opens with a marker and none is closed, so the next turn only appends. content(v) is v if it is a text, the
parts joined by nothing if it is a list, else empty. A part is

- a text: itself;
- an object whose `type` is image, image_url, input_image, image_embeds, computer_screenshot, audio, audio_url,
  input_audio, video, video_url, input_video, file, input_file or document: the 16-byte digest, as 32 lower-case hex
  digits, of JSON(part without cache_control), which has its URL or its data; repeated to 4,096 bytes, for the 1,024
  tokens of a usual image;
- an object whose `text` is a text: that;
- any other object: JSON(part without cache_control, content and output) + content(its content) + content(its output);
- anything else: JSON(part).

Of a text made of more than 20,000 markers, texts and parts, the first 20,000 count.

**Hashes.** `model` and `cache_salt` are empty unless they are texts; the model may be a LoRA adapter's name.

    root = H(H(model) + cache_salt)
    h[1] = H(root   + text[0:2048])
    h[i] = H(h[i-1] + text[2048*(i-1) : 2048*i])     for each full chunk of 2,048 bytes, at most 256

What is left after the last full chunk is not hashed: the next turn would cut it elsewhere.

**Hint.** What the client says belongs together: the value of the pool's session header, else `prompt_cache_key`, a text
that is not empty.

    hint = H(root + "\0hint\0" + value)

It stands before the hashes where one of them is to be a request's key (picker/stateless.py), so a prompt below a chunk
has a key too. Where the cost decides (picker/cost.py), a pod that was sent this hint is taken to hold one chunk of the
prompt, unless the hashes say that it holds more.
"""

from __future__ import annotations

import mmh3

from picker.prompt import BYTES_PER_TOKEN, Prompt

CHUNK = 2048  # bytes: an agent's turn adds a few, and a pod's whole cache is a few thousand
CHUNK_TOKENS = CHUNK // BYTES_PER_TOKEN
MAX_CHUNKS = 256  # 512 KiB, some 131,072 tokens: what differs only beyond a context window is one conversation

_digest = mmh3.mmh3_x64_128_digest


def chunk_hashes(prompt: Prompt) -> list[bytes]:
    """The hashes of the full chunks of `prompt`, 8 bytes each, first chunk first."""
    text = prompt.text
    link = _root(prompt)
    hashes = []
    for start in range(0, min(len(text) // CHUNK, MAX_CHUNKS) * CHUNK, CHUNK):
        link = _digest(link + text[start : start + CHUNK])[:8]
        hashes.append(link)
    return hashes


def hint_hash(prompt: Prompt, session: str) -> bytes | None:
    """The hash of the session header's value, else of the prompt's own `cache_key`; None when both are empty."""
    value = session or prompt.cache_key
    return _digest(_root(prompt) + b"\0hint\0" + value.encode())[:8] if value else None


def _root(prompt: Prompt) -> bytes:
    return _digest(_digest(prompt.model.encode())[:8] + prompt.cache_salt.encode())[:8]
