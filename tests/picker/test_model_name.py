"""picker/model_name.py: the model's name in a body, and another in its place."""

import json
from typing import Any

import jiter
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from picker.model_name import MAX_STRINGS, ModelName, find_model, rename
from tests.picker.test_prompt import JSON

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def renamed(body: bytes, name: str) -> bytes:
    """What `rename` makes of the body with what `find_model` has found."""
    found = find_model(body)
    assert found is not None
    return rename(body, found.places, name)


@pytest.mark.parametrize(
    ("body", "name", "after"),
    [
        (b'{"model":"a"}', "a", b'{"model":"NEW"}'),
        (b' {\n "model" :\t"a" , "b":1}', "a", b' {\n "model" :\t"NEW" , "b":1}'),
        (b'{"n":12345678901234567890.10,"model":"a","z":[1.0,1e3]}', "a", None),
        (b'{"messages":[{"model":"x"}],"model":"a","tools":{"model":"y"}}', "a", None),
        (b'{"x":"model","model":"a","y":["model"],"z":{"model":{"model":"y"}}}', "a", None),
        (b'{"x":"\\"model\\":\\"b\\"","model":"a"}', "a", None),
        (b'{"x":"\\\\","model":"a"}', "a", None),
        (b'{"x":"\\\\\\"","model":"a","y":"\\\\"}', "a", None),
        (rb'{"mod\u0065l":"\u0061\/\n"}', "a/\n", rb'{"mod\u0065l":"NEW"}'),
        (b'\xef\xbb\xbf{"model":"a"}', "a", b'\xef\xbb\xbf{"model":"NEW"}'),
        (
            '{"x":"通","model":"模","y":"\U0001f600"}'.encode(),
            "模",
            '{"x":"通","model":"NEW","y":"\U0001f600"}'.encode(),
        ),
        (b'{"model":"a","model":"b"}', "b", b'{"model":"NEW","model":"NEW"}'),
        (b'{"model":""}', "", b'{"model":"NEW"}'),
        (b'{"model":"a"} {"model":"b"}', "b", b'{"model":"NEW"} {"model":"NEW"}'),
        (b'{"prompt":[1,2,3],"model":"a","prompt":"cut sho', "a", None),
    ],
)
def test_the_name_and_nothing_else(body: bytes, name: str, after: bytes | None) -> None:
    """It is found however it is spelled and wherever it stands, and every other byte stays."""
    found = find_model(body)
    assert found is not None
    assert found.name == name
    assert rename(body, found.places, "NEW") == (after or body.replace(b'"model":"a"', b'"model":"NEW"'))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b"null",
        b"{}",
        b'["model","a"]',
        b'[{"model":"a"}]',
        b'"model":"a"',
        b'{"model":7}',
        b'{"model":null,"x":"y"}',
        b'{"model":["a"]}',
        b'{"model":{"model":"a"}}',
        b'{"Model":"a"}',
        b'{"model ":"a"}',
        b'{"x":{"model":"a"}}',
        b'{"model":"a',
        b'{"model"',
        b'{"model":',
        b"{'model':'a'}",
        '{"model":"a"}'.encode("utf-16"),
    ],
)
def test_no_name(body: bytes) -> None:
    """What names no model, or is no JSON, is left as it is."""
    assert find_model(body) == ModelName("", ())
    assert renamed(body, "NEW") == body


def test_the_last_one_counts_also_when_it_is_no_text() -> None:
    """As for every reader of JSON; the text before it is replaced all the same, and reaches nobody."""
    assert find_model(b'{"model":"a","model":7}') == ModelName("", ((9, 12),))


@pytest.mark.parametrize("body", [rb'{"model":"\ud800"}', b'{"model":"\xff"}', rb'{"model":"\x"}', b'{"model":"\n"}'])
def test_a_name_that_is_no_text(body: bytes) -> None:
    """It can be compared with no rule, so it is not looked at, and Envoy is not told that it was."""
    assert find_model(body) is None


def test_a_name_is_spliced_as_json() -> None:
    """Whatever an object's author calls a model, it ends where it ends."""
    for name in ('a"b', "a\\", "a\n\t\x00", "通义", "\u2028", "</script>"):
        assert json.loads(renamed(b'{"model":"a","b":"c"}', name)) == {"model": name, "b": "c"}


@given(st.lists(st.tuples(st.just("model") | TEXT, JSON), max_size=6), TEXT.filter(bool), st.sampled_from([None, 1]))
@example([("model", "a"), ("model", ["x"])], "b", None)
def test_any_object(pairs: list[tuple[str, Any]], name: str, indent: int | None) -> None:
    """Of any object, however written: what a parser reads as the model is found, and replaced, and that alone."""
    colon, comma = (": ", ",\n") if indent else (":", ",")

    def written(pairs: list[tuple[str, Any]]) -> bytes:
        return ("{" + comma.join(json.dumps(k) + colon + json.dumps(v) for k, v in pairs) + "}").encode()

    body = written(pairs)
    given_model = json.loads(body).get("model")
    found = find_model(body)
    assert found is not None
    assert found.name == (given_model if isinstance(given_model, str) else "")
    if isinstance(given_model, str):
        after = rename(body, found.places, name)
        expected = written([(k, name if k == "model" and isinstance(v, str) else v) for k, v in pairs])
        assert repr(json.loads(after, object_pairs_hook=list)) == repr(json.loads(expected, object_pairs_hook=list))
        assert jiter.from_json(after)["model"] == name


@given(st.binary() | st.text('{}[]":,\\u model').map(str.encode))
def test_any_bytes(body: bytes) -> None:
    """Nothing raises, and with the name it has already a body stays what it is for a reader of JSON."""
    found = find_model(body)
    if found is not None and found.places and len({body[a:b] for a, b in found.places}) == 1:
        again = find_model(rename(body, found.places, found.name))
        assert again is not None
        assert again.name == found.name


def test_what_it_costs_is_bounded() -> None:
    """A body of strings alone is looked at up to a bound; brackets without end and long texts cost next to nothing."""
    few = b'{"model":"a","x":[' + b'"",' * (MAX_STRINGS - 4) + b"1]}"
    assert find_model(few) == ModelName("a", ((9, 12),))
    assert find_model(few.replace(b"1]}", b'"","","","",""]}')) is None
    for filling in (b"[]," * 8_000_000, b'"' + b"\\\\" * 12_000_000 + b'",', b"9" * 24_000_000 + b","):
        assert find_model(b'{"x":[' + filling + b'1],"model":"a"}') is not None
