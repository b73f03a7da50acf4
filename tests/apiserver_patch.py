"""JSON merge patch and server-side apply as an API server does them, as far as status and small objects need (pure).

Server-side apply (https://kubernetes.io/docs/reference/using-api/server-side-apply/): a manager owns the fields it
applied. Another one's different value for such a field is a conflict, unless forced; a field its only owner leaves out
of the next apply is removed. A list is one value, except those the schemas declare as maps by a key: `KEYED`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

# Lists that are maps, and the field that tells their items apart (x-kubernetes-list-map-keys). All others are atomic:
# also status.parents of routes and pools, which takes the conditions inside with it.
KEYED = {"conditions": "type", "listeners": "name"}
FIXED = ("apiVersion", "kind", "metadata.name", "metadata.namespace")  # no manager owns these

Path = tuple[str, ...]  # ("f:status", "f:conditions", 'k:{"type":"Ready"}', "f:status"), as managedFields spell it


class ConflictError(Exception):
    """Fields that other managers own with another value: `fields` as (path, manager)."""

    def __init__(self, fields: list[tuple[str, str]]) -> None:
        super().__init__(fields)
        self.fields = fields


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386: null removes, a mapping merges, anything else replaces."""
    if not isinstance(patch, Mapping):
        return copy.deepcopy(patch)
    merged = dict(target) if isinstance(target, Mapping) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every field that can have an owner, with its value; an item of a keyed list is one itself, by its key."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            if isinstance(each, list) and name in KEYED and all(KEYED[name] in item for item in each):
                for item in each:
                    place = (*path, f"f:{name}", "k:" + json.dumps({KEYED[name]: item[KEYED[name]]}))
                    yield place, None
                    yield from leaves(item, place)
            elif isinstance(each, Mapping) and each:
                yield from leaves(each, (*path, f"f:{name}"))
            else:
                yield (*path, f"f:{name}"), each


def apply(
    live: dict[str, Any],
    applied: dict[str, Any],
    owned: Mapping[str, frozenset[Path]],
    manager: str,
    force: bool,
) -> tuple[dict[str, Any], dict[str, frozenset[Path]]]:
    """The object after `manager` has applied, and who owns what. `owned` is by manager. Raises ConflictError."""
    wanted = {path: value for path, value in leaves(applied) if ".".join(p[2:] for p in path) not in FIXED}
    present = dict(leaves(live))
    others = {name: paths for name, paths in owned.items() if name != manager}
    conflicts = [
        ("." + ".".join(part.removeprefix("f:") for part in path), name)
        for name, paths in sorted(others.items())
        for path in sorted(paths & wanted.keys())
        if path in present and present[path] != wanted[path]
    ]
    if conflicts and not force:
        raise ConflictError(conflicts)
    merged: dict[str, Any] = copy.deepcopy(live)
    kept = frozenset[Path]().union(*others.values())
    for path in sorted(owned.get(manager, frozenset()) - wanted.keys() - kept):
        if not any(other[: len(path)] == path for other in kept):
            _remove(merged, path)
    for path, value in wanted.items():
        _set(merged, path, value)
    lost = {path for path in wanted if path in present and present[path] != wanted[path]}
    owners = {name: paths - lost for name, paths in others.items()}
    return merged, {name: paths for name, paths in owners.items() if paths} | {manager: frozenset(wanted)}


def changed(before: dict[str, Any], after: dict[str, Any]) -> frozenset[Path]:
    """The fields that an update or a merge patch has set: they are its manager's from then on."""
    old = dict(leaves(before))
    return frozenset(path for path, value in leaves(after) if path not in old or old[path] != value)


def fields_v1(paths: frozenset[Path]) -> dict[str, Any]:
    """As `metadata.managedFields[].fieldsV1` spells a set of fields."""
    tree: dict[str, Any] = {}
    for path in sorted(paths):
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        if path[-1].startswith("k:"):
            node["."] = {}
    return tree


def _step(value: Any, part: str, *, make: bool) -> Any:
    """The child that one part of a path names; None when it is not there and not to be made."""
    if part.startswith("f:"):
        return value.setdefault(part[2:], {}) if make else value.get(part[2:])
    key = json.loads(part[2:])
    for item in value:
        if key.items() <= item.items():
            return item
    if not make:
        return None
    value.append(dict(key))
    return value[-1]


def _set(target: dict[str, Any], path: Path, value: Any) -> None:
    node: Any = target
    for part, following in zip(path, (*path[1:], ""), strict=True):
        if not following and part.startswith("f:"):
            node[part[2:]] = copy.deepcopy(value)
            return
        if following.startswith("k:") and not isinstance(node.get(part[2:]), list):
            node[part[2:]] = []
        node = _step(node, part, make=True)


def _remove(target: dict[str, Any], path: Path) -> None:
    node: Any = target
    for part in path[:-1]:
        node = _step(node, part, make=False)
        if node is None:
            return
    if path[-1].startswith("f:"):
        node.pop(path[-1][2:], None)
    elif (item := _step(node, path[-1], make=False)) is not None:
        node.remove(item)
