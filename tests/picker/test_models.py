"""picker/models.py: what the objects say of a pool's models, applied to requests."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import mmh3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.models import Models, Rule, Verdict, judge

SPLIT = Rule((("a", 90), ("b", 10)))


def chat(*messages: str, model: str = "m", **more: Any) -> bytes:
    """Turns of user and assistant behind a long system prompt that all conversations share."""
    roles = ["user", "assistant"] * len(messages)
    turns = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]
    system = {"role": "system", "content": "Be kind. " * 1000}
    return json.dumps({"model": model, "messages": [system, *turns]} | more).encode()


def asked(models: Models, body: bytes, session: str = "", objective: str = "", *, saturated: bool = False) -> Verdict:
    return judge(models, body, session, objective, lambda: saturated)


def models(rules: Mapping[str, Rule] | None = None, **more: Any) -> Models:
    return Models({"m": Rule()} if rules is None else rules, **more)


def test_names_and_targets() -> None:
    """A rule's single target replaces the name, a rule without targets or with the name itself does not."""
    rules = models({"m": Rule((("lora", 1),)), "same": Rule((("same", 5),)), "plain": Rule()})
    assert asked(rules, b'{"model": "m"}') == Verdict("lora", b'{"model": "lora"}')
    for name in ("same", "plain", "unknown"):
        assert asked(rules, b'{"model":"%s"}' % name.encode()) == Verdict(name)


def test_a_rule_for_every_name() -> None:
    """It is for those without one of their own, and not for a request that names none."""
    rules = models({"m": Rule(), "": Rule((("base", 1),))})
    assert asked(rules, b'{"model":"x"}') == Verdict("base", b'{"model":"base"}')
    for body, name in ((b'{"model":"m"}', "m"), (b'{"model":"base"}', "base"), (b'{"model":""}', ""), (b"{}", "")):
        assert asked(rules, body) == Verdict(name)


def test_a_closed_set() -> None:
    """A name without a rule does not exist; a request without a name, or with no JSON, is the pod's matter."""
    closed = models({"m": SPLIT}, closed=True)
    assert asked(closed, b'{"model":"x"}') == Verdict("x", refused=404)
    assert asked(closed, b'{"model":"a"}') == Verdict("a", refused=404)  # a target is no name to ask for
    assert asked(closed, b'{"model":"m"}').refused == 0
    for body in (b"{}", b"hello", b'{"model":7}'):
        assert asked(closed, body) == Verdict("")


def test_a_name_that_can_not_be_looked_at() -> None:
    """The verdict says so, so that Envoy does not send it on."""
    assert asked(models({"m": SPLIT}, closed=True), rb'{"model":"\ud800"}') == Verdict("", named=False)


def test_a_name_that_was_read_already() -> None:
    """The body is looked at only to replace it; where it then says something else, neither is trusted."""
    rules = models({"m": Rule((("lora", 1),)), "n": Rule()})

    def judged(body: bytes, name: str) -> Verdict:
        return judge(rules, body, "", "", lambda: False, name)

    assert judged(b"not looked at", "n") == Verdict("n")
    assert judged(b'{"model":"m"}', "m") == Verdict("lora", b'{"model":"lora"}')
    for body in (b'{"model":"n"}', b"hello", rb'{"model":"\ud800"}'):
        assert judged(body, "m") == Verdict("", named=False)


@pytest.mark.parametrize(
    ("rule", "objective", "shed"),
    [
        (Rule(), "", False),
        (Rule(), "unknown", False),
        (Rule(), "low", True),
        (Rule(), "high", False),
        (Rule(), "zero", False),
        (Rule(sheddable=True), "", True),
        (Rule(sheddable=True), "unknown", True),
        (Rule(sheddable=True), "high", False),
        (Rule(sheddable=True), "zero", False),
        (Rule(critical=True), "", False),
        (Rule(critical=True), "low", False),
    ],
)
def test_who_is_shed(rule: Rule, objective: str, shed: bool) -> None:
    """A request's objective counts before its model's criticality; a critical model is never shed, and nobody is while
    the pool is not saturated."""
    made = models({"m": rule}, objectives={"low": -1, "zero": 0, "high": 10})
    assert asked(made, b'{"model":"m"}', "", objective, saturated=True).refused == (429 if shed else 0)
    assert asked(made, b'{"model":"m"}', "", objective).refused == 0
    assert asked(made, b"{}", "", objective, saturated=True).refused == (429 if objective == "low" else 0)


def test_saturation_is_not_asked_for_in_vain() -> None:
    """Only a request that may be shed makes the picker look at the loads."""
    made = models({"m": Rule(critical=True), "n": Rule()}, objectives={"low": -1})
    for body in (b'{"model":"m"}', b'{"model":"n"}', b"{}"):
        judge(made, body, "", "high", lambda: 1 / 0 > 1)
    with pytest.raises(ZeroDivisionError):
        judge(made, b'{"model":"n"}', "", "low", lambda: 1 / 0 > 1)


def test_a_conversation_stays_with_its_target() -> None:
    """Whatever is said later, and however the first turn was short: each turn has the first one's target."""
    rules, found = models({"m": SPLIT}), Counter[str]()
    for i in range(200):
        turns = [f"question {i}", "answer", f"more {i}", "y" * 5000, "thanks"]
        targets = {asked(rules, chat(*turns[:n])).model for n in (1, 3, 5)}
        assert len(targets) == 1
        found.update(targets)
    assert 5 <= found["b"] <= 40  # 10 % of 200, though all share nine tenths of their first text
    assert found.total() == 200


def test_a_session_stays_with_its_target() -> None:
    """By its header, whatever it asks; sessions are shared as the weights say."""
    rules, found = models({"m": Rule((("a", 1), ("b", 2), ("c", 1)))}), Counter[str]()
    for i in range(400):
        bodies = (chat("x"), chat(f"y{i}"), b'{"model":"m","prompt":"z"}', b'{"model":"m"}')
        targets = {asked(rules, body, f"session {i}").model for body in bodies}
        assert len(targets) == 1
        found.update(targets)
    assert 160 <= found["b"] <= 240
    assert min(found["a"], found["c"]) > 70


def test_completions_are_shared_by_all_of_their_text() -> None:
    """A completion has no turns to tell from a preamble that all share; the same one has the same target."""
    rules = models({"m": Rule((("a", 1), ("b", 1)))})
    bodies = [json.dumps({"model": "m", "prompt": "Be kind. " * 1000 + str(i)}).encode() for i in range(100)]
    found = Counter(asked(rules, body).model for body in bodies)
    assert 30 <= found["a"] <= 70
    assert Counter(asked(rules, body).model for body in bodies) == found
    odd = [b'{"model":"m","query":"%d"}' % i for i in range(50)]  # no prompt: its bytes
    assert len({asked(rules, body).model for body in odd}) == 2


def test_a_changed_weight_moves_only_the_difference() -> None:
    """10 % to 20 %: nobody goes back, and a tenth goes over."""
    before, after = models({"m": SPLIT}), models({"m": Rule((("a", 80), ("b", 20)))})
    moves = Counter((asked(before, chat(str(i))).model, asked(after, chat(str(i))).model) for i in range(500))
    assert moves["b", "a"] == 0
    assert 20 <= moves["a", "b"] <= 90


def test_the_point_is_the_specified_one() -> None:
    """Written out a second time, so that independent pickers, and other implementations, agree."""
    for session in ("s1", "s2", "s3", "s4"):
        digest = mmh3.mmh3_x64_128_digest(b"\0split\0m\0" + session.encode())[:8]
        share = int.from_bytes(digest, "little") / 2**64
        assert asked(models({"m": SPLIT}), b'{"model":"m"}', session).model == ("a" if share < 0.9 else "b")


@given(st.lists(st.integers(1, 1_000_000), min_size=1, max_size=10), st.text(st.characters(exclude_categories=["Cs"])))
def test_there_is_always_a_target(weights: list[int], session: str) -> None:
    """Whatever the weights add up to."""
    rule = Rule(tuple((f"t{i}", weight) for i, weight in enumerate(weights)))
    assert asked(models({"m": rule}), b'{"model":"m"}', session).model in {name for name, _ in rule.targets}
