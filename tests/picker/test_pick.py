"""picker/pick.py: one decision for one request."""

import json
from random import Random

from picker.cost import STALE, Costs, PodLoad, PoolLoad
from picker.memory import CHUNKS
from picker.models import Models, Rule
from picker.pick import Pick, Picker, PoolConfig, Reason
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


def picker(pickers: int = 1) -> Picker:
    made = Picker(Random(1).random, pickers)
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
    """With several pickers: the pod they all agree on, among the pods there are now."""
    asked = picker(3)
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


def test_a_session_is_keyed_by_its_hint() -> None:
    """Without loads: short prompts of one session have one key, and long ones the session's before their prefix's."""
    asked, now = picker(), STALE + 1
    short, long = body("x", size=100), body("x")
    keys = {asked.pick(POOL, one, now, session).key for one in (short, long) for session in ("s1", "s2")}
    assert len(keys) == 2
    assert None not in keys
    assert asked.pick(POOL, long, now).key not in keys
    keyed = json.dumps({"model": "m", "prompt": "hi", "prompt_cache_key": "s1"}).encode()
    assert asked.pick("other", keyed, now).key in keys  # the model's and the hint's alone, whoever says it


def test_a_hint_all_share_is_split_like_a_preamble() -> None:
    """An application's name as prompt_cache_key: once it is hot, families part below it."""
    asked, now = picker(), STALE + 1
    keys = [asked.pick(POOL, body("wxyz"[i % 4]), now, "app").key for i in range(200)]
    assert len(set(keys[:8])) == 1  # MIN_COUNT: nothing is hot yet
    assert len(set(keys[100:])) == 4


def test_a_short_session_stays_on_its_pod() -> None:
    """With loads, too: its pod has its tokens, and costs least unless it is busier by more."""
    asked, pods = picker(), set()
    for turn in range(6):
        now = 2.0 * turn
        asked.update(report(), now)
        pods.add(asked.pick(POOL, body("x", f"turn {turn}", size=1500), now, "s1").pod)
    assert len(pods) == 1


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


def test_settings_and_loads_come_and_go_on_their_own() -> None:
    """A pool's settings count whichever came first; losing one of the two leaves the other, losing both nothing."""
    asked, config = Picker(Random(1).random), PoolConfig(POOL, Costs(request_cost=0.0))
    asked.configure(config)
    assert asked.pick(POOL, body("x"), 0.0).reason is Reason.STATELESS
    for settings in (config, None):
        asked.update(report(), 0.0)
        assert asked.config(POOL) == settings
        assert asked._pools[POOL].pool.costs == (config.costs if settings else Costs())
        assert asked.pick(POOL, body("x"), 0.0).reason is Reason.COST
        asked.forget(POOL)
        assert asked.config(POOL) == settings
        assert asked.pick(POOL, body("x"), 0.0).reason is Reason.STATELESS
        asked.update(report(), 0.0)
        asked.unconfigure(POOL)
        assert asked._pools[POOL].pool.costs == Costs()
        assert list(asked.read_at()) == [POOL]
    asked.forget(POOL)
    asked.configure(config)
    asked.unconfigure(POOL)
    asked.unconfigure("never known")
    assert asked.read_at() == {}


def asking(models: Models, *, picked: bool = True, loads: PoolLoad | None = None) -> Picker:
    """A picker of one pool with these models."""
    made = Picker(Random(1).random)
    made.configure(PoolConfig(POOL, picked=picked, models=models))
    made.update(loads or report(), 0.0)
    return made


RENAMING = Models({"m": Rule((("lora", 1),)), "n": Rule()}, closed=True)


def test_a_renamed_request_is_picked_by_its_new_name() -> None:
    """Hashed as what the pod is asked for: it shares its prefix with requests that name the target, not the alias."""
    pick = asking(RENAMING).pick(POOL, body("x"), 0.0)
    assert (pick.reason, pick.key, pick.named) == (Reason.COST, f"{pick.pod}_0", True)
    assert pick.body == body("x").replace(b'"model": "m"', b'"model": "lora"')
    for name, same in (("lora", True), ("m", False)):
        prompt = read_prompt(body("x").replace(b'"model": "m"', b'"model": "%s"' % name.encode()))
        assert prompt is not None
        stateless = asking(RENAMING).pick(POOL, body("x"), STALE + 1)
        assert (stateless.key == chunk_hashes(prompt)[0].hex()) is same


def test_an_unchanged_request_says_that_it_was_looked_at() -> None:
    """Its body is not sent back; one that can not be looked at does not say so, and is picked all the same."""
    asked = asking(RENAMING)
    pick = asked.pick(POOL, body("x").replace(b'"m"', b'"n"', 1), 0.0)
    assert (pick.reason, pick.named, pick.body) == (Reason.COST, True, None)
    unread = asked.pick(POOL, body("x").replace(b'"m"', b'"\\ud800"', 1), 0.0)
    assert (unread.named, unread.body, unread.refused) == (False, None, 0)
    assert asked.pick(POOL, b"not json", 0.0) == Pick(None, Reason.UNREADABLE, POOL, named=True)


def test_a_cluster_without_models_has_been_seen_to() -> None:
    """A route may share requests between a pool that renames and one that does not, or a Service; of a pool it was told
    nothing of the picker can not say so."""
    asked = asking(Models())
    assert asked.pick(POOL, body("x"), 0.0).named
    assert asked.pick("service/default/web/80", body("x"), 0.0).named
    assert asked.pick("service/default/web/80", b"", 0.0) == Pick(None, Reason.UNREADABLE, named=True)
    assert not asked.pick("pool/default/other", body("x"), 0.0).named
    asked.unconfigure(POOL)
    assert not asked.pick(POOL, body("x"), 0.0).named


def test_a_pool_that_is_not_picked_is_asked_for_its_models_alone() -> None:
    """No key, no memory: Envoy balances by itself. Names are seen to."""
    asked = asking(RENAMING, picked=False)
    pick = asked.pick(POOL, body("x"), 0.0)
    assert (pick.reason, pick.key, pick.named, pick.model) == (Reason.UNPICKED, None, True, "lora")
    assert pick.body is not None
    assert asked.chunks == 0
    assert asking(Models(), picked=False).pick(POOL, body("x"), 0.0) == Pick(
        None, Reason.UNPICKED, POOL, model="m", named=True
    )


def test_refusals() -> None:
    """An unknown model, and a sheddable request of a saturated pool: no pod is picked, none is charged for it."""
    full = PoolLoad(POOL, (PodLoad("default/a", waiting=50.0), PodLoad("default/b", waiting=50.0)))
    shedding = Models({"m": Rule(sheddable=True)}, closed=True, objectives={"low": -1})
    for asked in (asking(shedding, loads=full), asking(shedding, loads=full, picked=False)):
        assert asked.pick(POOL, body("x"), 0.0) == Pick(None, Reason.SHED, POOL, model="m", refused=429)
        unknown = body("x").replace(b'"m"', b'"x"', 1)
        assert asked.pick(POOL, unknown, 0.0) == Pick(None, Reason.UNKNOWN_MODEL, POOL, model="x", refused=404)
        assert asked.pick(POOL, body("x"), 0.0, "", "high").refused == 429  # no such objective
        assert asked.pick(POOL, body("x"), STALE + 1).refused == 0
        asked.update(report(), 2.0)
        assert asked.pick(POOL, body("x"), 2.0).refused == 0
        asked.unconfigure(POOL)
        assert asked.pick(POOL, unknown, 2.0).reason is Reason.COST


def test_thresholds_are_the_pools() -> None:
    """What saturates a pool is its operator's to say."""
    loads = PoolLoad(POOL, (PodLoad("default/a", waiting=6.0, kv_usage=0.5),))
    for waiting, kv_usage, refused in ((5.0, 0.8, 429), (7.0, 0.8, 0), (7.0, 0.5, 429)):
        models = Models({"m": Rule(sheddable=True)}, waiting=waiting, kv_usage=kv_usage)
        assert asking(models, loads=loads).pick(POOL, body("x"), 0.0).refused == refused


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
    assert 3 * 256 <= asked.chunks <= CHUNKS
