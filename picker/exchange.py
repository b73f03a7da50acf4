"""What pickers on several machines tell one another: what each has sent to which pod. Pure; time is an argument.

    Picker --tell--> Outbox --a batch each PERIOD--> management server --> the others' Inbox.hear --> their Picker

What another picker has sent is noted as if it had been sent by this one (picker/cost.py), so pickers that hear one
another pick as one. It is advice: batches may be lost or come late, and what is wrong in them costs prefix hits,
nothing else. Every bound on what comes in is here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from google.protobuf.message import DecodeError

from picker.cost import Placed
from picker.memory import WORD, Key, read_keys, write_keys
from picker.pick import Picker
from picker.prefix import MAX_CHUNKS
from xds.wire import exchange_pb2 as pb

PERIOD = 0.1  # seconds between batches: a tenth of it wins nothing (docs/benchmarks.md); a burst is heard of within it
MAX_BATCH = 60_000  # bytes; the management server takes 65,536
PLACED = 32  # bytes of a Placed at most, beside its names and prompts
MAX_PROMPT = (MAX_CHUNKS + 1) * WORD  # bytes: a hint, and the chunks of a prompt
MAX_REQUESTS, MAX_TOKENS = 10_000, 1 << 32  # of a Placed
WORK = 50_000  # chunks noted in a second: 5 % of a core
WORK_AT_ONCE = 10_000  # chunks: 10 ms, in which no request is answered
WORK_PLACED, WORK_PROMPT = 4, 2  # chunks: what takes as long


class Loss(StrEnum):
    """Why what was told is not noted here, or not told."""

    FULL = "full"  # a request or its prompt, more than a batch holds
    UNKNOWN = "unknown"  # of a pod that is not here
    EXCESS = "excess"  # the rest of a batch: more than is noted in a second
    REFUSED = "refused"  # the rest of a batch: it can not be read, or be true


class Outbox:
    """What this process has sent since its last batch. Mutable."""

    def __init__(self) -> None:
        self._size = 0  # bytes that a batch of it has at most
        self._placed: dict[tuple[str, str], tuple[list[int], list[Sequence[Key]]]] = {}  # the sums of a Placed; prompts
        self.full = 0  # requests that did not fit, and prompts, since the start

    def tell(self, pool: str, hash_key: str, tokens: int, uncached: int, chunks: Sequence[Key]) -> None:
        """Note one request of ours; the arguments are a Placed's."""
        name = (pool, hash_key)
        placed = self._placed.get(name)
        if placed is None:
            size = PLACED + len(pool.encode()) + len(hash_key.encode())
            if self._size + size > MAX_BATCH:
                self.full += 1
                return
            self._size += size
            placed = self._placed[name] = [0, 0, 0], []
        sums, prompts = placed
        sums[0] += 1
        sums[1] += tokens
        sums[2] += uncached
        if not chunks:
            return
        size = WORD * (1 + len(chunks))
        if self._size + size > MAX_BATCH:
            self.full += 1
            return
        self._size += size
        prompts.append(chunks)

    def take(self) -> bytes:
        """The next batch; empty when there is nothing to tell."""
        batch = pb.Batch()
        for (pool, hash_key), ((requests, tokens, uncached), prompts) in self._placed.items():
            placed = batch.placed.add(pool=pool, hash_key=hash_key, requests=requests, tokens=tokens, uncached=uncached)
            placed.prompts.extend(map(write_keys, prompts))
        self._placed, self._size = {}, 0
        return batch.SerializeToString()


@dataclass(frozen=True, slots=True)
class Heard:
    """What a message came to: `others` as in exchange.proto, requests that were noted, and what was lost and why.

    `refusal` is the last reason for one, "" for none.
    """

    others: int = 0
    requests: int = 0
    lost: Mapping[Loss, int] = field(default_factory=dict)
    refusal: str = ""


class Inbox:
    """Notes in `picker` what the others tell. Mutable."""

    def __init__(self, picker: Picker) -> None:
        self._picker = picker
        self._work = float(WORK_AT_ONCE)  # that may be done at once
        self._at = 0.0

    def hear(self, message: bytes, now: float) -> Heard:
        """Take an encoded Heard. DecodeError: it is none."""
        heard = pb.Heard.FromString(message)
        self._work = min(WORK_AT_ONCE, self._work + max(0.0, now - self._at) * WORK)
        self._at = now
        requests, refusal = 0, ""
        lost: Counter[Loss] = Counter()
        batches: Sequence[bytes] = heard.batches
        for encoded in batches:
            try:
                requests += self._note(encoded, lost, now)
            except (DecodeError, ValueError) as error:
                lost[Loss.REFUSED] += 1
                refusal = str(error)
        return Heard(heard.others, requests, lost, refusal)

    def _note(self, encoded: bytes, lost: Counter[Loss], now: float) -> int:
        """How many requests of a batch were noted. DecodeError, ValueError: it can not be read, or be true."""
        requests = 0
        if self._work > WORK_PLACED:
            for wire in pb.Batch.FromString(encoded).placed:
                self._work -= WORK_PLACED + sum(WORK_PROMPT + len(prompt) // WORD for prompt in wire.prompts)
                if self._work < 0:
                    break
                placed = _read(wire)
                if self._picker.hear(placed, now):
                    requests += placed.requests
                else:
                    lost[Loss.UNKNOWN] += 1
            else:
                return requests
        lost[Loss.EXCESS] += 1
        return requests


def _read(wire: pb.Placed) -> Placed:
    """ValueError: it can not be true."""
    if not (len(wire.prompts) <= wire.requests <= MAX_REQUESTS and wire.uncached <= wire.tokens <= MAX_TOKENS):
        sums = f"{wire.requests} requests of {wire.tokens} tokens, {wire.uncached} of them uncached"
        raise ValueError(f"{sums}, with {len(wire.prompts)} prompts")
    for prompt in wire.prompts:
        if len(prompt) % WORD or len(prompt) > MAX_PROMPT:
            raise ValueError(f"a prompt of {len(prompt)} bytes")
    prompts = tuple(map(read_keys, wire.prompts))
    return Placed(wire.pool, wire.hash_key, wire.requests, wire.tokens, wire.uncached, prompts)
