"""The benchmark of the API server source, in a tiny form. No test here looks at how long anything took."""

from __future__ import annotations

from bench.api_scale import change, follow
from tests.bench.test_figures import positive


async def test_following_is_measured() -> None:
    """The server gets ready from the many pods, makes Configs of their changes, and every figure is one."""
    row = await follow(50, 10, routes=1, seconds=1)
    assert row[0] == "50 pods, 10 in the pool, 1 routes"
    assert positive(row[1:6])


def test_one_change_is_taken_apart() -> None:
    """Four parts, each of the case's own size."""
    row = change(20, 10, routes=1, rounds=1)
    assert len(row) == 5
    assert positive((row[1], *row[3:]))
