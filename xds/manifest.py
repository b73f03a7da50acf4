"""YAML or JSON text to documents, each with its line and each on its own: one that is broken costs no other.

The values are JSON's (mapping with string keys, list, string, number, true, false, null), as Kubernetes has them: a
timestamp stays text, an explicit tag or a repeated key is an error. They are built from the parser's events, with a
stack of our own: the C composer of PyYAML recurses and overruns the process's stack on a file of a hundred thousand
`[`. An alias is counted by what it expands to ("billion laughs").
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise

import yaml

MAX_DEPTH = 64  # levels of nesting; a real object has about 15
MAX_NODES = 1_000_000  # values of one document with its aliases expanded; 1,000 full pods in a List are 300,000
_DIRECTIVE = re.compile(r"^%.*$", re.MULTILINE)  # %YAML 1.1: before the --- that it belongs to, and of no use here
_DOCUMENT = re.compile(r"^---(?=\s|$)", re.MULTILINE)  # at the start of a line it ends whatever came before

_WORDS: dict[str, object] = dict.fromkeys(("", "~", "null", "Null", "NULL"))
for _word in ("true", "yes", "on"):  # YAML 1.1, as kubectl reads it
    _WORDS |= dict.fromkeys((_word, _word.capitalize(), _word.upper()), True)
for _word in ("false", "no", "off"):
    _WORDS |= dict.fromkeys((_word, _word.capitalize(), _word.upper()), False)
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")  # longer ones read as a float, which no field of ours takes
_HEX = re.compile(r"0x[0-9a-fA-F]{1,16}")
_OCTAL = re.compile(r"0o?[0-7]{1,21}")
_FLOAT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")


@dataclass(frozen=True, slots=True)
class Document:
    """One document's value and the line it starts on, counted from 1."""

    value: object
    line: int


@dataclass(frozen=True, slots=True)
class BadDocument:
    """Why a document cannot be read, and on which line."""

    line: int
    message: str


def read_yaml(text: str) -> Iterator[Document | BadDocument]:
    """The documents of a YAML file; one that is empty or only comments has the value None."""
    marks = (match.start() for match in _DOCUMENT.finditer(text))
    line = 1
    for start, end in pairwise(chain([0], marks, [len(text)])):
        yield _read_document(_DIRECTIVE.sub("", text[start:end]), line)
        line += text.count("\n", start, end)


def read_json(text: str) -> Document | BadDocument:
    """The one document of a JSON file."""
    if sum(map(text.count, ",[{")) > MAX_NODES:  # at least as many as there are values, before any is made
        return BadDocument(1, f"more than {MAX_NODES} values")
    try:
        return Document(json.loads(text, object_pairs_hook=_unique), 1)
    except json.JSONDecodeError as error:
        return BadDocument(error.lineno, error.msg)
    except (ValueError, RecursionError) as error:
        return BadDocument(1, str(error))


def expand(value: object) -> Iterator[object]:
    """The items of a Kubernetes List (`kubectl get -o yaml`), or the value itself."""
    match value:
        case {"apiVersion": "v1", "kind": "List", "items": list(items)}:
            yield from items
        case _:
            yield value


def _read_document(text: str, line: int) -> Document | BadDocument:
    """`line` is its first one. Lines end with a newline, as in editors; in YAML some other characters do too."""
    builder = _Builder()
    try:
        for event in yaml.parse(text, Loader=yaml.CSafeLoader):
            builder.add(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        message = ": ".join(filter(None, (error.context, error.problem)))
        return BadDocument(line + text.count("\n", 0, mark.index if mark else 0), message)
    except yaml.YAMLError as error:
        return BadDocument(line, str(error).splitlines()[0])
    return Document(builder.value, line + text.count("\n", 0, builder.start))


@dataclass(slots=True)
class _Open:
    """A list or mapping whose end has not come yet; `size` counts the values in it, `key` waits for its value."""

    value: list[object] | dict[str, object]
    anchor: str | None
    size: int = 1
    key: str | None = None
    merged: dict[str, object] = field(default_factory=dict)  # from `<<`, which every key written out overrides


class _Builder:
    """The value of one document, event by event."""

    def __init__(self) -> None:
        self.value: object = None
        self.start = 0  # index of the first character of its list or mapping
        self._open: list[_Open] = []
        self._anchors: dict[str, tuple[object, int]] = {}

    def add(self, event: yaml.Event) -> None:
        match event:
            case yaml.ScalarEvent():
                self._place(_scalar(event), 1, event.anchor, event)
            case yaml.AliasEvent():
                name = event.anchor or ""
                if name not in self._anchors:
                    raise _error(f"alias *{name[:64]} of no complete value before it", event)
                self._place(*self._anchors[name], None, event)
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                if event.tag not in (None, "!"):
                    raise _error("tags are not supported", event)
                if len(self._open) == MAX_DEPTH:
                    raise _error(f"nested deeper than {MAX_DEPTH} levels", event)
                if not self._open and event.start_mark:
                    self.start = event.start_mark.index
                self._open.append(_Open([] if isinstance(event, yaml.SequenceStartEvent) else {}, event.anchor))
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                done = self._open.pop()
                if isinstance(done.value, dict):
                    done.value = {**done.merged, **done.value}
                self._place(done.value, done.size, done.anchor, event)

    def _place(self, value: object, size: int, anchor: str | None, event: yaml.Event) -> None:
        if anchor:
            self._anchors[anchor] = value, size
        if not self._open:
            self.value = value
            return
        here = self._open[-1]
        here.size += size
        if here.size > MAX_NODES:
            raise _error(f"more than {MAX_NODES} values with its aliases expanded", event)
        if isinstance(here.value, list):
            here.value.append(value)
        elif here.key is None:
            here.key = _key(event, here.value)
        else:
            if here.key == "<<":
                here.merged |= _merge(value, event)
            else:
                here.value[here.key] = value
            here.key = None


def _scalar(event: yaml.ScalarEvent) -> object:
    """The value of a scalar: only a plain one, without quotes, is anything but a string."""
    text = event.value
    if event.tag not in (None, "!", "tag:yaml.org,2002:str"):
        raise _error("tags are not supported", event)
    if event.tag is not None or not event.implicit[0]:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _HEX.fullmatch(text):
        return int(text, 16)
    if _OCTAL.fullmatch(text):
        return int(text.replace("o", ""), 8)
    return float(text) if _FLOAT.fullmatch(text) else text


def _key(event: yaml.Event, mapping: dict[str, object]) -> str:
    if not isinstance(event, yaml.ScalarEvent):
        raise _error("a key has to be text", event)
    key: str = event.value
    if key in mapping:
        raise _error(f"key {json.dumps(key[:64])} is here twice", event)
    return key


def _merge(value: object, event: yaml.Event) -> dict[str, object]:
    """What `<<: *anchor`, or a list of them, brings in; of equal keys the earlier mapping's counts."""
    merged: dict[str, object] = {}
    for part in value if isinstance(value, list) else [value]:
        if not isinstance(part, dict):
            raise _error("<< takes a mapping or a list of them", event)
        merged = {**part, **merged}
    return merged


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("a mapping has one key twice")
    return mapping


def _error(problem: str, event: yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]  # CParser's Mark
