"""Index and LiveIndex: the last good version of an object outlives what is wrong, and nothing else does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tls_files import CERTS
from xds.index import Index, LiveIndex, Reading
from xds.model import INFERENCE_X, Config, InferencePool, Level, Meta, ObjectRef, Pod, Refused, Rejection
from xds.parse import Parsed, parse


def _ref(name: str, kind: str = "Pod") -> ObjectRef:
    return ObjectRef("" if kind == "Pod" else INFERENCE_X, kind, "default", name)


def _pod(name: str, source: str, ip: str = "10.0.0.1", created: str = "") -> Parsed:
    """A good document of one pod."""
    ref = _ref(name)
    pod = Pod(Meta(ref, created, source=source), ip, ready=True, deleting=False, ports={})
    return Parsed(source, ref, pod)


def _bad(name: str, source: str) -> Parsed:
    """A document whose object is known and rejected."""
    return Parsed(source, _ref(name), None, (Rejection(_ref(name), "Invalid", "no", "spec", source),))


def _refused(name: str, text: str) -> Parsed:
    """The same of an object that has a status."""
    pool = InferencePool(Meta(_ref(name), generation=len(text)), {}, ())
    return replace(_bad(name, ""), refused=Refused(pool, "Invalid", text))


def _nameless(source: str) -> Parsed:
    """A document nobody can say whose it is."""
    return Parsed(source, rejections=(Rejection(None, "InvalidYAML", "no", source=source),))


def _served(config: Config) -> list[str]:
    return [f"{pod.meta.ref.name}@{pod.ip}" for pod in config.pods]


def test_whole_new_reading_replaces_the_old() -> None:
    """An object of no document is gone, a new version replaces the old one, and the old index is as it was."""
    first = Index().update(Reading((_pod("a", "f:1"), _pod("b", "f:2"))))
    second = first.update(Reading((_pod("b", "f:1", "10.0.0.2"), _pod("c", "f:2"))))
    assert _served(second.config()) == ["b@10.0.0.2", "c@10.0.0.1"]
    assert _served(first.config()) == ["a@10.0.0.1", "b@10.0.0.1"]


def test_rejected_object_keeps_its_last_good_version() -> None:
    """As often as it is read again; the rejection says that the old version is served. Mended, it is replaced."""
    index = Index().update(Reading((_pod("a", "f:1"),)))
    for _ in range(2):
        index = index.update(Reading((_bad("a", "f:1"),)))
        assert _served(index.config()) == ["a@10.0.0.1"]
        (rejection,) = index.config().rejections
        assert rejection.message == "no; its last good version is served"
    index = index.update(Reading((_pod("a", "f:1", "10.0.0.9"),)))
    assert _served(index.config()) == ["a@10.0.0.9"]
    assert index.config().rejections == ()


def test_rejected_object_without_a_past_is_not_served() -> None:
    """There is nothing to fall back to, and the message does not claim it."""
    config = Index().update(Reading((_bad("a", "f:1"),))).config()
    assert _served(config) == []
    assert config.rejections[0].message == "no"


def test_objects_of_an_unreadable_file_stay() -> None:
    """Of that file and of an unreadable directory all below it; objects of other files do not."""
    index = Index().update(Reading((_pod("a", "f.yaml:1"), _pod("b", "d/g.yaml:1"), _pod("c", "dd.yaml:1"))))
    after = index.update(Reading(unreadable=frozenset({"f.yaml", "d"})))
    assert _served(after.config()) == ["a@10.0.0.1", "b@10.0.0.1"]
    assert _served(index.update(Reading()).config()) == []


def test_nameless_document_keeps_the_objects_of_its_file() -> None:
    """It may be the one that is missing; an object that has moved to another file is served from there."""
    index = Index().update(Reading((_pod("a", "f:1"), _pod("b", "f:9"), _pod("c", "g:1"))))
    after = index.update(Reading((_nameless("f:1"), _pod("b", "h:1", "10.0.0.7"))))
    assert _served(after.config()) == ["a@10.0.0.1", "b@10.0.0.7"]
    gone = after.update(Reading((_pod("b", "h:1"),)))
    assert _served(gone.config()) == ["b@10.0.0.1"]


def test_document_of_others_or_a_warning_keeps_nothing() -> None:
    """A ConfigMap, or a kind that is only warned of, in the file does not hold deleted objects."""
    index = Index().update(Reading((_pod("a", "f:1"),)))
    warning = Rejection(None, "UnsupportedKind", "w", level=Level.WARNING)
    after = index.update(Reading((Parsed("f:1"), Parsed("f:2", rejections=(warning,)))))
    assert _served(after.config()) == []
    assert after.config().rejections == (warning,)


def test_first_of_two_documents_is_served() -> None:
    """In reading order, with a rejection of the other that names the first's place; the warnings of the first stay."""
    warned = replace(_pod("a", "f:1"), rejections=(Rejection(_ref("a"), "W", "w", level=Level.WARNING),))
    config = Index().update(Reading((warned, _pod("a", "f:5", "10.0.0.2"), _bad("a", "g:1")))).config()
    assert _served(config) == ["a@10.0.0.1"]
    duplicates = [each for each in config.rejections if each.reason == "Duplicate"]
    assert [each.source for each in duplicates] == ["f:5", "g:1"]
    assert duplicates[0].message == "already defined at f:1, which is served"
    assert len(config.rejections) == 3


def test_order_of_a_config() -> None:
    """Objects by age, then name; rejections by file and line number; every document of every kind in its place."""
    documents = (
        _pod("z", "f:1", created="2025-01-01T00:00:00Z"),
        _pod("b", "f:2"),
        _pod("a", "f:3"),
        _pod("y", "f:4", created="2024-01-01T00:00:00Z"),
    )
    rejections = tuple(Rejection(None, "R", "m", source=source) for source in ("f:10", "f:9", "e:11", "", "f"))
    config = Index().update(Reading(documents, rejections)).config()
    assert [pod.meta.ref.name for pod in config.pods] == ["y", "z", "a", "b"]
    assert [each.source for each in config.rejections] == ["", "e:11", "f", "f:9", "f:10"]
    assert config == Index().update(Reading(documents[::-1], rejections[::-1])).config()


def test_a_refused_version_says_what_is_served_instead() -> None:
    """The version before it, if there is one; and it is forgotten with the next good one."""
    first = Index().update(Reading((_refused("a", "why"),)))
    assert [each.message for each in first.config().refused] == ["why"]
    second = first.update(Reading((_pod("a", ""),))).update(Reading((_refused("a", "why"),)))
    assert [each.message for each in second.config().refused] == ["why; its last good version is served"]
    assert second.update(Reading((_pod("a", ""),))).config().refused == ()


def test_every_kind_reaches_its_field() -> None:
    """A parsed object of each kind is in exactly one tuple of the Config."""
    x = {"metadata": {"name": "x"}}
    gateway, inference = "gateway.networking.k8s.io/v1", "inference.networking.x-k8s.io/v1alpha2"
    target = {"group": "g", "kind": "K", "namespace": "n"}
    documents: list[dict[str, Any]] = [
        {"apiVersion": gateway, "kind": "GatewayClass", "spec": {"controllerName": "a.b/c"}},
        {
            "apiVersion": gateway,
            "kind": "Gateway",
            "spec": {"gatewayClassName": "c", "listeners": [{"name": "h", "port": 1, "protocol": "HTTP"}]},
        },
        {"apiVersion": gateway, "kind": "HTTPRoute", "spec": {}},
        {
            "apiVersion": gateway,
            "kind": "ReferenceGrant",
            "spec": {"from": [target], "to": [{"group": "", "kind": "S"}]},
        },
        {
            "apiVersion": "gateway.envoyproxy.io/v1alpha1",
            "kind": "BackendTrafficPolicy",
            "spec": {"targetRefs": [{"group": gateway[:-3], "kind": "Gateway", "name": "x"}]},
        },
        {"apiVersion": "v1", "kind": "Service", "spec": {}},
        {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4"},
        {"apiVersion": "v1", "kind": "Pod"},
        {"apiVersion": "v1", "kind": "Namespace"},
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "kubernetes.io/tls",
            "stringData": {"tls.crt": (CERTS / "first.pem").read_text(), "tls.key": (CERTS / "first.key").read_text()},
        },
        {"apiVersion": inference, "kind": "InferencePool", "spec": {"selector": {"a": "b"}, "targetPortNumber": 1}},
        {"apiVersion": inference, "kind": "InferenceModel", "spec": {"modelName": "m", "poolRef": {"name": "x"}}},
        {"apiVersion": inference, "kind": "InferenceModelRewrite", "spec": {"rules": [], "poolRef": {"name": "x"}}},
        {"apiVersion": inference, "kind": "InferenceObjective", "spec": {"poolRef": {"name": "x"}}},
    ]
    config = Index().update(Reading(tuple(parse(x | document) for document in documents))).config()
    assert config.rejections == ()
    for name in Config.__slots__:
        assert len(getattr(config, name)) == (name not in ("rejections", "refused")), name


def test_rejections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first by file and line are told, and that there are more; the objects are served all the same."""
    monkeypatch.setattr("xds.index.MAX_REJECTIONS", 2)
    documents = [_bad(name, f"f:{9 - line}") for line, name in enumerate("abcd")]
    config = Index().update(Reading((*documents, _pod("e", "f:10")))).config()
    assert [each.source for each in config.rejections] == ["f:6", "f:7", ""]
    assert config.rejections[-1].reason == "TooMany"
    assert _served(config) == ["e@10.0.0.1"]
    exactly = Index().update(Reading(tuple(documents[:2]))).config()
    assert [each.source for each in exactly.rejections] == ["f:8", "f:9"]


_DOCUMENTS = st.builds(
    lambda make, name, line: make(name, f"f:{line}"),
    st.sampled_from([_pod, _bad, lambda _, source: _nameless(source)]),
    st.sampled_from("abc"),
    st.integers(1, 9),
)


@given(st.lists(st.lists(_DOCUMENTS, max_size=5), max_size=5))
def test_served_objects_always_were_accepted(readings: list[list[Parsed]]) -> None:
    """Over any readings: each good first document is served, and whatever else is served was served before."""
    index = Index()
    for documents in readings:
        before, index = index, index.update(Reading(tuple(documents)))
        first = {each.ref: each for each in reversed(documents) if each.ref}
        for ref, each in first.items():
            if each.object:
                assert index.objects[ref] is each.object
        for ref, served in index.objects.items():
            assert served is (first[ref].object if ref in first else None) or served is before.objects[ref]
        bad = {each.ref for each in documents if each.rejections}
        assert bad <= {each.ref for each in index.rejections}


# --- object by object ---


_CHANGES = st.builds(
    lambda make, name, ip, created: (_ref(name), make(name, ip, created)),
    st.sampled_from(
        [
            lambda n, ip, c: _pod(n, "", ip, c),
            lambda n, *_: _bad(n, ""),
            lambda n, ip, c: _refused(n, ip + c),
            lambda *_: None,
        ]
    ),
    st.sampled_from("abcd"),
    st.sampled_from(["10.0.0.1", "10.0.0.2"]),
    st.sampled_from(["", "2025-01-01T00:00:00Z", "2026-01-01T00:00:00Z"]),
)


@given(st.lists(_CHANGES, max_size=40))
def test_live_index_is_the_index_of_the_last_documents(changes: list[tuple[ObjectRef, Parsed | None]]) -> None:
    """After any changes one by one its Config is that of whole readings, and it says truly whether it is another."""
    live, whole = LiveIndex(), Index()
    documents: dict[ObjectRef, Parsed] = {}
    for ref, document in changes:
        before = live.config()
        if document is None:
            documents.pop(ref, None)
            new = live.drop(ref)
        else:
            documents[ref] = document
            new = live.put(ref, document)
        whole = whole.update(Reading(tuple(documents.values())))
        assert live.config() == whole.config()
        assert new == (live.config() != before)
        assert live.objects == whole.objects


def test_live_index_shares_what_did_not_change() -> None:
    """A pod that changes leaves every other kind's tuple the same object, and its own in order."""
    live = LiveIndex()
    pool = {"metadata": {"name": "p"}, "spec": {"selector": {"a": "b"}, "targetPortNumber": 1}}
    parsed = parse({"apiVersion": "inference.networking.x-k8s.io/v1alpha2", "kind": "InferencePool"} | pool)
    assert parsed.ref is not None
    live.put(parsed.ref, parsed)
    for name in "cab":
        live.put(_ref(name), _pod(name, ""))
    before = live.config()
    live.put(_ref("a"), _pod("a", "", "10.0.0.9"))
    after = live.config()
    assert after.pools is before.pools
    assert _served(after) == ["a@10.0.0.9", "b@10.0.0.1", "c@10.0.0.1"]
    assert _served(before)[0] == "a@10.0.0.1"


def test_live_index_tells_pools_of_one_name_and_age_apart() -> None:
    """The same pool in both groups: one goes, the other stays."""
    live, refs = LiveIndex(), []
    for group in ("inference.networking.k8s.io", INFERENCE_X):
        ref = ObjectRef(group, "InferencePool", "default", "p")
        live.put(ref, Parsed("", ref, InferencePool(Meta(ref), {"a": "b"}, (1,))))
        refs.append(ref)
    for gone, left in (refs[::-1], refs):
        assert live.drop(gone)
        assert [each.meta.ref for each in live.config().pools] == [left]
        live.put(gone, Parsed("", gone, InferencePool(Meta(gone), {"a": "b"}, (1,))))
