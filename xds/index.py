"""The last good version of every object: what is served while a file is being edited, half written or wrong.

    Reading, Reading, ... --update--> Index --config--> Config

- An object whose new document is rejected keeps its previous version, with the rejection.
- An object no document names any more is gone, unless its file was unreadable, or held a document without a readable
  name: it may be the one that is missing, and a slip of the hand does not take a backend out of service.
- Of two documents for one object the first in reading order is served; of two InferenceModels for one model name of a
  pool the oldest (Gateway API's conflict rule).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from xds.model import (
    BackendTrafficPolicy,
    Config,
    EndpointSlice,
    Gateway,
    GatewayClass,
    HTTPRoute,
    InferenceModel,
    InferencePool,
    Level,
    Object,
    ObjectRef,
    Pod,
    ReferenceGrant,
    Rejection,
    Secret,
    Service,
)
from xds.parse import Parsed

MAX_REJECTIONS = 10_000  # told of one configuration: each is a log line when it is new
TOO_MANY = Rejection(None, "TooMany", f"there are more than {MAX_REJECTIONS} rejections; the first of them are told")

T = TypeVar("T")


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

    def update(self, reading: Reading) -> Index:
        """The index after a whole new reading."""
        rejections = list(reading.rejections)
        objects: dict[ObjectRef, Object] = {}
        first: dict[ObjectRef, Parsed] = {}
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
        kept_files = {
            ref: each
            for ref, each in self.objects.items()
            if ref not in first and _is_below(_place(each.meta.source)[0], unsure)
        }
        return Index(objects | kept_files, tuple(rejections))

    def config(self) -> Config:
        """What to serve: every kind oldest first, the rejections by file and line."""
        ordered = sorted(self.objects.values(), key=lambda each: each.meta.age_key)
        models, conflicts = _oldest(_of(InferenceModel, ordered))
        return Config(
            gateway_classes=_of(GatewayClass, ordered),
            gateways=_of(Gateway, ordered),
            http_routes=_of(HTTPRoute, ordered),
            reference_grants=_of(ReferenceGrant, ordered),
            traffic_policies=_of(BackendTrafficPolicy, ordered),
            services=_of(Service, ordered),
            endpoint_slices=_of(EndpointSlice, ordered),
            pods=_of(Pod, ordered),
            secrets=_of(Secret, ordered),
            pools=_of(InferencePool, ordered),
            models=models,
            rejections=_first(sorted([*self.rejections, *conflicts], key=_order)),
        )


def _first(rejections: list[Rejection]) -> tuple[Rejection, ...]:
    return tuple(rejections if len(rejections) <= MAX_REJECTIONS else [*rejections[:MAX_REJECTIONS], TOO_MANY])


def _of(kind: type[T], objects: Iterable[object]) -> tuple[T, ...]:
    return tuple(each for each in objects if isinstance(each, kind))


def _oldest(models: Iterable[InferenceModel]) -> tuple[tuple[InferenceModel, ...], list[Rejection]]:
    """The first model, in age order, for each model name of a pool, and a rejection for each other one."""
    served: dict[tuple[ObjectRef, str], InferenceModel] = {}
    conflicts = []
    for model in models:
        winner = served.setdefault((model.pool, model.model_name), model)
        if winner is not model:
            message = f"{winner.meta.ref} is older and has this model name in {model.pool}"
            conflicts.append(Rejection(model.meta.ref, "Conflicted", message, "spec.modelName", model.meta.source))
    return tuple(served.values()), conflicts


def _kept(rejection: Rejection) -> Rejection:
    return replace(rejection, message=f"{rejection.message}; its last good version is served")


def _place(source: str) -> tuple[str, int]:
    """`file.yaml:12` as (file, line), which sorts as a person reads; line 0 when there is none."""
    file, colon, line = source.rpartition(":")
    return (file, int(line)) if colon and line.isdecimal() else (source, 0)


def _is_below(file: str, paths: set[str]) -> bool:
    return bool(paths) and any(file == path or file.startswith(f"{path}/") for path in paths)


def _order(rejection: Rejection) -> tuple[tuple[str, int], str, str, str, str]:
    return _place(rejection.source), str(rejection.ref or ""), rejection.field, rejection.reason, rejection.message
