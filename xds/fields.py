"""A strict reader over one decoded Kubernetes object: it knows the path of every field and which fields were asked for.

A parser asks for the fields it serves; `unknown` then names what its author wrote and nobody asked for. The first field
that breaks its rule raises `FieldError`; `reject` and `warn` note what costs less than the object. Patterns and lengths
are those of the Gateway API (v1.6) and inference extension (v1.6) CRDs, whose API server refuses the same values.

`Reader` is mutable (the keys asked for, the notes); one lives as long as one call of `parse`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from xds.model import Level, Rejection

SHOWN = 64  # characters of a value or key repeated in a message: enough to find it, no room to flood a log

_SUBDOMAIN = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_DURATION = re.compile(r"([0-9]{1,5}(h|m|s|ms)){1,4}")  # GEP-2257; Envoy Gateway uses the same type
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


@dataclass(frozen=True, slots=True)
class Text:
    """A rule for a string: what to call it in a message, its length in characters, the pattern all of it must match.

    `reason` is that of a value that does not match: UnsupportedValue where the API allows it and Envoy does not.
    """

    expected: str
    longest: int
    pattern: re.Pattern[str] | None = None
    shortest: int = 1
    reason: str = "Invalid"


NAME = Text("a lower-case DNS name", 253, re.compile(_SUBDOMAIN))  # metadata.name, listener and section names
NAMESPACE = Text("a lower-case DNS label", 63, re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"))
# The CRDs allow any text where an object is referred to; no object has such a name, and messages repeat it.
OBJECT_NAME = Text("an object's name", 253, re.compile(r"[!-~]+"))
GROUP = Text("an API group", 253, re.compile(rf"({_SUBDOMAIN})?"), shortest=0)
KIND = Text("a kind", 63, re.compile(r"[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?"))
HOSTNAME = Text("a lower-case host name, possibly *.suffix", 253, re.compile(rf"(\*\.)?{_SUBDOMAIN}"))
PRECISE_HOSTNAME = Text("a lower-case host name without *", 253, re.compile(_SUBDOMAIN))
HEADER_NAME = Text("an HTTP header name", 256, re.compile(r"[A-Za-z0-9!#$%&'*+\-.^_`|~]+"))
# The CRD allows any text; Envoy refuses the whole response for a header value with CR, LF or NUL, and blanks at
# its ends are no part of one (RFC 9110, section 5.5).
HEADER_VALUE = Text(
    "text without control characters, and without blanks at its ends",
    4096,
    re.compile(r"(?![ \t])[^\x00-\x08\x0a-\x1f\x7f]+(?<![ \t])"),
    reason="UnsupportedValue",
)
# Of one connection and not of the request: Envoy takes them off before it looks for a route, and sends its own.
CONNECTION_HEADERS = frozenset({"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"})
# One character of a URL's path, as a regular expression (RFC 3986, section 3.3).
PATH_CHARACTER = r"(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|%[0-9a-fA-F]{2})"
LABEL_VALUE = Text("a label value", 63, re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?"), shortest=0)
# Kubernetes bounds all annotations of an object together, and a key is a name of 63 behind a prefix of 253 characters.
ANNOTATION = Text("text", 256 * 1024, shortest=0)
MAP_KEY = Text("a label key", 317, re.compile(r"([!-.0-~]+/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"))
MAX_LABELS = 1000  # entries of one metadata map: far above what 256 KiB of real ones hold


class FieldError(Exception):
    """A field that breaks its rule; `rejection` says which and why, and lacks only the object it belongs to."""

    def __init__(self, field: str, message: str, reason: str = "Invalid") -> None:
        super().__init__(f"{field}: {message}")
        self.rejection = Rejection(None, reason, message, field)


def describe(value: object) -> str:
    """The value as a message shows it: a scalar as JSON, cut at `SHOWN` characters; of anything else only its type."""
    match value:
        case None:
            return "nothing"
        case str() | bool() | float():
            text = json.dumps(value)
            return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
        case int():
            return str(value) if value.bit_length() <= 64 else "a number beyond 64 bits"
        case list() | tuple():
            return "a list"
        case Mapping():
            return "a mapping"
    return f"a value of type {type(value).__name__}"


class Reader:
    """One mapping of a document, at `path` ("" for the document itself); an absent one reads as empty.

    In every getter, a missing field and one that is null are the same, as in Kubernetes; `default` None = required.
    """

    __slots__ = ("_asked", "_child_of", "_children", "_mapping", "notes", "path")

    def __init__(self, value: object, path: str = "", notes: list[Rejection] | None = None) -> None:
        if not isinstance(value, Mapping):
            raise FieldError(path, f"expected a mapping, found {describe(value)}")
        self._mapping = value
        self._asked: set[str] = set()
        self._child_of: dict[str, Reader] = {}
        self._children: list[Reader] = []
        self.path = path
        self.notes: list[Rejection] = [] if notes is None else notes

    def at(self, key: str) -> str:
        """The path of a field of this mapping."""
        return f"{self.path}.{key}" if self.path else key

    def error(self, key: str, message: str, reason: str = "Invalid") -> FieldError:
        """The error to raise where the field `key` cannot be served."""
        return FieldError(self.at(key), message, reason)

    def reject(self, key: str, message: str, reason: str) -> Rejection:
        """Note that a part of the object is not served as written."""
        return self._note(Rejection(None, reason, message, self.at(key)))

    def warn(self, key: str, message: str, reason: str) -> Rejection:
        """Note that the object is served, with a default or without this field."""
        return self._note(Rejection(None, reason, message, self.at(key), level=Level.WARNING))

    def _note(self, rejection: Rejection) -> Rejection:
        self.notes.append(rejection)
        return rejection

    def get(self, key: str) -> object:
        """The field as it was decoded, None when missing."""
        self._asked.add(key)
        return self._mapping.get(key)

    def skip(self, *keys: str) -> None:
        """Let these fields pass unread: known to the API, without meaning here. No key = the whole mapping."""
        self._asked.update(keys or (key for key in self._mapping if isinstance(key, str)))

    def unknown(self) -> Iterator[str]:
        """The paths of the fields, here and below, that nobody asked for."""
        for key in self._mapping:
            if not isinstance(key, str):
                yield self.at(describe(key))
            elif key not in self._asked:
                yield self.at(key if key.isidentifier() and len(key) <= SHOWN else describe(key))
        for child in self._children:
            yield from child.unknown()

    def text(self, key: str, rule: Text, default: str | None = None) -> str:
        value = self.get(key)
        return default if value is None and default is not None else _text(value, rule, self.at(key))

    def choice(self, key: str, options: Collection[str], default: str | None = None) -> str:
        """One of a few words."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or value not in options:
            raise self.error(key, f"expected one of {', '.join(options)}, found {describe(value)}")
        return value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(key, f"expected an integer from {low} to {high}, found {describe(value)}")
        return value

    def port(self, key: str, default: int | None = None) -> int:
        return self.integer(key, 1, 65535, default)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, found {describe(value)}")
        return value

    def duration(self, key: str) -> float | None:
        """Seconds of a GEP-2257 duration; None when not given."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not _DURATION.fullmatch(value):
            raise self.error(key, f"expected a duration such as 10s, 1h30m or 500ms, found {describe(value)}")
        return sum(int(number) * _SECONDS[unit] for number, unit in re.findall(r"([0-9]+)(ms|h|m|s)", value))

    def child(self, key: str) -> Reader:
        """The mapping below `key`, an empty one when it is not given; the same reader each time."""
        if key not in self._child_of:
            value = self.get(key)
            self._child_of[key] = Reader({} if value is None else value, self.at(key), self.notes)
            self._children.append(self._child_of[key])
        return self._child_of[key]

    def children(self, key: str, most: int, least: int = 0) -> list[Reader]:
        """The mappings of a list of `least` to `most`."""
        readers = [Reader(value, path, self.notes) for value, path in self._items(key, most, least)]
        self._children += readers
        return readers

    def texts(self, key: str, most: int, rule: Text) -> tuple[str, ...]:
        """The strings of a list of at most `most`."""
        return tuple(_text(value, rule, path) for value, path in self._items(key, most, 0))

    def texts_by_key(self, key: str, most: int, rule: Text) -> dict[str, str]:
        """A mapping of at most `most` label-like keys to strings that follow `rule`."""
        value = self.get(key)
        path = self.at(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise FieldError(path, f"expected a mapping, found {describe(value)}")
        if len(value) > most:
            raise FieldError(path, f"expected at most {most} entries, found {len(value)}")
        return {(name := _text(k, MAP_KEY, path)): _text(v, rule, f"{path}[{name}]") for k, v in value.items()}

    def _items(self, key: str, most: int, least: int) -> list[tuple[object, str]]:
        value = self.get(key)
        path = self.at(key)
        items = [] if value is None else value
        if not isinstance(items, list | tuple):
            raise FieldError(path, f"expected a list, found {describe(value)}")
        if not least <= len(items) <= most:
            raise FieldError(path, f"expected {least} to {most} items, found {len(items)}")
        return [(item, f"{path}[{i}]") for i, item in enumerate(items)]


def _text(value: object, rule: Text, path: str) -> str:
    if not isinstance(value, str):
        raise FieldError(path, f"expected {rule.expected}, found {describe(value)}")
    if not rule.shortest <= len(value) <= rule.longest:
        raise FieldError(path, f"expected {rule.shortest} to {rule.longest} characters, found {len(value)}")
    # A lone surrogate (JSON can spell one) has no UTF-8 form and would fail later, while a message is encoded.
    surrogate = not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value)
    if surrogate or (rule.pattern and not rule.pattern.fullmatch(value)):
        raise FieldError(path, f"expected {rule.expected}, found {describe(value)}", rule.reason)
    return value
