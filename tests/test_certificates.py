"""What a Secret may hold: a certificate and its key, and nothing that Envoy would refuse."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import pytest

from tests.tls_files import CERTS
from xds.certificates import problem
from xds.model import ObjectRef, Secret
from xds.parse import Parsed, parse

FIRST, KEY, SECOND_KEY = ((CERTS / name).read_bytes() for name in ("first.pem", "first.key", "second.key"))
CA = (CERTS / "ca.pem").read_bytes()
# RSA of 1,024 bits, which OpenSSL reads by default and Envoy refuses; and an EC key with the password "x".
SHORT, SHORT_KEY, LOCKED_KEY = ((CERTS / name).read_bytes() for name in ("short.pem", "short.key", "locked.key"))


def test_a_pair_is_fine() -> None:
    """Alone, and with the chain behind it."""
    assert problem(FIRST, KEY) == ""
    assert problem(FIRST + CA, KEY) == ""


@pytest.mark.parametrize(
    ("certificate", "key"),
    [
        (FIRST, SECOND_KEY),
        (b"", KEY),
        (FIRST, b""),
        (b"\x00" * 99, b"x"),
        (KEY, FIRST),
        (SHORT, SHORT_KEY),
        (FIRST, LOCKED_KEY),
    ],
    ids=["another's key", "no certificate", "no key", "no PEM", "exchanged", "too short", "with a password"],
)
def test_what_is_no_pair_is_said(certificate: bytes, key: bytes) -> None:
    """One sentence; nothing is asked of a terminal."""
    assert problem(certificate, key).startswith("tls.crt and tls.key are not a certificate and its key")


def _secret(**fields: Any) -> Parsed:
    return parse(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x"}, "type": "kubernetes.io/tls", **fields}
    )


def _data(certificate: bytes = FIRST, key: bytes = KEY) -> dict[str, str]:
    return {"tls.crt": b64encode(certificate).decode(), "tls.key": b64encode(key).decode(), "ca.crt": "eA=="}


def test_a_secret_is_read() -> None:
    """From `data`, and from `stringData`, which is written by hand and counts first; a key never shows in a message."""
    written = {"tls.crt": FIRST.decode(), "tls.key": KEY.decode()}
    for fields in ({"data": _data()}, {"stringData": written}, {"data": _data(b"old", b"old"), "stringData": written}):
        parsed = _secret(**fields)
        assert parsed.rejections == ()
        assert isinstance(parsed.object, Secret)
        assert (parsed.object.certificate, parsed.object.key) == (FIRST, KEY)
        assert "PRIVATE" not in repr(parsed)


@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        ({"type": "Opaque"}, "type", "UnsupportedValue"),
        ({"type": None}, "type", "UnsupportedValue"),
        ({}, "data.tls.crt", "Invalid"),
        ({"data": {**_data(), "tls.key": "%"}}, "data.tls.key", "Invalid"),
        ({"data": {**_data(), "tls.key": 1}}, "data.tls.key", "Invalid"),
        ({"data": _data(key=SECOND_KEY)}, "data", "InvalidCertificate"),
    ],
)
def test_a_bad_secret_is_rejected(fields: dict[str, Any], field: str, reason: str) -> None:
    """By the field, and without what is in it."""
    parsed = _secret(**fields)
    assert (parsed.object, parsed.ref) == (None, ObjectRef("", "Secret", "default", "x"))
    (rejection,) = parsed.rejections
    assert (rejection.field, rejection.reason) == (field, reason)
    assert "PRIVATE" not in str(rejection)
