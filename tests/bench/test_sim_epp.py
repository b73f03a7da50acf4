"""bench/sim_epp.py: the endpoint picker's default profile, on cases worked out by hand."""

from __future__ import annotations

from random import Random

import pytest

from bench.sim_epp import BLOCK, BLOCKS, EndpointPicker, Gauges, block_hashes


def text(word: str, blocks: int) -> bytes:
    return (word * BLOCK)[:BLOCK].encode() * blocks


def picker(capacity: int = 1000) -> EndpointPicker:
    return EndpointPicker(capacity, Random(1))


IDLE = {"a": Gauges(), "b": Gauges(), "c": Gauges()}


@pytest.mark.parametrize(
    ("gauges", "scores"),
    [
        ({"a": Gauges(), "b": Gauges()}, {"a": 4.0, "b": 4.0}),  # all wait alike: 1 each
        ({"a": Gauges(2), "b": Gauges(0)}, {"a": 2.0, "b": 4.0}),  # the longest queue 0, the shortest 1
        ({"a": Gauges(8), "b": Gauges(2), "c": Gauges(4)}, {"a": 2.0, "b": 4.0, "c": 2.0 + 2.0 * 4 / 6}),
        ({"a": Gauges(0, 0.9), "b": Gauges(0, 0.25)}, {"a": 2.2, "b": 3.5}),
        ({"a": Gauges(1, 0.5), "b": Gauges(0, 1.0)}, {"a": 1.0, "b": 2.0}),
    ],
)
def test_queue_and_kv_cache(gauges: dict[str, Gauges], scores: dict[str, float]) -> None:
    """2 * queue + 2 * (1 - KV use), with nothing sent before."""
    assert picker().scores(block_hashes(text("x", 4)), gauges) == pytest.approx(scores)


def test_the_prefix_counts_by_its_share_of_the_prompt() -> None:
    """3 * blocks sent there / blocks of the prompt, for each pod by itself; a prompt below a block has no share."""
    asked = picker()
    assert asked.pick(text("x", 4), {"a": Gauges()}) == "a"
    assert asked.pick(text("x", 2), {"b": Gauges()}) == "b"
    prompt = text("x", 4) + text("y", 4)
    scores = asked.scores(block_hashes(prompt), IDLE)
    assert scores == pytest.approx({"a": 4 + 3 * 4 / 8, "b": 4 + 3 * 2 / 8, "c": 4})
    assert asked.pick(prompt, IDLE) == "a"
    assert asked.scores(block_hashes(text("z", 4)), IDLE) == {"a": 4, "b": 4, "c": 4}
    assert asked.scores(block_hashes(b"x" * (BLOCK - 1)), IDLE) == {"a": 4, "b": 4, "c": 4}


def test_only_the_beginning_of_a_prompt_is_looked_at() -> None:
    """Prompts that differ beyond 256 blocks of 64 characters are the same prompt."""
    assert BLOCK * BLOCKS == 4 * 4096
    same = text("x", BLOCKS)
    assert block_hashes(same + text("y", 4)) == block_hashes(same + text("z", 400))
    assert len(block_hashes(same)) == BLOCKS
    assert block_hashes(text("y", 1) + same) != block_hashes(same)


def test_the_first_blocks_are_forgotten_first() -> None:
    """An LRU of `capacity` blocks, touched from the first on: one block too many, and the prefix is lost whole."""
    asked = picker(capacity=6)
    asked.pick(text("x", 4), {"a": Gauges()})
    asked.pick(text("y", 2), {"a": Gauges()})
    assert asked.scores(block_hashes(text("x", 4)), {"a": Gauges()}) == {"a": 7.0}
    asked.pick(text("z", 1), {"a": Gauges()})
    assert asked.scores(block_hashes(text("x", 4)), {"a": Gauges()}) == {"a": 4.0}
    assert asked.scores(block_hashes(text("z", 1)), {"a": Gauges()}) == {"a": 7.0}


def test_a_pod_that_is_gone_is_forgotten() -> None:
    """Its blocks with it; what other pods were sent stays."""
    asked = picker()
    for pod in "ab":
        asked.pick(text("x", 4), {pod: Gauges()})
    asked.forget("a")
    asked.forget("never known")
    assert asked.scores(block_hashes(text("x", 4)), IDLE) == {"a": 4, "b": 7, "c": 4}
    asked.pick(text("y", 1), {"c": Gauges()})
    assert asked.scores(block_hashes(text("y", 1)), IDLE) == {"a": 4, "b": 4, "c": 7}


def test_equal_scores_are_shared() -> None:
    """Any of the best, and never another."""
    gauges = {"a": Gauges(), "b": Gauges(), "c": Gauges(0, 0.1)}
    asked = picker()
    assert {asked.pick(b"", gauges) for _ in range(50)} == {"a", "b"}
