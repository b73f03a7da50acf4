"""What every Envoy resource of ours says alike: the operator's options, the names, and a few words of Envoy's API."""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import betterproto2
from envoy_data_plane.envoy.config.core.v3 import AggregatedConfigSource, ApiVersion, ConfigSource, TypedExtensionConfig
from envoy_data_plane.envoy.extensions.filters.http.header_to_metadata.v3 import Config as HeaderToMetadata
from envoy_data_plane.envoy.extensions.filters.http.header_to_metadata.v3 import (
    ConfigKeyValuePair,
    ConfigRule,
    ConfigValueType,
)
from envoy_data_plane.envoy.type.v3 import Percent
from envoy_data_plane.google.protobuf import Any

import bootstrap
from xds.model import ObjectRef, PortListener, VirtualHost

PICK_HEADER = "x-vllm-pick"
OWN_HEADERS = "x-vllm-"  # prefix of every header that is ours alone
MODEL_HEADER = "x-gateway-model-name"  # what body-based routing of the inference extension calls the body's model
MODEL_NAMESPACE, MODEL_KEY = "llm", "model"  # dynamic metadata json_to_metadata writes
UNREAD_KEY = "unread"  # the same, where there is no model to be read
MISSING, UNREADABLE = "missing", "unreadable"  # values of UNREAD_KEY
PICKER_NAMESPACE, PICKER_KEY = "picker", "key"  # dynamic metadata the picker answers with
NAMED_KEY = "named"  # there when the picker has seen to the model's name
REASON_KEY, POD_KEY = "reason", "pod"  # how the key came about, and whose it is: for logs alone
REFUSED_KEY, PICKER_MODEL_KEY = "refused", "model"  # "404" or "429" when it refuses the request, and what was asked for
MARK = "vllm-xds.answered"  # filter state, with itself as its value, from when the picker has answered or failed
OBJECTIVE_HEADERS = ("x-llm-d-inference-objective", "x-gateway-inference-objective")  # where both are, the last counts
REQUEST_NAMESPACE = "request"  # dynamic metadata the picker is told of a request's headers, with these keys
SESSION_KEY, OBJECTIVE_KEY = "session", "objective"
PICKER_CLUSTER = "vllm-xds/picker"
JSON_TO_METADATA = "envoy.filters.http.json_to_metadata"
HEADER_TO_METADATA = "envoy.filters.http.header_to_metadata"
EXT_PROC = "envoy.filters.http.ext_proc"
BUFFER = "envoy.filters.http.buffer"
SET_FILTER_STATE = "envoy.filters.http.set_filter_state"
HEADER_MUTATION = "envoy.filters.http.header_mutation"
# In order of work, see xds/listeners.py; routes switch them on.
SWITCHED = (JSON_TO_METADATA, HEADER_TO_METADATA, EXT_PROC, BUFFER, SET_FILTER_STATE, HEADER_MUTATION)
BODY_LIMIT = 32 * 1024 * 1024  # bytes of a request body: 8 M tokens of text, or some images; above it the answer is 413
PICKER_TIMEOUTS = 0.001, 3600.0  # seconds: Envoy counts in milliseconds, and refuses more than an hour
SOCKET_PATH = 107  # bytes of a unix socket's path: what Linux has room for


@dataclass(frozen=True, slots=True)
class Options:
    """What the operator says about the Envoys, beside the objects.

    `bind` is the address listeners bind. `pickers` are ext_proc addresses as Envoy reaches them: `host:port` or
    `unix:/path`. `picker_timeout` in seconds: what a hung picker may cost a request before it goes on unpicked.
    `picker_tls_sds` is the directory on the Envoys' machines with `bootstrap.secrets`' files; None: plaintext.
    `access_log` and `debug_headers` are what xds/access_log.py has of each request.
    ValueError, with a sentence: an Envoy would refuse its listeners, or the picker's cluster, for this.
    """

    bind: str = "0.0.0.0"  # noqa: S104 - a gateway listens for everybody
    pickers: tuple[str, ...] = ("127.0.0.1:18001",)
    picker_timeout: float = 0.2
    picker_tls_sds: str | None = None
    access_log: bool = False
    debug_headers: bool = False

    def __post_init__(self) -> None:
        bind = ipaddress.ip_address(self.bind)
        mapped = isinstance(bind, ipaddress.IPv6Address) and bind.ipv4_mapped
        if bind.is_multicast or mapped or "%" in self.bind:
            raise ValueError(f"expected an IP address to listen on, without a zone, found {self.bind}")
        low, high = PICKER_TIMEOUTS
        if not low <= self.picker_timeout <= high:
            raise ValueError(f"expected a picker timeout of {low:g} to {high:g} seconds, found {self.picker_timeout:g}")
        for picker in self.pickers:
            _check_picker(picker)
        if self.picker_tls_sds == "":
            raise ValueError("expected a directory with the picker's TLS secrets, found an empty name")


def _check_picker(address: str) -> None:
    if address.startswith("unix:/"):
        if len(address.removeprefix("unix:").encode()) > SOCKET_PATH:
            raise ValueError(f"expected a socket path of at most {SOCKET_PATH} bytes, found {address}")
    elif "%" in bootstrap.split_address(address)[0]:
        raise ValueError(f"expected an address without a zone, found {address}")


def listener_name(source: PortListener) -> str:
    """`http-<port>` or `https-<port>`, for a group of Envoys with `@<group>` behind it: LDS name and stat prefix."""
    name = f"https-{source.port}" if source.chains else f"http-{source.port}"
    return f"{name}@{source.group}" if source.group else name


def route_tables(source: PortListener) -> Iterator[tuple[str, tuple[VirtualHost, ...]]]:
    """RDS name -> virtual hosts: one for the port, which has the listener's name, or one for each chain of HTTPS."""
    name = listener_name(source)
    if not source.chains:
        yield name, source.virtual_hosts
    for chain in source.chains:
        yield f"{name}/{chain.hostname}", chain.virtual_hosts


def secret_name(ref: ObjectRef) -> str:
    """`secret/<namespace>/<name>`: the SDS name."""
    return f"secret/{ref.namespace}/{ref.name}"


def ads() -> ConfigSource:
    return ConfigSource(ads=AggregatedConfigSource(), resource_api_version=ApiVersion.V3)


def seconds(value: float) -> dt.timedelta:
    return dt.timedelta(seconds=value)


def typed(name: str, message: betterproto2.Message) -> TypedExtensionConfig:
    return TypedExtensionConfig(name=name, typed_config=Any.pack(message))


def percent(value: float) -> Percent:
    return Percent(value=value)


def told_headers(sessions: Iterable[str] = ()) -> HeaderToMetadata:
    """The headers the picker is told of: the objective's, and the session's, by any of these names: the last counts."""
    names = [(OBJECTIVE_KEY, name) for name in OBJECTIVE_HEADERS] + [(SESSION_KEY, name) for name in sessions]
    rules = []
    for key, name in names:
        pair = ConfigKeyValuePair(metadata_namespace=REQUEST_NAMESPACE, key=key, type=ConfigValueType.STRING)
        rules.append(ConfigRule(header=name, on_header_present=pair))
    return HeaderToMetadata(request_rules=rules)
