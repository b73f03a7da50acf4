"""Objects: the text of a file, documents, regular expressions, and what follows from them up to Envoy's resources."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

import re2
from yarl import URL

from tests.fuzz.engine import ROOT, Target
from tests.fuzz.mutate import JSON, words
from tests.fuzz.script import dump, pure
from xds import debug
from xds.directory import read_documents
from xds.envoy import Options
from xds.index import Index, Reading
from xds.manifest import BadDocument, Document, read_json, read_yaml
from xds.model import Rejection, Topology
from xds.regex import problem
from xds.resolve import resolve
from xds.snapshot import ENDPOINT, missing
from xds.translate import translate

GOLDEN = [path.read_text() for path in sorted((ROOT / "tests" / "golden").glob("*/input.yaml"))]
OBJECTS = tuple(
    dump({"apiVersion": "v1", "kind": "List", "items": [d.value for d in read_yaml(each) if isinstance(d, Document)]})
    for each in GOLDEN
)
YAML = (
    *(b"---\n", b"\n---\n", b"%YAML 1.1\n", b"&a ", b"*a", b"<<: ", b"!!str ", b"|\n ", b">-\n  ", b"? ", b"- ", b": "),
    *(b"# ", b"{a: 1}", b"[*a, *a]", b'"\\ud800"', b"'", b"~", b"0x1F", b"0o7", b"1:30", b"\xef\xbb\xbf", b"\xc2\x85"),
)
JSON_VALUES = (dict, list, str, int, float, bool, type(None))


def _depth(value: Any) -> int:
    """How deep a value is; it has to be one of JSON's."""
    assert isinstance(value, JSON_VALUES)
    assert not isinstance(value, dict) or all(isinstance(key, str) for key in value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def documents(data: bytes) -> Iterable[Hashable]:
    """Any text is documents and reasons why not, in order of their lines, and always the same."""
    text = data.decode("utf-8-sig", "replace")
    outcomes: set[Hashable] = set()
    for read in (read_yaml, lambda text: [read_json(text)]):
        found = list(read(text))
        assert repr(found) == repr(list(read(text)))  # a NaN is not itself
        lines = [each.line for each in found]
        assert lines == sorted(lines)
        assert 1 <= lines[0] <= lines[-1] <= len(text.splitlines()) + text.count("\n") + 2
        for each in found:
            if isinstance(each, BadDocument):
                assert 0 < len(each.message) < 500
                assert each.message.isprintable()
                outcomes.add(re.sub(r"[^a-z ]", "", each.message)[:40])
            else:
                outcomes.add((type(each.value), min(_depth(each.value), 8)))
    return outcomes


def told(rejection: Rejection) -> Hashable:
    """A rejection has a reason, and is a line that can be logged and printed."""
    line = str(rejection)
    assert rejection.reason.isalnum()
    assert rejection.message
    assert line.isprintable()
    assert len(line.encode()) < 6000
    return rejection.reason, re.sub(r"\[.*?\]|\".*?\"", "", rejection.field)[:80]


def objects(data: bytes) -> Iterable[Hashable]:
    """A file as the server would serve it: every rejection can be told, and no page is asked of another host."""
    return _resolve(data)[0]


def translation(data: bytes) -> Iterable[Hashable]:
    """The same up to Envoy's resources: nothing refers to what is not there, and equal input is equal bytes."""
    outcomes, topology = _resolve(data)
    made = translate(topology, Options(), {})
    assert not missing(made)
    assert made.versions == translate(topology, Options(), {}).versions
    for group in made.groups:
        assert not missing(made.view(group))
    for resource in made.resources[ENDPOINT].values():
        assert json.dumps(debug.decode(made, "ClusterLoadAssignment", resource.name)) != "null"
    return outcomes


def _resolve(data: bytes) -> tuple[set[Hashable], Topology]:
    text = data.decode("utf-8-sig", "replace")
    index = Index().update(Reading(tuple(read_documents("a.json", text))))
    cut = tuple(read_documents("a.json", text[: len(text) // 2]))  # half written: what was served stays
    assert index.update(Reading(cut)).objects == index.objects or not cut[0].rejections
    config = index.config()
    topology = resolve(config)
    assert topology == resolve(config)
    outcomes: set[Hashable] = {told(each) for each in (*config.rejections, *topology.rejections)}
    outcomes |= Counter(type(each).__name__ for each in config.objects).items()
    for cluster in topology.clusters:
        for endpoint in cluster.endpoints:
            assert 0 < endpoint.port < 65536
            if endpoint.metrics_url:
                assert (URL(endpoint.metrics_url).scheme, URL(endpoint.metrics_url).host) == ("http", endpoint.address)
    names = [route.name for port in topology.listeners for host in port.virtual_hosts for route in host.routes]
    return outcomes | {("routes", len(names).bit_length()), ("groups", len(topology.groups))}, topology


PATTERNS = (
    *(b"/v1/.*", b"/[a-z]+(/[0-9]{4}){1,3}", b"(?i)(?P<x>a|b)", rb"[\[\]a-f0-9-]+\d*?$", b"(a{10}){100}"),
    *(rb"\x{41}\pN\Qa\E", rb"^\A\w\W\s\S\b\B.\z", rb"[^\d\-x]", b"(?s-i:a)", rb"\x41\n\t\a\f\v\r\0", b"(?<n>a)"),
)
PATTERN_WORDS = (
    *(b"(?:", b"{2,}", b"{1000}", b"[^", b"(?P<a>", "(?P<é>".encode(), rb"\b", b"*?", b"|", b"(?i", b")", b"]", b"["),
    *(rb"\x", rb"\p{L}", rb"\C", rb"\Q", rb"\E", b"(?U)", b"(?m)", b"{,5}", b"{0}", b"^", b"$", "é".encode()),
    "[\0-\U0010ffff]".encode(),
)
RE2 = re2.Options()
RE2.log_errors = False


def patterns(data: bytes) -> Iterable[Hashable]:
    """Any pattern is refused with a reason, or RE2 compiles it."""
    pattern = data.decode(errors="replace")[:4096]  # as long as the parser lets through
    reason = problem(pattern)
    assert reason == problem(pattern)
    assert len(reason) < 4200
    if not reason:
        re2.compile(pattern, RE2)
    return [tuple(re.findall(r"\b[a-z]{3,}\b", reason)[:3])]


TARGETS = (
    Target("documents", pure(documents), tuple(map(str.encode, GOLDEN)), words(*YAML), seconds_large=20, short=25),
    Target("objects", pure(objects), OBJECTS, JSON, seconds_large=10, short=40),
    Target("translation", pure(translation), OBJECTS, JSON, seconds=2, seconds_large=60, short=2),
    Target("patterns", pure(patterns), PATTERNS, words(*PATTERN_WORDS), short=100),
)
