"""What the project's own files promise: versions, the lock, the wheel, generated code, a name shared with others."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = {
    canonicalize_name(name): version
    for name, _, version in (
        line.partition("==")
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if not line.startswith("#")
    )
}
REQUIREMENTS = [
    Requirement(text)
    for text in (
        *PROJECT["build-system"]["requires"],
        *PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"]["demo"],
        *PROJECT["dependency-groups"]["dev"],
    )
]
PROTOS = sorted(path.relative_to(ROOT) for path in ROOT.glob("*/wire/*.proto"))


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_lock_is_within_the_bounds(requirement: Requirement) -> None:
    """Every dependency we declare is locked, to a version its bounds allow."""
    assert LOCK[canonicalize_name(requirement.name)] in requirement.specifier


def test_lock_names_no_place() -> None:
    """The lock is exact versions alone: no index, no file, no editable install of somebody's machine."""
    assert LOCK
    assert all(re.fullmatch(r"[\w.-]+", name) and re.fullmatch(r"[\w.+!]+", LOCK[name]) for name in LOCK)


def test_no_other_package_named_xds() -> None:
    """xds-protos installs a top-level `xds` too, and grpcio-csds and grpcio-admin pull it in: none of them is ours."""
    assert not LOCK.keys() & {"xds-protos", "grpcio-csds", "grpcio-admin"}


def test_xds_survives_beside_xds_protos() -> None:
    """`xds/__init__.py` is a docstring only, and no module has the name of one of xds-protos' packages."""
    body = ast.parse((ROOT / "xds" / "__init__.py").read_text()).body
    assert [type(node) for node in body] == [ast.Expr]
    assert not {path.stem for path in (ROOT / "xds").iterdir()} & {"annotations", "core", "data", "service", "type"}


def test_changelog_begins_with_this_version() -> None:
    """The newest heading of CHANGELOG.md is the version of pyproject.toml, or says that it is not released yet."""
    heading = re.search(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading is not None
    assert heading[1] in {PROJECT["project"]["version"], "Unreleased"}


def test_wire_is_what_protoc_makes_of_it(tmp_path: Path) -> None:
    """The generated files checked in are those of the .proto files beside them (`make wire`)."""
    protoc = [sys.executable, "-m", "grpc_tools.protoc", "--proto_path=."]
    subprocess.run(
        [*protoc, f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", *map(str, PROTOS)], cwd=ROOT, check=True
    )
    generated = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2.py*")}
    assert len(generated) == 2 * len(PROTOS) > 0
    assert generated == {path: (ROOT / path).read_text() for path in generated}
    assert {path.relative_to(ROOT) for path in ROOT.glob("*/wire/*_pb2.py*")} == set(generated)


def test_wheel_carries_its_data(tmp_path: Path) -> None:
    """The wheel holds what the commands read at run time, and is typed; tests and documents stay out."""
    build = f"from hatchling.build import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    data = {"bootstrap/envoy.yaml", *map(str, PROTOS)} | {
        str(path.relative_to(ROOT)) for path in (ROOT / "manifests").rglob("*.yaml")
    }
    typed = {f"{package}/py.typed" for package in ("xds", "picker", "bootstrap", "bench")}
    assert data | typed <= names
    info = f"vllm_xds-{PROJECT['project']['version']}.dist-info"
    assert f"{info}/licenses/LICENSE" in names
    assert {name.partition("/")[0] for name in names} == {
        "xds",
        "picker",
        "bootstrap",
        "bench",
        "manifests",
        info,
    }
