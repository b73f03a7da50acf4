"""What a pool's objects say of its models, applied to a request. Pure.

    body -> the model's name -> its rule -> refused with 404 or 429, or the name the pod is asked for

A rule's targets share its requests by weight: by a hash, not by dice, so that a conversation stays with its target, and
with the prefix cache. Hashed is the session header's value, else the conversation's opening: its text up to the end of
the first message of a user. Later turns repeat it, and conversations that only share a system prompt differ in it. A
completion has no turns: all of its text counts.

    point = H("\\0split\\0" + model + "\\0" + (session or opening)) as a little-endian integer, H as in picker/prefix.py
    target = the first whose weight, with those before it, is more than point * (sum of the weights) / 2^64
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import mmh3

from picker.model_name import find_model, rename
from picker.prompt import read_opening

# When a pool is saturated: the thresholds of the inference extension's own endpoint picker.
SATURATED_WAITING = 5.0  # requests waiting on a pod
SATURATED_KV_USAGE = 0.8  # 0..1

UNKNOWN_MODEL, SHED = 404, 429


@dataclass(frozen=True, slots=True)
class Rule:
    """`targets` are (name, weight), empty = the name as it is."""

    targets: tuple[tuple[str, int], ...] = ()
    sheddable: bool = False
    critical: bool = False


@dataclass(frozen=True, slots=True)
class Models:
    """`rules` by the name a client says, "" for every other one; `closed`: no other one exists.

    `objectives` by their names: the priority. The last two say when the pool is saturated.
    """

    rules: Mapping[str, Rule] = field(default_factory=dict)
    closed: bool = False
    objectives: Mapping[str, int] = field(default_factory=dict)
    waiting: float = SATURATED_WAITING
    kv_usage: float = SATURATED_KV_USAGE

    def __bool__(self) -> bool:
        """Whether anything is said."""
        return bool(self.rules or self.objectives)

    def rule(self, name: str) -> Rule | None:
        """The rule for a model; None when there is none, or no name."""
        return (self.rules.get(name) or self.rules.get("")) if name else None

    def sheddable(self, rule: Rule | None, objective: str) -> bool:
        """Whether a request may be refused while the pool is saturated. `objective` "" or unknown says nothing."""
        if rule is not None and rule.critical:
            return False
        priority = self.objectives.get(objective)
        return priority < 0 if priority is not None else rule is not None and rule.sheddable


NO_MODELS = Models()


@dataclass(frozen=True, slots=True)
class Verdict:
    """`model` is what the pod is to be asked for, with `refused` (404, 429; 0 = not) what the client asked for.

    `body` is the request's with that name in it, None for as it is. `named`: the name was looked at; when it could not
    be, the request is as it was, and Envoy does not send a name on that was to be another (xds/refusals.py).
    """

    model: str
    body: bytes | None = None
    refused: int = 0
    named: bool = True


def judge(
    models: Models,
    body: bytes,
    session: str,
    objective: str,
    saturated: Callable[[], bool],
    name: str | None = None,
) -> Verdict:
    """What is to become of a request.

    `saturated` is asked only where it matters. `name` is the model's name where it was read already: only to replace it
    the body is looked at once more.
    """
    found = None
    if name is None:
        found = find_model(body)
        if found is None:
            return Verdict("", named=False)
        name = found.name
    rule = models.rule(name)
    if rule is None and models.closed and name:
        return Verdict(name, refused=UNKNOWN_MODEL)
    if models.sheddable(rule, objective) and saturated():
        return Verdict(name, refused=SHED)
    target = _target(rule, name, body, session) if rule is not None else name
    if target == name:
        return Verdict(name)
    found = found or find_model(body)
    if found is None or found.name != name:  # two readers, two names: neither is to be trusted
        return Verdict("", named=False)
    return Verdict(target, rename(body, found.places, target))


def _target(rule: Rule, name: str, body: bytes, session: str) -> str:
    if len(rule.targets) < 2:
        return rule.targets[0][0] if rule.targets else name
    opening = session.encode() or read_opening(body)
    digest = mmh3.mmh3_x64_128_digest(b"\0split\0" + name.encode() + b"\0" + opening)
    point = int.from_bytes(digest[:8], "little") * sum(weight for _, weight in rule.targets) >> 64
    ends = list(accumulate(weight for _, weight in rule.targets))
    return rule.targets[bisect(ends, point)][0]
