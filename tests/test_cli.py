"""The commands as a person meets them: help, mistakes, and `serve` as a process."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

import bootstrap
import xds.serve
from bench.envoy import free_port
from tests.apiserver import FakeApiServer
from tests.goldens import ROOT
from tests.test_check import WHOLE
from xds import kube_client, show
from xds import serve as serve_command
from xds.__main__ import COMMANDS, main
from xds.kube_writer import Options as WriterOptions
from xds.model import ObjectRef
from xds.resolve import CONTROLLER_NAMES
from xds.serve import MOST_FILES

BOUND = 30.0  # seconds for anything awaited here, far above what it takes
OURS = ("serve", "check", "status", "bootstrap", "explain")


# --- help and mistakes ---


def exit_code(*argv: str) -> int:
    """What the command ends with, whether it returns or argparse does."""
    try:
        return main(argv)
    except SystemExit as end:
        return int(end.code or 0)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """With what it does, and how to see it all work."""
    assert exit_code("--help") == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert "vllm-xds demo" in text


@pytest.mark.parametrize("command", OURS)
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option has a sentence, and the defaults there are are shown once."""
    assert exit_code(command, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"usage: vllm-xds {command} ")
    assert "(default: None)" not in text
    assert ") (default:" not in text


def test_defaults_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Those a person needs to connect the parts."""
    exit_code("serve", "--help")
    text = " ".join(capsys.readouterr().out.split())
    for default in ("127.0.0.1:18000", "127.0.0.1:19001", "127.0.0.1:18001", "0.0.0.0", "0.2", "2.0"):
        assert f"(default: {default})" in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "COMMAND"),
        (("nonsense",), "invalid choice: 'nonsense'"),
        (("serve",), "--config"),
        (("serve", "--kubernetes", "--config", "."), "--config: not allowed with argument --kubernetes"),
        (("serve", "--config", ".", "--kubeconfig", "x"), "--kubeconfig goes with --kubernetes"),
        (("serve", "--config", ".", "--namespace", "x"), "--namespace goes with --kubernetes"),
        (("serve", "--config", ".", "--gateway-address", "x"), "--gateway-address goes with --kubernetes"),
        (("serve", "--config", ".", "--no-status"), "--no-status goes with --kubernetes"),
        (("serve", "--kubernetes", "--lease", "x"), "--lease: expected NAMESPACE/NAME, found x"),
        (
            ("serve", "--kubernetes", "--gateway-service", "A/b"),
            "--gateway-service: expected NAMESPACE/NAME, found A/b",
        ),
        (("serve", "--kubernetes", "--gateway-address", "A_b"), "--gateway-address: expected an IP address or a lower"),
        (("serve", "--kubernetes", "--lease", "a/b", "--no-status"), "--lease is for writing statuses"),
        (
            ("serve", "--kubernetes", "--namespace", "x", "--gateway-service", "y/envoy"),
            "--gateway-service: namespace y is not read: add --namespace y",
        ),
        (
            ("serve", "--config", ".", "--listen", "here"),
            "expected HOST:PORT with a port from 1 to 65535, found 'here'",
        ),
        (("serve", "--config", ".", "--status", "h:0"), "expected HOST:PORT with a port from 1 to 65535, found 'h:0'"),
        (("serve", "--config", ".", "--picker", "h"), "expected HOST:PORT with a port from 1 to 65535, found 'h'"),
        (("serve", "--config", ".", "--bind", "here"), "'here' does not appear to be an IPv4 or IPv6 address"),
        (
            ("serve", "--config", ".", "--bind", "fe80::1%a"),
            "expected an IP address to listen on, without a zone, found fe80::1%a",
        ),
        (("serve", "--config", ".", "--picker", "\udcff:1"), "surrogates not allowed"),
        (("serve", "--config", ".", "--picker-tls-sds", "/\udcff"), "surrogates not allowed"),
        (("serve", "--config", ".", "--scrape-interval", "0"), "expected seconds above 0, found 0"),
        (("serve", "--config", ".", "--picker-timeout", "x"), "'x'"),
        (("serve", "--config", ".", "--picker-workers", "0"), "expected a number, 1 or more, found 0"),
        (
            ("serve", "--config", ".", "--picker", "h:65535", "--picker-workers", "2"),
            "2 workers need as many ports, and there are fewer from h:65535 on",
        ),
        (("serve", "--config", ".", "--picker-timeout", "3601"), "expected a picker timeout of 0.001 to 3600 seconds"),
        (("serve", "--config", ".", "--picker-tls-sds", ""), "an empty name"),
        (("serve", "--config", ".", "--log-level", "loud"), "'loud'"),
        (("bootstrap", "--server", "x"), "expected HOST:PORT with a port from 1 to 65535, found 'x'"),
        (("bootstrap", "--node-id", "\udcff"), r"expected UTF-8, found '\udcff'"),
        (("bootstrap", "--admin", "x:99999"), "expected HOST:PORT with a port from 1 to 65535, found 'x:99999'"),
        (("check",), "DIR"),
    ],
)
def test_wrong_usage_is_2_and_a_sentence(argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The last line names what was wrong, on standard error."""
    assert exit_code(*argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("vllm-xds")
    assert said in last


def test_each_worker_of_each_picker_is_one_to_envoy() -> None:
    """As `vllm-xds picker --workers` spreads them over ports and files; one worker is at the address itself."""
    parser = argparse.ArgumentParser()
    xds.serve.add_arguments(parser)
    given = ("--config", ".", "--picker", "[::1]:7", "--picker", "unix:/run/p")
    assert xds.serve.options(parser.parse_args(given)).pickers == ("[::1]:7", "unix:/run/p")
    assert xds.serve.options(parser.parse_args([*given, "--picker-workers", "2"])).pickers == (
        *("[::1]:7", "[::1]:8"),
        *("unix:/run/p.0", "unix:/run/p.1"),
    )
    assert xds.serve.options(parser.parse_args(["--config", ".", "--picker-workers", "3"])).pickers == (
        *("127.0.0.1:18001", "127.0.0.1:18002", "127.0.0.1:18003"),
    )


def test_bootstrap_prints_a_bootstrap(capsys: pytest.CaptureFixture[str]) -> None:
    """The options are render's arguments, and nothing else is printed."""
    assert exit_code("bootstrap") == 0
    assert capsys.readouterr().out == (ROOT / "bootstrap" / "envoy.yaml").read_text()
    options = ("--server", "a:1", "--node-id", "n", "--node-cluster", "c", "--admin", "b:2", "--sotw")
    assert exit_code("bootstrap", *options) == 0
    assert capsys.readouterr().out == bootstrap.render("a:1", "n", "c", "b:2", delta=False)


# --- serve ---


class Server:
    """`vllm-xds serve` as a child process, its log lines read as they come."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    async def event(self, name: str) -> dict[str, Any]:
        """The next line with this event."""
        assert self.process.stderr is not None
        async with asyncio.timeout(BOUND):
            while line := await self.process.stderr.readline():
                self.lines.append(line.decode())
                fields: dict[str, Any] = json.loads(line)
                if fields["event"] == name:
                    return fields
        raise AssertionError(f"no {name!r} in {self.lines}")

    async def end(self) -> tuple[int, list[str]]:
        """Its exit code, and what it said last."""
        assert self.process.stderr is not None
        async with asyncio.timeout(BOUND):
            rest = await self.process.stderr.read()
            return await self.process.wait(), rest.decode().splitlines()


@asynccontextmanager
async def serve(config: Path | str, listen: int, status: int, *more: str) -> AsyncIterator[Server]:
    """From a directory, or from the API server of the kubeconfig whose path is given as text."""
    source = ("--kubernetes", "--kubeconfig", config) if isinstance(config, str) else ("--config", str(config))
    options = (*source, "--listen", f"127.0.0.1:{listen}", "--status", f"127.0.0.1:{status}", *more)
    few_files = ("sh", "-c", 'ulimit -S -n 256 && exec "$@"', "sh")
    process = await asyncio.create_subprocess_exec(
        *(*few_files, sys.executable, "-m", "xds", "serve", *options, "--scrape-interval", "0.2"),
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Server(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_serve_from_start_to_end(tmp_path: Path) -> None:
    """It logs JSON, gets ready, follows edits, names a mistake, serves on, says when it is gone, obeys SIGTERM."""

    def write(text: str) -> None:  # whole, as editors do: nobody reads half of it
        (tmp_path / ".new").write_text(text)
        (tmp_path / ".new").rename(tmp_path / "all.yaml")

    write(WHOLE)
    status = free_port()
    async with serve(tmp_path, free_port(), status) as server, aiohttp.ClientSession() as session:

        async def get(path: str) -> tuple[int, str]:
            async with session.get(f"http://127.0.0.1:{status}{path}") as response:
                return response.status, await response.text()

        applied = await server.event("configuration applied")
        assert (applied["ports"], applied["rejections"]) == ([8080], 0)
        started = await server.event("server started")
        assert started["config"] == str(tmp_path)
        assert await get("/readyz") == (200, "ready\n")
        soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        assert soft == min(hard, MOST_FILES)  # it was started with 256

        write(WHOLE.replace("port: 8080", "port: 8081"))
        assert (await server.event("configuration applied"))["ports"] == [8081]

        write(WHOLE.replace("port: 8080", "port: none"))
        rejected = await server.event("object rejected")
        assert (rejected["object"], rejected["field"]) == ("Gateway default/gw", "spec.listeners[0].port")
        assert rejected["source"] == "all.yaml:6"
        assert (await server.event("configuration applied"))["ports"] == [8081]  # the last good one
        assert await get("/readyz") == (200, "ready\n")
        assert 'vllm_xds_rejections{level="error",reason="Invalid"} 1.0' in (await get("/metrics"))[1]
        page = json.loads((await get("/debug/snapshot"))[1])
        assert (page["ready"], page["ports"][0]["port"]) == (True, 8081)
        assert [each["object"] for each in page["rejections"]] == ["Gateway default/gw"]
        assert await get("/debug/clients") == (200, '{"clients": []}')

        write(WHOLE)
        await server.event("rejection cleared")
        assert (await server.event("configuration applied"))["ports"] == [8080]

        server.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(3):
            await server.process.wait()
        code, rest = await server.end()
        assert code == 0
        assert json.loads(rest[-1])["event"] == "server stopped"


async def test_serve_from_an_api_server(tmp_path: Path) -> None:
    """Not ready before all is read, with the verb that is missing; then it serves, also when the API server is gone."""
    status, kubeconfig = free_port(), tmp_path / "kubeconfig"
    async with FakeApiServer() as api, aiohttp.ClientSession() as session:
        for document in yaml.safe_load_all(WHOLE):
            api.store.put(document)
        api.forbidden.add(("list", "pods"))
        kubeconfig.write_text(api.kubeconfig())

        async def get(path: str) -> tuple[int, str]:
            async with session.get(f"http://127.0.0.1:{status}{path}") as response:
                return response.status, await response.text()

        async with serve(str(kubeconfig), free_port(), status, "--namespace", "default") as server:
            failed = await server.event("watch failed")
            assert (failed["resource"], failed["reason"]) == ("pods in default", "Forbidden")
            assert 'cannot list resource "pods" in API group "" in the namespace "default"' in failed["message"]
            assert await get("/readyz") == (503, "not ready\n")
            api.forbidden.clear()
            assert (await server.event("watch recovered"))["resource"] == "pods in default"
            assert (await server.event("configuration applied"))["ports"] == [8080]
            assert (await server.event("server started"))["config"] == api.url
            assert await get("/readyz") == (200, "ready\n")
            page = (await get("/metrics"))[1]
            assert 'vllm_xds_api_objects{resource="gateways.gateway.networking.k8s.io"} 1.0' in page
            assert 'vllm_xds_api_staleness_seconds{resource="pods"}' in page
            assert not any(each.startswith(("patch", "create", "get")) for each in api.requests)  # no Lease, no status
            await api.stop()
            assert (await server.event("watch failed"))["reason"] == "Unreachable"
            assert await get("/readyz") == (200, "ready\n")
            server.process.send_signal(signal.SIGTERM)
            code, rest = await server.end()
        assert code == 0
        assert json.loads(rest[-1])["event"] == "server stopped"


async def test_serve_writes_statuses(tmp_path: Path) -> None:
    """Of what it serves, with the address given, while it holds the Lease; it says so, and gives it back at the end."""
    status, kubeconfig = free_port(), tmp_path / "kubeconfig"

    def programmed() -> tuple[str, str]:
        stored = api.store.get(api.store.table("Gateway"), ("default", "gw"))
        conditions = stored.get("status", {}).get("conditions", ())
        return next(((each["status"], each["reason"]) for each in conditions if each["type"] == "Programmed"), ("", ""))

    def holder() -> str:
        return str(api.store.get(api.store.table("Lease"), ("default", "l"))["spec"]["holderIdentity"])

    async with FakeApiServer() as api:
        for document in yaml.safe_load_all(WHOLE):
            api.store.put(document)
        kubeconfig.write_text(api.kubeconfig())
        options = ("--lease", "default/l", "--gateway-address", "10.0.0.1")
        async with serve(str(kubeconfig), free_port(), status, *options) as server:
            acquired = await server.event("leadership acquired")
            assert acquired["identity"] == holder()
            async with asyncio.timeout(BOUND):
                while programmed() != ("True", "Programmed"):  # noqa: ASYNC110 - the API server is this process
                    await asyncio.sleep(0.01)
            out = io.StringIO()
            await show.show(f"127.0.0.1:{status}", out)
            assert "writes statuses: holds the Lease default/l" in out.getvalue().splitlines()
            server.process.send_signal(signal.SIGTERM)
            code, rest = await server.end()
        assert (code, holder()) == (0, "")
        assert "leadership released" in [json.loads(line)["event"] for line in rest]


def test_the_lease_of_a_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cluster it is one of the pod's own namespace, unless another is named or no status is wanted; outside there
    is none."""
    namespace = tmp_path / "namespace"
    namespace.write_text("gateway\n")
    monkeypatch.setattr(kube_client, "SERVICE_ACCOUNT_NAMESPACE", namespace)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)

    def options(*argv: str) -> WriterOptions | None:
        parser = argparse.ArgumentParser()
        serve_command.add_arguments(parser)
        return serve_command.writer_options(parser.parse_args(["--kubernetes", *argv]))

    assert options() is None
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    found, other = options(), options()
    assert found is not None
    assert other is not None
    assert found.lease == ("gateway", "vllm-xds")
    assert found.identity != other.identity
    assert options("--no-status") is None
    chosen = options("--lease", "a/b", "--gateway-service", "x/envoy", "--gateway-address", "a.io")
    assert chosen is not None
    assert (chosen.lease, chosen.addresses) == (("a", "b"), (("Hostname", "a.io"),))
    assert chosen.service == ObjectRef("", "Service", "x", "envoy")
    namespace.unlink()
    assert options() is None


def test_whose_classes_are_served() -> None:
    """In a cluster ours alone unless another's are adopted; of a directory Envoy Gateway's too."""
    parser = argparse.ArgumentParser()
    serve_command.add_arguments(parser)
    ours, other = CONTROLLER_NAMES
    for argv, names in (
        (("--kubernetes",), (ours,)),
        (("--config", "."), (ours, other)),
        (("--kubernetes", "--controller-name", ours, "--controller-name", other), (ours, other)),
        (("--config", ".", "--controller-name", "a.io/b"), ("a.io/b",)),
    ):
        assert serve_command.controller_names(parser.parse_args(argv)) == names


async def test_serve_without_a_kubeconfig_ends_with_a_sentence(tmp_path: Path) -> None:
    """Exit code 1 and one line with its path."""
    missing = str(tmp_path / "missing")
    async with serve(missing, free_port(), free_port()) as server:
        code, lines = await server.end()
    assert code == 1
    assert lines == [f"vllm-xds serve: no kubeconfig at {missing}"]


async def test_serve_without_its_directory_ends_with_a_sentence(tmp_path: Path) -> None:
    """Exit code 1 and one line that says why: no traceback, and nothing that claims it had started."""
    missing = tmp_path / "missing"
    async with serve(missing, free_port(), free_port()) as server:
        code, lines = await server.end()
    assert code == 1
    assert lines == [f"vllm-xds serve: cannot read {missing}: No such file or directory"]


@pytest.mark.parametrize("which", ["listen", "status"])
async def test_serve_on_a_busy_port_ends_with_a_sentence(which: str) -> None:
    """Exit code 1 and one line, which names the port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = taken.getsockname()[1]
        ports = {"listen": free_port(), "status": free_port()} | {which: busy}
        async with serve(ROOT / "manifests" / "demo", **ports) as server:
            code, lines = await server.end()
    assert code == 1
    (line,) = lines
    assert line.startswith("vllm-xds serve: ")
    assert str(busy) in line
