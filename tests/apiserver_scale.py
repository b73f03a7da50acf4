"""The fake API server as a process with many pods that change: `python -m tests.apiserver_scale --help`.

Its pods are as large as real ones (6 KB). It prints the path of its kubeconfig when it listens.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from pathlib import Path
from typing import Any

import uvloop
import yaml

from tests.apiserver import FakeApiServer

GATEWAY = """\
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: envoy}
spec: {controllerName: vllm-xds.dev/gateway-controller}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: gateway}
spec: {gatewayClassName: envoy, listeners: [{name: http, protocol: HTTP, port: 8080}]}
---
apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata: {name: pool}
spec: {selector: {matchLabels: {app: vllm}}, targetPorts: [{number: 8000}]}
"""
ROUTE = """\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: route-{index}}}
spec:
  parentRefs: [{{name: gateway}}]
  hostnames: [host-{index}.example.com]
  rules:
  - matches: [{{path: {{value: /v1}}}}]
    backendRefs: [{{group: inference.networking.k8s.io, kind: InferencePool, name: pool}}]
"""


def pod(index: int, app: str, ready: bool = True) -> dict[str, Any]:
    """A pod with the fields a real one has: what is read of it is a small part."""
    address = f"127.{64 + (index >> 16)}.{index >> 8 & 255}.{index & 255}"
    fields: dict[str, object] = {f"f:field-{i}": {} for i in range(25)}
    managers = ("kube-controller-manager", "kubelet", "network-plugin")
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{app}-7c9f8b6d5-{index:05d}",
            "generateName": f"{app}-7c9f8b6d5-",
            "labels": {"app": app, "pod-template-hash": "7c9f8b6d5", "team": "inference", "tier": "gpu"},
            "annotations": {
                "prometheus.io/scrape": "false",  # nobody is there to be asked
                "network-plugin.example.com/status": '[{"name": "pod-network", "ips": ["10.0.0.1"]}]' * 4,
            },
            "managers": [{"manager": name, "fieldsV1": {"f:spec": fields}} for name in managers],
        },
        "spec": {
            "nodeName": f"node-{index % 500}",
            "volumes": [{"name": f"volume-{i}", "configMap": {"name": f"config-{i}"}} for i in range(6)],
            "containers": [
                {
                    "name": "vllm",
                    "image": "example.com/vllm/vllm-openai:v0.32.0",
                    "command": ["vllm", "serve", "/models/qwen", "--served-model-name", "/model/qwen"],
                    "ports": [{"name": "http", "containerPort": 8000}],
                    "env": [{"name": f"VARIABLE_{i}", "value": "value" * 6} for i in range(16)],
                    "readinessProbe": {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 10},
                    "volumeMounts": [{"name": f"volume-{i}", "mountPath": f"/mnt/{i}"} for i in range(6)],
                }
            ],
        },
        "status": {
            "phase": "Running",
            "podIP": address,
            "conditions": [
                {"type": kind, "status": str(ready or kind != "Ready"), "lastTransitionTime": "2026-01-01T00:00:00Z"}
                for kind in ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled")
            ],
            "containerStatuses": [{"name": "vllm", "ready": ready, "containerID": f"containerd://{'0' * 64}"}],
        },
    }


async def serve(pods: int, pool: int, routes: int, rate: float, kubeconfig: Path) -> None:
    """For ever: `rate` pods a second, of all at random, are not ready any more, or again."""
    async with FakeApiServer() as api:
        for document in yaml.safe_load_all(GATEWAY):
            api.store.put(document)
        for index in range(routes):
            api.store.put(yaml.safe_load(ROUTE.format(index=index)))
        apps = ["vllm" if index < pool else "other" for index in range(pods)]
        for index, app in enumerate(apps):
            api.store.put(pod(index, app))
        kubeconfig.write_text(api.kubeconfig())  # noqa: ASYNC240 - nobody is asking yet
        print(kubeconfig, flush=True)  # noqa: T201 - what it is asked for
        rng, ready, due = random.Random(1), [True] * pods, time.monotonic()
        while True:
            due += 1 / rate
            await asyncio.sleep(due - time.monotonic())
            index = rng.randrange(pods)
            ready[index] = not ready[index]
            api.store.put(pod(index, apps[index], ready[index]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--pods", type=int, default=10_000)
    parser.add_argument("--pool", type=int, default=1_000, help="how many of them the pool selects")
    parser.add_argument("--routes", type=int, default=500)
    parser.add_argument("--rate", type=float, default=50, help="changes a second")
    parser.add_argument("--kubeconfig", type=Path, required=True, help="a file to write")
    args = parser.parse_args()
    uvloop.run(serve(args.pods, args.pool, args.routes, args.rate, args.kubeconfig))
