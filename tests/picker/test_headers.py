"""picker/headers.py: what a header block asks for."""

from contextlib import suppress

import pytest
from hpack import Decoder, Encoder
from hypothesis import given
from hypothesis import strategies as st

from picker.headers import ANSWER, MAX_BLOCK, MAX_KNOWN, OK, BlockError, Head, HeaderReader, failure_block, status_block

REQUEST = {
    ":method": "POST",
    ":scheme": "http",
    ":path": "/a.B/C",
    ":authority": "picker",
    "te": "trailers",
    "content-type": "application/grpc",
}
CALL = Head("/a.B/C")
MALFORMED = Head("", 0)


def encode(fields: list[tuple[str, str]] | dict[str, str]) -> bytes:
    """As a client without a table does."""
    encoder = Encoder()
    encoder.header_table_size = 0
    return encoder.encode(list(fields.items()) if isinstance(fields, dict) else fields)


@pytest.mark.parametrize(
    ("changes", "head"),
    [
        ({}, CALL),
        ({"content-type": "application/grpc+proto"}, CALL),
        ({"content-type": "application/grpc; x=y"}, CALL),
        ({"x-b3-traceid": "1"}, CALL),
        ({":method": "GET"}, Head("", 405)),
        ({"content-type": "application/json"}, Head("", 415)),
        ({"content-type": "application/grpc-web"}, Head("", 415)),
        ({"content-type": None}, Head("", 415)),
        ({":path": None}, MALFORMED),
        ({":path": ""}, MALFORMED),
        ({":path": "/ä"}, MALFORMED),
        ({":scheme": None}, MALFORMED),
        ({":method": None}, MALFORMED),
        ({"te": "gzip"}, MALFORMED),
        ({"connection": "close"}, MALFORMED),
        ({"transfer-encoding": "chunked"}, MALFORMED),
        ({"X-Upper": "1"}, MALFORMED),
        ({":status": "200"}, MALFORMED),
    ],
)
def test_what_a_request_is(changes: dict[str, str | None], head: Head) -> None:
    """A gRPC call's path; what is HTTP but no gRPC has an HTTP status; what HTTP/2 forbids is malformed."""
    fields = {name: value for name, value in (REQUEST | changes).items() if value is not None}
    ordered = sorted(fields.items(), key=lambda item: not item[0].startswith(":"))
    assert HeaderReader().read(encode(ordered)) == head


def test_pseudo_headers_come_first_and_once() -> None:
    """Twice the same one, or one behind a regular header, is malformed."""
    fields = list(REQUEST.items())
    assert HeaderReader().read(encode([*fields, (":path", "/x")])) == MALFORMED
    assert HeaderReader().read(encode([(":path", "/x"), *fields])) == MALFORMED


@given(st.lists(st.sampled_from(["/a", "/b", "/c"]), max_size=12), st.integers(0, 12))
def test_blocks_are_read_in_their_order(paths: list[str], until: int) -> None:
    """While the client keeps a table, as its encoder may until it has acknowledged ours; and once it keeps none."""
    reader, encoder = HeaderReader(), Encoder()
    for turn, path in enumerate(paths):
        if turn == until:
            reader.no_table()
            encoder.header_table_size = 0
        assert reader.read(encoder.encode(list((REQUEST | {":path": path}).items()))) == Head(path)


def test_the_same_bytes_may_mean_different_things() -> None:
    """While there is a table: a field by its number there is what was put there last."""
    reader = HeaderReader()
    start, end = b"\x83\x86", b"\x0f\x10\x10application/grpc"  # POST, http; RFC 7541, appendix A and section 6
    for path in ("/a", "/b"):
        assert reader.read(start + b"\x44\x02" + path.encode() + end) == Head(path)
        assert reader.read(start + b"\xbe" + end) == Head(path)


def test_a_table_after_it_was_given_up_is_an_error() -> None:
    """A block that says nothing of the table's new size, and one that asks for a larger one."""
    reader, encoder = HeaderReader(), Encoder()
    reader.read(encoder.encode(list(REQUEST.items())))
    reader.no_table()
    with pytest.raises(BlockError):
        reader.read(encoder.encode(list(REQUEST.items())))
    reader = HeaderReader()
    reader.no_table()
    with pytest.raises(BlockError):
        reader.read(b"\x3f\xe1\x1f" + encode(REQUEST))


def test_what_is_remembered_is_bounded() -> None:
    """However many different blocks come, and what comes again is still read the same."""
    reader = HeaderReader()
    reader.no_table()
    reader.read(b"\x20")
    for turn in range(3 * MAX_KNOWN):
        assert reader.read(encode(REQUEST | {"x-trace": str(turn)})) == CALL
        assert len(reader._known) <= MAX_KNOWN
    assert reader.read(encode(REQUEST)) == reader.read(encode(REQUEST)) == CALL


@given(st.binary(max_size=200))
def test_no_block_makes_it_raise_anything_else(block: bytes) -> None:
    """Any bytes are a head or a BlockError."""
    with suppress(BlockError):
        HeaderReader().read(block)


@pytest.mark.parametrize(
    "block", [b"\x82" * MAX_BLOCK, b"\0\0\0" * (MAX_BLOCK // 3), b"\x7f" + b"\xff" * 4000, encode([("a", "x" * 9000)])]
)
def test_a_large_list_is_refused(block: bytes) -> None:
    """However few bytes stand for it."""
    with pytest.raises(BlockError):
        HeaderReader().read(block)


def test_what_is_written() -> None:
    """An independent decoder reads our blocks, and needs no table for them."""
    for block, fields in (
        (ANSWER, [(":status", "200"), ("content-type", "application/grpc")]),
        (OK, [("grpc-status", "0")]),
        (status_block(415), [(":status", "415")]),
        (
            failure_block(12, "no"),
            [(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "12"), ("grpc-message", "no")],
        ),
    ):
        decoder = Decoder()
        assert [(name.decode(), value.decode()) for name, value in decoder.decode(block, raw=True)] == fields
        assert len(decoder.header_table.dynamic_entries) == 0
