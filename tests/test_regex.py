"""regex.problem: what passes is what Envoy's RE2 compiles."""

from __future__ import annotations

import pytest
import re2
from hypothesis import given, settings
from hypothesis import strategies as st

from xds.regex import MAX_NESTED, problem


@pytest.mark.parametrize(
    "pattern",
    [
        "/v1/.*",
        "/[a-z]+(/[0-9]{4}){1,3}",
        "(?i)/foo",
        "(?P<x>a|b)",
        "(?:a|b)*?",
        r"[\[\]a-f0-9-]+",
        "[]a]",
        r"\d+\.\w*\b",
        "(" * MAX_NESTED + ")" * MAX_NESTED,
        "a{1000}",
        "(a{10}){100}",
        "[a-f0-9]{8}-[a-f0-9]{4}-[a-f0-9]{4}-[a-f0-9]{4}-[a-f0-9]{12}",
        "[a-zA-Z0-9/._-]{1,1000}",
        r"[\x80-\xff]+",
        "a{}{b}",
        "",
    ],
)
def test_common_ground_passes(pattern: str) -> None:
    """What both engines read alike is let through (each of these compiles in Envoy 1.40)."""
    assert problem(pattern) == ""


@pytest.mark.parametrize(
    "pattern",
    [
        "(?=a)",
        "(?!a)",
        "(?<=a)b",
        "(?<!a)b",
        r"(a)\1",
        "(?P<a>x)(?P=a)",
        "(?>a)",
        "a++",
        "a{2}+",
        r"a\Z",
        r"\u0041",
        "(?#c)a",
        "(?x)a",
        "(?a)a",
        r"\é",
        r"[a\é]",
        "[\U0010ffff-\u0100]",
        "(" * (MAX_NESTED + 1) + ")" * (MAX_NESTED + 1),
        "a{1001}",
        "a{1001,}",
        "(a{100}){20}",
        "((a{10}){11}){10}",
        "[^a]{1000}" * 11,
        "[acegikmoqsuwyACEGIKMOQSUWY02468]{1000}" * 20,
        "((((((((a)))))))){1000}" * 50,
        "(){1000}" * 500,
        "a{,2}",
        "é",
        "[é-ü]",
        "(?P<é>a)",
        "(",
        ")",
        "[",
        "[[",
        "[a&&",
        "[]&&a",
        "a**",
        "*",
        r"[\b]",
        "[[:alpha:]]",
    ],
)
def test_what_re2_would_refuse_is_refused(pattern: str) -> None:
    """Envoy refuses all routes for one such pattern, or reads it otherwise than Python (`a{,2}`, `[é]`, `[[a]]`)."""
    assert problem(pattern) != ""


def _compiles(pattern: str) -> bool:
    """Whether RE2 itself takes it."""
    options = re2.Options()
    options.log_errors = False
    try:
        re2.compile(pattern, options)
    except re2.error:
        return False
    return True


@settings(max_examples=1000)
@given(st.text(alphabet="ab01(){}[]|*+?\\.^$-,:=!<>PZdbx#&~é\n", max_size=30))
def test_any_pattern_that_passes_compiles(pattern: str) -> None:
    """Whatever is written, nothing raises, no warning of `re` is left to surface later, and RE2 takes what passes."""
    assert problem(pattern) or _compiles(pattern)


def test_a_reason_is_short() -> None:
    """However many digits a repetition has, and whatever they multiply to."""
    said = problem("(" + "a{999}" + "){" + "9" * 4000 + "}")
    assert "RE2 repeats at most 1000 times" in said
    assert len(said) < 300


def test_the_answer_does_not_depend_on_the_caller() -> None:
    """However much of the stack is in use: a directory read again rejects no route it served."""
    pattern = "(" * MAX_NESTED + "a*" + ")" * MAX_NESTED

    def below(frames: int) -> str:
        return below(frames - 1) if frames else problem(pattern)

    assert below(0) == below(400) == ""


@pytest.mark.parametrize("part", ["((((a)))){1000}", "[a-cx-z0-9]{1000}", r"(?:\W\d){1000}", "(?:a?b?){1000}"])
def test_size_is_counted_in_instructions(part: str) -> None:
    """Groups, a class's ranges, escapes and repetitions take more of RE2's memory than characters do."""
    assert "instructions" in problem(part * 7)
    assert problem("a{1000}" * 7) == problem(part) == ""
