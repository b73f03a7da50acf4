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


# Annotation without its prefix -> what reads it, or raises a ValueError that says what it expects. The names are
# PoolSettings' fields, with dashes.
_SETTINGS: Mapping[str, Callable[[str], Any]] = {"session-header": _header}
