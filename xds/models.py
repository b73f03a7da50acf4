"""What InferenceModels, InferenceModelRewrites and InferenceObjectives say of each pool's models (pure).

One rule counts for each name of a pool: one for exactly this name before one for every name, then that of the oldest
object, then the first of its list. (That is what InferenceModelRewrite says; an InferenceModel is a rule for its name.)
A rule that counts for no name is a conflict. InferenceModels name all models there are: with one of them a pool's set
of names is closed, unless a rule stands for every name. InferenceModelRewrites leave it open, as in the extension.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from xds.model import (
    INFERENCE,
    INFERENCE_X,
    Config,
    Criticality,
    InferenceModel,
    InferenceModelRewrite,
    InferenceObjective,
    Level,
    ModelRule,
    ObjectRef,
    PoolModels,
    Rejection,
)

POOL_GROUPS = (INFERENCE, INFERENCE_X)

PoolKey = tuple[str, str]  # namespace and name: one pool seen through both API groups is one
Targets = tuple[tuple[str, int], ...]
_Object = InferenceModel | InferenceModelRewrite | InferenceObjective


@dataclass(frozen=True, slots=True)
class _Claim:
    """A rule that an object has for a name, "" for every one."""

    owner: InferenceModel | InferenceModelRewrite
    name: str
    targets: Targets
    criticality: Criticality
    field: str


def pool_models(config: Config) -> tuple[Mapping[PoolKey, PoolModels], tuple[Rejection, ...]]:
    """The models of every pool that any object names, and why a part of an object does not count."""
    pools = {(pool.meta.ref.namespace, pool.meta.ref.name) for pool in config.pools}
    rejections: list[Rejection] = []
    rules: defaultdict[PoolKey, dict[str, _Claim]] = defaultdict(dict)
    objectives: defaultdict[PoolKey, dict[str, InferenceObjective]] = defaultdict(dict)
    closed = set()
    objects: list[_Object] = [*config.models, *config.rewrites, *config.objectives]
    for each in sorted(objects, key=lambda each: each.meta.age_key):
        key = (each.pool.namespace, each.pool.name)
        if each.pool.kind != "InferencePool" or each.pool.group not in POOL_GROUPS:
            message = f"{each.pool.kind} of group {each.pool.group!r} is not an InferencePool"
            rejections.append(_about(each, "InvalidKind", message, "spec.poolRef"))
        elif key not in pools:
            rejections.append(
                _about(each, "PoolNotFound", f"{each.pool} does not exist", "spec.poolRef", Level.WARNING)
            )
        elif isinstance(each, InferenceObjective):
            winner = objectives[key].setdefault(each.meta.ref.name, each)
            if winner is not each:
                rejections.append(_conflict(each, winner.meta.ref, "this name", "metadata.name"))
        else:
            if isinstance(each, InferenceModel):
                closed.add(key)
            for claim in _claims(each):
                first = rules[key].setdefault(claim.name, claim)
                if first is not claim:
                    what = f"a rule for model {claim.name!r}" if claim.name else "a rule for every model"
                    rejections.append(_conflict(each, first.owner.meta.ref, what, claim.field))
    found = {key: _models(rules[key], objectives[key], closed=key in closed) for key in {*rules, *objectives}}
    return found, tuple(rejections)


def _claims(owner: InferenceModel | InferenceModelRewrite) -> Iterator[_Claim]:
    if isinstance(owner, InferenceModel):
        yield _Claim(owner, owner.model_name, owner.targets, owner.criticality, "spec.modelName")
        return
    for i, rule in enumerate(owner.rules):
        field = f"spec.rules[{i}]"
        for j, name in enumerate(dict.fromkeys(rule.models)):
            yield _Claim(owner, name, rule.targets, Criticality.STANDARD, f"{field}.matches[{j}]")
        if not rule.models:
            yield _Claim(owner, "", rule.targets, Criticality.STANDARD, field)


def _models(claims: Mapping[str, _Claim], objectives: Mapping[str, InferenceObjective], *, closed: bool) -> PoolModels:
    rules = tuple(ModelRule(name, _targets(claim), claim.criticality) for name, claim in sorted(claims.items()))
    return PoolModels(
        rules, closed and "" not in claims, tuple((name, each.priority) for name, each in sorted(objectives.items()))
    )


def _targets(claim: _Claim) -> Targets:
    """Its targets; none when the name is all of them."""
    return claim.targets if any(target != claim.name for target, _ in claim.targets) else ()


def _conflict(owner: _Object, winner: ObjectRef, what: str, field: str) -> Rejection:
    how = "earlier" if winner == owner.meta.ref else "and is older"
    return _about(owner, "Conflicted", f"{winner} has {what} in {owner.pool} {how}", field)


def _about(owner: _Object, reason: str, message: str, field: str, level: Level = Level.ERROR) -> Rejection:
    return Rejection(owner.meta.ref, reason, message, field, owner.meta.source, level)
