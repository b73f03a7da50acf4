"""Of an object that is rejected whole: as much as says whose it is, so that its status can be written.

It is read without what was found wrong, and without a word about what else is.
"""

from __future__ import annotations

from xds.fields import OBJECT_NAME, FieldError, Reader
from xds.model import (
    Criticality,
    Gateway,
    HTTPRoute,
    InferenceModel,
    InferenceModelRewrite,
    InferenceObjective,
    InferencePool,
    Meta,
    ObjectRef,
    Refused,
    Rejection,
    Reporting,
)
from xds.parse_gateway import read_gateway_class
from xds.parse_inference import read_pool_ref
from xds.parse_route import read_parents

MAX_GENERATION = 2**63 - 1


def outline(document: object, ref: ObjectRef, rejection: Rejection) -> Refused | None:
    """What the status of a rejected object may say; None for a kind without one, or if not even that can be read."""
    try:
        reader = Reader(document, notes=[])
        meta = Meta(ref, generation=reader.child("metadata").integer("generation", 0, MAX_GENERATION, 0))
        found = _outline(reader, meta)
    except FieldError:
        return None
    path = f"{rejection.field}: " if rejection.field else ""
    return Refused(found, rejection.reason, f"{path}{rejection.message}") if found else None


def _outline(reader: Reader, meta: Meta) -> Reporting | None:
    match meta.ref.kind:
        case "GatewayClass":
            return read_gateway_class(reader, meta)
        case "Gateway":
            return Gateway(meta, reader.child("spec").text("gatewayClassName", OBJECT_NAME), ())
        case "HTTPRoute":
            return HTTPRoute(meta, read_parents(reader, meta.ref.namespace), (), ())
        case "InferencePool":
            return InferencePool(meta, {}, ())
        case "InferenceModel":
            return InferenceModel(meta, "", Criticality.STANDARD, (), read_pool_ref(reader.child("spec"), meta))
        case "InferenceModelRewrite":
            return InferenceModelRewrite(meta, (), read_pool_ref(reader.child("spec"), meta))
        case "InferenceObjective":
            return InferenceObjective(meta, 0, read_pool_ref(reader.child("spec"), meta))
    return None
