"""The golden cases: each folder of tests/golden has an input.yaml, and what the server makes of it.

    input.yaml -> rejections.txt  listeners.yaml  routes.yaml  clusters.yaml  endpoints.yaml  pools.yaml

`python -m tests.goldens` (`make golden`) writes the outputs anew, and bootstrap/envoy.yaml; read the difference before
you commit it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import betterproto2
import yaml
from envoy_data_plane.envoy.config.cluster.v3 import Cluster
from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment
from envoy_data_plane.envoy.config.listener.v3 import Listener
from envoy_data_plane.envoy.config.route.v3 import RouteConfiguration
from google.protobuf.json_format import MessageToDict

import bootstrap
from xds import snapshot as types
from xds.directory import DirectorySource
from xds.envoy import Options
from xds.resolve import resolve
from xds.snapshot import Snapshot
from xds.translate import translate
from xds.wire import discovery_pb2 as wire
from xds.wire.pool_config_pb2 import PoolConfig

ROOT = Path(__file__).parent.parent
INPUTS = {path.name: path for path in sorted((ROOT / "tests" / "golden").iterdir())}
CASES = INPUTS | {"demo": ROOT / "manifests" / "demo"}
OUTPUTS = {  # file -> (type, its full message in envoy-data-plane)
    "listeners.yaml": (types.LISTENER, Listener),
    "routes.yaml": (types.ROUTE, RouteConfiguration),
    "clusters.yaml": (types.CLUSTER, Cluster),
    "endpoints.yaml": (types.ENDPOINT, ClusterLoadAssignment),
}


def build(case: Path) -> tuple[Snapshot, list[str]]:
    """The snapshot of one case, and its rejections as lines."""
    with tempfile.TemporaryDirectory() as scratch:  # the source reads directories, and this one holds the outputs too
        for file in [case / "input.yaml"] if (case / "input.yaml").exists() else case.glob("*.yaml"):
            shutil.copy(file, scratch)
        config = DirectorySource(Path(scratch)).load()
    topology = resolve(config)
    rejections = sorted({str(r) for r in (*config.rejections, *topology.rejections)})
    return translate(topology, Options(bind="127.0.0.1"), {}), rejections


def decoded(snapshot: Snapshot, type_url: str, message: type[betterproto2.Message]) -> list[dict[str, Any]]:
    """Every resource of a type as Envoy's own (full) message reads it, in the form of its YAML."""
    resources = snapshot.resources[type_url].values()
    bodies = [wire.Any.FromString(resource.any).value for resource in resources]
    return [_plain(message.parse(body).to_dict(casing=betterproto2.Casing.SNAKE)) for body in bodies]


def outputs(case: Path) -> dict[str, str]:
    """What the case's output files have to hold."""
    snapshot, rejections = build(case)
    texts = {
        name: yaml.safe_dump_all(decoded(snapshot, type_url, message), sort_keys=False, width=120)
        for name, (type_url, message) in OUTPUTS.items()
    }
    told = [
        PoolConfig.FromString(wire.Any.FromString(r.any).value) for r in snapshot.resources[types.POOL_CONFIG].values()
    ]
    pools = [MessageToDict(message, preserving_proto_field_name=True) for message in told]
    return {
        "rejections.txt": "".join(f"{line}\n" for line in rejections),
        **texts,
        "pools.yaml": yaml.safe_dump_all(pools, sort_keys=False, width=120),
    }


def golden_files(name: str) -> Path:
    """Where the outputs of a case are: beside its input, or tests/golden/demo for the demo's own manifests."""
    return ROOT / "tests" / "golden" / name


def _plain(value: Any) -> Any:
    """In words Envoy's YAML reader knows: no empty `@type` for an empty Any, and a field betterproto2 misspells."""
    if isinstance(value, dict):
        known = {k.replace("_5_xx", "_5xx"): v for k, v in value.items() if (k, v) != ("@type", "")}
        return {k: _plain(v) for k, v in known.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def main() -> int:
    for name, case in CASES.items():
        folder = golden_files(name)
        folder.mkdir(exist_ok=True)
        for file, text in outputs(case).items():
            path = folder / file
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
                print(f"wrote {path.relative_to(ROOT)}")  # noqa: T201 - a command
    (ROOT / "bootstrap" / "envoy.yaml").write_text(bootstrap.render())
    return 0


if __name__ == "__main__":
    sys.exit(main())
