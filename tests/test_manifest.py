"""manifest: text to documents with their lines, each on its own, and no text that takes the process down."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from xds.manifest import MAX_DEPTH, MAX_NODES, BadDocument, Document, expand, read_json, read_yaml


def _one(text: str) -> Any:
    """The value of the only document."""
    (document,) = read_yaml(text)
    assert isinstance(document, Document), document
    return document.value


def _bad(text: str) -> str:
    """Why the only document is refused."""
    (document,) = read_yaml(text)
    assert isinstance(document, BadDocument), document
    return document.message


def test_documents_have_the_line_they_start_on() -> None:
    """Comments, blank lines, directives and markers with text on their line do not shift the count."""
    text = "%YAML 1.1\n# first\n---\na: 1\n--- # second\n\nb: 2\n--- {c: 3}\n---\n# nothing\n"
    documents = list(read_yaml(text))
    assert documents == [
        Document(None, 1),
        Document({"a": 1}, 4),
        Document({"b": 2}, 7),
        Document({"c": 3}, 8),
        Document(None, 9),
    ]


@pytest.mark.parametrize("broken", ["a: 'open", "a: [1, 2", "a: b: c", "a: *nowhere", "\tx: 1", "? {a: 1}\n: 2"])
def test_a_broken_document_costs_no_other(broken: str) -> None:
    """The documents before and after it are read, and its own line is named."""
    before, bad, after = read_yaml(f"a: 1\n---\nb: 2\n{broken}\n---\nc: 3\n")
    assert before == Document({"a": 1}, 1)
    assert after == Document({"c": 3}, 3 + broken.count("\n") + 3)
    assert isinstance(bad, BadDocument)
    assert 3 <= bad.line <= 5 + broken.count("\n")
    assert bad.message


def test_lines_are_those_of_an_editor() -> None:
    """Other characters that YAML takes for the end of a line end none; a CRLF is one end."""
    text = "é: \u20281\r\n---\r\n\r\x85\r\na: 1\n---\n\r\r: \n---\nb: [\n"
    assert [each.line for each in read_yaml(text)] == [2, 4, 6, 9]


def test_a_marker_in_a_block_of_text_is_text() -> None:
    """Only --- at the start of a line ends a document."""
    assert _one("a: |\n  x\n  ---\n  y\n") == {"a": "x\n---\ny\n"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2025-01-01T00:00:00Z", "2025-01-01T00:00:00Z"),
        ("2025-01-01", "2025-01-01"),
        ("8000", 8000),
        ('"8000"', "8000"),
        ("0x1F", 31),
        ("010", 8),
        ("0o10", 8),
        ("-1", -1),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("1:30", "1:30"),
        ("yes", True),
        ("off", False),
        ("~", None),
        ("=", "="),
        ("!!str 8000", "8000"),
        ("9" * 5000, float("inf")),
    ],
)
def test_scalars(text: str, value: object) -> None:
    """As Kubernetes reads them: timestamps and times of day are text, quoted is text, a huge number no integer."""
    assert _one(f"a: {text}") == {"a": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", 'key "a" is here twice'),
        ("a: !!python/object:os.system x", "tags are not supported"),
        ("a: !!int x", "tags are not supported"),
        ("&a [*a]", "alias *a of no complete value before it"),
        ("[" * 100_000, f"nested deeper than {MAX_DEPTH} levels"),
        ("{a: " * 100_000, f"nested deeper than {MAX_DEPTH} levels"),
        ("<<: 3", "<< takes a mapping or a list of them"),
        ("[a]: 1", "a key has to be text"),
        ("a: \x07", "unacceptable character"),
    ],
)
def test_refused(text: str, message: str) -> None:
    """What JSON has no form for, and what would exhaust the process, is refused with a reason."""
    assert message in _bad(text)


@pytest.mark.parametrize("step", ["[{}]", "{{<<: [{}]}}"])
def test_alias_bomb(step: str) -> None:
    """Aliases of aliases are counted by what they expand to, in lists and in merges."""
    lines = ["a0: &a0 {x: [y, y, y, y, y, y, y, y, y, y]}"]
    lines += [f"a{i}: &a{i} " + step.format(", ".join([f"*a{i - 1}"] * 10)) for i in range(1, 20)]
    assert "with its aliases expanded" in _bad("\n".join(lines))


def test_aliases_and_merges() -> None:
    """Anchors do what they do in YAML: a merged key yields to one written out, and to the earlier merge."""
    text = "base: &b {x: 1, y: 2}\nmore: &m {y: 3, z: 4}\nall: {<<: [*b, *m], x: 9}\nagain: *b\n"
    value = _one(text)
    assert value["all"] == {"x": 9, "y": 2, "z": 4}
    assert value["again"] == {"x": 1, "y": 2}


def test_json() -> None:
    """JSON has surrogate pairs and deep nesting of its own; its errors have their line."""
    assert read_json('{"a": "\\ud83d\\ude00"}') == Document({"a": "😀"}, 1)
    assert read_json('{\n"a": 1,\n}') == BadDocument(3, "Expecting property name enclosed in double quotes")
    assert read_json('{"a": 1, "a": 2}') == BadDocument(1, "a mapping has one key twice")
    assert isinstance(read_json("[" * 100_000), BadDocument)
    assert isinstance(read_json("9" * 5000), BadDocument)
    assert read_json(f"[{'1,' * MAX_NODES}1]") == BadDocument(1, f"more than {MAX_NODES} values")


def test_expand() -> None:
    """`kubectl get -o yaml` writes a List; anything else is itself."""
    assert list(expand({"apiVersion": "v1", "kind": "List", "items": [1, 2]})) == [1, 2]
    assert list(expand({"apiVersion": "v1", "kind": "List", "items": 3})) == [
        {"apiVersion": "v1", "kind": "List", "items": 3}
    ]
    assert list(expand(None)) == [None]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5).filter(lambda k: k != "<<"), inner, max_size=3)
    ),
    max_leaves=10,
)


class _Quoting(yaml.SafeDumper):
    """Quotes every text: PyYAML leaves some plain (0E0) that kubectl's reader, and ours, take for numbers."""


_Quoting.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


@given(_JSON)
@example("0E0")
def test_round_trip(value: object) -> None:
    """What PyYAML and json write of a JSON value is read back as it was."""
    assert _one(yaml.dump(value, Dumper=_Quoting, default_flow_style=False)) == value
    assert read_json(json.dumps(value)) == Document(value, 1)


@given(st.text(alphabet="ab:- \n\t[]{}&*!|>'\"%@#,?<~0.\x00é", max_size=60))
def test_any_text_is_answered(text: str) -> None:
    """Whatever a file holds, it is documents or reasons why not, in order of their lines."""
    documents = list(read_yaml(text))
    assert documents
    assert all(1 <= each.line <= text.count("\n") + 2 for each in documents)
