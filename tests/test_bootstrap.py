"""The bootstrap of an Envoy. That Envoy takes it, and that the file in the tree is it, is in tests/test_golden.py."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import bootstrap


def rendered(*args: Any, **kw: Any) -> Any:
    return yaml.safe_load(bootstrap.render(*args, **kw))


def server_address(document: Any) -> dict[str, Any]:
    (cluster,) = document["static_resources"]["clusters"]
    (locality,) = cluster["load_assignment"]["endpoints"]
    (endpoint,) = locality["lb_endpoints"]
    found: dict[str, Any] = endpoint["endpoint"]["address"]["socket_address"]
    return found


def test_state_of_the_world_differs_in_one_line() -> None:
    """The variant is chosen by `api_type` alone."""
    delta, sotw = (bootstrap.render(delta=each).splitlines() for each in (True, False))
    different = [(a.strip(), b.strip()) for a, b in zip(delta, sotw, strict=True) if a != b]
    assert different == [("api_type: DELTA_GRPC", "api_type: GRPC")]


@pytest.mark.parametrize(
    ("server", "address", "discovery"),
    [
        ("10.0.0.1:18000", {"address": "10.0.0.1", "port_value": 18000}, "STATIC"),
        ("[fd00::1]:18000", {"address": "fd00::1", "port_value": 18000}, "STATIC"),
        ("xds.gateway.svc:1", {"address": "xds.gateway.svc", "port_value": 1}, "STRICT_DNS"),
    ],
)
def test_a_name_is_looked_up_and_an_address_is_not(server: str, address: dict[str, Any], discovery: str) -> None:
    """Envoy refuses a name in a STATIC cluster, and would ask DNS for an address."""
    document = rendered(server)
    assert server_address(document) == address
    assert document["static_resources"]["clusters"][0]["type"] == discovery


def test_two_pages_of_the_admin_api_are_shown_where_asked_for() -> None:
    """GET /ready and /stats/prometheus at `status`, from the admin API wherever that is; by default nowhere."""
    resources = rendered(admin="127.0.0.1:1", status="[::]:19003")["static_resources"]
    (listener,) = resources["listeners"]
    assert listener["address"] == {"socket_address": {"address": "::", "port_value": 19003}}
    (filters,) = listener["filter_chains"]
    (host,) = filters["filters"][0]["typed_config"]["route_config"]["virtual_hosts"]
    get = [{"name": ":method", "string_match": {"exact": "GET"}}]
    assert [route["match"] for route in host["routes"]] == [
        {"path": path, "headers": get} for path in ("/ready", "/stats/prometheus")
    ]
    admin = resources["clusters"][0]
    assert {route["route"]["cluster"] for route in host["routes"]} == {admin["name"]}
    (endpoint,) = admin["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert endpoint["endpoint"]["address"] == {"socket_address": {"address": "127.0.0.1", "port_value": 1}}
    assert "listeners" not in rendered()["static_resources"]


NAMES = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=30)  # reading YAML is slow
@given(NAMES, NAMES)
def test_names_are_what_was_given(node_id: str, node_cluster: str) -> None:
    """No character ends the string it is in, or becomes another type."""
    node = rendered(node_id=node_id, node_cluster=node_cluster)["node"]
    assert node == {"id": node_id, "cluster": node_cluster}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        ":1",
        "host:",
        "[]:1",
        "host:0",
        "host:65536",
        "host:-1",
        "host:1x",
        "host:\u0661",
        "host:" + "9" * 5000,
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    """By a sentence, for the server as for the admin API and its two pages."""
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        bootstrap.render(text)
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        bootstrap.render(admin=text)
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        bootstrap.render(status=text)


@pytest.mark.parametrize("given", [{"node_id": "\udcff"}, {"node_cluster": "a\ud800"}, {"tls_sds": "/\udcff"}])
def test_what_is_no_utf8_is_refused(given: dict[str, str]) -> None:
    """YAML has no form for it, so Envoy would not start: a sentence instead, of the secrets' paths too."""
    with pytest.raises(ValueError, match="expected UTF-8, found"):
        bootstrap.render(**given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected UTF-8, found"):
        bootstrap.secrets("/a", "/b", next(iter(given.values())))


@pytest.mark.parametrize(
    ("text", "parts"), [("a:1", ("a", 1)), ("[::1]:65535", ("::1", 65535)), ("127.0.0.1:80", ("127.0.0.1", 80))]
)
def test_addresses_are_split(text: str, parts: tuple[str, int]) -> None:
    """Brackets belong to the text, not to the host."""
    assert bootstrap.split_address(text) == parts
