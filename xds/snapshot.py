"""Snapshot: every resource to be served, by type and name, as bytes that are encoded once and sent to every client.

A version is a hash of the content, so equal content has an equal version on every server and after every restart: a
client that reconnects, to this server or to another, is sent only what differs. Nothing here knows what is in a body;
what a body refers to (a cluster its endpoints, a listener its routes) is said beside it, in `Resource.refs`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from xds.wire import discovery_pb2 as wire

LISTENER = "type.googleapis.com/envoy.config.listener.v3.Listener"
ROUTE = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
CLUSTER = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
ENDPOINT = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
SECRET = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"  # noqa: S105 - a type's name
POOL_CONFIG = "type.googleapis.com/vllm_xds.v1.PoolConfig"
POOL_LOAD = "type.googleapis.com/vllm_xds.v1.PoolLoad"
OURS = frozenset({POOL_CONFIG, POOL_LOAD})  # for pickers, not for Envoys

TYPES = (
    CLUSTER,
    ENDPOINT,
    SECRET,
    LISTENER,
    ROUTE,
    POOL_CONFIG,
    POOL_LOAD,
)  # in the order they are sent: xds/stream.py


# 128 bits. Cryptographic although nobody is meant to attack it: two bodies with one version would leave an Envoy on the
# older one without a trace, and part of a body is text its author chose. 0.1 ms for the endpoints of 1,000 pods.
DIGEST_BYTES = 16

Ref = tuple[str, str]  # (type_url, name)


@dataclass(frozen=True, slots=True)
class Resource:
    """One named resource, encoded for both protocol variants; `refs` are the resources it cannot work without."""

    name: str
    version: str
    any: bytes  # encoded google.protobuf.Any: one of DiscoveryResponse.resources
    entry: bytes  # encoded envoy.service.discovery.v3.Resource: one of DeltaDiscoveryResponse.resources
    refs: tuple[Ref, ...] = ()


def make_resource(type_url: str, name: str, body: bytes, refs: Iterable[Ref] = ()) -> Resource:
    """Wrap `body`, the encoded message of type `type_url`."""
    version = hashlib.blake2b(body, digest_size=DIGEST_BYTES).hexdigest()
    message = wire.Any(type_url=type_url, value=body)
    entry = wire.Resource(version=version, resource=message, name=name)
    return Resource(name, version, message.SerializeToString(), entry.SerializeToString(), tuple(refs))


def version_of(resources: Mapping[str, Resource]) -> str:
    """Return the version of a set of resources of one type: SotW's `version_info`. The order does not matter."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(resources):
        digest.update(f"{name}\0{resources[name].version}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Step:
    """From the resources of one type before (that very object) to the next: the names of those that differ."""

    before: Mapping[str, Resource]
    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything served at one time. Make one with `Snapshot.of`, the next with `replace`.

    `resources` has every type of TYPES, each sorted by name; `versions` has `version_of` each of them. `groups` has the
    names of the listeners that each group of clients is for; empty: every client is served everything. `steps` has how
    a type came to be what it is, found once for all the clients that have to take the same step.
    """

    resources: Mapping[str, Mapping[str, Resource]]
    versions: Mapping[str, str]
    groups: Mapping[str, frozenset[str]] = field(default_factory=dict)
    steps: Mapping[str, Step] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(
        cls, resources: Mapping[str, Iterable[Resource]], groups: Mapping[str, Iterable[str]] | None = None
    ) -> Snapshot:
        """Build a snapshot; a type that is not given is empty. ValueError: unknown type, or a name given twice."""
        empty: dict[str, Mapping[str, Resource]] = {type_url: {} for type_url in TYPES}
        of_group = {group: frozenset(names) for group, names in (groups or {}).items()}
        return cls(empty, dict.fromkeys(TYPES, version_of({})), of_group).replace(resources)

    def replace(self, resources: Mapping[str, Iterable[Resource]]) -> Snapshot:
        """Return a snapshot with these types replaced as a whole; a type whose content is equal stays the same object.

        Sharing is what makes a change of one type cheap: a stream sees by identity that the others need no look.
        """
        merged, versions, steps = dict(self.resources), dict(self.versions), dict(self.steps)
        for type_url, given in resources.items():
            if type_url not in merged:
                raise ValueError(f"{type_url!r} is not a type this server serves")
            ordered = sorted(given, key=lambda resource: resource.name)
            by_name = {resource.name: resource for resource in ordered}
            if len(by_name) != len(ordered):
                raise ValueError(f"two resources of type {label(type_url)} have the same name")
            version = version_of(by_name)
            if version != versions[type_url]:
                steps[type_url] = _step(merged[type_url], by_name)
                merged[type_url], versions[type_url] = by_name, version
        return Snapshot(merged, versions, self.groups, steps)

    def view(self, group: str, before: Snapshot | None = None) -> Snapshot:
        """What one group of clients is served: its listeners, what these need, and all that is for pickers.

        What is equal in `before`, the group's last view, stays the same object.
        """
        seen: set[Ref] = set()
        pending = [(LISTENER, name) for name in self.groups[group]]
        while pending:
            ref = pending.pop()
            resource = self.resources[ref[0]].get(ref[1])
            if resource is not None and ref not in seen:
                seen.add(ref)
                pending += resource.refs
        kept = {
            type_url: [r for name, r in resources.items() if type_url in OURS or (type_url, name) in seen]
            for type_url, resources in self.resources.items()
        }
        return (before or Snapshot.of({})).replace(kept)


def _step(before: Mapping[str, Resource], after: Mapping[str, Resource]) -> Step:
    same = {name for name, resource in before.items() if name in after and after[name].version == resource.version}
    return Step(before, frozenset(before.keys() | after.keys()) - same)


def group_of(groups: Container[str], node_cluster: str, node_id: str) -> str:
    """The group a client is in: its node.cluster if there is such a group, else its node.id, else ""."""
    return next((name for name in (node_cluster, node_id) if name in groups), "")


def missing(snapshot: Snapshot) -> tuple[tuple[Ref, Ref], ...]:
    """Return each (resource, what it refers to) whose target is not in the snapshot; empty = consistent."""
    return tuple(
        ((type_url, resource.name), ref)
        for type_url, resources in snapshot.resources.items()
        for resource in resources.values()
        for ref in resource.refs
        if ref[1] not in snapshot.resources.get(ref[0], ())
    )


def label(type_url: str) -> str:
    """Return the type's short name, as logs and metric labels have it: `Cluster`; a type not served is `other`."""
    return type_url.rpartition(".")[2] if type_url in TYPES else "other"
