"""picker/stateless.py: the key that needs no pods, and the ring that names its primary."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from picker import stateless
from picker.stateless import MAX_NODES, HotPrefixes, Ring


def path(*names: object) -> list[bytes]:
    """Chained hashes of a path of chunks."""
    return ["/".join(map(str, names[: i + 1])).encode() for i in range(len(names))]


def test_a_cold_prefix_is_keyed_on_its_first_chunk() -> None:
    """Below MIN_COUNT nothing is hot, so equal beginnings have equal keys."""
    hot = HotPrefixes()
    assert [hot.key(path("sys", i), 4, 0.0) for i in range(3)] == [b"sys"] * 3
    assert hot.key([], 4, 0.0) is None


def test_a_preamble_all_share_is_split_where_it_branches() -> None:
    """Once the shared chunks are hot, the key is the first chunk that tells conversations apart."""
    hot = HotPrefixes()
    for i in range(200):
        hot.key(path("s1", "s2", "s3", i % 20, "tail"), 4, i * 0.1)
    assert hot.key(path("s1", "s2", "s3", 7, "tail"), 4, 20.0) == b"s1/s2/s3/7"


def test_a_key_that_is_not_counted() -> None:
    """It is the one the request would have, at every step of a walk that gets deeper, and asking changes nothing."""
    hot, asked = HotPrefixes(), HotPrefixes()
    for i in range(200):
        walk, now = path("s1", "s2", i % 20, "tail"), i * 0.1
        asked.key(path("s1", i), 4, now, counted=False)
        expected = asked.key(walk, 4, now, counted=False)
        assert asked.key(walk, 4, now) == hot.key(walk, 4, now) == expected
    assert len(asked) == len(hot)
    assert asked.key([], 4, 20.0, counted=False) is None


def test_a_long_session_keeps_its_key() -> None:
    """One conversation that is most of the traffic grows each turn: no branch, so the key stays."""
    hot, turn, keys = HotPrefixes(), list[bytes](), set()
    for i in range(60):
        turn = path(*["turn"] * (i // 3 + 1))
        keys.add(hot.key(turn, 4, i * 0.5))
        hot.key(path("other", i), 4, i * 0.5)
    assert keys == {turn[0]}


def test_requests_that_end_here_make_no_branch() -> None:
    """A preamble asked bare as often as with one continuation: those who go on all go the same way."""
    hot, keys = HotPrefixes(), set()
    for _ in range(50):
        hot.key(path("s"), 4, 0.0)
        keys.add(hot.key(path("s", "t", "u"), 4, 0.0))
    assert keys == {b"s"}


def test_heat_decays() -> None:
    """A preamble nobody has sent for long is cold: its next request is keyed at the top again."""
    hot = HotPrefixes()
    for i in range(100):
        hot.key(path("s", i % 10), 4, 0.0)
    assert hot.key(path("s", 3), 4, 1.0) == b"s/3"
    assert hot.key(path("s", 3), 4, 3600.0) == b"s"


@given(st.floats(0, 1e12), st.floats(0, 1e12))
def test_any_two_times_are_fine(first: float, second: float) -> None:
    """Forward decay neither overflows after years of silence nor minds a clock that steps back."""
    hot = HotPrefixes()
    for now in (first, second, second, first):
        assert hot.key(path("a", "b"), 4, now) == b"a"


def test_the_decay_is_rescaled_without_a_change() -> None:
    """Shares are the same on both sides of the rescale: steady streams keep their keys for days."""
    hot, keys = HotPrefixes(), Counter[bytes | None]()
    for i in range(8000):  # 800 time constants: e^800 is more than a float can hold
        now = i * stateless.TIME_CONSTANT / 10
        for hashes in (path("s", i % 10), path("t", "t", "t")):
            key = hot.key(hashes, 4, now)
            if i >= 1000:
                keys[key] += 1
    assert keys == {b"t": 7000} | {f"s/{i}".encode(): 700 for i in range(10)}
    assert hot.key(path("s", 3), 4, now + 3600.0) == b"s"  # and it still decays


def test_nodes_are_bounded() -> None:
    """However many distinct prompts arrive, and a hot one among them is kept."""
    hot = HotPrefixes()
    for i in range(MAX_NODES + 100):
        hot.key(path(i), 4, i * 1e-4)
        hot.key(path("s", i % 10), 4, i * 1e-4)
    assert len(hot) == MAX_NODES
    assert hot.key(path("s", 3), 4, 1.0) == b"s/3"


def test_the_ring_moves_only_what_it_must() -> None:
    """The order of the pods does not matter, shares are about equal, and a pod's end moves its keys alone."""
    names = [f"default/pod-{i}" for i in range(8)]
    keys = [str(i).encode() for i in range(4000)]
    ring, turned, less = Ring(names), Ring(reversed(names)), Ring(names[1:])
    before = {key: ring.primary(key) for key in keys}
    assert before == {key: turned.primary(key) for key in keys}
    assert min(Counter(before.values()).values()) > 4000 / 8 * 0.6
    assert {key: pod for key, pod in before.items() if pod != names[0]} == {
        key: less.primary(key) for key in keys if before[key] != names[0]
    }
    assert Ring(()).primary(b"x") is None
