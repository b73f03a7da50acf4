"""bench/live*.py: what is sent, what is made of what was seen, and one short run of it all."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest

from bench.live import ROUTES, main, measure
from bench.live_figures import Run, Sample, figures, picture, table
from bench.live_shapes import RANDOM, SHAPES, SHARED, Shape, bodies, in_flight, throughput
from bench.load import Answer
from bench.stack import Stack, fleet_options, plan, write_manifests

SAMPLES = (
    Sample(0.0, (0.0, 0.9), 0.0, 5.0),  # the warm-up: in no figure
    Sample(2.0, (0.2, 0.4), 100.0, 5.0),
    Sample(3.0, (0.3, 0.3), 200.0, 5.0),
    Sample(4.0, (0.1, 0.7), 500.0, 7.0),
)
ANSWERS = (
    Answer(ttft=0.1, seconds=1.1, prompt_tokens=100, cached_tokens=50, output_tokens=11),
    Answer(ttft=0.3, seconds=0.7, prompt_tokens=100, cached_tokens=0, output_tokens=3),
    Answer(ttft=0.2, seconds=0.2, prompt_tokens=200, cached_tokens=150, output_tokens=1),
    Answer(ttft=9.0, error="HTTP 503"),
)
RUN = Run("random", "8080", 2.0, ANSWERS, SAMPLES)


# --- what is sent


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_requests_are_their_seed(shape: Shape) -> None:
    """Equal seeds give equal bytes, other seeds other ones; lengths are the shape's."""
    first, again, other = (list(islice(bodies(shape, 2, seed), 40)) for seed in (1, 1, 2))
    assert first == again
    assert not set(first) & set(other)
    for body in map(json.loads, first):
        assert shape.output[0] <= body["max_completion_tokens"] <= shape.output[1]
        assert body["ignore_eos"]
        question = body["messages"][-1]["content"]
        assert shape.question[0] * 4 <= len(question) <= shape.question[1] * 4


def test_random_prompts_share_nothing_and_the_others_do() -> None:
    """No two random prompts begin alike; the others begin with as many system prompts as pods have."""
    texts = sorted(json.loads(body)["messages"][0]["content"] for body in islice(bodies(RANDOM, 8, 1), 200))
    assert all(one[:40] != other[:40] for one, other in pairwise(texts))
    messages = [json.loads(body)["messages"] for body in islice(bodies(SHARED, 2, 1), 300)]
    systems = {system["content"] for system, _ in messages}
    assert len(systems) == 2 * SHARED.systems
    assert all(SHARED.system[0] * 4 <= len(system) <= SHARED.system[1] * 4 for system in systems)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_load_is_the_share_asked_for(shape: Shape) -> None:
    """The found number gives the share of the most a pod can, one less does not, and more than fits gives no more."""
    count = in_flight(shape, 2, 0.75, seed=1)
    most = throughput(shape, 2, 100, seed=1)
    assert throughput(shape, 2, count, seed=1) >= 0.75 * most
    assert throughput(shape, 2, count - 1, seed=1) < 0.75 * most
    assert throughput(shape, 2, 200, seed=1) == pytest.approx(most, rel=0.02)


# --- what is made of it


def test_figures_are_of_the_time_that_counts() -> None:
    """Sums by hand; the warm-up and answers with an error are in none but the errors."""
    found = figures(RUN)
    assert (found.requests, found.errors) == (4, 1)
    assert found.ttft_mean == pytest.approx(0.2)
    assert (found.ttft_p50, found.ttft_p99) == (0.2, 0.3)
    assert found.token_time == pytest.approx((1.0 / 10 + 0.4 / 2) / 2)  # one token alone has no time between
    assert found.token_rate == pytest.approx(400 / 2)
    assert found.hit_ratio == pytest.approx(0.5)
    assert found.preemptions == 2
    assert found.kv_usage == pytest.approx((0.3 + 0.3 + 0.4) / 3)
    assert (found.spread_mean, found.spread_most) == pytest.approx(((0.2 + 0.0 + 0.6) / 3, 0.6))
    assert (found.deviation_mean, found.deviation_most) == pytest.approx(((0.1 + 0.0 + 0.3) / 3, 0.3))


def test_nothing_seen_is_nothing_told() -> None:
    """No answers and no samples: dashes, and no ratio to them; no error, and no zero either."""
    empty = Run("random", "8081", 2.0, (), ())
    assert math.isnan(figures(empty).ttft_p99)
    assert math.isnan(figures(empty).spread_most)
    _, row, ratios = table("t", [RUN, empty]).rows
    assert row == ("random, 8081", "0", *("-" * (len(row) - 2)))
    assert ratios == ("x", *("" for _ in row[1:]))


def test_the_table_compares_within_a_shape() -> None:
    """Ratios are to the first run of the same shape, which has none itself; there is none to 0."""
    half = Run("random", "8081", 2.0, tuple(Answer(ttft=0.1, seconds=0.2) for _ in range(3)), SAMPLES)
    other = Run("shared", "8080", 2.0, ANSWERS, SAMPLES)
    same = Run("shared", "8081", 2.0, ANSWERS, SAMPLES)
    made = table("t", [RUN, half, other, same])
    assert [row[0] for row in made.rows] == ["random, 8080", "random, 8081", "x", "shared, 8080", "shared, 8081", "x"]
    ratios = dict(zip(made.columns, made.rows[2], strict=True))
    assert (ratios["TTFT mean ms"], ratios["tokens/s"], ratios["prefix hits %"]) == ("0.50", "1.00", "")
    assert ratios["requests"] == ""
    assert set(made.rows[5][1:]) == {"", "1.00"}


def test_the_picture_has_a_line_for_each_pod() -> None:
    """All pods of all runs, equal bytes for equal input, and small for the runs that are in docs/."""
    long = tuple(Sample(float(at), tuple((at * place % 7) / 7 for place in range(8)), 0, 0) for at in range(60))
    runs = [Run(shape.name, route.name, 8.0, (), long) for shape in SHAPES for route in ROUTES]
    names = [f"qwen-{index}" for index in range(8)]
    drawn = picture(runs, names)
    assert drawn == picture(runs, names)
    assert drawn.count("<polyline") == 8 * len(runs)
    assert all(f"{run.shape}, {run.route}" in drawn for run in runs)
    assert len(drawn) < 150_000
    assert picture([Run("random", "8080", 8.0, (), ())], names).count("<polyline") == 0


# --- the command


@pytest.mark.parametrize(
    "arguments",
    [
        ("--pods", "1"),
        ("--seconds", "1"),
        ("--load", "0"),
        ("--shape", "x"),
        ("--plot", "/none/x.svg"),
        ("--plot", "/"),
    ],
)
def test_a_wrong_option_is_said(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2 and the option's name before anything starts, and no traceback."""
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    text = capsys.readouterr().err
    assert (raised.value.code, arguments[0] in text, "Traceback" in text) == (2, True, False)


@pytest.mark.alone
@pytest.mark.envoy
async def test_a_run_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real Envoy, two pods: all is answered through the pool, tokens and caches are seen, and no longer than asked."""
    where = plan(2)
    write_manifests(where, tmp_path / "config", "DEFAULT")
    shape = replace(SHARED, output=(20, 30))
    async with Stack(where, tmp_path / "config", tmp_path, fleet_options(shape.config, 2, slow=False)) as stack:
        run, _ = await measure(shape, ROUTES[1], stack, 4, seconds=1.6, seed=1, warm=0.5)
    found = figures(run)
    assert found.requests > 0
    assert found.errors == 0
    assert {answer.pod for answer in run.answers} <= {"qwen-0", "qwen-1"}
    assert found.token_rate > 0
    assert found.token_time > 0
    assert 0 < found.kv_usage < 1
    assert [round(sample.at) for sample in run.samples] == [0, 1, 2]
    assert not re.search("Traceback", capsys.readouterr().err)
