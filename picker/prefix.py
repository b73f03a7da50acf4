"""Chained hashes of a prompt's chunks: two prompts share their first k hashes exactly when they share k chunks. Pure.

This is the specification; an implementation that follows it gives the same hashes. H(x) is the first 8 bytes of the
16-byte digest of MurmurHash3_x64_128, seed 0, h1 before h2, both little-endian (mmh3_x64_128_digest). `+` joins bytes.

    root = H(H(model) + cache_salt)            model and cache_salt in UTF-8, empty when not given
    h[1] = H(root   + text[0:2048])
    h[i] = H(h[i-1] + text[2048*(i-1) : 2048*i])    for i up to the number of full chunks, at most 256

`text` is the canonical text (picker/prompt.py). What is left after the last full chunk is not hashed: the next turn of
the conversation would cut it elsewhere. So a prompt below 2,048 bytes has no hashes and is balanced by load alone; it
has at most 512 tokens of prefill to save, which a handful of running requests outweighs (picker/cost.py).
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
    link = _digest(_digest(prompt.model.encode())[:8] + prompt.cache_salt.encode())[:8]
    hashes = []
    for start in range(0, min(len(text) // CHUNK, MAX_CHUNKS) * CHUNK, CHUNK):
        link = _digest(link + text[start : start + CHUNK])[:8]
        hashes.append(link)
    return hashes
