"""A rate from counters: what it believes, and how soon."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xds.rates import ALPHA, STEP, UNKNOWN, Rate

growth = st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 100)), max_size=30)


def follow(rate: Rate, steps: list[tuple[float, float, float]], enough: float = 1.0) -> Rate:
    """The rate after pages whose counters grew by (over, under) and whose clock by the third."""
    over, under, at = rate.over, rate.under, max(rate.at, 0.0)
    for more_over, more_under, seconds in steps:
        over, under, at = over + more_over, under + more_under, at + seconds
        rate = rate.follow(over, under, at, enough)
    return rate


def test_the_first_sample_is_the_average_since_the_process_began() -> None:
    """A rate is known from the first page with enough in it, and unknown before."""
    assert UNKNOWN.follow(408.0, 99.0, 10.0, enough=100) == UNKNOWN
    rate = UNKNOWN.follow(400.0, 1600.0, 10.0, enough=100)
    assert (rate.value, rate.samples) == (0.25, 1)


def test_a_constant_rate_is_found_and_a_change_believed_to_two_thirds_in_ten_samples() -> None:
    """The smoothing is the documented one."""
    steady = follow(UNKNOWN, [(20.0, 100.0, STEP)] * 20)
    assert steady.value == pytest.approx(0.2)
    doubled = follow(steady, [(40.0, 100.0, STEP)] * 10)
    assert doubled.value == pytest.approx(0.4 - 0.2 * (1 - ALPHA) ** 10)


def test_no_sample_is_taken_too_soon_or_from_too_little() -> None:
    """Pages in between change nothing, and what they counted is part of the next sample."""
    rate = follow(UNKNOWN, [(20.0, 100.0, STEP)])
    assert follow(rate, [(1.0, 100.0, STEP / 2)], enough=50) == rate
    assert follow(rate, [(1.0, 49.0, STEP)], enough=50) == rate
    assert follow(rate, [(30.0, 50.0, STEP / 2), (30.0, 50.0, STEP / 2)], enough=50).value == pytest.approx(0.4)


@pytest.mark.parametrize(("over", "under"), [(1.0, 2e6), (2e6, 2.0)])
def test_counters_that_went_back_begin_anew(over: float, under: float) -> None:
    """Nothing of the old process is left, and the new one is read as if it had always been the first."""
    old = follow(UNKNOWN, [(20.0, 100.0, STEP)] * 9)
    assert old.follow(over, under, old.at + STEP, 1.0) == UNKNOWN.follow(over, under, old.at + STEP, 1.0)


@given(growth)
def test_the_value_stays_within_its_samples(steps: list[tuple[float, float, float]]) -> None:
    """The rate is an average: never below 0, never above the steepest sample."""
    rate = follow(UNKNOWN, steps)
    assert 0 <= rate.value <= sum(over for over, _, _ in steps)
    assert (rate.samples == 0) <= (rate.value == 0)
