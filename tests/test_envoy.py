"""Options: what every Envoy would refuse is refused where an operator says it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from xds.envoy import PICKER_TIMEOUTS, SOCKET_PATH, Options


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bind": "127.0.0.1"},
        {"bind": "::"},
        {"bind": "fd00::1"},
        *({"picker_timeout": seconds} for seconds in PICKER_TIMEOUTS),
        {"pickers": ("picker.example.com:1", "[fd00::1]:2", "unix:/run/picker.sock")},
        {"pickers": (f"unix:/{'x' * (SOCKET_PATH - 1)}",)},
        {"picker_tls_sds": "/run/envoy"},
    ],
)
def test_what_envoy_takes(options: dict[str, Any]) -> None:
    """Addresses of both families, names, sockets, and the limits themselves."""
    Options(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bind": "localhost"}, "does not appear to be an IPv4 or IPv6 address"),
        ({"bind": "::ffff:127.0.0.1"}, "expected an IP address to listen on"),
        ({"bind": "fe80::1%eth0"}, "without a zone"),
        ({"bind": "ff02::1"}, "expected an IP address to listen on"),
        *(
            ({"picker_timeout": seconds}, "expected a picker timeout of 0.001 to 3600 seconds")
            for seconds in (0.0, 0.0009, 3600.1, math.inf, math.nan)
        ),
        ({"pickers": ("picker",)}, "expected HOST:PORT"),
        ({"pickers": ("unix:run",)}, "expected HOST:PORT"),
        ({"pickers": ("[fe80::1%eth0]:1",)}, "without a zone"),
        ({"pickers": (f"unix:/{'x' * SOCKET_PATH}",)}, "expected a socket path of at most 107 bytes"),
        ({"pickers": (f"unix:/{'é' * 60}",)}, "expected a socket path of at most 107 bytes"),
        ({"picker_tls_sds": ""}, "an empty name"),
    ],
)
def test_what_envoy_refuses(options: dict[str, Any], said: str) -> None:
    """With a sentence that has the value in it."""
    with pytest.raises(ValueError, match=said):
        Options(**options)
