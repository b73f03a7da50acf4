"""bench/sim_envoy.py: Envoy's balancers, held against what the real one was seen to do."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from bench.sim_envoy import Host, LeastRequest, RingHash, RoundRobin, hash64

KEYS = [f"key-{i}" for i in range(3000)]


def hosts(count: int, weights: tuple[int, ...] = ()) -> list[Host]:
    made = [Host(f"default/pod-{i}") for i in range(count)]
    for host, weight in zip(made, weights, strict=False):
        host.weight = weight
    return made


def send(balancer: RingHash, key: str | None, requests: int) -> None:
    """Requests none of which ends."""
    for _ in range(requests):
        balancer.choose(key).active += 1


def moved(weight: int, rings: int = 5) -> tuple[float, float]:
    """Percent of keys that move when one of ten weights goes from 100 to `weight`, and of those not on that host.

    The mean of several rings, of hosts of other names.
    """
    total = collateral = 0
    for ring in range(rings):
        fleet = [Host(f"default/{ring}-{i}") for i in range(10)]
        before = list(map(RingHash(fleet, Random(1)).choose, KEYS))
        fleet[0].weight = weight
        after = list(map(RingHash(fleet, Random(1)).choose, KEYS))
        changed = [one for one, other in zip(before, after, strict=True) if one is not other]
        total += len(changed)
        collateral += sum(one is not fleet[0] for one in changed)
    return 100 * total / rings / len(KEYS), 100 * collateral / rings / len(KEYS)


def test_an_addressed_key_lands_on_its_host_whatever_the_weights() -> None:
    """`<hash key>_0` is a host's own first point; without that host it goes to one other, always the same."""
    for weights in ((), (100, 7, 33, 1, 100)):
        fleet = hosts(5, weights)
        ring = RingHash(fleet, Random(1))
        assert [ring.choose(f"{host.hash_key}_0") for host in fleet] == fleet
    rest = RingHash(fleet[1:], Random(1))
    (other,) = {rest.choose(f"{fleet[0].hash_key}_0") for _ in range(5)}
    assert other is not fleet[0]


@pytest.mark.parametrize(
    ("weight", "seen", "seen_collateral"),
    [(90, 1.9, 1.1), (50, 7.7, 3.2), (10, 19.5, 10.1), (1, 48.0, 38.0)],
)
def test_a_weight_moves_as_many_keys_as_it_does_in_envoy(weight: int, seen: float, seen_collateral: float) -> None:
    """A ring of 1024 points, 10 hosts: within what one ring differs from the mean of several."""
    found, collateral = moved(weight)
    assert found == pytest.approx(seen, rel=0.15, abs=0.8)
    assert collateral == pytest.approx(seen_collateral, rel=0.15, abs=0.8)


def test_equal_weights_move_nothing() -> None:
    """A ring that is built again is the same ring."""
    assert moved(100, rings=1) == (0, 0)


def test_shares_of_a_ring() -> None:
    """Equal weights: about as uneven as Envoy's (7.7 to 12.6 % of ten hosts); no key: by weight."""
    counts = Counter(map(RingHash(hosts(10), Random(1)).choose, KEYS))
    assert all(0.065 < count / len(KEYS) < 0.135 for count in counts.values())
    fleet = hosts(3, (100, 7, 33))
    ring = RingHash(fleet, Random(1))
    anywhere = Counter(ring.choose(None) for _ in range(6000))
    assert [anywhere[host] / 6000 for host in fleet] == pytest.approx([100 / 140, 7 / 140, 33 / 140], abs=0.04)


@pytest.mark.parametrize(
    ("factor", "requests", "weights", "owner", "busiest"),
    [
        (150, 12, (100,) * 6, 4, [4, 4, 4]),
        (150, 12, (300, *(100,) * 5), 8, None),
        (150, 12, (1, *(100,) * 5), 2, None),
        (150, 30, (100,) * 5, 11, [11, 11, 8]),
        (300, 30, (100,) * 5, 20, [20, 10]),
    ],
)
def test_bounded_load(
    factor: int, requests: int, weights: tuple[int, ...], owner: int, busiest: list[int] | None
) -> None:
    """Requests of one key at the same time, as counted in Envoy; its counts run one ahead when requests overlap."""
    fleet = hosts(len(weights), weights)
    send(RingHash(fleet, Random(1), factor), f"{fleet[0].hash_key}_0", requests)
    assert fleet[0].active == pytest.approx(owner, abs=1)
    if busiest:
        found = sorted((host.active for host in fleet if host.active), reverse=True)
        assert found == pytest.approx(busiest, abs=2)
    assert sum(host.active for host in fleet) == requests


def test_what_is_beyond_the_bound_spills_in_an_order_of_its_own() -> None:
    """The same key, the same order, whoever asks; another key has another; with no bound nothing spills."""

    def spilled(key: str, factor: int) -> tuple[int, ...]:
        fleet = hosts(6)
        send(RingHash(fleet, Random(len(key)), factor), key, 12)
        return tuple(host.active for host in fleet)

    assert spilled("a", 150) == spilled("a", 150)
    assert len({spilled(key, 150) for key in "abcdefgh"}) > 3
    assert sorted(spilled("a", 0)) == [0, 0, 0, 0, 0, 12]


def test_round_robin_takes_turns() -> None:
    """From any host on, each once before one comes again."""
    fleet = hosts(3)
    balancer = RoundRobin(fleet, Random(2))
    first = [balancer.choose() for _ in range(3)]
    assert set(first) == set(fleet)
    assert [balancer.choose() for _ in range(3)] == first


def test_full_scan_finds_the_least_loaded() -> None:
    """Any of the least loaded, never another; two choices miss it now and then."""
    fleet = hosts(8)
    for host, active in zip(fleet, (3, 1, 2, 1, 5, 4, 3, 2), strict=True):
        host.active = active
    scan = LeastRequest(fleet, Random(1), full_scan=True)
    assert {scan.choose() for _ in range(50)} == {fleet[1], fleet[3]}
    choices = LeastRequest(fleet, Random(1), full_scan=False)
    found = Counter(choices.choose() for _ in range(6400))
    assert found[fleet[1]] / 6400 == pytest.approx((64 - 36) / 64 / 2, abs=0.03)  # either of the two least
    assert found[fleet[4]] / 6400 == pytest.approx(1 / 64, abs=0.01)  # the busiest: only when drawn twice


def test_unequal_weights_are_a_schedule() -> None:
    """Weighted round robin while nothing is under way; a busy host's share is divided by what it does."""
    fleet = hosts(3, (200, 100, 100))
    idle_balancer = LeastRequest(fleet, Random(1), full_scan=True)
    idle = Counter(idle_balancer.choose() for _ in range(400))
    assert [idle[host] for host in fleet] == pytest.approx([200, 100, 100], abs=3)
    fleet[0].active = 3
    busy_balancer = LeastRequest(fleet, Random(1), full_scan=True)
    busy = Counter(busy_balancer.choose() for _ in range(500))
    assert [busy[host] for host in fleet] == pytest.approx([100, 200, 200], abs=5)


def test_hashes_are_64_bits_and_stable() -> None:
    """The ring is the same in every process."""
    assert hash64("default/pod-0_0") == hash64("default/pod-0_0")
    assert 0 <= hash64("x") < 1 << 64
    assert hash64("x") != hash64("y")
