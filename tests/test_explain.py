"""`vllm-xds explain`: the command over a directory, its words and its errors; what asks and answers over HTTP.

That it says what Envoy and the picker really do is tests/envoy/test_pools.py's and tests/test_routes.py's to show.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from bench.envoy import free_port
from picker.explain_ask import Directory, ExplainError, Running, picker_of, read_loads
from picker.explain_main import explain
from tests.goldens import ROOT
from tests.objects import backend, config, gateway, gateway_class, parent, pod, pool, route, rule
from xds.__main__ import main
from xds.directory import DirectorySource
from xds.explain import asked, explain_route
from xds.match import Request
from xds.model import Strategy
from xds.resolve import CONTROLLER_NAMES, resolve
from xds.status import MAX_POSTED, _is_here, serve_status

DEMO = ROOT / "manifests" / "demo"
URL = "http://llm.test:8081/v1/completions"
POOL = "pool/default/vllm-qwen-pool"
BODY = json.dumps({"model": "/model/qwen", "prompt": "x" * 5000, "max_tokens": 7})
LOADS = f"""\
name: {POOL}
endpoints:
- {{hash_key: default/qwen-0, running: 9, waiting: 1, kv_tokens: 400000}}
- {{hashKey: default/qwen-1, running: 2, kvTokens: "400000"}}
---
resource: {{"@type": type.googleapis.com/vllm_xds.v1.PoolLoad, name: {POOL}, endpoints: []}}
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory with a body and loads."""
    (tmp_path / "body").write_text(BODY)
    (tmp_path / "loads").write_text(LOADS.partition("---")[0])
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command."""
    try:
        code = main(["explain", *map(str, argv)])
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_in_words(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Route, pool, prompt, pick and the cost of each pod, the cheapest first; pods that have not reported say so."""
    code, out, err = said(capsys, URL, "--body", files / "body", "--config", DEMO, "--loads", files / "loads")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:2] == [
        "POST /v1/completions of llm.test:8081, port 8081",
        f"body: {len(BODY):,} bytes, model /model/qwen",
    ]
    assert "route: default/qwen-backend/0/0 of virtual host *" in lines
    assert f"goes to {POOL}: PREFIX_CACHE, 8 endpoints" in lines
    assert "  prompt: about 1,250 tokens, 2 chunks of 512" in lines
    table = [line.split() for line in lines if line.startswith("  default/qwen-")]
    assert len(table) == 8
    costs = [int(row[1].replace(",", "")) for row in table]
    assert costs == sorted(costs)
    assert any(line.startswith(f"  pick: {table[0][0]}, cheapest by ") for line in lines)
    assert sum("load not fresh" in line for line in lines) == 6
    mean = (2 + 10) / 2
    assert {row[0]: float(row[9]) for row in table} == {
        f"default/qwen-{i}": {0: 10.0, 1: 2.0}.get(i, mean) for i in range(8)
    }


def test_as_json(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same and everything else, in one document; idle pods where there are no loads; the same again each time."""
    argv = (URL, "--body", files / "body", "--config", DEMO, "--json", "-H", "Host: other.test", "-H", "x-session:  s")
    code, out, _ = said(capsys, *argv)
    document = json.loads(out)
    (pick,) = document["picks"]
    assert code == 0
    assert document["request"] == {
        "method": "POST",
        "host": "other.test",
        "port": 8081,
        "path": "/v1/completions",
        "headers": [["x-session", "s"]],
        "body_bytes": len(BODY),
        "model": "/model/qwen",
        "unread": "",
    }
    assert document["route"]["route"] == "default/qwen-backend/0/0"
    assert (pick["cluster"], pick["reason"], pick["pod"]) == (POOL, "cost", pick["offers"][0]["pod"])
    assert len({offer["cost"] for offer in pick["offers"]}) == 1  # all are idle
    assert (len(pick["prompt"]["chunks"]), pick["prompt"]["max_tokens"]) == (2, 7)
    assert said(capsys, *argv) == (0, out, "")


def test_what_is_not_picked(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Service, no route, no body, a path Envoy refuses: the words say who answers, and there is no table."""
    for url, *options, expected in (
        ("http://a.test:8080/v1/models", "round robin, 8 endpoints; Envoy itself chooses one, no picker is asked"),
        ("http://a.test:8081/v1/models", "body: 0 bytes, there is no body"),
        ("http://a.test:8081/a#b", "body: 0 bytes, there is no body"),
        ("http://a.test:8081/a%2fb", "no route is looked for: the path has an escaped slash: Envoy redirects to /a/b"),
        ("http://a.test:8081/x", "--body", files / "none", "pick: none: the body has no prompt that can be read"),
    ):
        (files / "none").write_text("no JSON")
        code, out, err = said(capsys, url, *options, "--config", DEMO)
        assert (code, err) == (0, "")
        assert expected in out
        assert "backlog" not in out


@pytest.mark.parametrize(
    ("argv", "code", "expected"),
    [
        (("localhost:8081",), 2, "expected a URL like http://localhost:8081/v1/completions, found 'localhost:8081'"),
        (("ftp://a/b",), 2, "expected a URL like"),
        (("http://a:99999/",), 2, "expected a port from 1 to 65535"),
        (("http://a/ b",), 2, "without spaces"),
        ((URL, "-H", "no colon"), 2, "expected a header like 'x-session: s1', found 'no colon'"),
        ((URL, "--loads", "x"), 2, "--loads goes with --config"),
        ((URL, "--picker-status", "here"), 2, "expected HOST:PORT"),
        ((URL, "--config", "/nowhere"), 1, "/nowhere"),
        ((URL, "--config", DEMO, "--body", "/nowhere"), 1, "cannot read /nowhere: No such file or directory"),
        ((URL, "--config", DEMO, "--loads", "/nowhere"), 1, "cannot read /nowhere: No such file or directory"),
        (("http://a:1/", "--config", DEMO), 1, "no Gateway has port 1: there are 8080, 8081"),
        ((URL, "--config", DEMO, "--group", "edge"), 1, "no Gateway has port 8081 for the Envoys of group 'edge'"),
        ((URL, "--server-status", f"127.0.0.1:{free_port()}"), 1, "is `vllm-xds serve` running with this --status?"),
    ],
)
def test_mistakes_are_a_sentence(
    argv: tuple[object, ...], code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On standard error, and nothing else is printed."""
    found, out, err = said(capsys, *argv)
    assert (found, out) == (code, "")
    assert err.splitlines()[-1].startswith("vllm-xds explain: ")
    assert expected in err
    assert "Traceback" not in err


def test_a_body_too_large_is_not_read_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is a sentence, as long as what a picker takes would be passed."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MAX_POSTED + 1)
    code, out, err = said(capsys, URL, "--config", DEMO, "--body", tmp_path / "large")
    assert (code, out) == (1, "")
    assert "is larger than 8 MiB" in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "expected"),
        ("- 1", "expected a PoolLoad, found [1]"),
        ("name: x\nendpoint: []", 'no field named "endpoint"'),
        (f"name: {POOL}\nendpoints: [{{hash_key: a, running: many}}]", "running"),
        (f"name: {POOL}\nendpoints: [{{hash_key: default/qwen-0, running: -1}}]", "default/qwen-0: running is -1"),
        (f"name: {POOL}\nendpoints: [{{hash_key: default/other}}]", f"{POOL} has no pod 'default/other'"),
        ("name: pool/default/x", f"there is no pool 'pool/default/x': there are {POOL}"),
    ],
)
def test_wrong_loads(text: str, expected: str) -> None:
    """What is no PoolLoad, and one of pods that are not there, is a sentence."""
    with pytest.raises(ExplainError) as error:
        Directory(DEMO, CONTROLLER_NAMES, read_loads(text))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_loads_are_those_of_the_debug_page() -> None:
    """Alone or as /debug/snapshot has them, in either spelling of protobuf's JSON; the last one of a pool counts."""
    first, second = (read_loads(text) for text in LOADS.split("---\n"))
    assert [each.hash_key for each in first[POOL].endpoints] == ["default/qwen-0", "default/qwen-1"]
    assert first[POOL].endpoints[1].kv_tokens == 400_000
    assert read_loads(LOADS) == second
    assert not second[POOL].endpoints
    assert picker_of(resolve(config()), {}).read_at() == {}


def test_a_route_of_a_group() -> None:
    """Where several groups of Envoys have a port, one has to be named; a question that is none is a ValueError."""
    topology = resolve(
        config(
            gateway_class(),
            gateway(name="gw"),
            gateway(name="edge", groups=("edge",)),
            route(rule(backend("llm", "InferencePool", port=0)), parents=[parent(), parent("edge")]),
            pool(strategy=Strategy.PREFIX_CACHE),
            pod("a", "10.0.0.1"),
        )
    )
    request = Request("POST", "a.test", "/")
    with pytest.raises(ValueError, match="several groups of Envoys have port 8080: name one of '', 'edge'"):
        explain_route(topology, asked(request, 8080))
    assert explain_route(topology, asked(request, 8080, ""))["clusters"][0]["picked"] is True
    assert explain_route(topology, asked(request, 8080, "edge"))["group"] == "edge"
    for question in (b"", b"{}", b"[]", b'{"port":1}', asked(request, 1).replace(b'"a.test"', b"7")):
        with pytest.raises(ValueError, match=r"[a-z]"):
            explain_route(topology, question)


# --- asking what runs ---


async def test_a_picker_that_does_not_answer() -> None:
    """The route is told all the same, and why there is no more; exit code 1."""
    topology = resolve(DirectorySource(DEMO).load())

    async def route_of(_: Mapping[str, str], question: bytes) -> object:
        return explain_route(topology, question)

    posted = {"/debug/route": route_of}
    async with serve_status("127.0.0.1", 0, CollectorRegistry(), lambda: True, posted=posted) as port:
        for picker, why in ((free_port(), "is `vllm-xds picker` running"), (port, "no worker of the picker at")):
            source, out = Running(f"127.0.0.1:{port}", f"127.0.0.1:{picker}"), io.StringIO()
            request = Request("POST", "a.test", "/v1/completions")
            assert await explain(source, request, 8081, BODY.encode(), out) == 1
            assert "route: default/qwen-backend/0/0" in out.getvalue()
            assert why in out.getvalue()
        with pytest.raises(ExplainError, match="no Gateway has port 1"):
            await source.route(asked(request, 1))


async def test_what_is_posted_is_bounded_and_for_this_machine() -> None:
    """A ValueError is a 400 with its sentence, None a 404, a body beyond the bound a 413, which nobody looks at;
    nor at a GET."""
    answered: list[bytes] = []

    async def page(query: Mapping[str, str], body: bytes) -> object:
        answered.append(body)
        if body == b"bad":
            raise ValueError("expected good")
        return {"query": dict(query), "bytes": len(body)} if body else None

    async def post(url: str, body: bytes) -> tuple[int, Any]:
        async with aiohttp.ClientSession() as session, session.post(url, data=io.BytesIO(body)) as response:
            return response.status, await response.text()

    async with serve_status("0.0.0.0", 0, CollectorRegistry(), lambda: True, posted={"/x": page}) as port:
        url = f"http://127.0.0.1:{port}/x"
        assert await post(f"{url}?a=1", b"abc") == (200, '{"query": {"a": "1"}, "bytes": 3}')
        assert await post(url, b"bad") == (400, "expected good\n")
        assert await post(url, b"") == (404, "no such thing\n")
        assert (await post(url, bytes(MAX_POSTED)))[0] == 200
        assert (await post(url, bytes(MAX_POSTED + 1)))[0] == 413
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            assert response.status == 405
        assert len(answered) == 4


@pytest.mark.parametrize(
    ("address", "here"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True), ("10.0.0.1", False),
     ("::ffff:10.0.0.1", False), ("::", False), (None, False)],
)  # fmt: skip
def test_who_is_on_this_machine(address: str | None, here: bool) -> None:
    """Loopback of both families alone."""
    assert _is_here(address) is here
