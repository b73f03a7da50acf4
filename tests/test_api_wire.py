"""api_wire: an API server's documents become values, and what is none of them a Failure."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xds.api_wire import (
    SHOWN,
    Event,
    Failure,
    Item,
    Page,
    Served,
    choose,
    group_versions,
    read_event,
    read_page,
    refusal,
)

PODS = Served("", "v1", "Pod", "pods", namespaced=True)
GATEWAYS = Served("gateway.networking.k8s.io", "v1", "Gateway", "gateways", namespaced=True)
CLASSES = Served("gateway.networking.k8s.io", "v1", "GatewayClass", "gatewayclasses", namespaced=False)
WORDS = (
    "metadata",
    "items",
    "resourceVersion",
    "continue",
    "name",
    "type",
    "object",
    "kind",
    "code",
    "resources",
    "verbs",
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
)


def pod(name: str = "a", version: str = "7") -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "default", "uid": "u", "resourceVersion": version}}


def test_names_and_paths() -> None:
    """As kubectl and RBAC name them; a cluster-scoped resource has no namespace in its path."""
    assert [each.name for each in (PODS, GATEWAYS)] == ["pods", "gateways.gateway.networking.k8s.io"]
    assert PODS.path() == "/api/v1/pods"
    assert PODS.path("llm") == "/api/v1/namespaces/llm/pods"
    assert GATEWAYS.path("llm") == "/apis/gateway.networking.k8s.io/v1/namespaces/llm/gateways"
    assert CLASSES.path("llm") == "/apis/gateway.networking.k8s.io/v1/gatewayclasses"


def test_page() -> None:
    """Items with key, uid and version; the items of a built-in kind are given the kind they lack."""
    document = {"kind": "PodList", "metadata": {"resourceVersion": "9", "continue": "t"}, "items": [pod()]}
    whole = {**pod(), "apiVersion": "v1", "kind": "Pod"}
    assert read_page(document, PODS) == Page((Item(("default", "a"), "u", "7", whole),), "9", "t")
    empty = {"metadata": {"resourceVersion": "9", "continue": ""}, "items": []}
    assert read_page(empty, PODS) == Page((), "9")
    assert read_page(empty | {"items": None}, PODS) == Page((), "9")
    named = {"metadata": {"name": "c", "resourceVersion": "1"}}
    page = read_page({"metadata": {"resourceVersion": "9"}, "items": [named]}, CLASSES)
    assert isinstance(page, Page)
    assert page.items[0].key == ("", "c")


@pytest.mark.parametrize(
    "document",
    [None, [], {}, {"items": []}, {"metadata": {"resourceVersion": ""}, "items": []}, "404 page not found\n"]
    + [{"metadata": {"resourceVersion": "9"}, "items": [bad]} for bad in (None, {}, {"metadata": {"name": "a"}})]
    + [{"metadata": {"resourceVersion": "9", "continue": 5}, "items": []}],
)
def test_what_is_no_page(document: object) -> None:
    """A list with one item that can not be told from others is none: a delete would follow from it."""
    assert read_page(document, PODS) == Failure("Protocol", "no list of pods")


def test_events() -> None:
    """Three with an object, a bookmark with a version alone."""
    for kind in ("ADDED", "MODIFIED", "DELETED"):
        event = read_event({"type": kind, "object": pod()}, PODS)
        assert isinstance(event, Event)
        assert (event.type, event.version) == (kind, "7")
        assert event.item is not None
        assert event.item.document["kind"] == "Pod"
    bookmark = {"type": "BOOKMARK", "object": {"kind": "Pod", "metadata": {"resourceVersion": "12"}}}
    assert read_event(bookmark, PODS) == Event("BOOKMARK", "12")


def test_error_event() -> None:
    """HTTP was 200; the Status has the code."""
    status = {"kind": "Status", "message": "too old resource version: 1 (1719)", "reason": "Expired", "code": 410}
    expected = Failure("Expired", "too old resource version: 1 (1719)", 410)
    assert read_event({"type": "ERROR", "object": status}, PODS) == expected
    for useless in (10**400, -1, "410", None):
        assert read_event({"type": "ERROR", "object": {"code": useless}}, PODS) == Failure("HTTP", "HTTP 0", 0)


@pytest.mark.parametrize("line", [None, {}, {"type": "ADDED", "object": {}}, {"type": "X", "object": pod()}, "404"])
def test_what_is_no_event(line: object) -> None:
    """It is a Failure, not skipped: what it wanted to say is lost."""
    assert read_event(line, PODS) == Failure("Protocol", "no event of pods")


def test_refusals() -> None:
    """A Status object with its reason and Retry-After, or a text."""
    text = refusal(404, b"404 page not found\n")
    assert text == Failure("NotFound", "HTTP 404: 404 page not found", 404)
    status = {"kind": "Status", "message": "storage is (re)initializing", "reason": "TooManyRequests", "code": 429}
    details = {"details": {"retryAfterSeconds": 3}}
    assert refusal(429, json.dumps(status).encode(), "1").retry_after == 1
    assert refusal(429, json.dumps(status | details).encode()).retry_after == 3
    useless: object
    for useless in (10**400, -1, 3.5, "3", None):
        told = {"details": {"retryAfterSeconds": useless}}
        assert refusal(429, json.dumps(status | told).encode()).retry_after == 0
    assert refusal(429, json.dumps(status).encode(), "Wed, 21 Oct 2026").retry_after == 0
    failure = refusal(500, json.dumps({"kind": "Status", "message": "boom\n" * 1000}).encode())
    assert (failure.reason, failure.status) == ("HTTP", 500)
    assert len(failure.message) <= SHOWN
    assert "\n" not in failure.message
    for body in (b"\x1b[2J", b'{"kind": "Status", "message": "\\u001b[2J"}'):
        assert refusal(500, body).message.endswith(r"\x1b[2J")
    odd = refusal(418, json.dumps({"kind": "Status", "reason": "no word"}).encode())
    assert odd == Failure("HTTP", "HTTP 418", 418)


# --- discovery ---

KINDS = {
    ("", "Pod"): ("v1",),
    ("gateway.networking.k8s.io", "Gateway"): ("v1", "v1beta1"),
    ("gateway.networking.k8s.io", "ReferenceGrant"): ("v1", "v1beta1"),
    ("gateway.envoyproxy.io", "BackendTrafficPolicy"): ("v1alpha1",),
}


def group(name: str, *versions: str) -> dict[str, Any]:
    return {"name": name, "versions": [{"groupVersion": f"{name}/{v}", "version": v} for v in versions]}


def row(name: str, kind: str, *verbs: str) -> dict[str, Any]:
    return {"name": name, "kind": kind, "namespaced": True, "verbs": list(verbs) or ["get", "list", "watch"]}


def test_group_versions() -> None:
    """Of ours the ones the server has; the core group is not in its list and always there."""
    groups = {"kind": "APIGroupList", "groups": [group("apps", "v1"), group("gateway.networking.k8s.io", "v1", "v9")]}
    assert group_versions(KINDS, groups) == [("", "v1"), ("gateway.networking.k8s.io", "v1")]
    assert isinstance(group_versions(KINDS, {"kind": "Status"}), Failure)


def test_each_kind_through_one_version() -> None:
    """The newest that has it and lets it be watched; a kind of no list is not there."""
    name = "gateway.networking.k8s.io"
    lists = {
        ("", "v1"): {"resources": [row("pods/status", "Pod"), row("pods", "Pod")]},
        (name, "v1"): {"resources": [row("gateways", "Gateway"), row("referencegrants", "ReferenceGrant", "get")]},
        (name, "v1beta1"): {"resources": [row("gateways", "Gateway"), row("referencegrants", "ReferenceGrant")]},
    }
    found = choose(KINDS, lists)
    assert {kind: (served.version, served.plural) for (_, kind), served in found.items()} == {
        "Pod": ("v1", "pods"),
        "Gateway": ("v1", "gateways"),
        "ReferenceGrant": ("v1beta1", "referencegrants"),
    }


@given(JSON, JSON)
def test_no_document_raises(first: object, second: object) -> None:
    """Whatever a server that is none may say."""
    read_page(first, PODS)
    read_event(first, PODS)
    read_event({"type": "ERROR", "object": first}, PODS)
    read_page({"metadata": first, "items": [second]}, PODS)
    refusal(500, json.dumps(first).encode())
    refusal(500, json.dumps({"kind": "Status", "reason": first, "details": second}).encode())
    group_versions(KINDS, {"kind": "APIGroupList", "groups": [first, {"name": "x", "versions": second}]})
    choose(KINDS, {("", "v1"): {"resources": [{"name": "pods", "kind": "Pod", "verbs": first}]}})
    choose(KINDS, {("", "v1"): first, ("gateway.networking.k8s.io", "v1"): {"resources": [first, second]}})
    refusal(500, b"\xff[")
