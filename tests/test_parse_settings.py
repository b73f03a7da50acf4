"""xds/parse_settings.py: the annotations `vllm-xds/...` of a pool."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from xds.model import INFERENCE, INFERENCE_X, InferencePool, Level, PoolSettings
from xds.parse import parse


def read(annotations: dict[str, Any], group: str = INFERENCE) -> tuple[PoolSettings, tuple[tuple[str, str], ...]]:
    """A pool's settings, and (field, message) of what is said of them, which is never more than a warning."""
    alpha = {"selector": {"app": "llm"}, "targetPortNumber": 8000}
    v1 = {"selector": {"matchLabels": {"app": "llm"}}, "targetPorts": [{"number": 8000}]}
    document = {
        "apiVersion": f"{group}/{'v1' if group == INFERENCE else 'v1alpha2'}",
        "kind": "InferencePool",
        "metadata": {"name": "p", "annotations": annotations},
        "spec": v1 if group == INFERENCE else alpha,
    }
    parsed = parse(document)
    assert isinstance(parsed.object, InferencePool)
    assert {each.level for each in parsed.rejections} <= {Level.WARNING}
    return parsed.object.settings, tuple((each.field, each.message) for each in parsed.rejections)


@pytest.mark.parametrize("group", [INFERENCE, INFERENCE_X])
@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("session-header", "X-Session-Id", "x-session-id"),
        ("hash-balance-factor", "100", 100),
        ("hash-balance-factor", "10000", 10_000),
        ("output-tokens", "1800", 1800),
        ("prefill-rate", "25000", 25_000),
        ("request-cost", "0", 0),
    ],
)
def test_a_setting(group: str, name: str, text: str, value: object) -> None:
    """What an operator may set, on a pool of either generation; what is not annotated keeps its default."""
    settings, said = read({f"vllm-xds/{name}": text}, group)
    changed: dict[str, Any] = {name.replace("-", "_"): value}
    assert settings == replace(PoolSettings(), **changed)
    assert said == ()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("session-header", "", "an HTTP header name"),
        ("session-header", "x y", "an HTTP header name"),
        ("session-header", ":path", "an HTTP header name"),
        ("session-header", "x" * 300, "an HTTP header name"),
        ("session-header", "X-Vllm-Pick", "a header that clients may send"),
        ("session-header", "X-Gateway-Model-Name", "a header that clients may send"),
        ("hash-balance-factor", "99", "an integer from 100 to 10000"),
        ("hash-balance-factor", "10001", "an integer from 100 to 10000"),
        ("output-tokens", "0", "an integer from 1 to 1000000"),
        ("output-tokens", "1e3", "an integer from 1 to 1000000"),
        ("prefill-rate", "8000.5", "an integer from 1 to 10000000"),
        ("prefill-rate", "9" * 5000, "an integer from 1 to 10000000"),
        ("request-cost", "-1", "an integer from 0 to 1000000"),
        ("request-cost", "\u0661", "an integer from 0 to 1000000"),
    ],
)
def test_a_wrong_setting_is_a_warning(name: str, text: str, expected: str) -> None:
    """It says what was expected and what was found, and the default is served."""
    settings, ((field, message),) = read({f"vllm-xds/{name}": text})
    assert settings == PoolSettings()
    assert field == f"metadata.annotations[vllm-xds/{name}]"
    assert message.startswith(f"expected {expected}, found ")
    assert message.endswith("; the default is served")


def test_an_unknown_setting_is_a_warning() -> None:
    """It names those there are: a slip in a name must not be silent. Other people's annotations are theirs."""
    settings, ((field, message),) = read({"vllm-xds/sesion-header": "x-id", "example.com/vllm-xds": "x"})
    assert settings == PoolSettings()
    assert field == "metadata.annotations[vllm-xds/sesion-header]"
    assert "vllm-xds/session-header" in message
