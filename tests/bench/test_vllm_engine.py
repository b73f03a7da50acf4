"""bench/vllm_engine.py: the scheduler, driven in virtual time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.kv_cache import BYTES_PER_TOKEN, block_hashes
from bench.vllm_engine import Engine, EngineConfig, EngineRequest, Sequence

BLOCK = 4  # tokens
SMALL = EngineConfig(block_size=BLOCK, num_gpu_blocks=13, max_num_seqs=3, max_num_batched_tokens=16)
ROOMY = EngineConfig(block_size=BLOCK, num_gpu_blocks=1000, max_num_batched_tokens=32)


def request(name: str, text: bytes, output: int = 1, *, seed: object = None, reply: bytes = b"") -> EngineRequest:
    """`text` as a prompt at four bytes a token; `reply` is what its output will be."""
    hashes = block_hashes(text + reply, BLOCK, seed)
    return EngineRequest(name, -(-len(text) // BYTES_PER_TOKEN), output, hashes, owner=text)


def tokens(count: int, word: bytes = b"word") -> bytes:
    return word * count


def common(one: bytes, other: bytes) -> int:
    """How many leading bytes two texts share."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def drive(engine: Engine, now: float = 0.0, steps: int = 10_000) -> dict[str, Sequence]:
    """Step until there is nothing to do: the sequences that finished, by name."""
    done = {}
    while (duration := engine.schedule(now)) > 0:
        now += duration
        for sequence in engine.finish_step(now):
            if sequence.finished:
                done[sequence.request.request_id] = sequence
        steps -= 1
        assert steps > 0, "the engine does not come to an end"
    return done


# Prompts of up to five blocks of two kinds, so that they often share a prefix; 12 blocks are there for all of them.
PROMPTS = st.lists(st.sampled_from((b"a" * 16, b"b" * 16, b"c" * 6)), min_size=1, max_size=5).map(b"".join)
ARRIVALS = st.lists(
    st.tuples(PROMPTS, st.integers(1, 20), st.integers(0, 6), st.integers(-1, 12)), min_size=1, max_size=12
)


@settings(deadline=None)
@given(ARRIVALS)
def test_whatever_arrives(arrivals: list[tuple[bytes, int, int, int]]) -> None:
    """Any traffic, with clients that leave: all others finish whole and in order, and no block is lost.

    Arrivals are (prompt, output tokens, step of arrival, step in which the client leaves; before arrival = stays).
    """
    engine = Engine(SMALL)
    order: list[Sequence] = []
    produced: dict[str, int] = {}
    left: set[str] = set()
    step, now = 0, 0.0
    while step <= 12 or engine.in_flight:
        for index, (text, output, arrives, _) in enumerate(arrivals):
            if arrives == step:
                assert engine.submit(request(str(index), text, output), now)
        now += engine.schedule(now)
        for index, (_, _, arrives, leaves) in enumerate(arrivals):
            if arrives <= leaves == step:
                left.add(str(index))
                engine.abort(str(index))
        for sequence in engine.finish_step(now):
            name = sequence.request.request_id
            assert name not in left
            produced[name] = produced.get(name, 0) + 1
            if sequence.generated == 1:
                order.append(sequence)
                seen = [text for text, _, arrives, _ in arrivals if arrives <= step]
                assert sequence.cached_tokens * BYTES_PER_TOKEN <= max(common(sequence.request.owner, t) for t in seen)
        assert 0.0 <= engine.stats.kv_usage <= 1.0
        assert 0 <= engine.stats.running <= SMALL.max_num_seqs
        step += 1
        assert step < 10_000, "the engine does not come to an end"
    assert engine.cache.free == engine.cache.capacity
    for index, (_, output, _, _) in enumerate(arrivals):
        assert produced.get(str(index), 0) == output or str(index) in left
    assert sum(produced.values()) == engine.stats.generation_tokens
    assert engine.stats.prefix_hits <= engine.stats.prefix_queries
    first_scheduled = {sequence.request.request_id: sequence.scheduled for sequence in order}
    arrived = sorted(first_scheduled, key=lambda name: (arrivals[int(name)][2], int(name)))
    assert [first_scheduled[name] for name in arrived] == sorted(first_scheduled.values())


def play(arrivals: list[tuple[bytes, int, int]], most: int) -> tuple[Engine, dict[str, tuple[float, float, int, int]]]:
    """Requests (prompt, output tokens, ms of arrival) through an engine that is asked for `most` steps at once.

    For each its first token's and its last token's time, hits and preemptions.
    """
    engine = Engine(SMALL)
    coming = sorted(
        (milliseconds / 1000, index, request(str(index), text, output))
        for index, (text, output, milliseconds) in enumerate(arrivals)
    )
    done, now = {}, 0.0
    while coming or engine.in_flight:
        duration = engine.schedule(now, most)
        if duration == 0.0:
            now = max(now, coming[0][0])
        began, ends = now, now + engine.steps * duration
        while coming and coming[0][0] <= ends:
            arrived, _, submitted = coming.pop(0)
            engine.submit(submitted, arrived)
            if duration:
                engine.cut(int((arrived - began) / duration) + 1)
                ends = began + engine.steps * duration
        if duration == 0.0:
            continue
        now = ends
        for sequence in engine.finish_step(now):
            if sequence.finished:
                times = (sequence.first_token, sequence.last_token)
                done[sequence.request.request_id] = (*times, sequence.cached_tokens, sequence.preemptions)
    return engine, done


@settings(deadline=None)
@given(st.lists(st.tuples(PROMPTS, st.integers(1, 28), st.integers(0, 400)), min_size=1, max_size=8))
def test_several_steps_at_once_are_the_same_steps(arrivals: list[tuple[bytes, int, int]]) -> None:
    """Whatever arrives: the same times, hits and preemptions, and the same counters, as step by step."""
    (one, expected), (other, found) = play(arrivals, 1), play(arrivals, 50)
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values)
    for read in ("generation_tokens", "prefix_hits", "preemptions", "running", "waiting", "kv_usage"):
        assert getattr(other.stats, read) == getattr(one.stats, read)
    for histogram in ("inter_token", "first_token", "step_tokens", "e2e"):
        assert getattr(other.stats, histogram).count == getattr(one.stats, histogram).count
        assert getattr(other.stats, histogram).sum == pytest.approx(getattr(one.stats, histogram).sum)


def test_steps_are_taken_at_once_only_while_alike() -> None:
    """A step that computes a prompt is one; then as many as the shortest answer lasts, the blocks suffice, or asked."""
    engine = Engine(ROOMY)
    for name, output in (("short", 11), ("long", 40)):
        engine.submit(request(name, tokens(8, name[:4].encode()), output), 0.0)
    now, steps = 0.0, []
    while (duration := engine.schedule(now, 15)) > 0:
        steps.append(engine.steps)
        now += engine.steps * duration
        engine.finish_step(now)
    assert steps == [1, 10, 15, 14]
    tight = Engine(replace(SMALL, num_gpu_blocks=8))  # seven blocks; the prompts take four, and one each is left
    for name in ("old", "young"):
        tight.submit(request(name, tokens(8, name[:4].encode().ljust(4)), 20), 0.0)
    tight.finish_step(tight.schedule(0.0, 50))
    assert (tight.schedule(1.0, 50) > 0, tight.steps) == (True, 1)


@settings(deadline=None)
@given(PROMPTS, PROMPTS)
def test_a_hit_is_exactly_the_shared_full_blocks(one: bytes, other: bytes) -> None:
    """After `one`, `other` finds every block they share, but never all of its own prompt."""
    engine = Engine(ROOMY)
    engine.submit(request("one", one), 0.0)
    drive(engine)
    engine.submit(request("other", other), 1.0)
    sequence = drive(engine, 1.0)["other"]
    shared = common(one, other) // 16
    assert sequence.cached_tokens == min(shared, (sequence.request.prompt_tokens - 1) // BLOCK) * BLOCK


def test_another_salt_never_hits() -> None:
    """The same prompt under another hash seed is computed in full."""
    engine = Engine(ROOMY)
    for name in ("one", "two"):
        engine.submit(request(name, tokens(40), seed=name), 0.0)
    assert [sequence.cached_tokens for sequence in drive(engine).values()] == [0, 0]


def test_a_prompt_is_computed_in_chunks_and_timed() -> None:
    """100 tokens at 32 a step take four steps, each costing its base and its tokens; the token comes at the end."""
    engine = Engine(ROOMY)
    engine.submit(request("one", tokens(100), 2), 0.0)
    durations, now, counts = [], 0.0, []
    for _ in range(5):
        durations.append(engine.schedule(now))
        now += durations[-1]
        counts.append(len(engine.finish_step(now)))
    prefill = [ROOMY.step_base + n * ROOMY.step_per_prefill_token for n in (32, 32, 32, 4)]
    assert durations == pytest.approx([*prefill, ROOMY.step_base + ROOMY.step_per_sequence])
    assert counts == [0, 0, 0, 1, 1]
    assert engine.stats.first_token.sum == pytest.approx(sum(prefill))
    assert engine.stats.inter_token.sum == pytest.approx(durations[-1])
    assert engine.schedule(now) == 0.0


def test_speed_divides_every_duration() -> None:
    """Ten times the speed, a tenth of the time."""
    slow, fast = (Engine(EngineConfig(speed=speed)) for speed in (1.0, 10.0))
    for engine in (slow, fast):
        engine.submit(request("one", tokens(100)), 0.0)
    assert slow.schedule(0.0) == pytest.approx(10 * fast.schedule(0.0))


def test_decoding_and_prefill_share_a_step() -> None:
    """Continuous batching: a running sequence gets its token in the step that computes a newcomer's prompt."""
    engine = Engine(ROOMY)
    engine.submit(request("old", tokens(8), 10), 0.0)
    engine.finish_step(engine.schedule(0.0))
    engine.submit(request("new", tokens(31, b"fill"), 10), 0.1)
    assert engine.schedule(0.1) == pytest.approx(
        ROOMY.step_base + 31 * ROOMY.step_per_prefill_token + ROOMY.step_per_sequence
    )
    assert [sequence.request.request_id for sequence in engine.finish_step(0.2)] == ["old", "new"]


def test_the_same_prefix_in_the_same_step_hits() -> None:
    """Blocks are findable once scheduled, so a burst of one prompt is computed once."""
    engine = Engine(EngineConfig(block_size=BLOCK))
    for index in range(10):
        engine.submit(request(str(index), tokens(401), 5), 0.0)
    done = drive(engine)
    assert [done[str(index)].cached_tokens for index in range(10)] == [0] + [400] * 9


def test_the_next_turn_hits_the_last_reply() -> None:
    """Output is cached as well: a conversation's second turn computes only what is new."""
    engine = Engine(ROOMY)
    engine.submit(request("one", tokens(10), 20, reply=tokens(20, b"said")), 0.0)
    drive(engine)
    engine.submit(request("two", tokens(10) + tokens(20, b"said") + tokens(3, b"more")), 1.0)
    assert drive(engine, 1.0)["two"].cached_tokens == 28  # 7 full blocks; the last reply token was never computed


def test_gauges_miss_what_arrived_during_the_step() -> None:
    """The trap: a burst is in no gauge before the first step ends that began after it came."""
    engine = Engine(SMALL)
    seen = []
    engine.submit(request("0", tokens(8), 5), 0.0)
    seen.append((engine.stats.running, engine.stats.waiting))
    engine.schedule(0.0)
    for index in range(1, 6):
        engine.submit(request(str(index), tokens(8), 5), 0.0)
    engine.finish_step(0.1)
    seen.append((engine.stats.running, engine.stats.waiting))
    engine.schedule(0.1)
    engine.finish_step(0.2)
    seen.append((engine.stats.running, engine.stats.waiting))
    assert seen == [(0, 0), (1, 0), (3, 3)]


def test_running_out_of_blocks_preempts_the_youngest() -> None:
    """Two sequences outgrow the blocks: the later one starts over, both finish, and its client lost no token.

    It waits at the head of the queue: one that came later, and would fit, is not let in before it.
    """
    engine = Engine(replace(SMALL, max_num_seqs=2))
    for name in ("old", "young", "last"):
        engine.submit(request(name, tokens(8, name[:4].encode().ljust(4)), 30 if name != "last" else 1), 0.0)
    done = drive(engine)
    assert list(done) == ["old", "last", "young"]
    assert done["last"].scheduled >= done["old"].last_token
    assert (done["old"].preemptions, done["young"].preemptions) == (0, 1)
    assert done["young"].generated == 30
    assert (engine.stats.preemptions, engine.stats.request_preemptions.sum) == (1, 1)
    assert engine.stats.prefix_queries == 24  # the second time round is not another query


def test_the_admission_limit_counts_all_in_flight() -> None:
    """max_num_queued_reqs bounds waiting plus running; a finished request makes room."""
    engine = Engine(EngineConfig(max_num_queued_reqs=2))
    assert [engine.submit(request(str(n), tokens(4)), 0.0) for n in range(3)] == [True, True, False]
    assert engine.stats.rejections == 1
    drive(engine)
    assert engine.submit(request("3", tokens(4)), 1.0)


def test_resetting_the_prefix_cache_makes_the_next_request_cold() -> None:
    """POST /reset_prefix_cache between benchmark runs."""
    engine = Engine(ROOMY)
    cached = []
    for index in range(3):
        engine.submit(request(str(index), tokens(40)), 0.0)
        cached.append(drive(engine)[str(index)].cached_tokens)
        if index == 1:
            engine.reset_prefix_cache()
    assert cached == [0, 36, 0]


def test_running_and_waiting_adapters_are_told() -> None:
    """lora_requests_info's content: which adapters run and wait, and when that was last so."""
    engine = Engine(EngineConfig(max_num_seqs=1))
    for name in ("code", "chat"):
        engine.submit(EngineRequest(name, 4, 1, adapter=name), 0.0)
    engine.schedule(0.0)
    engine.finish_step(5.0)
    assert engine.stats.lora == {("", "chat"): 5.0}


@pytest.mark.parametrize("option", ["block_size", "speed", "max_num_seqs", "step_base"])
def test_impossible_options_are_refused_with_a_sentence(option: str) -> None:
    """The constructor names the option and its value."""
    with pytest.raises(ValueError, match=f"{option} must be above 0, not 0"):
        EngineConfig(**{option: 0})


def test_a_request_that_can_never_fit_is_the_drivers_mistake() -> None:
    """Longer than the context, or an id that is in flight: ValueError, and nothing is queued."""
    engine = Engine(SMALL)
    with pytest.raises(ValueError, match="context of 48"):
        engine.submit(request("one", tokens(48), 1), 0.0)
    engine.submit(request("one", tokens(4), 1), 0.0)
    with pytest.raises(ValueError, match="already in flight"):
        engine.submit(request("one", tokens(4), 1), 0.0)
    assert engine.in_flight == 1
