"""The static bootstrap of an Envoy that takes everything else from the management server.

`bootstrap/envoy.yaml` is `render()` with its defaults, kept in the tree for people (`make golden` writes it, a test
holds the two equal).
"""

from __future__ import annotations

import ipaddress
import math
import re

import yaml

DEFAULT_SERVER = "127.0.0.1:18000"
DEFAULT_ADMIN = "127.0.0.1:19000"
DEFAULT_NODE_ID = "envoy"
DEFAULT_NODE_CLUSTER = "vllm-xds"
CERTIFICATE, CA = "certificate", "ca"  # names of the two secrets

_PORT = re.compile(r"[0-9]{1,5}")

_TEMPLATE = """\
# Envoy's bootstrap: everything but the way to the management server comes from there.
# Start it with:  envoy -c envoy.yaml --component-log-level ext_proc:error --drain-time-s 3600
#   ext_proc:error   Envoy logs a warning for each request a dead picker could not see
#   drain-time-s     a changed or removed listener lets running answers go on for this long
node:
  id: {node_id}
  cluster: {node_cluster}

admin:
  address:
    socket_address: {{address: {admin_host}, port_value: {admin_port}}}

dynamic_resources:
  ads_config:
    api_type: {api_type}
    transport_api_version: V3
    set_node_on_first_message_only: true
    grpc_services:
    - envoy_grpc:
        cluster_name: xds
        retry_policy:  # back soon after the server is: it holds no traffic, so there is no herd to fear
          retry_back_off: {{base_interval: 0.2s, max_interval: 2s}}
  cds_config: {{ads: {{}}, resource_api_version: V3}}
  lds_config: {{ads: {{}}, resource_api_version: V3}}

# Each second the management server is told how many requests are under way to each pod: no metrics page is that fresh.
cluster_manager:
  load_stats_config:
    api_type: GRPC
    transport_api_version: V3
    grpc_services:
    - envoy_grpc: {{cluster_name: xds}}

static_resources:
{status_listener}  clusters:
{status_cluster}  - name: xds
    type: {discovery}
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config:
          http2_protocol_options:
            connection_keepalive: {{interval: 3s, timeout: 2s}}  # or a hung server is never noticed
    load_assignment:
      cluster_name: xds
      endpoints:
      - lb_endpoints:
        - endpoint:
            address:
              socket_address: {{address: {server_host}, port_value: {server_port}}}
{tls}
layered_runtime:
  layers:
  - name: static
    static_layer:
      # Envoy refuses all routes for one regular expression of more than 100 RE2 instructions; HTTPRoutes have larger ones.
      re2.max_program_size.error_level: 4294967295

overload_manager:
  resource_monitors:
  - name: envoy.resource_monitors.global_downstream_max_connections
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig
      max_active_downstream_connections: 50000
"""  # noqa: E501 - a type's name can not be broken

_STATUS_LISTENER = """\
  listeners:
  - name: status
    address:
      socket_address: {{address: {host}, port_value: {port}}}
    ignore_global_conn_limit: true  # a full Envoy is not one that is down
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: status
          route_config:
            virtual_hosts:
            - name: status
              domains: ["*"]
              routes:  # of the admin API these two pages, and nothing that changes anything
              - match: {{path: /ready, headers: [{{name: ":method", string_match: {{exact: GET}}}}]}}
                route: {{cluster: admin}}
              - match: {{path: /stats/prometheus, headers: [{{name: ":method", string_match: {{exact: GET}}}}]}}
                route: {{cluster: admin}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
"""

_STATUS_CLUSTER = """\
  - name: admin
    type: STATIC
    connect_timeout: 1s
    load_assignment:
      cluster_name: admin
      endpoints:
      - lb_endpoints:
        - endpoint:
            address:
              socket_address: {{address: {admin_host}, port_value: {admin_port}}}
"""

_TLS = """\
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context:
          alpn_protocols: [h2]
          tls_certificate_sds_secret_configs:
          - name: certificate
            sds_config: {certificate}
          combined_validation_context:
            default_validation_context:
              match_typed_subject_alt_names: [{{san_type: {san_type}, matcher: {{exact: {host}}}}}]
            validation_context_sds_secret_config:
              name: ca
              sds_config: {ca}
"""

# Envoy's file-based SDS: it reads what a secret names again when something is moved into the directory of that file.
_CERTIFICATE = """\
resources:
- "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret
  name: certificate
  tls_certificate:
    certificate_chain: {{filename: {cert}}}
    private_key: {{filename: {key}}}
"""
_CA = """\
resources:
- "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret
  name: ca
  validation_context:
    trusted_ca: {{filename: {ca}}}
"""


def render(
    server: str = DEFAULT_SERVER,
    node_id: str = DEFAULT_NODE_ID,
    node_cluster: str = DEFAULT_NODE_CLUSTER,
    admin: str = DEFAULT_ADMIN,
    *,
    delta: bool = True,
    tls_sds: str | None = None,
    status: str | None = None,
) -> str:
    """The bootstrap as YAML. `server` and `admin` are `HOST:PORT` (`[IPv6]:PORT`); a host name is looked up by Envoy.

    At `status`, an address like them, Envoy answers GET /ready and /stats/prometheus of its admin API and no more.
    With `tls_sds`, a directory on Envoy's machine that holds the files of `secrets`, it is mutual TLS: the server's
    certificate is of the CA there and names the server's host.
    Raises ValueError with a sentence for an address that is not one.
    """
    server_host, server_port = split_address(server)
    admin_host, admin_port = split_address(admin)
    status_listener = status_cluster = ""
    if status is not None:
        host, port = split_address(status)
        status_listener = _STATUS_LISTENER.format(host=_quoted(host), port=port)
        status_cluster = _STATUS_CLUSTER.format(admin_host=_quoted(admin_host), admin_port=admin_port)
    return _TEMPLATE.format(
        node_id=_quoted(node_id),
        node_cluster=_quoted(node_cluster),
        admin_host=_quoted(admin_host),
        admin_port=admin_port,
        api_type="DELTA_GRPC" if delta else "GRPC",
        discovery="STATIC" if _is_ip(server_host) else "STRICT_DNS",
        server_host=_quoted(server_host),
        server_port=server_port,
        tls=_transport_socket(server_host, tls_sds) if tls_sds else "",
        status_listener=status_listener,
        status_cluster=status_cluster,
    )


def secrets(cert: str, key: str, ca: str) -> dict[str, str]:
    """File name -> text: the secrets of an Envoy whose PEM files these are, in the form its file-based SDS reads.

    Files that the bootstrap named itself would be read once. They have to be replaced by a move, as Kubernetes does.
    https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/security/secret
    """
    return {
        secret_file(CERTIFICATE): _CERTIFICATE.format(cert=_quoted(cert), key=_quoted(key)),
        secret_file(CA): _CA.format(ca=_quoted(ca)),
    }


def secret_file(name: str) -> str:
    """The file that holds the secret `name`."""
    return f"{name}.yaml"


def _transport_socket(host: str, directory: str) -> str:
    def source(name: str) -> str:
        path = _quoted(f"{directory}/{secret_file(name)}")
        return f"{{path_config_source: {{path: {path}}}, resource_api_version: V3}}"

    san_type = "IP_ADDRESS" if _is_ip(host) else "DNS"
    return _TLS.format(certificate=source(CERTIFICATE), ca=source(CA), san_type=san_type, host=_quoted(host))


def split_address(text: str) -> tuple[str, int]:
    """`HOST:PORT` -> (host without brackets, port 1-65535)."""
    before, separator, port = text.rpartition(":")
    host = before.removeprefix("[").removesuffix("]")
    if not separator or not host or not _PORT.fullmatch(port) or not 0 < int(port) < 65536:
        raise ValueError(f"expected HOST:PORT with a port from 1 to 65535, found {text!r}")
    return host, int(port)


def worker_addresses(address: str, workers: int) -> tuple[str, ...]:
    """Where the workers of a picker at `address` answer: `HOST:PORT` and ports after it, or `unix:/path.0`, `.1`, ...

    One worker answers at `address` itself. Raises ValueError with a sentence.
    """
    if workers == 1:
        return (address,)
    if address.startswith("unix:"):
        return tuple(f"{address}.{index}" for index in range(workers))
    _, port = split_address(address)
    if port + workers > 65536:
        raise ValueError(f"{workers} workers need as many ports, and there are fewer from {address} on")
    return tuple(f"{address.rpartition(':')[0]}:{port + index}" for index in range(workers))


def _quoted(text: str) -> str:
    """As a YAML scalar on one line, whatever is in it; ValueError for what has no UTF-8 form and so none in YAML."""
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError(f"expected UTF-8, found {text!r}")
    return yaml.safe_dump(text, default_style='"', width=math.inf).rstrip("\n")


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
