"""What an Envoy says of each request, where the operator asks for it: a line of JSON, and response headers (pure).

    access log        to Envoy's standard output, one object a request, when it is over
    debug headers     on the answer itself: where it came from, and what the picker had chosen

Both tell the pod that was picked from the pod that has served: they differ after a retry, when the pod picked is gone
or over its bound, and where nothing was picked. docs/explain.md has each field of the log. Neither is on by itself: a
log of every request is the operator's to keep, and clients need not know the pods' names.
"""

from __future__ import annotations

from collections.abc import Mapping

from envoy_data_plane.envoy.config.accesslog.v3 import AccessLog
from envoy_data_plane.envoy.config.core.v3 import (
    HeaderValue,
    HeaderValueOption,
    HeaderValueOptionHeaderAppendAction,
    SubstitutionFormatString,
)
from envoy_data_plane.envoy.extensions.access_loggers.stream.v3 import StdoutAccessLog
from envoy_data_plane.google.protobuf import Any, Struct

from xds.envoy import (
    MODEL_KEY,
    MODEL_NAMESPACE,
    PICKER_KEY,
    PICKER_NAMESPACE,
    POD_KEY,
    REASON_KEY,
    REFUSED_KEY,
)

MOST = 256  # characters of what a client chooses: its headers may have 60 KiB


def _picker(key: str) -> str:
    return f"%DYNAMIC_METADATA({PICKER_NAMESPACE}:{key})%"


_ROUTE, _PICKED, _REASON, _SERVED = (
    "%ROUTE_NAME%",
    _picker(POD_KEY),
    _picker(REASON_KEY),
    "%UPSTREAM_METADATA(envoy.lb:hash_key)%",
)

# https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/observability/access_log/usage#command-operators
# A number stays one, and what there is not is null.
FIELDS: Mapping[str, str] = {
    "time": "%START_TIME%",
    "request_id": f"%REQ(X-REQUEST-ID):{MOST}%",
    "client": "%DOWNSTREAM_REMOTE_ADDRESS%",
    "port": "%DOWNSTREAM_LOCAL_PORT%",
    "method": f"%REQ(:METHOD):{MOST}%",
    "host": f"%REQ(:AUTHORITY):{MOST}%",
    "path": f"%PATH(NQ:PATH):{MOST}%",
    "route": _ROUTE,
    "cluster": "%UPSTREAM_CLUSTER%",
    "model": f"%DYNAMIC_METADATA({MODEL_NAMESPACE}:{MODEL_KEY}):{MOST}%",
    "reason": _REASON,
    "picked": _PICKED,
    "key": _picker(PICKER_KEY),
    "refused": _picker(REFUSED_KEY),
    "served": _SERVED,
    "address": "%UPSTREAM_HOST%",
    "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
    "status": "%RESPONSE_CODE%",
    "flags": "%RESPONSE_FLAGS%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "received_bytes": "%BYTES_RECEIVED%",
    "sent_bytes": "%BYTES_SENT%",
    "request_ms": "%REQUEST_DURATION%",
    "first_byte_ms": "%RESPONSE_DURATION%",
    "duration_ms": "%DURATION%",
}

DEBUG_HEADERS: Mapping[str, str] = {
    "x-vllm-route": _ROUTE,
    "x-vllm-reason": _REASON,
    "x-vllm-picked": _PICKED,
    "x-vllm-pod": _SERVED,
}


def access_log() -> AccessLog:
    """One line of FIELDS for each request, on Envoy's standard output."""
    log_format = SubstitutionFormatString(json_format=Struct.from_dict(dict(FIELDS)))
    config = StdoutAccessLog(log_format=log_format)
    return AccessLog(name="envoy.access_loggers.stdout", typed_config=Any.pack(config))


def debug_headers() -> list[HeaderValueOption]:
    """DEBUG_HEADERS, in place of a pod's own; what has no value is no header."""
    action = HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD
    return [
        HeaderValueOption(header=HeaderValue(key=name, value=value), append_action=action)
        for name, value in DEBUG_HEADERS.items()
    ]
