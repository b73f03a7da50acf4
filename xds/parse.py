"""A decoded document to a frozen `Object`: `parse` decides whose object it is and lets the kind's own parser read it.

    dict --Reader--> parse_gateway, parse_route (parse_filters), parse_inference, parse_core --> Object, Rejections

An object that breaks its schema is rejected whole, as an API server would refuse it; what costs less (a listener, a
rule, an unknown field) is noted and the rest is served. Nothing here raises on what a document contains.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

from xds.fields import ANNOTATION, LABEL_VALUE, MAX_LABELS, NAME, NAMESPACE, FieldError, Reader, Text, describe
from xds.model import (
    CORE,
    DISCOVERY,
    ENVOY_GATEWAY,
    GATEWAY,
    INFERENCE,
    INFERENCE_X,
    LLM_D,
    Level,
    Meta,
    Object,
    ObjectRef,
    Refused,
    Rejection,
)
from xds.parse_core import read_endpoint_slice, read_namespace, read_pod, read_secret, read_service
from xds.parse_gateway import read_gateway, read_gateway_class, read_reference_grant, read_traffic_policy
from xds.parse_inference import read_model, read_objective, read_pool, read_pool_x, read_rewrite
from xds.parse_outline import MAX_GENERATION, outline
from xds.parse_route import read_http_route

MAX_NOTES = 32  # rejections of one object: a route can have thousands of filters that are none of ours
MAX_UNKNOWN = 16  # unknown fields named of one object: a person mends a few, a file of another kind has thousands
# The annotations that are read. Of ten thousand pods all others would be kept for nothing: last-applied-configuration
# alone is as large as its object.
ANNOTATIONS = ("prometheus.io/", "inference.networking.x-k8s.io/", "vllm-xds/")

_API_VERSION = Text("group/version", 317, re.compile(r"[a-z0-9.-]+(/[a-z0-9]+)?"))
_KIND = Text("a kind", 63, re.compile(r"[A-Za-z][A-Za-z0-9]*"))
_TIMESTAMP = Text("an RFC 3339 time in UTC", 64, re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}(\.[0-9]+)?Z"))


@dataclass(frozen=True, slots=True)
class Parsed:
    """What one document came to: the object, or why there is none.

    `ref` names the object even if it is rejected; `refused` is then what its status may say. All empty: a kind this
    product does not read (a Deployment). `source` is where the document was read (`file.yaml:12`), "" for one from the
    API server.
    """

    source: str = ""
    ref: ObjectRef | None = None
    object: Object | None = None
    rejections: tuple[Rejection, ...] = ()
    refused: Refused | None = None


@dataclass(frozen=True, slots=True)
class _Kind:
    """`strict`: fields of the spec nobody reads are worth a warning; of core kinds only a few of many are read."""

    versions: tuple[str, ...]
    read: Callable[[Reader, Meta], Object]
    namespaced: bool = True
    strict: bool = True


_KINDS = {
    (GATEWAY, "GatewayClass"): _Kind(("v1", "v1beta1"), read_gateway_class, namespaced=False),
    (GATEWAY, "Gateway"): _Kind(("v1", "v1beta1"), read_gateway),
    (GATEWAY, "HTTPRoute"): _Kind(("v1", "v1beta1"), read_http_route),
    (GATEWAY, "ReferenceGrant"): _Kind(("v1", "v1beta1"), read_reference_grant),
    (ENVOY_GATEWAY, "BackendTrafficPolicy"): _Kind(("v1alpha1",), read_traffic_policy),
    (INFERENCE, "InferencePool"): _Kind(("v1",), read_pool),
    (INFERENCE_X, "InferencePool"): _Kind(("v1alpha2", "v1alpha1"), read_pool_x),
    (INFERENCE_X, "InferenceModel"): _Kind(("v1alpha2", "v1alpha1"), read_model),
    (INFERENCE_X, "InferenceModelRewrite"): _Kind(("v1alpha2",), read_rewrite),
    (INFERENCE_X, "InferenceObjective"): _Kind(("v1alpha2",), read_objective),
    (LLM_D, "InferenceModelRewrite"): _Kind(("v1alpha2",), read_rewrite),
    (LLM_D, "InferenceObjective"): _Kind(("v1alpha2",), read_objective),
    (CORE, "Service"): _Kind(("v1",), read_service, strict=False),
    (CORE, "Pod"): _Kind(("v1",), read_pod, strict=False),
    (CORE, "Namespace"): _Kind(("v1",), read_namespace, namespaced=False, strict=False),
    (CORE, "Secret"): _Kind(("v1",), read_secret, strict=False),
    (DISCOVERY, "EndpointSlice"): _Kind(("v1",), read_endpoint_slice, strict=False),
}
# What a source has to read: group and kind -> its versions, the newest first, and whether it is namespaced.
KINDS = {name: (kind.versions, kind.namespaced) for name, kind in _KINDS.items()}
_OUR_GROUPS = frozenset({GATEWAY, ENVOY_GATEWAY, INFERENCE, INFERENCE_X})


def parse(document: object, source: str = "", default_namespace: str = "default") -> Parsed:
    """Read one document; never raises, whatever it holds. A null document (an empty one) comes to nothing."""
    notes: list[Rejection] = []
    ref: ObjectRef | None = None
    kind: _Kind | None = None
    parsed: Object | None = None
    refused: Refused | None = None
    try:
        reader = Reader({} if document is None else document, notes=notes)
        if document is not None:
            ref, kind = _identify(reader, default_namespace)
        if ref and kind:
            parsed = _read(reader, kind, ref, source)
    except FieldError as error:
        notes.append(error.rejection)
        refused = outline(document, ref, error.rejection) if ref and kind else None
    told = notes if len(notes) <= MAX_NOTES else [*notes[: MAX_NOTES - 1], notes[-1]]  # the last may say why it is none
    rejections = tuple(replace(note, ref=ref, source=source) for note in told)
    return Parsed(source, ref if kind else None, parsed, rejections, refused)


def _identify(reader: Reader, default_namespace: str) -> tuple[ObjectRef | None, _Kind | None]:
    """Whose document it is; no ref for a kind of others, no kind for one of our groups that is not served."""
    group, _, _ = reader.text("apiVersion", _API_VERSION).rpartition("/")
    name = reader.text("kind", _KIND)
    kind = _KINDS.get((group, name))
    if kind is None and group not in _OUR_GROUPS:
        return None, None
    metadata = reader.child("metadata")
    namespace = metadata.text("namespace", NAMESPACE, default_namespace)
    if kind is None:
        reader.warn("kind", "not a kind this product serves, ignored", "UnsupportedKind")
    elif not kind.namespaced:
        namespace = ""
    return ObjectRef(group, name, namespace, metadata.text("name", NAME)), kind


def _read(reader: Reader, kind: _Kind, ref: ObjectRef, source: str) -> Object:
    version = reader.text("apiVersion", _API_VERSION).rpartition("/")[2]
    if version not in kind.versions:
        message = f"expected version {' or '.join(kind.versions)}, found {describe(version)}"
        raise reader.error("apiVersion", message, "UnsupportedVersion")
    metadata = reader.child("metadata")
    meta = Meta(
        ref,
        created=metadata.text("creationTimestamp", _TIMESTAMP, ""),
        generation=metadata.integer("generation", 0, MAX_GENERATION, 0),
        source=source,
        labels=metadata.texts_by_key("labels", MAX_LABELS, LABEL_VALUE),
        annotations={
            name: text
            for name, text in metadata.texts_by_key("annotations", MAX_LABELS, ANNOTATION).items()
            if name.startswith(ANNOTATIONS)
        },
    )
    parsed = kind.read(reader, meta)
    if kind.strict:
        for field in islice(reader.child("spec").unknown(), MAX_UNKNOWN):
            message = "not supported, ignored"
            reader.notes.append(Rejection(None, "UnknownField", message, field, level=Level.WARNING))
    return parsed
