"""A short, seeded part of `python -m tests.refusals`: what parse accepts, Envoy accepts and serves as it is written."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest

from tests import edges
from tests.refusals import Refusals, search
from xds.model import Filters, HeaderModifier, Route, Topology
from xds.translate import translate

pytestmark = [pytest.mark.envoy, pytest.mark.timeout(120)]

STEP = 50  # every fiftieth of some 11,000 listed cases: 225, two seconds
EXAMPLES = 75


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def refusals(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Refusals]:
    refusals = Refusals(tmp_path_factory.mktemp("refusals"))
    runner.run(refusals.start())
    yield refusals
    runner.run(refusals.close())


def test_listed_values_and_options(runner: asyncio.Runner, refusals: Refusals) -> None:
    """Values known to be edges, each alone in a field, and the operator's options: none is refused by Envoy first."""
    listed = islice(edges.listed(refusals.listen, refusals.upstream), 0, None, STEP)
    assert runner.run(refusals.sweep(listed, edges.OPTIONS)) == []


def test_examples(runner: asyncio.Runner, refusals: Refusals) -> None:
    """One to three fields at once, with values like those."""
    search(runner, refusals, EXAMPLES, seed=0)


def changed(topology: Topology, filters: Filters) -> Topology:
    """The topology with these filters in the first route of HTTPRoute edge, past parse."""

    def route(each: Route) -> Route:
        return replace(each, filters=filters) if each.name.startswith("default/edge/") else each

    (listener,) = topology.listeners
    hosts = tuple(replace(host, routes=tuple(map(route, host.routes))) for host in listener.virtual_hosts)
    return replace(topology, listeners=(replace(listener, virtual_hosts=hosts),))


def test_a_refusal_and_a_wrong_answer_would_be_seen(runner: asyncio.Runner, refusals: Refusals) -> None:
    """A route past parse is refused with Envoy's reason, one served otherwise than it says is named; neither lasts."""
    steady = edges.steady(refusals.listen, refusals.upstream)
    topology = refusals.topology(steady)
    bad = changed(topology, Filters(request_headers=HeaderModifier(set=(("host", "x"),))))
    (refusal,) = runner.run(refusals.offer(translate(bad, refusals.options, {})))
    assert refusal.startswith("RouteConfiguration: ")
    assert "host headers may not be modified" in refusal
    assert runner.run(refusals.attempt(steady)) == ""
    said = changed(topology, Filters(response_headers=HeaderModifier(set=(("x-set", "other"),))))
    (wrong,) = runner.run(refusals.probe(said))
    assert wrong == "edge.test: expected x-set: 'other' alone in the answer, found [b's']"
    assert runner.run(refusals.attempt(steady)) == ""
