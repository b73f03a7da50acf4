"""A backend -> Envoy's cluster, and the picker's own cluster (pure)."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from functools import cache

import betterproto2
from envoy_data_plane.envoy.config.cluster.v3 import (
    CircuitBreakers,
    CircuitBreakersThresholds,
    CircuitBreakersThresholdsRetryBudget,
    Cluster,
    ClusterCommonLbConfig,
    ClusterDiscoveryType,
    ClusterEdsClusterConfig,
    LoadBalancingPolicy,
    LoadBalancingPolicyPolicy,
    OutlierDetection,
    UpstreamConnectionOptions,
)
from envoy_data_plane.envoy.config.core.v3 import (
    Address,
    ApiVersion,
    ConfigSource,
    HealthCheck,
    HealthCheckGrpcHealthCheck,
    HealthCheckHttpHealthCheck,
    Http1ProtocolOptions,
    Http2ProtocolOptions,
    HttpProtocolOptions,
    PathConfigSource,
    Pipe,
    SocketAddress,
    TcpKeepalive,
    TransportSocket,
)
from envoy_data_plane.envoy.config.endpoint.v3 import (
    ClusterLoadAssignment,
    Endpoint,
    LbEndpoint,
    LocalityLbEndpoints,
)
from envoy_data_plane.envoy.extensions.load_balancing_policies.common.v3 import ConsistentHashingLbConfig
from envoy_data_plane.envoy.extensions.load_balancing_policies.least_request.v3 import (
    LeastRequest,
    LeastRequestSelectionMethod,
)
from envoy_data_plane.envoy.extensions.load_balancing_policies.ring_hash.v3 import RingHash
from envoy_data_plane.envoy.extensions.load_balancing_policies.round_robin.v3 import RoundRobin
from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import (
    CertificateValidationContext,
    CommonTlsContext,
    CommonTlsContextCombinedCertificateValidationContext,
    SdsSecretConfig,
    SubjectAltNameMatcher,
    UpstreamTlsContext,
)
from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import SubjectAltNameMatcherSanType as SanType
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import HttpProtocolOptions as UpstreamHttpProtocolOptions
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import HttpProtocolOptionsExplicitHttpConfig
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.google.protobuf import Any
from google.protobuf.wrappers_pb2 import StringValue

import bootstrap
from xds import model
from xds.envoy import (
    PICKER_CLUSTER,
    Options,
    ads,
    percent,
    seconds,
    typed,
)
from xds.model import Strategy

RING_SIZE = 1024  # points: an addressed pick needs one a pod; more only evens out requests without a key
BREAKER = 100_000  # connections, requests: Envoy's 1,024 would queue long answers behind each other
CONNECT_TIMEOUT = 1.0  # seconds, to a pod in the same network
UVICORN_IDLE = 4.0  # seconds: uvicorn closes an idle connection after 5, and a request sent just then is lost
HEALTH_INTERVAL = 2.0  # seconds between GETs of /health: a dead engine answers 503 there at once
HEALTH_TIMEOUT = 1.0  # seconds
STAND_IN_WAIT = 1.0  # seconds: as long as the first health check of the clusters that come with it may take


def cluster(source: model.Cluster) -> Cluster:
    """An EDS cluster. A Service is plain round robin, the honest baseline; a pool is made for long, uneven requests."""
    common = Cluster(
        name=source.name,
        type=ClusterDiscoveryType.EDS,
        eds_cluster_config=ClusterEdsClusterConfig(eds_config=ads()),
        connect_timeout=seconds(CONNECT_TIMEOUT if source.connect_timeout is None else source.connect_timeout),
        circuit_breakers=_breakers(BREAKER),
        typed_extension_protocol_options=_http(
            http2=source.http2,
            idle=UVICORN_IDLE if source.connection_idle_timeout is None else source.connection_idle_timeout,
        ),
    )
    if source.strategy is None:
        common.load_balancing_policy = _policy("round_robin", RoundRobin())
        return common
    if source.strategy is Strategy.PREFIX_CACHE:
        common.load_balancing_policy = _policy(
            "ring_hash",
            RingHash(
                minimum_ring_size=RING_SIZE,
                consistent_hashing_lb_config=ConsistentHashingLbConfig(
                    hash_balance_factor=source.settings.hash_balance_factor
                ),
            ),
        )
    else:
        full_scan = LeastRequest(selection_method=LeastRequestSelectionMethod.FULL_SCAN)
        common.load_balancing_policy = _policy("least_request", full_scan)
    common.health_checks = [
        HealthCheck(
            interval=seconds(HEALTH_INTERVAL),
            no_traffic_interval=seconds(HEALTH_INTERVAL),
            timeout=seconds(HEALTH_TIMEOUT),
            unhealthy_threshold=2,
            healthy_threshold=1,
            http_health_check=HealthCheckHttpHealthCheck(path="/health"),
        )
    ]
    # Without this an endpoint that left EDS keeps its traffic for as long as its health checks pass.
    common.ignore_health_on_host_removal = True
    common.outlier_detection = OutlierDetection(
        consecutive_5xx=5,
        consecutive_gateway_failure=3,
        enforcing_consecutive_gateway_failure=100,
        interval=seconds(2),
        base_ejection_time=seconds(10),
        max_ejection_percent=50,  # Envoy's 10 would never eject one pod of four
    )
    common.common_lb_config = ClusterCommonLbConfig(healthy_panic_threshold=percent(20))
    common.upstream_connection_options = UpstreamConnectionOptions(
        tcp_keepalive=TcpKeepalive(keepalive_time=30, keepalive_interval=10, keepalive_probes=3)
    )
    return common


def picker_cluster(options: Options) -> Cluster:
    """The picker, so bounded that its death or hang costs a request at most `picker_timeout`, and soon nothing.

    A hang is found by the gRPC health check alone: ext_proc's message timeouts do not count for outlier detection.
    """
    return Cluster(
        name=PICKER_CLUSTER,
        type=ClusterDiscoveryType.STATIC if all(map(_is_static, options.pickers)) else ClusterDiscoveryType.STRICT_DNS,
        connect_timeout=seconds(0.25),
        load_balancing_policy=_policy("round_robin", RoundRobin()),
        circuit_breakers=_breakers(256),  # requests that may wait on a hung picker; further ones go on unpicked at once
        common_lb_config=ClusterCommonLbConfig(healthy_panic_threshold=percent(0)),
        health_checks=[
            HealthCheck(
                interval=seconds(1),
                no_traffic_interval=seconds(1),
                timeout=seconds(options.picker_timeout),  # who is too late for this is too late for requests
                unhealthy_threshold=1,
                healthy_threshold=1,
                grpc_health_check=HealthCheckGrpcHealthCheck(),
            )
        ],
        outlier_detection=OutlierDetection(
            consecutive_gateway_failure=3,
            enforcing_consecutive_gateway_failure=100,
            interval=seconds(1),
            base_ejection_time=seconds(1),
            max_ejection_percent=100,
        ),
        typed_extension_protocol_options=_http(http2=True),
        transport_socket=_tls(options.picker_tls_sds, options.pickers) if options.picker_tls_sds else None,
        load_assignment=ClusterLoadAssignment(
            cluster_name=PICKER_CLUSTER,
            endpoints=[
                LocalityLbEndpoints(
                    lb_endpoints=[LbEndpoint(endpoint=Endpoint(address=_address(a))) for a in options.pickers]
                )
            ],
        ),
    )


def stand_in(name: str) -> bytes:
    """The encoded cluster keeping one of this name in use with a SotW Envoy, whatever it is: xds/stream.py, rule 11.

    Envoy goes on using the old one while this warms. It is answered no endpoints, so after STAND_IN_WAIT Envoy takes
    those it remembers, and only then acknowledges: should the server be lost just then, requests still arrive.
    """
    return StringValue(value=name).SerializeToString() + _nameless()  # field 1, a string: the name


@cache
def _nameless() -> bytes:
    """What all stand-ins have alike, encoded once: a client can ask for hundreds, and one takes a millisecond."""
    source = ads()
    source.initial_fetch_timeout = seconds(STAND_IN_WAIT)
    return bytes(
        Cluster(
            type=ClusterDiscoveryType.EDS,
            eds_cluster_config=ClusterEdsClusterConfig(eds_config=source),
            connect_timeout=seconds(CONNECT_TIMEOUT),
            circuit_breakers=_breakers(BREAKER),
        )
    )


def _tls(directory: str, addresses: Sequence[str]) -> TransportSocket:
    """Mutual TLS by the secrets in `directory`, with a server that is one of the `host:port` addresses."""

    def secret(name: str) -> SdsSecretConfig:
        path = PathConfigSource(path=f"{directory}/{bootstrap.secret_file(name)}")
        return SdsSecretConfig(
            name=name, sds_config=ConfigSource(path_config_source=path, resource_api_version=ApiVersion.V3)
        )

    names = [
        SubjectAltNameMatcher(
            san_type=SanType.IP_ADDRESS if _is_static(address) else SanType.DNS,
            matcher=StringMatcher(exact=_host(address)),
        )
        for address in {_host(address): address for address in addresses}.values()  # each host once
    ]
    common = CommonTlsContext(
        alpn_protocols=["h2"],
        tls_certificate_sds_secret_configs=[secret(bootstrap.CERTIFICATE)],
        combined_validation_context=CommonTlsContextCombinedCertificateValidationContext(
            default_validation_context=CertificateValidationContext(match_typed_subject_alt_names=names),
            validation_context_sds_secret_config=secret(bootstrap.CA),
        ),
    )
    return TransportSocket(
        name="envoy.transport_sockets.tls", typed_config=Any.pack(UpstreamTlsContext(common_tls_context=common))
    )


def _host(text: str) -> str:
    return text.rpartition(":")[0].strip("[]")


def _address(text: str) -> Address:
    if text.startswith("unix:"):
        return Address(pipe=Pipe(path=text.removeprefix("unix:")))
    return Address(socket_address=SocketAddress(address=_host(text), port_value=int(text.rpartition(":")[2])))


def _is_static(text: str) -> bool:
    if text.startswith("unix:"):
        return True
    try:
        ipaddress.ip_address(_host(text))
    except ValueError:
        return False
    return True


def _breakers(limit: int) -> CircuitBreakers:
    budget = CircuitBreakersThresholdsRetryBudget(budget_percent=percent(20), min_retry_concurrency=20)
    return CircuitBreakers(
        thresholds=[
            CircuitBreakersThresholds(
                max_connections=limit,
                max_pending_requests=limit,
                max_requests=limit,
                retry_budget=budget,  # Envoy's default of 3 retries at a time refuses 57 of 60
            )
        ]
    )


def _http(*, http2: bool, idle: float = 0.0) -> dict[str, Any]:
    explicit = HttpProtocolOptionsExplicitHttpConfig(
        http_protocol_options=None if http2 else Http1ProtocolOptions(),
        http2_protocol_options=Http2ProtocolOptions() if http2 else None,
    )
    options = UpstreamHttpProtocolOptions(
        explicit_http_config=explicit,
        common_http_protocol_options=HttpProtocolOptions(idle_timeout=seconds(idle)) if idle else None,
    )
    return {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": Any.pack(options)}


def _policy(name: str, config: betterproto2.Message) -> LoadBalancingPolicy:
    extension = typed(f"envoy.load_balancing_policies.{name}", config)
    return LoadBalancingPolicy(policies=[LoadBalancingPolicyPolicy(typed_extension_config=extension)])
