"""A cluster and its weights -> ClusterLoadAssignment bytes (pure, upb): the resource that changes every few seconds."""

from __future__ import annotations

from collections.abc import Mapping

from xds.model import Cluster
from xds.weights import BASE
from xds.wire import endpoint_pb2 as pb


def assignment(cluster: Cluster, weights: Mapping[str, int]) -> bytes:
    """The encoded EDS resource of `cluster`; `weights` by hash key, BASE where there is none.

    A weight below 1 would make Envoy refuse the whole response and with it every other cluster's endpoints, so it is
    raised to 1 here. A draining endpoint stays, marked: its running answers go on, new requests go elsewhere.
    """
    message = pb.ClusterLoadAssignment(cluster_name=cluster.name)
    locality = message.endpoints.add()
    for endpoint in cluster.endpoints:
        entry = locality.lb_endpoints.add()
        address = entry.endpoint.address.socket_address
        address.address, address.port_value = endpoint.address, endpoint.port
        entry.health_status = pb.DRAINING if endpoint.draining else pb.UNKNOWN
        entry.load_balancing_weight.value = max(1, weights.get(endpoint.hash_key, BASE))
        fields = entry.metadata.filter_metadata["envoy.lb"].fields
        fields["hash_key"].string_value = endpoint.hash_key
    return message.SerializeToString(deterministic=True)
