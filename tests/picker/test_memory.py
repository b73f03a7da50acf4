"""picker/memory.py: the LRU of chunks seen by a pod."""

from hypothesis import given
from hypothesis import strategies as st

from picker.memory import SeenChunks

PATHS = st.lists(st.sampled_from("ab"), min_size=1, max_size=6).map("".join)


def hashes(path: str) -> list[bytes]:
    """Chained hashes of a path of chunks: one for each of its beginnings."""
    return [path[: i + 1].encode() for i in range(len(path))]


@given(st.lists(PATHS, max_size=30), PATHS, st.integers(0, 12))
def test_it_is_a_bounded_lru_of_whole_prefixes(paths: list[str], asked: str, capacity: int) -> None:
    """Against a plain list of the newest chunks: never more than the capacity, and bisection finds the true length."""
    seen, newest = SeenChunks(capacity), list[bytes]()
    for path in paths:
        seen.touch(hashes(path))
        newest = [chunk for chunk in newest if chunk not in hashes(path)] + hashes(path)[::-1]
        newest = newest[max(0, len(newest) - capacity) :]
        assert len(seen) == len(newest) <= capacity
    held = 0
    for chunk in hashes(asked):
        if chunk not in newest:
            break
        held += 1
    assert seen.longest_prefix(hashes(asked)) == held


def test_the_end_of_a_prompt_is_forgotten_before_its_beginning() -> None:
    """As vLLM evicts: what is left of an old prompt is still usable as a prefix."""
    seen = SeenChunks(5)
    seen.touch(hashes("aaaa"))
    seen.touch(hashes("bbb"))
    assert seen.longest_prefix(hashes("aaaa")) == 2
    assert seen.longest_prefix(hashes("bbb")) == 3


def test_shrinking_and_forgetting() -> None:
    """A smaller cache forgets at once, a restarted pod everything."""
    seen = SeenChunks(10)
    seen.touch(hashes("aaaa"))
    seen.resize(1)
    assert (len(seen), seen.longest_prefix(hashes("aaaa"))) == (1, 1)
    seen.forget()
    assert (len(seen), seen.longest_prefix(hashes("aaaa")), seen.longest_prefix([])) == (0, 0, 0)
