"""picker/explain.py: the picker's own decision, with its reasons."""

import json
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from picker.cost import CN, ETA, OUTPUT, PRIOR_ALONE, STALE, PodLoad, PoolLoad
from picker.explain import explain
from picker.models import Models, Rule
from picker.pick import Picker, PoolConfig
from picker.prefix import chunk_hashes, hint_hash
from picker.prompt import read_prompt

POOL = "pool/default/qwen"
IDLE = PodLoad("default/a", kv_tokens=500_000, start_time=1.0)


def picker(*pods: PodLoad) -> Picker:
    """One that takes the first of equal pods."""
    made = Picker(lambda: 0.0)
    made.update(PoolLoad(POOL, pods or tuple(replace(IDLE, hash_key=f"default/{name}") for name in "abcd")), 0.0)
    return made


def completion(text: str, **more: object) -> bytes:
    return json.dumps({"model": "m", "prompt": text, **more}).encode()


def test_it_is_what_is_picked_and_leaves_no_trace() -> None:
    """Some traffic at two pickers that are alike, one of which is asked why before each request, and of others: the pod
    and the key are always those of the pick that follows, and both pickers pick alike to the end."""
    asked, other, rng = picker(), picker(), Random(1)
    for turn in range(300):
        now = turn * 0.05
        if turn % 40 == 0:
            loads = tuple(
                replace(IDLE, hash_key=f"default/{name}", running=float(rng.randrange(9)), age=0.5 * rng.random())
                for name in "abcd"
            )
            for each in (asked, other):
                each.update(PoolLoad(POOL, loads), now)
        cluster = POOL if rng.random() < 0.9 else "elsewhere"
        body = completion(f"family {rng.randrange(6)} " * rng.choice([1, 300, 900]) + f"turn {turn}")
        session = rng.choice(["", "s1", "s2"])
        explained = explain(asked, cluster, body, now, session)
        explain(asked, cluster, completion(f"never sent {turn} " * 500), now)
        pick = asked.pick(cluster, body, now, session)
        assert pick == other.pick(cluster, body, now, session)
        assert (explained["key"], explained["pod"], explained["reason"]) == (pick.key, pick.pod or None, pick.reason)
    assert asked.chunks == other.chunks


def test_the_terms_of_the_formula() -> None:
    """What each pod holds, its load and its costs, the cheapest one first; the cost is the sum of its terms."""
    asked = picker(replace(IDLE, running=4.0), replace(IDLE, hash_key="default/b", age=-1.0, running=99.0))
    body, prompt = completion("x" * 8192), read_prompt(completion("x" * 8192))
    assert prompt is not None
    asked.pick(POOL, body, 0.0)
    explained = explain(asked, POOL, completion("x" * 8192 + "y" * 400), 100.0 * 0.05)
    held = next(each for each in explained["offers"] if each["cached"])
    bare = next(each for each in explained["offers"] if not each["cached"])
    assert (held["chunks_held"], held["cached"], bare["chunks_held"]) == (4, 2048, 0)
    assert (held["uncached"], bare["fresh"]) == (
        pytest.approx(100 * (1 - PRIOR_ALONE * _primary(explained, held))),
        False,
    )
    assert held["requests"] == CN * held["running"]
    assert held["prefill"] == held["uncached"] * (1 + ETA * held["running"])
    assert (held["backlog"], held["preempted"], held["adapter"]) == (0.0, 0.0, 0.0)
    for offer in explained["offers"]:
        terms = ("backlog", "prefill", "requests", "preempted", "adapter")
        assert offer["cost"] == pytest.approx(sum(offer[name] for name in terms))
    assert all(one["cost"] <= next_["cost"] for one, next_ in pairwise(explained["offers"]))
    assert explained["pod"] == explained["offers"][0]["pod"]
    assert explained["equal"] == 1
    full = picker(replace(IDLE, kv_tokens=10_000, kv_usage=0.95))
    (offer,) = explain(full, POOL, completion("x" * 400), 0.0)["offers"]
    assert offer["preempted"] == pytest.approx(2 * (offer["uncached"] + OUTPUT))


def _primary(explained: dict[str, object], offer: dict[str, object]) -> bool:
    return explained["primary"] == offer["pod"]


def test_what_was_read() -> None:
    """The chunks and the hint by their hashes, the length, the client's bound; equal pods are counted."""
    body = completion("x" * 5000, max_tokens=7, cache_salt="salt")
    prompt = read_prompt(body)
    assert prompt is not None
    explained = explain(picker(), POOL, body, 0.0, "session")
    hint = hint_hash(prompt, "session")
    assert explained["prompt"] == {
        "cache_salt": "salt",
        "bytes": 5000,
        "tokens": 1250,
        "max_tokens": 7,
        "chunks": [each.hex() for each in chunk_hashes(prompt)],
        "hint": hint.hex() if hint else None,
    }
    assert (explained["model"], explained["renamed"], explained["known"]) == ("m", False, True)
    assert explained["stateless_key"] == explained["prompt"]["hint"]
    assert explained["primary"] in {offer["pod"] for offer in explained["offers"]}
    assert (explained["pod"], explained["equal"]) == ("default/a", 4)
    assert explain(picker(), POOL, completion("hi"), 0.0)["equal"] == 4
    assert json.loads(json.dumps(explained)) == explained


def test_what_is_not_picked_by_cost() -> None:
    """Stale loads, no prompt, a pool nothing is known of, refusals, other names: said as such, without offers."""
    asked = picker()
    for cluster, body, now, reason, known in (
        (POOL, completion("x" * 5000), STALE + 1, "stateless", True),
        (POOL, b"no prompt", 0.0, "unreadable", True),
        (POOL, completion("hi"), STALE + 1, "unkeyed", True),
        ("elsewhere", completion("x" * 5000), 0.0, "stateless", False),
    ):
        explained = explain(asked, cluster, body, now)
        assert (explained["reason"], explained["known"]) == (reason, known)
        assert (explained["pod"], explained["offers"], explained["equal"]) == (None, [], 0)
        assert (explained["prompt"] is None) is (reason == "unreadable")
        assert explained["key"] == (explained["stateless_key"] if reason == "stateless" else None)
    asked.configure(PoolConfig(POOL, models=Models({"m": Rule((("lora", 1),))}, closed=True)))
    renamed = explain(asked, POOL, completion("x"), 0.0)
    assert (renamed["model"], renamed["renamed"], renamed["refused"]) == ("lora", True, 0)
    refused = explain(asked, POOL, completion("x").replace(b'"m"', b'"z"'), 0.0)
    assert (refused["model"], refused["refused"], refused["reason"], refused["pod"]) == (
        "z",
        404,
        "unknown-model",
        None,
    )
