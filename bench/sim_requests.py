"""What a simulated fleet is asked: sessions of turns, read from a trace or generated. Pure; seeded.

A session is one client: its first turn is sent when the session starts, each further one `pause` seconds after the
answer before it was complete, and contains that answer. A trace's requests are sessions of one turn each.

Texts are `BYTES_PER_TOKEN` bytes a token. A piece of text is named by a number, and pieces of one number are equal; a
body is written only when it is sent, so a workload of a million tokens takes little memory.

    chat      conversations under one of several system prompts
    rag       one question about one of many documents (Zipf)
    prefixes  short conversations under long shared prompts (Zipf)
    agent     long sessions that grow with each tool's result, and fork sub-agents that begin with all of it
    random    prompts that share nothing
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from bench.kv_cache import BYTES_PER_TOKEN, block_hashes

BLOCK = 64  # tokens of a KV block: four of vLLM's, for a quarter of the work
TRACE_BLOCK = 512  # tokens that one of a trace's hash_ids stands for
MODEL = b"model"
LONGEST = 200_000  # tokens of prompt and output: traces were made with a context of 128k and go a little beyond it


@dataclass(frozen=True, slots=True)
class Piece:
    """A text of `tokens` tokens; `role` is its message's, "" in a completion."""

    role: str
    number: int
    tokens: int

    @property
    def text(self) -> str:
        return (f"{self.number:016x}" * (self.tokens // 4 + 1))[: self.tokens * BYTES_PER_TOKEN]


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One request. `hashes` are those of its prompt's and its output's full KV blocks, as the engine chains them.

    `pause` is in seconds, from the answer before. `forks` are sessions that start when this one is answered.
    """

    pieces: tuple[Piece, ...]
    prompt_tokens: int
    output_tokens: int
    hashes: tuple[int, ...]
    pause: float = 0.0
    forks: tuple[Session, ...] = ()

    def text(self, most: int = 1 << 40) -> bytes:
        """The messages as JSON, or a completion's prompt, about `most` bytes of it: what an endpoint picker hashes."""
        chat, written, size = bool(self.pieces[0].role), [], 0
        for piece in self.pieces:
            written.append(f'{{"role":"{piece.role}","content":"{piece.text}"}}' if chat else piece.text)
            size += len(written[-1])
            if size >= most:
                break
        return f"[{','.join(written)}]".encode() if chat else "".join(written).encode()

    def body(self) -> bytes:
        """The request's JSON."""
        if self.pieces[0].role:
            return b'{"model":"%b","messages":%b}' % (MODEL, self.text())
        return b'{"model":"%b","prompt":"%b"}' % (MODEL, self.text())


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """A client's turns. `start` is in seconds, of a fork after the answer that it forks from."""

    start: float
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """Where sessions come from.

    `sessions(rate, pods, seed)` yields them in order of their start, without end unless it is a trace, at `rate`
    requests a second on average; what is shared (documents, system prompts) grows with `pods`. Requests that are sent
    from `warm` to `span` seconds are measured; of a trace these are shares of its whole length.
    """

    name: str
    sessions: Callable[[float, int, int], Iterator[Session]]
    warm: float
    span: float
    trace: bool = False


# --- traces -----------------------------------------------------------------------------------------------------------


class TraceError(ValueError):
    """A line that is no request; says which and why."""


def read_trace(lines: Iterable[str]) -> tuple[Session, ...]:
    """Mooncake's JSON lines (https://github.com/kvcache-ai/Mooncake, FAST25 release), in order of their timestamps.

    `timestamp` in milliseconds; `input_length` and `output_length` in tokens; `hash_ids`: equal numbers stand for equal
    prefixes up to and with this block of 512 tokens. What a request answers is not known, and so not found again.
    """
    sessions = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            start, tokens, output = row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"])
            ids = [int(each) for each in row["hash_ids"]]
        except (ValueError, TypeError, KeyError) as error:
            raise TraceError(f"line {number}: {type(error).__name__}: {error}") from error
        if not 0 < tokens <= len(ids) * TRACE_BLOCK:
            raise TraceError(f"line {number}: {len(ids)} hash_ids do not cover an input_length of {tokens}")
        tokens = min(tokens, LONGEST)
        output = min(max(1, output), LONGEST - tokens + 1)
        sizes = [min(TRACE_BLOCK, tokens - at) for at in range(0, tokens, TRACE_BLOCK)]
        pieces = tuple(Piece("", each, size) for each, size in zip(ids, sizes, strict=False))
        hashes = tuple(piece.number * TRACE_BLOCK + at for piece in pieces for at in range(piece.tokens // BLOCK))
        sessions.append(Session(start, (Turn(pieces, tokens, output, hashes),)))
    if not sessions:
        raise TraceError("no requests")
    sessions.sort(key=lambda session: session.start)
    return tuple(sessions)


def trace_workload(name: str, sessions: tuple[Session, ...]) -> Workload:
    """The trace, played faster or slower so that it has the rate that is asked for."""
    first, last = sessions[0].start, sessions[-1].start
    length = max(last - first, 1e-3)

    def play(rate: float, pods: int, seed: int) -> Iterator[Session]:  # noqa: ARG001 - a trace is what it is
        factor = len(sessions) / (length * rate)
        return (Session((session.start - first) * factor, session.turns) for session in sessions)

    return Workload(name, play, warm=0.1, span=0.97, trace=True)


# --- generators -------------------------------------------------------------------------------------------------------

FILL = 60.0  # seconds at half the rate: a fleet whose caches are all empty at once is another question


class _Draw(random.Random):
    """Random numbers in the shapes that traffic has."""

    def long(self, mean: float, least: int, most: int) -> int:
        """A length in tokens, exponential about `mean`, within bounds."""
        return min(most, max(least, round(self.expovariate(1 / mean))))

    def rank(self, weights: tuple[float, ...]) -> int:
        """An index, by cumulated weights."""
        return self.choices(range(len(weights)), cum_weights=weights)[0]

    def text(self) -> int:
        """The number of a text nobody else has."""
        return self.getrandbits(63)


def zipf(count: int, exponent: float) -> tuple[float, ...]:
    """Cumulated weights k ** -exponent."""
    return tuple(accumulate(k**-exponent for k in range(1, count + 1)))


def _turn(pieces: tuple[Piece, ...], answer: Piece, pause: float, forks: tuple[Session, ...] = ()) -> Turn:
    text = "".join(piece.text for piece in (*pieces, answer)).encode()
    prompt = sum(piece.tokens for piece in pieces)
    return Turn(pieces, prompt, answer.tokens, block_hashes(text, BLOCK), pause, forks)


def _talk(draw: _Draw, pieces: tuple[Piece, ...], turns: Iterable[tuple[str, int, int, float]]) -> Iterator[Turn]:
    """Turns of (role, tokens added, tokens answered, pause), each on top of all before it."""
    for role, added, answered, pause in turns:
        pieces = (*pieces, Piece(role, draw.text(), added))
        answer = Piece("assistant", draw.text(), answered)
        yield _turn(pieces, answer, pause)
        pieces = (*pieces, answer)


def _poisson(draw: _Draw, rate: float, make: Callable[[], tuple[Turn, ...]], each: float) -> Iterator[Session]:
    """Sessions of `each` requests on average, so many that requests come at `rate`; at half of it while caches fill."""
    start = 0.0
    while True:
        start += draw.expovariate(rate / each * (0.5 if start < FILL else 1.0))
        yield Session(start, make())


def _chat(rate: float, pods: int, seed: int) -> Iterator[Session]:
    """Two system prompts a pod of 500 to 3,000 tokens; 1 to 8 turns; people who type for some seconds."""
    draw = _Draw(seed)
    prompts = tuple(Piece("system", draw.text(), draw.randint(500, 3000)) for _ in range(2 * pods))
    weights = zipf(len(prompts), 0.8)

    def conversation() -> tuple[Turn, ...]:
        shape = [
            ("user", draw.long(120, 10, 2000), draw.long(250, 10, 1500), 2 + draw.expovariate(1 / 6))
            for _ in range(draw.randint(1, 8))
        ]
        return tuple(_talk(draw, (prompts[draw.rank(weights)],), shape))

    return _poisson(draw, rate, conversation, 4.5)


def _rag(rate: float, pods: int, seed: int) -> Iterator[Session]:
    """A hundred documents a pod of 2,000 to 10,000 tokens, more than its KV cache holds; one question each time."""
    draw = _Draw(seed)
    system = Piece("system", draw.text(), 300)
    documents = tuple(Piece("user", draw.text(), draw.randint(2000, 10_000)) for _ in range(100 * pods))
    weights = zipf(len(documents), 1.0)

    def question() -> tuple[Turn, ...]:
        shape = [("user", draw.long(60, 10, 300), draw.long(200, 10, 1000), 0.0)]
        return tuple(_talk(draw, (system, documents[draw.rank(weights)]), shape))

    return _poisson(draw, rate, question, 1.0)


def _prefixes(rate: float, pods: int, seed: int) -> Iterator[Session]:
    """Forty prompts a pod of 10,000 tokens, three short turns under one of them, 100 tokens an answer."""
    draw = _Draw(seed)
    prompts = tuple(Piece("system", draw.text(), 10_000) for _ in range(40 * pods))
    weights = zipf(len(prompts), 0.9)

    def conversation() -> tuple[Turn, ...]:
        shape = [("user", draw.randint(50, 150), 100, draw.uniform(1.0, 3.0)) for _ in range(3)]
        return tuple(_talk(draw, (prompts[draw.rank(weights)],), shape))

    return _poisson(draw, rate, conversation, 3.0)


AGENT_TURNS, FORK_SHARE, FORK_TURNS = (8, 24), 0.06, 4


def _agent(rate: float, pods: int, seed: int) -> Iterator[Session]:  # noqa: ARG001 - there are four, however many pods
    """Four agents, whose tools and instructions are 6,000 to 14,000 tokens; a tool's result each turn, some forked.

    A fork is a sub-agent that goes on from all that its parent has said, beside it.
    """
    draw = _Draw(seed)
    agents = tuple(Piece("system", draw.text(), draw.randint(6000, 14_000)) for _ in range(4))

    def shape(turns: int) -> Iterator[tuple[str, int, int, float]]:
        for turn in range(turns):
            added = draw.long(600, 50, 4000) if turn else draw.long(400, 50, 2000)
            yield "user" if turn == 0 else "tool", added, draw.long(120, 20, 800), 0.2 + draw.expovariate(1 / 1.5)

    def fork(turn: Turn) -> Turn:
        if draw.random() >= FORK_SHARE:
            return turn
        forked = Session(0.2, tuple(_talk(draw, turn.pieces, shape(FORK_TURNS))))
        return replace(turn, forks=(forked,))

    def session() -> tuple[Turn, ...]:
        return tuple(fork(turn) for turn in _talk(draw, (draw.choice(agents),), shape(draw.randint(*AGENT_TURNS))))

    return _poisson(draw, rate, session, sum(AGENT_TURNS) / 2 * (1 + FORK_SHARE * FORK_TURNS))


def _random(rate: float, pods: int, seed: int) -> Iterator[Session]:  # noqa: ARG001 - nothing is shared
    """Prompts of 1,550 tokens that nobody sent before, 450 tokens an answer."""
    draw = _Draw(seed)

    def prompt() -> tuple[Turn, ...]:
        return tuple(_talk(draw, (), [("user", 1550, 450, 0.0)]))

    return _poisson(draw, rate, prompt, 1.0)


GENERATED = (
    Workload("chat", _chat, warm=180, span=300),
    Workload("rag", _rag, warm=120, span=270),
    Workload("prefixes", _prefixes, warm=110, span=260),
    Workload("agent", _agent, warm=150, span=400),
    Workload("random", _random, warm=90, span=290),
)
