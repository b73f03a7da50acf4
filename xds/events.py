"""Events of an API server: a rejection told on the object it is about (pure).

An Event's name is made of what it says, so that it is there once, whoever tells it and how often; an API server forgets
it after an hour. https://kubernetes.io/docs/reference/kubernetes-api/cluster-resources/event-v1/
"""

from __future__ import annotations

import hashlib
from datetime import datetime

from xds.api_wire import group_path
from xds.lease import micro_time
from xds.model import ObjectRef, Rejection
from xds.status_patch import Live

GROUP, VERSION = "events.k8s.io", "v1"
REPORTER = "vllm-xds"  # reportingController
MAX_NOTE = 1024  # bytes, the API's
MAX_NAME = 253 - 17  # characters of the object's name, before "." and the hash
MAX_INSTANCE = 128  # characters of reportingInstance, the API's
CLUSTER_NAMESPACE = "default"  # where Events about objects without a namespace are


def event(
    ref: ObjectRef, rejection: Rejection, live: Live, instance: str, utc: datetime
) -> tuple[str, dict[str, object]]:
    """The path to create the Event at, and its body: of a rejection of `ref`, told by `instance`."""
    namespace = ref.namespace or CLUSTER_NAMESPACE
    told = f"{live.uid}|{rejection.reason}|{rejection.field}|{rejection.message}"
    digest = hashlib.sha256(told.encode()).hexdigest()[:16]
    note = f"{rejection.field}: {rejection.message}" if rejection.field else rejection.message
    body: dict[str, object] = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "Event",
        "metadata": {"name": f"{ref.name[:MAX_NAME].rstrip('.-')}.{digest}", "namespace": namespace},
        "eventTime": micro_time(utc),
        "reportingController": REPORTER,
        "reportingInstance": instance[:MAX_INSTANCE],
        "action": "Configure",
        "reason": rejection.reason,
        "type": "Warning",
        "note": note.encode()[:MAX_NOTE].decode(errors="ignore"),
        "regarding": {
            "apiVersion": live.api_version,
            "kind": ref.kind,
            "name": ref.name,
            "uid": live.uid,
            **({"namespace": ref.namespace} if ref.namespace else {}),
        },
    }
    return f"{group_path(GROUP, VERSION)}/namespaces/{namespace}/events", body
