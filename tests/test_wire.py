"""The wire subsets are Envoy's messages: each encodes the bytes envoy-data-plane's full message does, and reads them.

load.proto is a message of our own and has no twin.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from envoy_data_plane.envoy.config.core.v3 import Address, ControlPlane, HealthStatus, Metadata, Node, SocketAddress
from envoy_data_plane.envoy.config.endpoint.v3 import (
    ClusterLoadAssignment,
    ClusterStats,
    Endpoint,
    LbEndpoint,
    LocalityLbEndpoints,
    UpstreamEndpointStats,
    UpstreamLocalityStats,
)
from envoy_data_plane.envoy.service.discovery.v3 import (
    DeltaDiscoveryRequest,
    DeltaDiscoveryResponse,
    DiscoveryRequest,
    DiscoveryResponse,
    Resource,
)
from envoy_data_plane.envoy.service.load_stats.v3 import LoadStatsRequest, LoadStatsResponse
from envoy_data_plane.google.protobuf import Any as FullAny
from envoy_data_plane.google.protobuf import Struct, Value
from envoy_data_plane.google.rpc import Status
from google.protobuf.duration_pb2 import Duration

from xds.snapshot import ENDPOINT, make_resource
from xds.wire import discovery_pb2, endpoint_pb2, load_stats_pb2

BODY = b"\x0a\x01a"
MADE = make_resource(ENDPOINT, "a", BODY)
FULL_ANY = FullAny(type_url=ENDPOINT, value=BODY)
FULL_RESOURCE = Resource(name="a", version=MADE.version, resource=FULL_ANY)

# (the full message, the same in the subset)
PAIRS: dict[str, tuple[Any, Any]] = {
    "DiscoveryRequest": (
        DiscoveryRequest(
            version_info="v",
            node=Node(id="envoy-1", cluster="gateways"),
            resource_names=["a", "b"],
            type_url=ENDPOINT,
            response_nonce="7",
            error_detail=Status(code=13, message="no"),
        ),
        discovery_pb2.DiscoveryRequest(
            version_info="v",
            node=discovery_pb2.Node(id="envoy-1", cluster="gateways"),
            resource_names=["a", "b"],
            type_url=ENDPOINT,
            response_nonce="7",
            error_detail=discovery_pb2.Status(code=13, message="no"),
        ),
    ),
    "DiscoveryResponse": (
        DiscoveryResponse(
            version_info="v",
            resources=[FULL_ANY, FULL_ANY],
            type_url=ENDPOINT,
            nonce="7",
            control_plane=ControlPlane(identifier="us"),
        ),
        discovery_pb2.DiscoveryResponse(
            version_info="v",
            resources=[MADE.any, MADE.any],
            type_url=ENDPOINT,
            nonce="7",
            control_plane=discovery_pb2.ControlPlane(identifier="us"),
        ),
    ),
    "DeltaDiscoveryRequest": (
        DeltaDiscoveryRequest(
            node=Node(id="envoy-1", cluster="gateways"),
            type_url=ENDPOINT,
            resource_names_subscribe=["a"],
            resource_names_unsubscribe=["b"],
            initial_resource_versions={"a": "1"},
            response_nonce="7",
            error_detail=Status(code=13, message="no"),
        ),
        discovery_pb2.DeltaDiscoveryRequest(
            node=discovery_pb2.Node(id="envoy-1", cluster="gateways"),
            type_url=ENDPOINT,
            resource_names_subscribe=["a"],
            resource_names_unsubscribe=["b"],
            initial_resource_versions={"a": "1"},
            response_nonce="7",
            error_detail=discovery_pb2.Status(code=13, message="no"),
        ),
    ),
    "DeltaDiscoveryResponse": (
        DeltaDiscoveryResponse(
            system_version_info="v",
            resources=[FULL_RESOURCE],
            type_url=ENDPOINT,
            nonce="7",
            removed_resources=["b", "c"],
            control_plane=ControlPlane(identifier="us"),
        ),
        discovery_pb2.DeltaDiscoveryResponse(
            system_version_info="v",
            resources=[bytes(FULL_RESOURCE)],
            type_url=ENDPOINT,
            nonce="7",
            removed_resources=["b", "c"],
            control_plane=discovery_pb2.ControlPlane(identifier="us"),
        ),
    ),
    "LoadStatsRequest": (
        LoadStatsRequest(
            node=Node(id="envoy-1", cluster="gateways"),
            cluster_stats=[
                ClusterStats(
                    cluster_name="pool/default/qwen",
                    upstream_locality_stats=[
                        UpstreamLocalityStats(
                            upstream_endpoint_stats=[
                                UpstreamEndpointStats(
                                    address=Address(socket_address=SocketAddress(address="10.0.0.1", port_value=8000)),
                                    total_requests_in_progress=300,
                                )
                            ]
                        )
                    ],
                )
            ],
        ),
        load_stats_pb2.LoadStatsRequest(
            node=discovery_pb2.Node(id="envoy-1", cluster="gateways"),
            cluster_stats=[
                {
                    "cluster_name": "pool/default/qwen",
                    "upstream_locality_stats": [
                        {
                            "upstream_endpoint_stats": [
                                {
                                    "address": endpoint_pb2.Address(
                                        socket_address={"address": "10.0.0.1", "port_value": 8000}
                                    ).SerializeToString(),
                                    "total_requests_in_progress": 300,
                                }
                            ]
                        }
                    ],
                }
            ],
        ),
    ),
    "LoadStatsResponse": (
        LoadStatsResponse(
            clusters=["a"],
            send_all_clusters=True,
            report_endpoint_granularity=True,
            load_reporting_interval=dt.timedelta(seconds=1.5),
        ),
        load_stats_pb2.LoadStatsResponse(
            clusters=["a"],
            send_all_clusters=True,
            report_endpoint_granularity=True,
            load_reporting_interval=Duration(seconds=1, nanos=500_000_000),
        ),
    ),
    "Resource": (FULL_RESOURCE, discovery_pb2.Resource.FromString(MADE.entry)),
    "ClusterLoadAssignment": (
        ClusterLoadAssignment(
            cluster_name="pool/default/qwen",
            endpoints=[
                LocalityLbEndpoints(
                    lb_endpoints=[
                        LbEndpoint(
                            endpoint=Endpoint(
                                address=Address(socket_address=SocketAddress(address="10.0.0.1", port_value=8000))
                            ),
                            health_status=HealthStatus.DRAINING,
                            metadata=Metadata(
                                filter_metadata={
                                    "envoy.lb": Struct(fields={"hash_key": Value(string_value="default/qwen-0")})
                                }
                            ),
                            load_balancing_weight=700,
                        )
                    ],
                    load_balancing_weight=1,
                )
            ],
        ),
        endpoint_pb2.ClusterLoadAssignment(
            cluster_name="pool/default/qwen",
            endpoints=[
                {
                    "lb_endpoints": [
                        {
                            "endpoint": {"address": {"socket_address": {"address": "10.0.0.1", "port_value": 8000}}},
                            "health_status": endpoint_pb2.DRAINING,
                            "metadata": {
                                "filter_metadata": {
                                    "envoy.lb": {"fields": {"hash_key": {"string_value": "default/qwen-0"}}}
                                }
                            },
                            "load_balancing_weight": {"value": 700},
                        }
                    ],
                    "load_balancing_weight": {"value": 1},
                }
            ],
        ),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_subset_has_the_bytes_of_the_full_message(name: str) -> None:
    """Both encode the same bytes, and each reads the other's as its own."""
    full, subset = PAIRS[name]
    theirs, ours = bytes(full), subset.SerializeToString(deterministic=True)
    assert type(full)().parse(ours) == full
    assert type(subset).FromString(theirs) == subset
    assert sorted(ours) == sorted(theirs)  # an encoder may write the fields of a message in any order


@pytest.mark.parametrize("status", HealthStatus)
def test_health_statuses_have_the_same_numbers(status: Any) -> None:
    """A status in the subset means what it means in the full enum; the subset leaves out the last two."""
    if status.name in endpoint_pb2.HealthStatus.keys():  # noqa: SIM118 - protobuf's enum wrapper has no `in`
        assert endpoint_pb2.HealthStatus.Value(status.name) == int(status)
    else:
        assert status.name in {"TIMEOUT", "DEGRADED"}


def test_fields_left_out_are_skipped() -> None:
    """A first request of Envoy carries far more in its node; the subset reads past it."""
    node = Node(id="envoy-1", cluster="gateways", user_agent_name="envoy", client_features=["x"] * 100)
    read = discovery_pb2.DiscoveryRequest.FromString(bytes(DiscoveryRequest(node=node, type_url=ENDPOINT)))
    assert (read.node.id, read.node.cluster, read.type_url) == ("envoy-1", "gateways", ENDPOINT)
