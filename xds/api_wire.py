"""What an API server says, as values: pages, events, refusals, and the resources it has (pure).

Nothing here trusts its input: what is not of the shape the API promises becomes a `Failure`, as a refusal does.
https://kubernetes.io/docs/reference/using-api/api-concepts/
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from xds.model import printable

SHOWN = 300  # characters of a server's message that are repeated: it names user, verb and resource in about 200

MAX_RETRY_AFTER = 100_000  # seconds: what is longer is no advice, and may be no float

Key = tuple[str, str]  # namespace ("" for cluster scope) and name
GroupKind = tuple[str, str]

_REASON = re.compile(r"[A-Za-z]{1,64}")  # it labels a metric


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no answer, or none that helps.

    `reason` is the server's own (Expired, Forbidden, TooManyRequests, ...) or one of ours: Unreachable, Timeout,
    Closed, Protocol, TooLarge, HTTP. `status` is the HTTP status, 0 without an answer; `retry_after` in seconds.
    """

    reason: str
    message: str
    status: int = 0
    retry_after: float = 0.0


@dataclass(frozen=True, slots=True)
class Item:
    """One object. `version` is its resourceVersion: compared for equality and given back, never more."""

    key: Key
    uid: str
    version: str
    document: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list; `token` is "" on the last one."""

    items: tuple[Item, ...]
    version: str
    token: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a watch: ADDED, MODIFIED, DELETED with an item, or BOOKMARK with only a version."""

    type: str
    version: str
    item: Item | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """A resource as this server has it."""

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool

    @property
    def name(self) -> str:
        """`pods`, or `gateways.gateway.networking.k8s.io`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str = "") -> str:
        """Of its objects in one namespace, or in all ("")."""
        within = f"/namespaces/{namespace}" if namespace and self.namespaced else ""
        return f"{group_path(self.group, self.version)}{within}/{self.plural}"


def group_path(group: str, version: str) -> str:
    return f"/apis/{group}/{version}" if group else f"/api/{version}"


def read_page(document: object, served: Served) -> Page | Failure:
    """A list. The items of built-in kinds come without apiVersion and kind, which are put back."""
    match document:
        case {"metadata": {"resourceVersion": str(version), **metadata}, "items": list(values)} if version:
            items = tuple(_items(values, served))
            token = metadata.get("continue") or ""
            if len(items) == len(values) and isinstance(token, str):
                return Page(items, version, token)
        case {"metadata": {"resourceVersion": str(version)}, "items": None} if version:
            return Page((), version)
    return Failure("Protocol", f"no list of {served.name}")


def read_event(line: object, served: Served) -> Event | Failure:
    """One line of a watch; its ERROR is a Failure."""
    match line:
        case {"type": "ADDED" | "MODIFIED" | "DELETED" as kind, "object": dict(value)}:
            for item in _items([value], served):
                return Event(kind, item.version, item)
        case {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(version)}}} if version:
            return Event("BOOKMARK", version)
        case {"type": "ERROR", "object": dict(status)}:
            code = status.get("code")
            return _of_status(code if isinstance(code, int) and 0 < code < 1000 else 0, status)
    return Failure("Protocol", f"no event of {served.name}")


def refusal(status: int, body: bytes, retry_after: str = "") -> Failure:
    """An answer that is not 200: a Status object, or a text (404 for a path nobody serves)."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and value.get("kind") == "Status":
        failure = _of_status(status, value)
    else:
        text = _line(body[:SHOWN].decode(errors="replace"))
        failure = Failure("NotFound" if status == 404 else "HTTP", f"HTTP {status}: {text}", status)
    seconds = float(retry_after) if retry_after.isdecimal() and len(retry_after) < 6 else failure.retry_after
    return Failure(failure.reason, failure.message, failure.status, seconds)


def group_versions(kinds: Mapping[GroupKind, Iterable[str]], groups: object) -> list[tuple[str, str]] | Failure:
    """Of the server's APIGroupList (`/apis`) the versions of our groups; the core group is always there."""
    if not isinstance(groups, dict) or groups.get("kind") != "APIGroupList":
        return Failure("Protocol", "no APIGroupList at /apis: not an API server")
    served = {("", "v1")}
    for group in _mappings(groups.get("groups")):
        for version in _mappings(group.get("versions")):
            served.add((str(group.get("name")), str(version.get("version"))))
    wanted = {(group, version) for (group, _), versions in kinds.items() for version in versions}
    return sorted(wanted & served)


def choose(
    kinds: Mapping[GroupKind, Iterable[str]], lists: Mapping[tuple[str, str], object]
) -> Mapping[GroupKind, Served]:
    """Each kind through one version alone: the first of `kinds` that the server's APIResourceLists have.

    `kinds` names the newest first; `lists` are by group and version.
    """
    found: dict[GroupKind, Served] = {}
    for (group, kind), versions in kinds.items():
        for version in versions:
            row = next((r for r in _rows(lists.get((group, version))) if r.get("kind") == kind), None)
            if row is not None and (group, kind) not in found:
                found[group, kind] = Served(group, version, kind, str(row["name"]), bool(row.get("namespaced")))
    return found


def _rows(document: object) -> Iterator[Mapping[str, object]]:
    """The resources of an APIResourceList that can be listed and watched; `pods/status` is none."""
    rows = document.get("resources") if isinstance(document, dict) else None
    for row in _mappings(rows):
        name, verbs = row.get("name"), row.get("verbs")
        followed = isinstance(verbs, list) and "list" in verbs and "watch" in verbs
        if followed and isinstance(name, str) and "/" not in name:
            yield row


def _mappings(value: object) -> Iterator[Mapping[str, object]]:
    yield from (each for each in value if isinstance(each, dict)) if isinstance(value, list) else ()


def _items(values: Iterable[object], served: Served) -> Iterator[Item]:
    """Those that have what every object of an API server has."""
    for value in values:
        metadata = value.get("metadata") if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(metadata, dict):
            continue
        name, version = metadata.get("name"), metadata.get("resourceVersion")
        if isinstance(name, str) and isinstance(version, str) and name and version:
            document = value | {"apiVersion": served.api_version, "kind": served.kind}
            yield Item((str(metadata.get("namespace") or ""), name), str(metadata.get("uid") or ""), version, document)


def _line(text: str) -> str:
    return printable(" ".join(text.split()))


def _of_status(status: int, value: Mapping[str, object]) -> Failure:
    reason, message, details = value.get("reason"), value.get("message"), value.get("details")
    reason = reason if isinstance(reason, str) and _REASON.fullmatch(reason) else "HTTP"
    after = details.get("retryAfterSeconds") if isinstance(details, dict) else None
    seconds = float(after) if isinstance(after, int) and 0 < after < MAX_RETRY_AFTER else 0.0
    text = _line(message[:SHOWN]) if isinstance(message, str) else ""
    return Failure(reason, text or f"HTTP {status}", status, seconds)
