"""kube_client: whose credentials are taken, and every way a server may fail to answer as a value."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from kubernetes_asyncio.config import incluster_config

from tests.apiserver import FakeApiServer
from tests.following import eventually
from tests.tls_files import CERTS
from xds import kube_client
from xds.api_wire import Failure
from xds.kube_client import Client, KubeError, connect

LONG = 10.0  # seconds, far above what an answer takes here


def kubeconfig(path: Path, server: str = "http://127.0.0.1:1", ca: str = "", **user: Any) -> Path:
    """A kubeconfig with two contexts, `one` and `two`, the second for another server."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "one",
        "clusters": [
            {"name": "one", "cluster": {"server": server, **({"certificate-authority": ca} if ca else {})}},
            {"name": "two", "cluster": {"server": "http://127.0.0.1:2"}},
        ],
        "users": [{"name": "user", "user": user}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": "user"}} for name in ("one", "two")],
    }
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of whoever runs the tests."""
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


async def server_of(*arguments: str) -> str:
    async with aclosing(await connect(*arguments)) as client:
        return client.server


# --- credentials ---


async def test_where_the_server_is_read_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first of: the option, $KUBECONFIG, the home directory's; a context chooses within."""
    (tmp_path / ".kube").mkdir()
    kubeconfig(tmp_path / ".kube" / "config", "http://127.0.0.1:3")
    assert await server_of() == "http://127.0.0.1:3"
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path}/missing:{kubeconfig(tmp_path / 'env', 'http://127.0.0.1:4')}")
    assert await server_of() == "http://127.0.0.1:4"
    given = str(kubeconfig(tmp_path / "given", "http://127.0.0.1:5"))
    assert await server_of(given) == "http://127.0.0.1:5"
    assert await server_of(given, "two") == "http://127.0.0.1:2"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no kubeconfig at "),
        ("", "it is not a kubeconfig"),
        ("- a", "it is not a kubeconfig"),
        ("a: [", "while parsing a flow node"),
        ("apiVersion: v1", "Expected key current-context"),
        ("current-context: x\ncontexts: []\nclusters: []\nusers: []", "Expected object with name x"),
    ],
)
async def test_bad_kubeconfig_is_a_sentence(text: str | None, said: str, tmp_path: Path) -> None:
    """With its path, on one line."""
    path = tmp_path / "config"
    if text is not None:
        path.write_text(text)
    with pytest.raises(KubeError) as error:
        await connect(str(path))
    assert said in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


async def test_no_kubeconfig_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The option is named; in a pod without a token the service account is."""
    with pytest.raises(KubeError, match=r"no kubeconfig at .*/\.kube/config; give one with --kubeconfig"):
        await connect()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    with pytest.raises(KubeError, match=r"cannot use the service account of this pod: .*token"):
        await connect()


@pytest.mark.parametrize(("ca", "said"), [("ca.pem", ""), ("strange-ca.pem", "certificate verify failed")])
async def test_tls(ca: str, said: str, odd: Odd, tmp_path: Path) -> None:
    """The server has to be of the kubeconfig's CA, and is shown the user's certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=CERTS / "ca.pem")
    context.load_cert_chain(CERTS / "first.pem", CERTS / "first.key")
    context.verify_mode = ssl.CERT_REQUIRED
    user = {"client-certificate": str(CERTS / "second.pem"), "client-key": str(CERTS / "second.key")}
    async with listening(odd, context) as port:
        path = kubeconfig(tmp_path / "config", f"https://127.0.0.1:{port}", ca=str(CERTS / ca), **user)
        async with aclosing(await connect(str(path))) as client:
            answer = await client.get("/x", {}, LONG)
    if said:
        assert isinstance(answer, Failure)
        assert answer.reason == "Unreachable"
        assert said in answer.message
    else:
        assert answer == {}


async def test_a_pod_is_its_service_account(odd: Odd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its CA, and its token, which is read again as the kubelet renews it."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(CERTS / "first.pem", CERTS / "first.key")
    (tmp_path / "token").write_text("old")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(CERTS / "ca.pem"))
    monkeypatch.setattr(incluster_config, "TOKEN_REFRESH_PERIOD", timedelta(0))
    async with listening(odd, context) as port:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(port))
        async with aclosing(await connect()) as client:
            for token in ("old", "new"):
                (tmp_path / "token").write_text(token)
                assert await client.get("/x", {}, LONG) == {}
                assert odd.asked["Authorization"] == f"Bearer {token}"
                assert odd.asked["User-Agent"].startswith("vllm-xds/")


async def test_more_watches_than_connections_by_default(tmp_path: Path) -> None:
    """The library allows 100 at a time; each watch holds one for ever."""
    async with FakeApiServer() as api:
        path = kubeconfig(tmp_path / "config", api.url, token=api.token)
        async with aclosing(await connect(str(path))) as client, asyncio.TaskGroup() as group:

            async def watch() -> None:
                async with aclosing(client.lines("/api/v1/pods", {"watch": "true"}, LONG)) as lines:
                    async for _ in lines:
                        pass

            tasks = [group.create_task(watch()) for _ in range(110)]
            await eventually(lambda: len(api.watches) == 110)
            for task in tasks:
                task.cancel()


# --- answers ---


class Odd:
    """A server that answers as it is told: a status, a body, and whether it keeps silent after it."""

    def __init__(self) -> None:
        self.status, self.body, self.content_type, self.hangs = 200, b"{}", "application/json", False
        self.headers: dict[str, str] = {}
        self.asked: Mapping[str, str] = {}  # the headers of the last request

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked = request.headers
        response = web.StreamResponse(status=self.status, headers={"Content-Type": self.content_type, **self.headers})
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(self.body)
        if self.hangs:
            await asyncio.sleep(LONG)
        return response


@asynccontextmanager
async def listening(odd: Odd, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """On a port of loopback."""
    app = web.Application()
    app.router.add_get("/{path:.*}", odd.handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@pytest.fixture
async def odd() -> Odd:
    return Odd()


@pytest.fixture
async def client(odd: Odd, tmp_path: Path) -> AsyncIterator[Client]:
    async with listening(odd) as port:
        path = kubeconfig(tmp_path / "config", f"http://127.0.0.1:{port}", token="t")
        async with aclosing(await connect(str(path))) as client:
            yield client


async def lines_of(client: Client, within: float = LONG) -> list[Any]:
    async with aclosing(client.lines("/x", {}, within)) as lines:
        return [line async for line in lines]


async def test_a_whole_answer(client: Client, odd: Odd) -> None:
    """Decoded, whatever its content type says; or its bytes."""
    odd.body, odd.content_type = b'{"a": [1]}', "text/plain"
    assert await client.get("/x", {"limit": 5}, LONG) == {"a": [1]}
    assert await client.get("/x", {}, LONG, text=True) == odd.body


async def test_refusals_are_read(client: Client, odd: Odd) -> None:
    """Of a watch as of a list: the library does not look at a watch's status."""
    odd.status, odd.body, odd.content_type = 404, b"404 page not found\n", "text/plain; charset=utf-8"
    failure = Failure("NotFound", "HTTP 404: 404 page not found", 404)
    assert await client.get("/x", {}, LONG) == failure
    assert await lines_of(client) == [failure]
    odd.status, odd.body, odd.headers = 429, b'{"kind":"Status","reason":"TooManyRequests"}', {"Retry-After": "7"}
    assert await lines_of(client) == [Failure("TooManyRequests", "HTTP 429", 429, 7)]


async def test_lines(client: Client, odd: Odd) -> None:
    """One after the other; an empty one is nothing; half of one is a fault, and so is what is not JSON."""
    odd.body = b'{"a":1}\n\n{"b":2}\n'
    assert await lines_of(client) == [{"a": 1}, {"b": 2}]
    odd.body = b'{"a":1}\n{"b":'
    first, failure = await lines_of(client)
    assert (first, failure.reason) == ({"a": 1}, "Protocol")


async def test_silence_ends(client: Client, odd: Odd) -> None:
    """A connection that stays open without a byte is given up when its time is over: a list, and a watch."""
    odd.hangs = True
    failure = await client.get("/x", {}, 0.2)
    assert isinstance(failure, Failure)
    assert failure.reason == "Timeout"
    odd.body = b'{"a":1}\n'
    first, failure = await lines_of(client, 0.2)
    assert (first, failure.reason) == ({"a": 1}, "Timeout")


async def test_a_redirect_to_nowhere(client: Client, odd: Odd) -> None:
    """To a host whose name can be none, as to one that is not there, it is a fault like others."""
    for host in ("x" * 70, "127.0.0.1:1", "a b", "[::"):
        odd.status, odd.headers = 302, {"Location": f"http://{host}/"}
        failure = await client.get("/x", {}, LONG)
        assert isinstance(failure, Failure)
        assert failure.reason == "Unreachable"
        assert [each.reason for each in await lines_of(client)] == ["Unreachable"]


async def test_a_redirect_with_a_control_character(tmp_path: Path) -> None:
    """The library fails to send such a request: a fault, for a write too."""

    served: list[asyncio.Task[None] | None] = []

    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.current_task())
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 302\nLocation:`\x17/9\n\n")
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    async with await asyncio.start_server(redirect, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        path = kubeconfig(tmp_path / "config", f"http://127.0.0.1:{port}", token="t")
        async with aclosing(await connect(str(path))) as client:
            answers = [await client.get("/x", {}, LONG), await client.send("POST", "/x", {}, LONG)]
            answers += await lines_of(client)
        await asyncio.gather(*filter(None, served), return_exceptions=True)
    assert [each.reason for each in answers if isinstance(each, Failure)] == ["Unreachable"] * 3


async def test_sizes_are_bounded(client: Client, odd: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page beyond MAX_BODY, and a line beyond aiohttp's buffer: 4 MiB, more than any object may have."""
    monkeypatch.setattr(kube_client, "MAX_BODY", 1000)
    odd.body = b'"' + b"x" * 2000 + b'"'
    assert await client.get("/x", {}, LONG) == Failure("TooLarge", "more than 1000 bytes")
    odd.body = b'"' + b"x" * (5 << 20) + b'"\n'
    assert [each.reason for each in await lines_of(client)] == ["TooLarge"]


async def test_nobody_there(tmp_path: Path) -> None:
    """Unreachable, with the address and the system's word for it."""
    path = str(kubeconfig(tmp_path / "config", "http://127.0.0.1:1"))
    async with aclosing(await connect(path)) as client:
        expected = Failure("Unreachable", "cannot connect to 127.0.0.1:1: Connection refused")
        assert await client.get("/x", {}, LONG) == expected
        assert await lines_of(client) == [expected]


async def test_credentials_that_can_not_be_read_again(client: Client, odd: Odd, tmp_path: Path) -> None:
    """After a 401 the kubeconfig's user is read again; a plugin that fails is no crash."""
    odd.status, odd.body = 401, b'{"kind":"Status","reason":"Unauthorized","message":"Unauthorized"}'
    assert await client.get("/x", {}, LONG) == Failure("Unauthorized", "Unauthorized", 401)
    user = {"tokenFile": str(tmp_path / "token")}
    (tmp_path / "token").write_text("t")
    path = str(kubeconfig(tmp_path / "other", client.server, **user))
    async with aclosing(await connect(path)) as other:
        (tmp_path / "token").unlink()
        failure = await other.get("/x", {}, LONG)
    assert isinstance(failure, Failure)
    assert failure.reason == "Unauthorized"
    assert "token" in failure.message
