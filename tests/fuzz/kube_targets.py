"""An API server's answers: pages, events, refusals, discovery; and what follows from them up to the configuration."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from tests.fuzz.engine import Target
from tests.fuzz.mutate import JSON
from tests.fuzz.object_targets import OBJECTS, told
from tests.fuzz.script import dump, load, number, pure, steps, text
from xds.api_wire import Event, Failure, Page, Served, choose, group_versions, read_event, read_page, refusal
from xds.index import LiveIndex
from xds.kube_client import _decode
from xds.model import ObjectRef
from xds.parse import KINDS, parse
from xds.reflector import Changes, List, Reflector, Wait, Watch
from xds.resolve import resolve

PODS = Served("", "v1", "Pod", "pods", True)
VERSIONS = {kind: versions for kind, (versions, _) in KINDS.items()}


def _pod(name: str, version: str, ip: str = "10.0.0.1") -> dict[str, Any]:
    metadata = {"name": name, "namespace": "default", "uid": name, "resourceVersion": version, "labels": {"app": "a"}}
    return {"metadata": metadata, "status": {"podIP": ip, "phase": "Running"}}


def _page(version: str, *pods: dict[str, Any], token: str = "") -> list[Any]:
    metadata = {"resourceVersion": version, "continue": token}
    return ["page", {"kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": list(pods)}]


def _event(kind: str, value: dict[str, Any]) -> list[Any]:
    return ["event", {"type": kind, "object": value}]


STATUS = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old", "details": {"retryAfterSeconds": 2}}
RESOURCE = {"name": "pods", "kind": "Pod", "namespaced": True, "verbs": ["get", "list", "watch"]}
GROUPS = {
    "kind": "APIGroupList",
    "groups": [{"name": "gateway.networking.k8s.io", "versions": [{"version": "v1"}, {"version": "v1beta1"}]}],
}
ANSWERS = (
    dump(
        [
            *(["found", "/api/v1/pods"], _page("1", _pod("a", "1"), token="more"), _page("2", _pod("b", "2"))),
            *(_event("ADDED", _pod("c", "3")), _event("MODIFIED", _pod("a", "4", "10.0.0.9")), ["wait", 5]),
            *(_event("DELETED", _pod("b", "5")), _event("BOOKMARK", {"metadata": {"resourceVersion": "6"}}), ["end"]),
            *(_event("ERROR", STATUS), _page("9", _pod("a", "4")), ["refused", 410, dump(STATUS).decode(), "3"]),
            *(["refused", 503, "no", "1"], ["wait", 40], ["end"], ["found", ""], ["wait", 90], ["found", ""]),
        ]
    ),
    dump([["discovery", GROUPS, {"resources": [RESOURCE]}], ["found", "/a"], ["refused", 404, "<html>", ""]]),
)


class Followed:
    """A resource of a server that answers anything. Mutable."""

    def __init__(self) -> None:
        self.reflector, self.index, self.now = Reflector(lambda: 0.5, 0.0), LiveIndex(), 0.0
        self.outcomes: set[Hashable] = set()

    def take(self, changes: Changes) -> None:
        for item in changes.put:
            self.index.put(ObjectRef("", "Pod", *item.key), parse(item.document))
        for key in changes.gone:
            self.index.drop(ObjectRef("", "Pod", *key))

    def hear(self, found: Page | Event | Failure) -> None:
        match found:
            case Failure():
                assert found.reason.isalnum()
                assert found.message.isprintable()
                assert len(found.message) < 500
                self.reflector.failed(found, self.now)
                self.outcomes.add((found.reason[:20], found.status))
            case Page():
                self.take(self.reflector.listed(found, self.now))
            case Event():
                self.take(self.reflector.happened(found, self.now))

    def play(self, word: str, given: list[Any]) -> None:
        """One step of a script."""
        match word, given:
            case "found", [str(path)]:
                self.take(self.reflector.discovered(text(path), self.now))
            case "page" | "event", [document]:
                decoded = _decode(dump(document))
                read = read_page if word == "page" else read_event
                self.hear(decoded if isinstance(decoded, Failure) else read(decoded, PODS))
            case "refused", [status, str(body), str(after)]:
                self.hear(refusal(int(number(status, 300, 599)), body.encode(errors="replace"), text(after)))
            case "discovery", [groups, rows]:
                wanted = group_versions(VERSIONS, groups)
                if isinstance(wanted, Failure):
                    self.hear(wanted)
                else:
                    self.outcomes.add(("served", len(choose(VERSIONS, dict.fromkeys(wanted, rows)))))
            case "end", _:
                self.reflector.ended(self.now)
            case "wait", [seconds]:
                self.now += number(seconds, 0, 1e6)

    def go_on(self) -> List | Watch:
        """What is asked next, and when it is time for it; a resource that is not there is found."""
        for _ in range(3):
            step = self.reflector.next(self.now)
            if not isinstance(step, Wait):
                assert not isinstance(step, Watch) or 0 < step.seconds < 100
                return step
            assert step.seconds > 0
            if step.seconds < 1000:
                self.now += step.seconds
            else:
                self.take(self.reflector.discovered("/api/v1/pods", self.now))
        raise AssertionError("nothing is ever asked")


def follow(data: bytes) -> Iterable[Hashable]:
    """Whatever an API server answers, in any order: there is a next step, and the truth with the next whole list."""
    followed = Followed()
    for word, given in steps(data):
        followed.play(word, given)
        followed.go_on()
        reflector = followed.reflector
        followed.outcomes.add((reflector.synced, reflector.trouble is None, len(followed.index.objects)))
    followed.take(followed.reflector.discovered("/api/v1/other", followed.now))
    good = read_page(_page("7", _pod("good", "7"))[1], PODS)
    while isinstance(followed.go_on(), List):
        followed.hear(good)
    config = followed.index.config()
    assert [pod.meta.ref.name for pod in config.pods] == ["good"]
    assert set(followed.reflector.known) == {("default", "good")}
    return followed.outcomes | {told(each) for each in config.rejections}


def objects(data: bytes) -> Iterable[Hashable]:
    """Objects one after the other, changed and gone: the same configuration as all of them at once."""
    listed = load(data)
    items = listed.get("items") if isinstance(listed, dict) else None
    live, parsed = LiveIndex(), [parse(each) for each in items] if isinstance(items, list) else []
    for _ in range(2):
        for each in parsed:
            if each.ref is not None:
                live.put(each.ref, each)
                config = live.config()
        for each in parsed[::2]:
            if each.ref is not None:
                live.drop(each.ref)
    config = live.config()
    kept = {each.meta.ref for each in config.objects}
    assert kept == set(live.objects)
    return {told(each) for each in (*config.rejections, *resolve(config).rejections)}


TARGETS = (
    Target("follow", pure(follow), ANSWERS, JSON, short=60),
    Target("live", pure(objects), OBJECTS, JSON, seconds_large=10, short=30),
)
