"""What an API server keeps and how it changes: objects, resourceVersions, the recent events, a refusal's words (pure).

One revision counter for everything, as etcd has. Every write makes one event; watches are served from the events, which
are forgotten beyond `floor` (410). An object is held as the bytes it is sent as, so that ten thousand pods list and
change cheaply.
"""

from __future__ import annotations

import itertools
import json
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from tests.apiserver_patch import ConflictError, Path, apply, changed, fields_v1, merge_patch

HISTORY = 20_000  # events that are kept: at 50 changes a second, longer than a watch of ours is ever behind

Key = tuple[str, str]  # namespace ("" for cluster scope) and name
Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Resource:
    """One row of discovery. `versions` are served, one storage for all; `crd` False: built in, with typed lists."""

    group: str
    versions: tuple[str, ...]
    kind: str
    plural: str
    namespaced: bool = True
    status: bool = True  # has the status subresource
    generation: bool = True
    graceful: bool = False  # a delete sets deletionTimestamp and waits for its kubelet, once it has a node
    crd: bool = True

    @property
    def name(self) -> str:
        """`pods`, `gateways.gateway.networking.k8s.io`: as messages and RBAC have it."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def api_version(self, version: str) -> str:
        return f"{self.group}/{version}" if self.group else version


def _built_in(group: str, kind: str, plural: str, **more: Any) -> Resource:
    return Resource(group, ("v1",), kind, plural, crd=False, **more)


BUILT_IN = (
    _built_in("", "Namespace", "namespaces", namespaced=False, generation=False),
    _built_in("", "Pod", "pods", graceful=True),
    _built_in("", "Service", "services", generation=False),
    _built_in("", "Secret", "secrets", status=False, generation=False),
    _built_in("", "Event", "events", status=False, generation=False),
    _built_in("discovery.k8s.io", "EndpointSlice", "endpointslices", status=False),
    _built_in("events.k8s.io", "Event", "events", status=False, generation=False),
    _built_in("coordination.k8s.io", "Lease", "leases", status=False, generation=False),
)
GATEWAY_API = tuple(
    Resource("gateway.networking.k8s.io", ("v1", "v1beta1"), kind, plural, namespaced, status)
    for kind, plural, namespaced, status in (
        ("GatewayClass", "gatewayclasses", False, True),
        ("Gateway", "gateways", True, True),
        ("HTTPRoute", "httproutes", True, True),
        ("ReferenceGrant", "referencegrants", True, False),
    )
)
POLICY = Resource("gateway.envoyproxy.io", ("v1alpha1",), "BackendTrafficPolicy", "backendtrafficpolicies")
POOL = Resource("inference.networking.k8s.io", ("v1",), "InferencePool", "inferencepools")
POOL_X = Resource("inference.networking.x-k8s.io", ("v1alpha2",), "InferencePool", "inferencepools")
MODEL_X = Resource("inference.networking.x-k8s.io", ("v1alpha2",), "InferenceModel", "inferencemodels")
REWRITES, OBJECTIVES = (
    tuple(Resource(group, ("v1alpha2",), kind, f"{kind.lower()}s") for group in (POOL_X.group, "llm-d.ai"))
    for kind in ("InferenceModelRewrite", "InferenceObjective")
)
EVERYTHING = (*BUILT_IN, *GATEWAY_API, POLICY, POOL, POOL_X, MODEL_X, *REWRITES, *OBJECTIVES)


class ApiError(Exception):
    """A refusal; `status()` is the Status object an API server answers with."""

    def __init__(
        self, code: int, reason: str, message: str, details: Mapping[str, Any] | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, message
        self.details, self.retry_after = dict(details or {}), retry_after
        if retry_after:
            self.details["retryAfterSeconds"] = retry_after

    def status(self) -> Object:
        body: Object = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "details": self.details,
            "code": self.code,
        }
        return {name: value for name, value in body.items() if value != "" and (value != {} or name == "metadata")}


def expired(asked: int, oldest: int) -> ApiError:
    return ApiError(410, "Expired", f"too old resource version: {asked} ({oldest})")


def too_large(asked: int, current: int) -> ApiError:
    cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
    message = f"Timeout: Too large resource version: {asked}, current: {current}"
    return ApiError(504, "Timeout", message, {"causes": [cause]}, retry_after=1)


def not_found(resource: Resource, name: str) -> ApiError:
    return ApiError(404, "NotFound", f'{resource.name} "{name}" not found', _details(resource, name))


def invalid(resource: Resource, name: str, message: str) -> ApiError:
    return ApiError(422, "Invalid", f'{resource.kind} "{name}" is invalid: {message}', _details(resource, name))


def _details(resource: Resource, name: str) -> Object:
    return {"name": name, **({"group": resource.group} if resource.group else {}), "kind": resource.plural}


@dataclass(frozen=True, slots=True)
class Stored:
    """An object as it is sent, but for its first two fields, and who owns which of its fields."""

    rest: bytes  # '"metadata":{...},...}', after apiVersion and kind
    revision: int
    owned: Mapping[str, frozenset[Path]] = field(default_factory=dict)

    def body(self, resource: Resource, version: str) -> bytes:
        """The whole object through one of its versions."""
        head = {"apiVersion": resource.api_version(version), "kind": resource.kind}
        return json.dumps(head, separators=(",", ":")).encode()[:-1] + b"," + self.rest


@dataclass(frozen=True, slots=True)
class Change:
    """One event: ADDED, MODIFIED or DELETED, and the object as of then."""

    revision: int
    type: str
    key: Key
    stored: Stored


class Table:
    """The objects of one resource (mutable)."""

    def __init__(self, resource: Resource, revision: int) -> None:
        self.resource = resource
        self.objects: dict[Key, Stored] = {}
        self.history: deque[Change] = deque()
        self.floor = revision  # a watch can begin at this revision and at any later one

    def since(self, revision: int) -> list[Change]:
        """The events after `revision`."""
        newest = list(itertools.takewhile(lambda change: change.revision > revision, reversed(self.history)))
        return newest[::-1]

    def select(self, namespace: str) -> list[tuple[Key, Stored]]:
        """Sorted as etcd does: by namespace, then name."""
        return sorted(each for each in self.objects.items() if namespace in ("", each[0][0]))


class Store:
    """All objects of one API server (mutable). `changed` is told of every event, `now` gives RFC 3339 times."""

    def __init__(self, resources: tuple[Resource, ...], now: Callable[[], str], revision: int = 1000) -> None:
        self.revision = revision
        self.now = now
        self.tables = {(each.group, each.plural): Table(each, revision) for each in resources}
        self.changed: Callable[[Table], None] = lambda _: None
        self._ids = itertools.count(1)
        for name in ("default", "kube-system"):
            self.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

    def table(self, kind: str, group: str | None = None) -> Table:
        """Of a kind; `group` where two groups have it."""
        for table in self.tables.values():
            if table.resource.kind == kind and group in (None, table.resource.group):
                return table
        raise KeyError(kind)

    def get(self, table: Table, key: Key) -> Object:
        stored = table.objects.get(key)
        if stored is None:
            raise not_found(table.resource, key[1])
        value: Object = json.loads(stored.body(table.resource, table.resource.versions[0]))
        return value

    # --- what clients may do ---

    def create(self, table: Table, namespace: str, value: Object, manager: str = "client") -> Stored:
        """POST. The status is dropped where it is a subresource, as a real server does."""
        metadata = dict(value.get("metadata") or {})
        name = metadata.get("name") or f"{metadata.get('generateName', '')}{next(self._ids):05x}"
        key = (self._namespace(table, namespace, metadata), name)
        if key in table.objects:
            message = f'{table.resource.name} "{name}" already exists'
            raise ApiError(409, "AlreadyExists", message, _details(table.resource, name))
        if table.resource.status and table.resource.kind != "Namespace":
            value = {field: each for field, each in value.items() if field != "status"}
        return self._write(table, key, None, {**value, "metadata": {**metadata, "name": name}}, f"{manager}/Update")

    def update(self, table: Table, key: Key, value: Object, subresource: str = "", manager: str = "client") -> Stored:
        """PUT. A resourceVersion that is not the current one is a 409, none at all a 422 where the kind demands it."""
        live = self.get(table, key)
        given = (value.get("metadata") or {}).get("resourceVersion", "")
        if not given and (table.resource.crd or table.resource.kind == "Lease"):
            message = "metadata.resourceVersion: Invalid value: 0x0: must be specified for an update"
            raise invalid(table.resource, key[1], message)
        if given and given != live["metadata"]["resourceVersion"]:
            raise modified(table.resource, key[1])
        return self._replace(table, key, live, value, subresource, f"{manager}/Update")

    def merge(self, table: Table, key: Key, patch: Object, subresource: str = "", manager: str = "client") -> Stored:
        """PATCH with application/merge-patch+json; a resourceVersion in it is a condition."""
        live = self.get(table, key)
        given = (patch.get("metadata") or {}).get("resourceVersion")
        if given and given != live["metadata"]["resourceVersion"]:
            raise modified(table.resource, key[1])
        return self._replace(table, key, live, merge_patch(live, patch), subresource, f"{manager}/Update")

    def apply(
        self, table: Table, key: Key, value: Object, subresource: str = "", manager: str = "client", force: bool = False
    ) -> Stored:
        """PATCH with application/apply-patch+yaml: server-side apply, which also creates."""
        stored = table.objects.get(key)
        owner = f"{manager}/Apply" + (f"/{subresource}" if subresource else "")
        if stored is None:
            if subresource:
                raise not_found(table.resource, key[1])
            self._namespace(table, key[0], {})
            return self._write(table, key, None, value, owner)
        live = self.get(table, key)
        bare = {**live, "metadata": {n: v for n, v in live["metadata"].items() if n != "managedFields"}}
        try:
            merged, owned = apply(bare, _part(value, subresource, table.resource), stored.owned, owner, force)
        except ConflictError as conflict:
            listed = [f'conflict with "{name.partition("/")[0]}": {path}' for path, name in conflict.fields]
            message = f"Apply failed with {len(listed)} conflict{'s' * (len(listed) > 1)}: {'; '.join(listed)}"
            causes = [{"reason": "FieldManagerConflict", "message": m, "field": conflict.fields[0][0]} for m in listed]
            raise ApiError(409, "Conflict", message, {"causes": causes}) from None
        return self._write(table, key, live, merged, owner, owned)

    def delete(self, table: Table, key: Key, grace: int | None = None) -> tuple[Object, bool]:
        """DELETE: the object as it was last, and whether it is gone; one with finalizers, or a pod on a node, waits."""
        live = self.get(table, key)
        metadata = live["metadata"]
        waits = bool(metadata.get("finalizers"))
        if table.resource.graceful and grace != 0 and live.get("spec", {}).get("nodeName"):
            waits = True
            metadata["deletionGracePeriodSeconds"] = grace if grace is not None else 30
        if waits:
            metadata.setdefault("deletionTimestamp", self.now())
            self._write(table, key, self.get(table, key), live, "server/Update")
            return self.get(table, key), False
        if table.resource.kind == "Namespace":
            for other in self.tables.values():
                for inner in [each for each in other.objects if each[0] == key[1]]:
                    self._remove(other, inner)
        self._remove(table, key)
        return live, True

    # --- what a test or a controller in the cluster does ---

    def put(self, value: Object, group: str | None = None) -> Stored:
        """Create or replace the whole object, status included."""
        if group is None:
            group = value["apiVersion"].rpartition("/")[0]
        table = self.table(value["kind"], group)
        metadata = value["metadata"]
        namespace = metadata.get("namespace", "default") if table.resource.namespaced else ""
        key = (namespace, metadata["name"])
        live = self.get(table, key) if key in table.objects else None
        return self._write(table, key, live, value, "test/Update")

    def forget(self) -> None:
        """Compact: no watch can begin before the present revision."""
        for table in self.tables.values():
            table.history.clear()
            table.floor = self.revision

    def install(self, resource: Resource) -> None:
        """A CustomResourceDefinition comes."""
        self.revision += 1
        self.tables[resource.group, resource.plural] = Table(resource, self.revision)

    def uninstall(self, kind: str, group: str | None = None) -> Table:
        """And goes, with its objects."""
        table = self.table(kind, group)
        for key in list(table.objects):
            self._remove(table, key)
        del self.tables[table.resource.group, table.resource.plural]
        self.changed(table)
        return table

    # --- inside ---

    def _namespace(self, table: Table, namespace: str, metadata: Object) -> str:
        if not table.resource.namespaced:
            return ""
        if metadata.get("namespace", namespace) != namespace:
            message = "the namespace of the provided object does not match the namespace sent on the request"
            raise ApiError(400, "BadRequest", message)
        namespaces = self.tables["", "namespaces"]
        if ("", namespace) not in namespaces.objects:
            raise not_found(namespaces.resource, namespace)
        return namespace

    def _replace(self, table: Table, key: Key, live: Object, value: Object, subresource: str, owner: str) -> Stored:
        """The status alone, or all but the status."""
        if subresource:
            value = {**live, **({"status": value["status"]} if "status" in value else {})}
            owner += f"/{subresource}"
        elif table.resource.status:
            value = {name: each for name, each in value.items() if name != "status"}
            value |= {"status": live["status"]} if "status" in live else {}
        return self._write(table, key, live, value, owner)

    def _write(
        self,
        table: Table,
        key: Key,
        live: Object | None,
        value: Object,
        owner: str,
        owned: Mapping[str, frozenset[Path]] | None = None,
    ) -> Stored:
        """One new revision of one object, or the present one when nothing is new."""
        resource = table.resource
        _validate(resource, key[1], value)
        metadata = self._metadata(resource, key, live, value)
        bare = {"metadata": metadata, **{n: v for n, v in value.items() if n not in ("apiVersion", "kind", "metadata")}}
        stored = table.objects.get(key)
        if owned is None:
            before = {} if live is None else {**live, "metadata": _unowned(live["metadata"])}
            new = changed(before, {**bare, "metadata": _unowned(metadata)})
            previous = {} if stored is None else stored.owned
            owned = {name: paths - new for name, paths in previous.items()}
            owned |= {owner: owned.get(owner, frozenset()) | new}
            owned = {name: paths for name, paths in owned.items() if paths}
        if live is not None and stored is not None and _same(live, bare) and owned == stored.owned:
            return stored
        self.revision += 1
        metadata["resourceVersion"] = str(self.revision)
        metadata["managedFields"] = list(self._managed(resource, owned))
        rest = json.dumps(bare, separators=(",", ":")).encode()[1:]
        written = Stored(rest, self.revision, owned)
        gone = metadata.get("deletionTimestamp") and live is not None and _ends(resource, metadata, live)
        table.objects[key] = written
        if gone:
            self._remove(table, key)
        else:
            self._happened(table, Change(self.revision, "MODIFIED" if stored else "ADDED", key, written))
        return written

    def _metadata(self, resource: Resource, key: Key, live: Object | None, value: Object) -> Object:
        metadata = {n: v for n, v in (value.get("metadata") or {}).items() if n != "managedFields"}
        metadata["name"] = key[1]
        if resource.namespaced:
            metadata["namespace"] = key[0]
        if live is None:
            metadata["uid"] = str(uuid.UUID(int=next(self._ids)))
            metadata["creationTimestamp"] = metadata.get("creationTimestamp") or self.now()
            if resource.generation:
                metadata["generation"] = 1
            if resource.kind == "Namespace":
                metadata["labels"] = {**(metadata.get("labels") or {}), "kubernetes.io/metadata.name": key[1]}
        else:
            old = live["metadata"]
            for fixed in ("uid", "creationTimestamp", "generation", "deletionTimestamp", "resourceVersion"):
                if fixed in old:
                    metadata[fixed] = old[fixed]
            if resource.generation and _spec(live) != _spec(value):
                metadata["generation"] = old.get("generation", 0) + 1
        return metadata

    def _managed(self, resource: Resource, owned: Mapping[str, frozenset[Path]]) -> Iterator[Object]:
        for owner, paths in owned.items():
            manager, operation, *subresource = owner.split("/")
            yield {
                "manager": manager,
                "operation": operation,
                "apiVersion": resource.api_version(resource.versions[0]),
                "time": self.now(),
                "fieldsType": "FieldsV1",
                "fieldsV1": fields_v1(paths),
                **({"subresource": subresource[0]} if subresource else {}),
            }

    def _remove(self, table: Table, key: Key) -> None:
        """The event of a delete carries the object's last state with the revision of the delete."""
        last = self.get(table, key)
        self.revision += 1
        last["metadata"]["resourceVersion"] = str(self.revision)
        del table.objects[key]
        bare = {name: value for name, value in last.items() if name not in ("apiVersion", "kind")}
        stored = Stored(json.dumps(bare, separators=(",", ":")).encode()[1:], self.revision)
        self._happened(table, Change(self.revision, "DELETED", key, stored))

    def _happened(self, table: Table, change: Change) -> None:
        table.history.append(change)
        while len(table.history) > HISTORY:
            table.floor = table.history.popleft().revision
        self.changed(table)


def modified(resource: Resource, name: str) -> ApiError:
    message = (
        f'Operation cannot be fulfilled on {resource.name} "{name}": the object has been modified; '
        "please apply your changes to the latest version and try again"
    )
    return ApiError(409, "Conflict", message, _details(resource, name))


def _part(value: Object, subresource: str, resource: Resource) -> Object:
    """What an apply may say: of a subresource the status alone, else all but the status."""
    if subresource:
        return {"status": value.get("status") or {}}
    return {name: each for name, each in value.items() if name != "status" or not resource.status}


def _unowned(metadata: Object) -> Object:
    """The part of the metadata that managers own."""
    return {name: metadata[name] for name in ("labels", "annotations", "finalizers") if name in metadata}


def _spec(value: Object) -> Object:
    """What a generation counts the changes of."""
    return {name: each for name, each in value.items() if name not in ("apiVersion", "kind", "metadata", "status")}


def _same(live: Object, bare: Object) -> bool:
    left = {name: value for name, value in live.items() if name not in ("apiVersion", "kind", "metadata")}
    right = {name: value for name, value in bare.items() if name != "metadata"}
    metadata = {name: value for name, value in live["metadata"].items() if name != "managedFields"}
    return left == right and metadata == bare["metadata"]


def _ends(resource: Resource, metadata: Object, live: Object) -> bool:
    """Whether this write took the last finalizer of an object that is being deleted."""
    on_node = resource.graceful and live.get("spec", {}).get("nodeName")
    return bool(live["metadata"].get("finalizers")) and not metadata.get("finalizers") and not on_node


def _validate(resource: Resource, name: str, value: Object) -> None:
    """The one rule of a real server that a gateway on one machine meets: no loopback address in an EndpointSlice."""
    for i, endpoint in enumerate(value.get("endpoints") or () if resource.kind == "EndpointSlice" else ()):
        for address in endpoint.get("addresses", ()):
            if ip_address(address).is_loopback:
                message = f'endpoints[{i}].addresses[0]: Invalid value: "{address}": may not be in the loopback range'
                raise invalid(resource, name, message)
