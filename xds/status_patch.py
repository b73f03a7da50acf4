"""What to write so that an object's status says what it should: a merge patch, or nothing (pure).

    Status, Live (the object as the API server has it) ─▶ patch with its resourceVersion, or None

- Only what is ours is touched: entries of `parents` with our controllerName, conditions of our types. Others stay what
  and where they are. A list is replaced whole by a merge patch, so the patch holds for this version of the object
  alone: an object that somebody else has written meanwhile is a 409, and looked at again.
- A condition keeps its lastTransitionTime while its status stays.
- Nothing is said of a version that nobody has judged yet: the status waits for the configuration that has it.

https://gateway-api.sigs.k8s.io/guides/implementers/#conditions
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address

from xds.api_wire import Item, Served
from xds.model import (
    CORE,
    GATEWAY,
    INFERENCE,
    INFERENCE_X,
    LLM_D,
    Condition,
    ConditionType,
    ListenerStatus,
    ObjectRef,
    ParentRef,
    ParentStatus,
    Status,
)

MAX_MESSAGE = 2048  # characters: the API lets it have 32768, and an Envoy's refusal may quote a whole resource
MAX_PARENTS = 32  # entries of status.parents
MAX_ADDRESSES = 16  # of a Gateway
NEWEST_MINOR = 6  # of Gateway API v1, whose schemas the parsers follow
FEATURES_MINOR = 2  # where supportedFeatures became objects: lists of names, as before, refuse the whole status
_BUNDLE = re.compile(r"v1\.([0-9]{1,3})\.[0-9]")
UNKNOWN_TIME = "1970-01-01T00:00:00Z"

Address = tuple[str, str]  # IPAddress or Hostname, and the value
Json = dict[str, object]

# Kinds whose objects have a status of ours, by group.
REPORTING = frozenset(
    {
        (GATEWAY, "GatewayClass"),
        (GATEWAY, "Gateway"),
        (GATEWAY, "HTTPRoute"),
        (INFERENCE, "InferencePool"),
        (INFERENCE_X, "InferencePool"),
        (INFERENCE_X, "InferenceModel"),
        *((group, kind) for group in (INFERENCE_X, LLM_D) for kind in ("InferenceModelRewrite", "InferenceObjective")),
    }
)
# Condition types that are ours to write, and so to remove, in each place that has conditions.
_IN_CLASS = frozenset({ConditionType.ACCEPTED})
_IN_GATEWAY = frozenset({ConditionType.ACCEPTED, ConditionType.PROGRAMMED})
_IN_LISTENER = _IN_GATEWAY | {ConditionType.RESOLVED_REFS, ConditionType.CONFLICTED, ConditionType.OVERLAPPING_TLS}
_IN_PARENT = frozenset({ConditionType.ACCEPTED, ConditionType.RESOLVED_REFS, ConditionType.PARTIALLY_INVALID})
_IN_MODEL = frozenset({ConditionType.ACCEPTED, ConditionType.READY})

# What a v1alpha2 InferencePool has that no Gateway is for: its CRD wants it gone with the first entry, and back after
# the last.
_NO_PARENT: Json = {
    "parentRef": {"kind": "Status", "name": "default"},
    "conditions": [
        {
            "type": "Accepted",
            "status": "Unknown",
            "reason": "Pending",
            "message": "Waiting for controller",
            "lastTransitionTime": UNKNOWN_TIME,
        }
    ],
}


@dataclass(frozen=True, slots=True)
class Live:
    """An object as the API server showed it last: where it is, and of its content what a status is written from.

    `addresses` are those at which a Service is reached.
    """

    path: str
    api_version: str
    uid: str
    version: str
    generation: int
    status: Mapping[str, object]
    addresses: tuple[Address, ...] = ()


def read_live(item: Item, served: Served) -> Live:
    """One object of a list, an event or an answer."""
    namespace, name = item.key
    metadata, status = item.document.get("metadata"), item.document.get("status")
    generation = metadata.get("generation") if isinstance(metadata, dict) else 0
    return Live(
        f"{served.path(namespace)}/{name}",
        served.api_version,
        item.uid,
        item.version,
        generation if isinstance(generation, int) else 0,
        status if isinstance(status, dict) else {},
        tuple(_service_addresses(item.document)) if (served.group, served.kind) == (CORE, "Service") else (),
    )


def read_address(text: str) -> Address:
    """An IP address or a host name, as Gateway API tells them apart."""
    try:
        return "IPAddress", str(ip_address(text))
    except ValueError:
        return "Hostname", text


def _service_addresses(document: Mapping[str, object]) -> Iterator[Address]:
    """Of a load balancer what it has been given, of any other Service its cluster IPs."""
    spec, status = _mapping(document.get("spec")), _mapping(document.get("status"))
    ingress = _mapping(status.get("loadBalancer")).get("ingress")
    given = [str(each.get("ip") or each.get("hostname") or "") for each in _mappings(ingress)]
    if not given and spec.get("type") != "LoadBalancer":
        ips = spec.get("clusterIPs") or [spec.get("clusterIP")]
        given = [str(each) for each in ips if each not in (None, "", "None")] if isinstance(ips, list) else []
    yield from (read_address(each) for each in given if each)


def patch(
    ref: ObjectRef,
    status: Status | None,
    live: Live,
    now: str,
    *,
    controllers: frozenset[str],
    addresses: Sequence[Address] = (),
    bundle: str | None = None,
    is_others: Callable[[ObjectRef], bool] = lambda _: False,
) -> Json | None:
    """The merge patch for the status of `ref`; `status` None: nothing of ours has any place in it.

    `now` is an RFC 3339 time with seconds, `addresses` those of the Envoys, `bundle` the version of Gateway API's CRDs,
    "" for none and None for unknown. `is_others` says of a Gateway that it is another controller's: the entries of
    v1alpha2 do not say whose they are.
    """
    if status is not None and status.generation < live.generation:
        return None
    match ref.group, ref.kind:
        case (_, "HTTPRoute"):
            wanted = _parents(status, live.status, "parents", controllers, now, ref.namespace, is_others)
        case (group, "InferencePool"):
            key = "parents" if group == INFERENCE else "parent"
            wanted = _parents(status, live.status, key, controllers, now, ref.namespace, is_others)
        case (_, "Gateway") if status is not None:
            wanted = _gateway(status, live.status, addresses, now)
        case (_, "GatewayClass") if status is not None:
            wanted = _class(status, live.status, bundle, now)
        case _ if status is not None:
            wanted = {"conditions": _conditions(status.conditions, live.status.get("conditions"), _IN_MODEL, now)}
        case _:
            return None
    changed = {key: value for key, value in wanted.items() if live.status.get(key, []) != value}
    return {"metadata": {"resourceVersion": live.version}, "status": changed} if changed else None


# --- conditions -------------------------------------------------------------------------------------------------------


def _conditions(wanted: Iterable[Condition], live: object, own: frozenset[ConditionType], now: str) -> list[Json]:
    """Ours in the places they have, other types untouched, new ones at the end; those of `own` not wanted are gone."""
    left = {each.type.value: each for each in wanted}
    found: list[Json] = []
    for entry in _mappings(live):
        kind = str(entry.get("type"))
        if kind in left:
            found.append(_condition(left.pop(kind), entry, now))
        elif kind not in own:
            found.append(dict(entry))
    return [*found, *(_condition(each, {}, now) for each in left.values())]


def _condition(wanted: Condition, live: Mapping[str, object], now: str) -> Json:
    since = live.get("lastTransitionTime")
    is_same = live.get("status") == wanted.status and isinstance(since, str)
    message = wanted.message
    return {
        "type": wanted.type.value,
        "status": wanted.status,
        "reason": wanted.reason,
        "message": message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}...",
        "observedGeneration": wanted.generation,
        "lastTransitionTime": since if is_same else now,
    }


# --- GatewayClasses and Gateways --------------------------------------------------------------------------------------


def _class(status: Status, live: Mapping[str, object], bundle: str | None, now: str) -> Json:
    conditions, own = status.conditions, _IN_CLASS
    if bundle is not None:  # else what the class says of it, if anything, is of one who knew
        conditions, own = (*conditions, _version(bundle, status.generation)), own | {ConditionType.SUPPORTED_VERSION}
    found: Json = {"conditions": _conditions(conditions, live.get("conditions"), own, now)}
    minor = _minor(bundle or "")
    if minor is None or minor >= FEATURES_MINOR:
        found["supportedFeatures"] = [{"name": name} for name in status.features]
    return found


def _minor(bundle: str) -> int | None:
    """The 6 of v1.6.1; None for a version that is not of v1."""
    found = _BUNDLE.match(bundle)
    return int(found[1]) if found else None


def _version(bundle: str, generation: int) -> Condition:
    """Whether the CRDs are of a release whose schemas are known here; of another, what is known is read."""
    kind = ConditionType.SUPPORTED_VERSION
    known = f"v1.0 to v1.{NEWEST_MINOR}"
    minor = _minor(bundle)
    if minor is not None and minor <= NEWEST_MINOR:
        return Condition(kind, "True", "SupportedVersion", f"{bundle}, of {known}", generation)
    message = f"the CRDs of Gateway API are of version {bundle[:64] or 'unknown'}, known are those of {known}"
    return Condition(kind, "False", "UnsupportedVersion", message, generation)


def _gateway(status: Status, live: Mapping[str, object], addresses: Sequence[Address], now: str) -> Json:
    conditions, assigned = _address(status, addresses)
    before = {str(entry.get("name")): entry for entry in _mappings(live.get("listeners"))}
    return {
        "addresses": [{"type": kind, "value": value} for kind, value in assigned],
        "conditions": _conditions(conditions, live.get("conditions"), _IN_GATEWAY, now),
        "listeners": [_listener(each, before.get(each.name, {}), now) for each in status.listeners],
    }


def _address(status: Status, addresses: Sequence[Address]) -> tuple[tuple[Condition, ...], Sequence[Address]]:
    """The Gateway's addresses, and its conditions: without any, or not with those it asks for, it is not programmed."""
    assigned = tuple(dict.fromkeys(addresses))[:MAX_ADDRESSES]
    if status.addresses:
        assigned = tuple(each for each in assigned if each in status.addresses or (each[0], "") in status.addresses)
    missing = [value for kind, value in status.addresses if value and (kind, value) not in assigned]
    if missing:
        has = ", ".join(value for _, value in addresses) or "none are known"
        reason, message = "AddressNotUsable", f"{', '.join(missing)}: no address of the Envoys ({has})"
    elif not assigned:
        reason = "AddressNotAssigned"
        message = "no address of the Envoys is known: vllm-xds serve takes --gateway-address and --gateway-service"
    else:
        return status.conditions, assigned
    conditions = tuple(
        replace(each, status="False", reason=reason, message=message)
        if each.type is ConditionType.PROGRAMMED and each.status == "True"
        else each
        for each in status.conditions
    )
    return conditions, assigned


def _listener(wanted: ListenerStatus, live: Mapping[str, object], now: str) -> Json:
    return {
        "name": wanted.name,
        "supportedKinds": [{"group": group, "kind": kind} for group, kind in wanted.kinds],
        "attachedRoutes": wanted.attached,
        "conditions": _conditions(wanted.conditions, live.get("conditions"), _IN_LISTENER, now),
    }


# --- entries of parents -----------------------------------------------------------------------------------------------

_Key = tuple[str, ParentRef]  # controller ("" where entries have none) and parent


def _parents(
    status: Status | None,
    live: Mapping[str, object],
    key: str,
    controllers: frozenset[str],
    now: str,
    namespace: str,
    is_others: Callable[[ObjectRef], bool],
) -> Json:
    """{key: entries}: ours in the places they have, others untouched, new ones at the end, ours not wanted gone."""
    named = key == "parents"  # v1alpha2's InferencePool has `parent`, whose entries name no controller
    left = {(each.controller if named else "", each.parent): each for each in (status.parents if status else ())}
    found: list[Json] = []
    nobody = _NO_PARENT
    for entry in _mappings(live.get(key)):
        if _mapping(entry.get("parentRef")).get("kind") == "Status":
            nobody = dict(entry)
            continue
        of, parent = _key(entry, namespace, named=named)
        if (of, parent) in left:
            found.append(_parent(left.pop((of, parent)), entry, now, named=named))
        elif of not in controllers if named else is_others(parent.ref):
            found.append(dict(entry))
    found += [_parent(each, {}, now, named=named) for each in left.values()]
    if not found and not named and live.get(key):
        found.append(nobody)
    return {key: found[:MAX_PARENTS]}


def _key(entry: Mapping[str, object], namespace: str, *, named: bool) -> _Key:
    parent = _mapping(entry.get("parentRef"))

    def text(name: str, default: str = "") -> str:
        value = parent.get(name)
        return value if isinstance(value, str) else default

    ref = ObjectRef(text("group", GATEWAY), text("kind", "Gateway"), text("namespace", namespace), text("name"))
    port = parent.get("port")
    of = entry.get("controllerName") if named else ""
    return str(of or ""), ParentRef(ref, text("sectionName"), port if isinstance(port, int) else 0)


def _parent(wanted: ParentStatus, live: Mapping[str, object], now: str, *, named: bool) -> Json:
    ref, section, port = wanted.parent.ref, wanted.parent.section, wanted.parent.port
    parent: Json = {"group": ref.group, "kind": ref.kind, "namespace": ref.namespace, "name": ref.name}
    parent |= {name: value for name, value in (("sectionName", section), ("port", port)) if value}
    conditions = _conditions(wanted.conditions, live.get("conditions"), _IN_PARENT, now)
    return {"parentRef": parent, "conditions": conditions, **({"controllerName": wanted.controller} if named else {})}


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _mappings(value: object) -> Iterator[Mapping[str, object]]:
    yield from (each for each in value if isinstance(each, dict)) if isinstance(value, list) else ()
