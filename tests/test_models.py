"""xds/models.py: which rule counts for each name of a pool, and what that asks of Envoy and the picker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.objects import config, inference_model, objective, pool, ref, rewrite, rewrite_rule
from xds.model import (
    INFERENCE,
    INFERENCE_X,
    LLM_D,
    Criticality,
    InferenceModel,
    Level,
    ModelRule,
    Object,
    PoolModels,
    Rejection,
    Renames,
)
from xds.models import PoolKey, pool_models

LLM = ("default", "llm")
LORA = (("lora", 1),)
OLD, YOUNG = "2024-01-01T00:00:00Z", "2025-01-01T00:00:00Z"


def served(*objects: Object) -> tuple[Mapping[PoolKey, PoolModels], tuple[Rejection, ...]]:
    return pool_models(config(pool(), *objects))


def models(*objects: Object) -> PoolModels:
    """The pool's, where nothing is to be said against an object."""
    found, rejections = served(*objects)
    assert rejections == ()
    return found[LLM]


def test_models_close_the_set_and_rewrites_do_not() -> None:
    """InferenceModels name all there are; a rule for every name opens the set again."""
    assert models(inference_model("a")) == PoolModels((ModelRule("m"),), closed=True)
    assert models(rewrite("a", rewrite_rule("m", targets=LORA))) == PoolModels((ModelRule("m", LORA),))
    both = models(inference_model("a"), rewrite("b", rewrite_rule("x", targets=LORA)))
    assert both == PoolModels((ModelRule("m"), ModelRule("x", LORA)), closed=True)
    opened = models(inference_model("a"), rewrite("b", rewrite_rule(targets=LORA)))
    assert opened == PoolModels((ModelRule("", LORA), ModelRule("m")), closed=False)


def test_a_target_that_is_the_name_is_no_target() -> None:
    """The seed's model: it asks for nothing the pods do not do themselves."""
    seed = models(inference_model("a", "m", ("m", 100), criticality=Criticality.CRITICAL))
    assert seed == PoolModels((ModelRule("m", (), Criticality.CRITICAL),), closed=True)
    assert (seed.renames, seed.sheds, seed.needs_picker) == (None, False, False)
    split = models(inference_model("a", "m", ("m", 9), ("lora", 1)))
    assert split.rules == (ModelRule("m", (("m", 9), ("lora", 1))),)
    assert split.needs_picker


@pytest.mark.parametrize("pool_group", [INFERENCE, INFERENCE_X])
def test_an_object_of_either_group_reaches_a_pool_of_either(pool_group: str) -> None:
    """One pool seen through both API groups is one; both groups of rewrites and objectives are read."""
    objects = (
        inference_model("a"),
        rewrite("b", rewrite_rule("x", targets=LORA), group=INFERENCE_X),
        rewrite("c", rewrite_rule("y", targets=LORA), group=LLM_D),
        objective("low", -1, group=INFERENCE_X),
        objective("high", 5, group=LLM_D),
    )
    found, rejections = pool_models(config(pool(group=pool_group), *objects))
    assert rejections == ()
    assert [rule.name for rule in found[LLM].rules] == ["m", "x", "y"]
    assert found[LLM].objectives == (("high", 5), ("low", -1))


def test_the_oldest_object_counts() -> None:
    """Of models, of rewrites, and of the one against the other; the younger is told which one counts."""
    old, young = inference_model("z", "m", ("a", 1), created=OLD), inference_model("y", "m", ("b", 1), created=YOUNG)
    alias = rewrite("x", rewrite_rule("m", targets=(("c", 1),)), created="2024-06-01T00:00:00Z")
    found, rejections = served(young, alias, old)
    assert found[LLM].rules == (ModelRule("m", (("a", 1),)),)
    assert [(each.ref, each.reason, each.level, each.field) for each in rejections] == [
        (alias.meta.ref, "Conflicted", Level.ERROR, "spec.rules[0].matches[0]"),
        (young.meta.ref, "Conflicted", Level.ERROR, "spec.modelName"),
    ]
    assert rejections[1].message == (
        "InferenceModel default/z has a rule for model 'm' in InferencePool default/llm and is older"
    )


def test_exact_goes_before_every_name_whatever_the_age_and_the_order() -> None:
    """An old rule for every name leaves a young one for exactly one name in force."""
    every = rewrite("a", rewrite_rule(targets=(("base", 1),)), created=OLD)
    exact = rewrite("b", rewrite_rule("m", targets=LORA), created=YOUNG)
    assert models(every, exact).rules == (ModelRule("", (("base", 1),)), ModelRule("m", LORA))
    mixed = rewrite("a", rewrite_rule(targets=(("base", 1),)), rewrite_rule("m", targets=LORA))
    assert models(mixed).rules == (ModelRule("", (("base", 1),)), ModelRule("m", LORA))


def test_within_an_object_the_first_rule_counts() -> None:
    """The second one for a name, or for every name, is a conflict; a name twice in one rule is none."""
    one = rewrite(
        "a",
        rewrite_rule("m", "n", "m", targets=(("1", 1),)),
        rewrite_rule("x", "n", targets=(("2", 1),)),
        rewrite_rule(targets=(("3", 1),)),
        rewrite_rule(targets=(("4", 1),)),
    )
    found, rejections = served(one)
    assert {rule.name: rule.targets[0][0] for rule in found[LLM].rules} == {"": "3", "m": "1", "n": "1", "x": "2"}
    assert [(each.field, each.message.partition(" has ")[2]) for each in rejections] == [
        ("spec.rules[1].matches[1]", "a rule for model 'n' in InferencePool default/llm earlier"),
        ("spec.rules[3]", "a rule for every model in InferencePool default/llm earlier"),
    ]


def test_pools_do_not_meet() -> None:
    """The same name, the same objective in two pools is no conflict."""
    found, rejections = pool_models(
        config(
            pool(),
            pool("other"),
            pool("llm", "elsewhere"),
            inference_model("a", "m", ("1", 1)),
            inference_model("b", "m", ("2", 1), of="other"),
            objective("low", -1),
            objective("low2", -2, of="other"),
        )
    )
    assert rejections == ()
    assert {key: each.rules[0].targets[0][0] for key, each in found.items()} == {LLM: "1", ("default", "other"): "2"}


def test_objectives_of_one_name() -> None:
    """One of each group: the older counts."""
    old, young = objective("low", -1, created=OLD), objective("low", 9, created=YOUNG, group=INFERENCE_X)
    found, (rejection,) = served(young, old)
    assert found[LLM].objectives == (("low", -1),)
    assert (rejection.ref, rejection.reason, rejection.field) == (young.meta.ref, "Conflicted", "metadata.name")


def test_a_pool_that_is_not_there() -> None:
    """A slip in its name is a warning, another kind an error; neither is served anywhere."""
    lost = inference_model("a", of="lln")
    odd = InferenceModel(lost.meta, "m", Criticality.STANDARD, (), ref("Service", "llm"))
    for each, reason, level in ((lost, "PoolNotFound", Level.WARNING), (odd, "InvalidKind", Level.ERROR)):
        found, (rejection,) = served(each)
        assert found == {}
        assert (rejection.reason, rejection.level, rejection.field) == (reason, level, "spec.poolRef")


@pytest.mark.parametrize(
    ("rules", "renames"),
    [
        ({}, None),
        ({"m": ()}, None),
        ({"": ()}, None),
        ({"m": LORA, "n": (), "b": LORA}, Renames(("b", "m"))),
        ({"": LORA}, Renames((), True, ("lora",))),
        ({"": LORA, "m": (("x", 1),), "n": ()}, Renames(("m",), True, ("lora", "n"))),
        ({"": (("a", 1), ("b", 1))}, Renames((), True, ())),  # a request for a may go to b
        ({"": (("a", 1), ("a", 2))}, Renames((), True, ("a",))),
        ({"": LORA, "lora": (("x", 1),)}, Renames(("lora",), True, ())),
    ],
)
def test_what_must_not_be_sent_on_as_it_is(rules: dict[str, Any], renames: Renames | None) -> None:
    """The names whose requests may be given another one; of a rule for every name, all but those that keep theirs."""
    made = PoolModels(tuple(ModelRule(name, targets) for name, targets in sorted(rules.items())))
    assert made.renames == renames
    assert made.needs_picker == (renames is not None)


def test_what_sheds() -> None:
    """A sheddable model, or an objective below 0."""
    assert models(inference_model("a", criticality=Criticality.SHEDDABLE)).sheds
    assert models(objective("low", -1)).sheds
    assert not models(objective("zero", 0), inference_model("a", criticality=Criticality.CRITICAL)).sheds
