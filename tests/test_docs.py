"""The documents keep up with the code."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from xds.conditions import FEATURES

ROOT = Path(__file__).parent.parent
WRITER = re.compile(r"(.*\b)?(log|events)\.(debug|info|warning|error)|write|tell")  # the last two are one of them


def _events() -> set[str]:
    """The first argument, where it is a plain text, of every call of a logger's methods in the product."""
    found = set()
    for path in [*ROOT.glob("xds/*.py"), *ROOT.glob("picker/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not WRITER.fullmatch(ast.unparse(node.func)):
                continue
            event = node.args[0]
            if isinstance(event, ast.Constant) and isinstance(event.value, str):
                found.add(event.value)
    return found


def test_every_log_event_is_documented_with_an_example() -> None:
    """docs/logs.md has each event of the code in words, and an example that is JSON."""
    text = (ROOT / "docs" / "logs.md").read_text()
    examples = {json.loads(line)["event"] for line in text.splitlines() if line.startswith("{")}
    events = _events()
    assert len(events) > 20
    assert events - examples == set()
    assert {event for event in events if f"**{event}**" not in text} == set()


def test_what_conformance_rests_on_exists() -> None:
    """Every test and file that docs/conformance.md names, and every feature that a GatewayClass claims is in it."""
    text = (ROOT / "docs" / "conformance.md").read_text()
    tests = {
        name for path in ROOT.glob("tests/**/test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    named = set(re.findall(r"\btest_\w+", text))
    assert len(named) > 40
    assert named - tests == set()
    assert all((ROOT / path).exists() for path in re.findall(r"\btests/[\w/]+", text))
    assert [feature for feature in FEATURES if not re.search(rf"\b{feature}\b", text)] == []


def test_readme_names_exactly_the_two_commands() -> None:
    """A new user needs `make demo` and `make test`, and is shown no third one."""
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^make [a-z]+", text, re.MULTILINE)) == {"make demo", "make test"}


def test_every_path_the_documents_link_to_exists() -> None:
    """No dead link in the tree."""
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
