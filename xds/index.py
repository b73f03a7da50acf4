"""The last good version of every object: what is served while a file is being edited, half written or wrong.

    Reading, Reading, ... --update--> Index --config--> Config            a directory: everything, each time
    put, drop, put, ...   ----------> LiveIndex --config--> Config        an API server: object by object

- An object whose new document is rejected keeps its previous version, with the rejection.
- An object no document names any more is gone, unless its file was unreadable, or held a document without a readable
  name: it may be the one that is missing, and a slip of the hand does not take a backend out of service.
- Of two documents for one object the first in reading order is served.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar, cast

from xds.model import (
    BackendTrafficPolicy,
    Config,
    EndpointSlice,
    Gateway,
    GatewayClass,
    HTTPRoute,
    InferenceModel,
    InferenceModelRewrite,
    InferenceObjective,
    InferencePool,
    Level,
    Namespace,
    Object,
    ObjectRef,
    Pod,
    ReferenceGrant,
    Refused,
    Rejection,
    Secret,
    Service,
)
from xds.parse import Parsed

MAX_REJECTIONS = 10_000  # told of one configuration: each is a log line when it is new
TOO_MANY = Rejection(None, "TooMany", f"there are more than {MAX_REJECTIONS} rejections; the first of them are told")

T = TypeVar("T")
Told = TypeVar("Told", Rejection, Refused)


@dataclass(frozen=True, slots=True)
class Reading:
    """One whole look at a source of objects: every document, in order, and what could not be read at all.

    `unreadable` are files, and directories with all below them, as `source` names them before the line.
    """

    documents: tuple[Parsed, ...] = ()
    rejections: tuple[Rejection, ...] = ()
    unreadable: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Index:
    """The objects served now and why others are not; every `update` is a new one."""

    objects: Mapping[ObjectRef, Object] = field(default_factory=dict)
    rejections: tuple[Rejection, ...] = ()
    refused: tuple[Refused, ...] = ()

    def update(self, reading: Reading) -> Index:
        """The index after a whole new reading."""
        rejections = list(reading.rejections)
        objects: dict[ObjectRef, Object] = {}
        first: dict[ObjectRef, Parsed] = {}
        refused: list[Refused] = []
        unsure = set(reading.unreadable)
        for document in reading.documents:
            ref = document.ref
            if ref is None:
                rejections += document.rejections
                if any(rejection.level is Level.ERROR for rejection in document.rejections):
                    unsure.add(_place(document.source)[0])
            elif ref in first:
                message = f"already defined at {first[ref].source or 'the same source'}, which is served"
                rejections.append(Rejection(ref, "Duplicate", message, source=document.source))
            else:
                first[ref] = document
                served = document.object or self.objects.get(ref)
                if served:
                    objects[ref] = served
                kept = served is not None and document.object is None
                rejections += map(_kept, document.rejections) if kept else document.rejections
                if document.refused:
                    refused.append(_kept(document.refused) if kept else document.refused)
        kept_files = {
            ref: each
            for ref, each in self.objects.items()
            if ref not in first and _is_below(_place(each.meta.source)[0], unsure)
        }
        return Index(objects | kept_files, tuple(rejections), tuple(refused))

    def config(self) -> Config:
        """What to serve: every kind oldest first, the rejections by file and line."""
        ordered = sorted(self.objects.values(), key=_age_key)

        def of(kind: type[T]) -> tuple[T, ...]:
            return tuple(each for each in ordered if isinstance(each, kind))

        return _config(of, self.rejections, self.refused)


class LiveIndex:
    """The same, told of one object after the other (mutable); a change costs its object, not all of them.

    Each kind is kept in order, and its tuple in the Config is made anew only when one of the kind has changed.
    """

    def __init__(self) -> None:
        self.objects: dict[ObjectRef, Object] = {}
        self._rejections: dict[ObjectRef, tuple[Rejection, ...]] = {}
        self._refused: dict[ObjectRef, Refused] = {}
        self._ordered: defaultdict[type, list[Object]] = defaultdict(list)
        self._tuples: dict[type, tuple[Object, ...]] = {}

    def put(self, ref: ObjectRef, document: Parsed) -> bool:
        """The object as it is now; returns whether the Config is another one by that."""
        old, new = self.objects.get(ref), document.object
        kept = new is None and old is not None
        rejections = tuple(map(_kept, document.rejections)) if kept else document.rejections
        refused = _kept(document.refused) if kept and document.refused else document.refused
        told = rejections == self._rejections.get(ref, ()) and refused == self._refused.get(ref)
        if (kept or new == old) and told:
            return False
        self._rejections.pop(ref, None)
        self._refused.pop(ref, None)
        if rejections:
            self._rejections[ref] = rejections
        if refused:
            self._refused[ref] = refused
        if new is not None and new != old:
            self._remove(old)
            self.objects[ref] = new
            bisect.insort(self._ordered[type(new)], new, key=_age_key)
            self._tuples.pop(type(new), None)
        return True

    def drop(self, ref: ObjectRef) -> bool:
        """The object is gone; returns whether the Config is another one by that."""
        old = self.objects.pop(ref, None)
        self._remove(old)
        self._refused.pop(ref, None)
        return self._rejections.pop(ref, None) is not None or old is not None

    def config(self) -> Config:
        """What to serve, as `Index.config` would have it."""
        rejections = [each for several in self._rejections.values() for each in several]
        return _config(self._of, rejections, self._refused.values())

    def _of(self, kind: type[T]) -> tuple[T, ...]:
        if kind not in self._tuples:
            self._tuples[kind] = tuple(self._ordered[kind])
        return cast("tuple[T, ...]", self._tuples[kind])

    def _remove(self, old: Object | None) -> None:
        if old is None:
            return
        ordered = self._ordered[type(old)]
        at = bisect.bisect_left(ordered, _age_key(old), key=_age_key)
        while ordered[at] is not old:  # pools of both groups may have the same age and name
            at += 1
        del ordered[at]
        self._tuples.pop(type(old), None)


class _Of(Protocol):
    """The objects of one kind, oldest first."""

    def __call__(self, kind: type[T], /) -> tuple[T, ...]: ...


def _config(of: _Of, rejections: Iterable[Rejection], refused: Iterable[Refused]) -> Config:
    return Config(
        gateway_classes=of(GatewayClass),
        gateways=of(Gateway),
        http_routes=of(HTTPRoute),
        reference_grants=of(ReferenceGrant),
        traffic_policies=of(BackendTrafficPolicy),
        services=of(Service),
        endpoint_slices=of(EndpointSlice),
        pods=of(Pod),
        namespaces=of(Namespace),
        secrets=of(Secret),
        pools=of(InferencePool),
        models=of(InferenceModel),
        rewrites=of(InferenceModelRewrite),
        objectives=of(InferenceObjective),
        rejections=_first(sorted(rejections, key=_order)),
        refused=tuple(sorted(refused, key=lambda each: each.object.meta.ref)),
    )


def _first(rejections: list[Rejection]) -> tuple[Rejection, ...]:
    return tuple(rejections if len(rejections) <= MAX_REJECTIONS else [*rejections[:MAX_REJECTIONS], TOO_MANY])


def _age_key(each: Object) -> tuple[bool, str, str]:
    return each.meta.age_key


def _kept(told: Told) -> Told:
    return replace(told, message=f"{told.message}; its last good version is served")


def _place(source: str) -> tuple[str, int]:
    """`file.yaml:12` as (file, line), which sorts as a person reads; line 0 when there is none."""
    file, colon, line = source.rpartition(":")
    return (file, int(line)) if colon and line.isdecimal() else (source, 0)


def _is_below(file: str, paths: set[str]) -> bool:
    return bool(paths) and any(file == path or file.startswith(f"{path}/") for path in paths)


def _order(rejection: Rejection) -> tuple[tuple[str, int], str, str, str, str]:
    return _place(rejection.source), str(rejection.ref or ""), rejection.field, rejection.reason, rejection.message
