"""picker/pick.py: one decision for one request."""

import json
from random import Random

from picker.cost import STALE, PodLoad, PoolLoad
from picker.pick import Pick, Picker, Reason
from picker.prefix import chunk_hashes
from picker.prompt import read_prompt
from picker.stateless import Ring

POOL = "pool/default/qwen"


def body(family: str, question: str = "?", size: int = 8000) -> bytes:
    """A chat completion whose system prompt is its family's."""
    system = (family * size)[:size]
    return json.dumps(
        {"model": "m", "messages": [{"role": "system", "content": system}, {"role": "user", "content": question}]}
    ).encode()


def report(name: str = POOL, names: str = "abcd") -> PoolLoad:
    return PoolLoad(name, tuple(PodLoad(f"default/{pod}", kv_tokens=500_000, start_time=1.0) for pod in names))


def picker() -> Picker:
    made = Picker(Random(1).random)
    made.update(report(), 0.0)
    return made


def test_a_family_stays_on_one_pod() -> None:
    """Requests with the same prefix share a pod; the key is its hash key's first point on Envoy's ring."""
    asked, pods = picker(), dict[str, str]()
    for round_ in range(5):
        now = 2.0 * round_
        asked.update(report(), now)
        for family in "xyz":
            pick = asked.pick(POOL, body(family, f"question {round_}"), now)
            assert pick == Pick(f"{pick.pod}_0", Reason.COST, POOL, pick.pod)
            assert pods.setdefault(family, pick.pod) == pick.pod
    assert len(set(pods.values())) == 3


def test_a_new_prefix_starts_on_its_primary() -> None:
    """The pod every picker agrees on, among the pods there are now."""
    asked = picker()
    for names in ("abcd", "efgh"):
        asked.update(report(names=names), 0.0)
        ring = Ring(f"default/{name}" for name in names)
        prompt = read_prompt(body(names))
        assert prompt is not None
        assert asked.pick(POOL, body(names), 0.0).pod == ring.primary(chunk_hashes(prompt)[0])


def test_stale_loads_leave_the_stateless_key() -> None:
    """STALE seconds without a report: the prompt's own prefix, the same for the whole family, names no pod."""
    asked, now = picker(), STALE + 1
    prompt = read_prompt(body("x"))
    assert prompt is not None
    key = chunk_hashes(prompt)[0].hex()
    assert asked.pick(POOL, body("x", "one"), now) == Pick(key, Reason.STATELESS, POOL)
    assert asked.pick(POOL, body("x", "two"), now).key == key
    assert asked.pick(POOL, body("y"), now).key != key
    asked.update(report(), now)
    assert asked.pick(POOL, body("x"), now).reason is Reason.COST


def test_an_unknown_cluster_is_keyed_without_pods() -> None:
    """The server has not answered, or never will: affinity by the key alone, and invented names leave no trace."""
    asked = Picker(Random(1).random)
    key = asked.pick("", body("x"), 0.0).key
    assert {asked.pick(f"made-up-{i}", body("x", str(i)), 0.0) for i in range(5)} == {Pick(key, Reason.STATELESS)}
    assert asked.read_at() == {}


def test_too_short_to_key_on() -> None:
    """Below one chunk: placed by load when it is known, else no key at all, never one constant for all."""
    short = body("x", size=100)
    asked = picker()
    assert asked.pick(POOL, short, 0.0).reason is Reason.COST
    assert asked.pick(POOL, short, STALE + 1) == Pick(None, Reason.UNKEYED, POOL)
    assert asked.pick("other", short, 0.0) == Pick(None, Reason.UNKEYED)


def test_no_prompt_no_key() -> None:
    """What is not an LLM request goes through without a key, and leaves no trace."""
    asked = picker()
    for unread in (b"", b"GET", b"{}", b'{"file":"x"}', b"\xff" * 1000):
        assert asked.pick(POOL, unread, 0.0) == Pick(None, Reason.UNREADABLE, POOL)
    assert asked.chunks == 0


def test_pools_do_not_meet() -> None:
    """One pool stale, removed or full leaves the other's picks and memory alone."""
    asked, other = picker(), "pool/default/llama"
    asked.update(report(other, "pq"), 0.0)
    first = asked.pick(other, body("x"), 0.0)
    assert first.pod in {"default/p", "default/q"}
    asked.update(PoolLoad(POOL, ()), 5.0)
    assert asked.pick(POOL, body("x"), 5.0).reason is Reason.STATELESS
    asked.forget(POOL)
    asked.forget("never known")
    assert asked.pick(other, body("x"), 5.0).pod == first.pod
    assert asked.read_at() == {other: 0.0}


def test_the_memory_is_bounded_over_all_pods() -> None:
    """However many pods in however many pools report however large a cache; pools that go leave their share."""
    asked = Picker(Random(1).random)
    for i in range(64):
        pods = tuple(PodLoad(f"{i}/{k}", kv_tokens=1 << 40) for k in range(64))
        asked.update(PoolLoad(str(i), pods), 0.0)
    # 4,096 pods: 256 chunks each, so a second prompt of 256 chunks displaces the first on a lone pod
    asked.update(PoolLoad("0", (PodLoad("0/0", kv_tokens=1 << 40),)), 0.0)
    for family in "xy":
        asked.pick("0", body(family, size=600_000), 0.0)
    assert 256 <= asked.chunks < 270
    for i in range(1, 64):
        asked.forget(str(i))
    asked.update(PoolLoad("0", (PodLoad("0/0", kv_tokens=1 << 40),)), 0.0)
    for family in "xyz":
        asked.pick("0", body(family, size=600_000), 0.0)
    assert asked.chunks == 3 * 256
