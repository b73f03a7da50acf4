"""The annotations `vllm-xds/...` of an InferencePool: what an operator may set of how its requests are balanced.

What cannot be used is a warning on the object, and the default is served: an annotation is never worth a pool.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from xds.fields import HEADER_NAME, Reader, describe
from xds.model import Meta, PoolSettings

PREFIX = "vllm-xds/"

_INTEGER = re.compile(r"[0-9]{1,9}")
_SHARE = re.compile(r"[01](\.[0-9]{1,9})?")
_OWN_HEADERS = re.compile(r"x-vllm-.*|x-gateway-model-name")  # a client's are dropped before anything reads them


def read_settings(document: Reader, meta: Meta) -> PoolSettings:
    """The settings of the pool `document`, which is told of each that is unknown or wrong."""
    given: dict[str, Any] = {}
    for annotation, text in sorted(meta.annotations.items()):
        name = annotation.removeprefix(PREFIX)
        if name == annotation:
            continue
        field = f"metadata.annotations[{annotation}]"
        if name not in _SETTINGS:
            message = f"not a setting of a pool, ignored; there are {', '.join(PREFIX + each for each in _SETTINGS)}"
            document.warn(field, message, "UnknownSetting")
            continue
        try:
            given[name.replace("-", "_")] = _SETTINGS[name](text)
        except ValueError as error:
            message = f"expected {error}, found {describe(text)}; the default is served"
            document.warn(field, message, "InvalidSetting")
    return PoolSettings(**given)


def _header(text: str) -> str:
    name = text.lower()
    if len(name) > HEADER_NAME.longest or not (HEADER_NAME.pattern and HEADER_NAME.pattern.fullmatch(name)):
        raise ValueError(HEADER_NAME.expected)
    if _OWN_HEADERS.fullmatch(name):
        raise ValueError("a header that clients may send")
    return name


def _integer(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not _INTEGER.fullmatch(text) or not low <= int(text) <= high:
            raise ValueError(f"an integer from {low} to {high}")
        return int(text)

    return read


def _share(text: str) -> float:
    if not _SHARE.fullmatch(text) or not 0 < float(text) <= 1:
        raise ValueError("a number above 0, up to 1")
    return float(text)


# Annotation without its prefix -> what reads it, or raises a ValueError that says what it expects. The names are
# PoolSettings' fields, with dashes.
_SETTINGS: Mapping[str, Callable[[str], Any]] = {
    "session-header": _header,
    "hash-balance-factor": _integer(100, 10_000),  # Envoy refuses less: a pod with its fair share would be full
    "output-tokens": _integer(1, 1_000_000),
    "prefill-rate": _integer(1, 10_000_000),
    "request-cost": _integer(0, 1_000_000),
    "shed-waiting": _integer(1, 1_000_000),
    "shed-kv-usage": _share,
}
