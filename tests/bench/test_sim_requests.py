"""bench/sim_requests.py: what is sent is what the trace or the generator says, for picker and engine alike."""

from __future__ import annotations

import json
from itertools import islice, takewhile

import pytest

from bench.kv_cache import BYTES_PER_TOKEN
from bench.sim_requests import (
    BLOCK,
    FILL,
    GENERATED,
    LONGEST,
    Session,
    TraceError,
    Turn,
    Workload,
    read_trace,
    trace_workload,
)
from picker.prefix import CHUNK_TOKENS, chunk_hashes
from picker.prompt import read_prompt


def line(timestamp: int, tokens: int, ids: list[int], output: int = 10) -> str:
    return json.dumps({"timestamp": timestamp, "input_length": tokens, "output_length": output, "hash_ids": ids})


def seen(turn: Turn) -> list[bytes]:
    """What the picker makes of a body."""
    prompt = read_prompt(turn.body())
    assert prompt is not None
    return chunk_hashes(prompt)


def common(one: tuple[int, ...] | list[bytes], other: tuple[int, ...] | list[bytes]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def some(workload: Workload, count: int, seed: int = 1) -> list[Session]:
    return list(islice(workload.sessions(50.0, 4, seed), count))


def test_a_trace_shares_what_its_hash_ids_share() -> None:
    """Equal leading ids are equal text for the picker and equal blocks for the engine, and nothing else is."""
    lines = (line(0, 1200, [7, 8, 9]), line(100, 1500, [7, 8, 10]), line(50, 600, [11, 12], 3))
    one, alone, other = (session.turns[0] for session in read_trace(lines))  # in order of their timestamps
    assert common(one.hashes, other.hashes) == 1024 // BLOCK
    assert common(seen(one), seen(other)) == 1024 // CHUNK_TOKENS
    assert common(one.hashes, alone.hashes) == common(seen(one), seen(alone)) == 0
    assert [turn.prompt_tokens for turn in (one, alone, other)] == [1200, 600, 1500]
    assert [turn.output_tokens for turn in (one, alone, other)] == [10, 3, 10]
    assert len(one.hashes) == 1200 // BLOCK  # of full blocks, the last id's partial ones included
    assert json.loads(one.body())["prompt"] == one.text().decode()
    assert len(one.text()) == 1200 * BYTES_PER_TOKEN


def test_a_trace_is_played_at_the_rate_asked_for() -> None:
    """Its own order and bursts, from 0 on, in the time that so many requests take."""
    sessions = read_trace(line(at, 100, [at]) for at in (1000, 1000, 2000, 5000))
    played = list(trace_workload("t", sessions).sessions(2.0, 8, 1))
    assert [session.start for session in played] == [0.0, 0.0, 0.5, 2.0]
    assert [session.turns for session in played] == [session.turns for session in sessions]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["{}"], "line 1: KeyError"),
        ([line(0, 100, [1]), "no JSON"], "line 2: JSONDecodeError"),
        (["[]"], "line 1: TypeError"),
        ([line(0, 513, [1])], "1 hash_ids do not cover an input_length of 513"),
        ([line(0, 0, [1])], "do not cover"),
        ([], "no requests"),
    ],
)
def test_what_is_no_trace_is_told(lines: list[str], words: str) -> None:
    """Which line, and what is wrong with it."""
    with pytest.raises(TraceError, match=words):
        read_trace(lines)


def test_a_request_longer_than_the_context_is_cut() -> None:
    """Prompt and output together fit, and there is some output."""
    (session,) = read_trace([line(0, 250_000, list(range(489)), 5000)])
    (turn,) = session.turns
    assert (turn.prompt_tokens, turn.output_tokens) == (LONGEST, 1)
    assert sum(piece.tokens for piece in turn.pieces) == LONGEST


@pytest.mark.parametrize("workload", GENERATED, ids=lambda workload: workload.name)
def test_generated_traffic(workload: Workload) -> None:
    """Sizes of body and prompt agree, the rate is the one asked for, and a seed says everything."""
    sessions = some(workload, 30)
    for turn in (turn for session in sessions for turn in session.turns):
        prompt = read_prompt(turn.body())
        assert prompt is not None
        roles = sum(len(f"\0{piece.role}\0") for piece in turn.pieces)
        assert len(prompt.text) == turn.prompt_tokens * BYTES_PER_TOKEN + roles
        assert len(turn.hashes) == (turn.prompt_tokens + turn.output_tokens) // BLOCK
        assert turn.text(100)[:100] == turn.text()[:100]
    again = [(session.start, [turn.body() for turn in session.turns]) for session in some(workload, 3)]
    assert again == [(session.start, [turn.body() for turn in session.turns]) for session in sessions[:3]]
    assert again != [(s.start, [turn.body() for turn in s.turns]) for s in some(workload, 3, seed=2)]


@pytest.mark.parametrize("workload", GENERATED, ids=lambda workload: workload.name)
def test_the_rate_is_in_requests(workload: Workload) -> None:
    """Turns and forks counted; half of it while the caches fill."""
    rate, end = 4.0, FILL + 400.0
    sessions = list(takewhile(lambda session: session.start < end, workload.sessions(rate, 1, 1)))
    requests = sum(
        len(session.turns) + sum(len(fork.turns) for turn in session.turns for fork in turn.forks)
        for session in sessions
        if session.start >= FILL
    )
    assert requests == pytest.approx(rate * 400, rel=0.25)


def test_the_next_turn_contains_the_one_before() -> None:
    """For the picker every full chunk of it, for the engine every full block, the answer included."""
    by_name = {workload.name: workload for workload in GENERATED}
    for name in ("chat", "agent", "prefixes"):
        session = next(session for session in some(by_name[name], 50) if len(session.turns) > 2)
        for one, other in zip(session.turns, session.turns[1:], strict=False):
            assert common(seen(one), seen(other)) == len(seen(one))
            assert common(one.hashes, other.hashes) == len(one.hashes)


def test_a_fork_goes_on_from_its_parent() -> None:
    """All that its parent was asked is in it; random prompts have nothing in common."""
    by_name = {workload.name: workload for workload in GENERATED}
    turn = next(turn for session in some(by_name["agent"], 50) for turn in session.turns if turn.forks)
    child = turn.forks[0].turns[0]
    assert common(child.hashes, turn.hashes) == turn.prompt_tokens // BLOCK
    one, other = (session.turns[0] for session in some(by_name["random"], 2))
    assert common(one.hashes, other.hashes) == common(seen(one), seen(other)) == 0
