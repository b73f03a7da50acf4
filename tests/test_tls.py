"""Mutual TLS: who may connect, new files without a restart, and plaintext only where it is asked for."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from structlog.testing import capture_logs

import bootstrap
from bench.envoy import free_port
from picker.loads import LoadsClient
from picker.metrics import PickerMetrics
from picker.pick import Picker
from picker.server import HEALTH, SERVING, PickerServer
from tests.scenarios import FULL, snapshot
from tests.test_cli import exit_code
from tests.tls_files import CERTS, Identity
from xds import tls
from xds.clusters import picker_cluster
from xds.envoy import Options
from xds.metrics import Metrics
from xds.server import ManagementServer
from xds.tls import TlsFiles, channel_credentials

BOUND = 20.0  # seconds for anything awaited here, far above what it takes


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    return Identity(tmp_path / "server")


@contextlib.asynccontextmanager
async def serving(files: TlsFiles | None, host: str = "127.0.0.1") -> AsyncIterator[tuple[ManagementServer, str]]:
    """A management server with something to serve, and its address."""
    server = ManagementServer(Metrics())
    server.publish(snapshot(**FULL))
    (port,) = await server.start([f"{host}:0"], files)
    try:
        yield server, f"{host}:{port}"
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def picking(files: TlsFiles) -> AsyncIterator[str]:
    """The address of a picker, whose server is not gRPC's."""
    picker = PickerServer(Picker(lambda: 0.0), PickerMetrics(), lambda: 0.0, files)
    (address,) = await picker.start(["127.0.0.1:0"])
    try:
        yield address
    finally:
        await picker.stop(0)


@contextlib.asynccontextmanager
async def managing(files: TlsFiles) -> AsyncIterator[str]:
    """The address of a management server."""
    async with serving(files) as (_, address):
        yield address


both = pytest.mark.parametrize("part", [managing, picking])
Part = Callable[[TlsFiles], contextlib.AbstractAsyncContextManager[str]]


async def health(address: str, credentials: grpc.ChannelCredentials | None) -> bytes | grpc.StatusCode:
    """What a client is told; UNAVAILABLE when there is no connection."""
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
    channel = (
        grpc.aio.insecure_channel(address, options)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials, options)
    )
    async with channel:
        try:
            answer: bytes = await channel.unary_unary(HEALTH)(b"", timeout=BOUND)
        except grpc.aio.AioRpcError as error:
            code: grpc.StatusCode = error.code()
            return code
        return answer


async def name_of(address: str) -> str:
    """The name in the certificate a new connection is shown."""
    context = ssl.create_default_context(cafile=CERTS / "ca.pem")
    context.load_cert_chain(CERTS / "first.pem", CERTS / "first.key")
    context.set_alpn_protocols(["h2"])
    host, port = bootstrap.split_address(address)
    reader, writer = await asyncio.open_connection(host, port, ssl=context)
    await reader.readexactly(1)  # gRPC's settings: the server has accepted us too
    subject: Any = writer.get_extra_info("peercert")["subject"]
    name: str = subject[0][0][1]
    writer.close()
    return name


# --- who may connect ---


def ca_only() -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials((CERTS / "ca.pem").read_bytes())


def mixed(ca: str, name: str) -> grpc.ChannelCredentials:
    return channel_credentials(TlsFiles(CERTS / f"{name}.pem", CERTS / f"{name}.key", CERTS / f"{ca}.pem"))


@pytest.mark.parametrize(
    ("client", "told"),
    [
        (lambda: mixed("ca", "first"), SERVING),
        (lambda: mixed("ca", "second"), SERVING),
        (lambda: mixed("ca", "stranger"), grpc.StatusCode.UNAVAILABLE),
        (lambda: mixed("strange-ca", "first"), grpc.StatusCode.UNAVAILABLE),
        (ca_only, grpc.StatusCode.UNAVAILABLE),
        (lambda: None, grpc.StatusCode.UNAVAILABLE),
    ],
    ids=["ours", "another of ours", "of another CA", "trusts another CA", "no certificate", "plaintext"],
)
async def test_only_a_certificate_of_the_ca_gets_in(client: Any, told: object, identity: Identity) -> None:
    """On the management server and on the picker alike."""
    async with serving(identity.files) as (_, address):
        assert await health(address, client()) == told
    picker = PickerServer(Picker(lambda: 0.0), PickerMetrics(), lambda: 0.0, identity.files)
    addresses = await picker.start(["127.0.0.1:0"] * 2)
    try:
        assert [await health(address, client()) for address in addresses] == [told] * 2
    finally:
        await picker.stop(0)


async def test_a_client_checks_whom_it_called(identity: Identity) -> None:
    """A certificate of the right CA that does not name the address is refused by the picker's side of a connection."""
    async with serving(identity.files, "127.0.0.2") as (_, address):
        assert await health(address, channel_credentials(identity.files)) is grpc.StatusCode.UNAVAILABLE


async def test_a_unix_socket_stays_plaintext(identity: Identity, tmp_path: Path) -> None:
    """A picker beside its Envoy needs no certificate there, whatever it shows the management server."""
    picker = PickerServer(Picker(lambda: 0.0), PickerMetrics(), lambda: 0.0, identity.files)
    (address,) = await picker.start([f"unix:{tmp_path}/picker.sock"])
    try:
        assert await health(address, None) == SERVING
    finally:
        await picker.stop(0)


# --- files that change ---


@both
async def test_new_files_count_from_the_next_connection_on(part: Part, identity: Identity) -> None:
    """The certificate and the CA, without a restart; a connection that is there lives on."""
    async with part(identity.files) as address, grpc.aio.secure_channel(address, mixed("ca", "first")) as old:
        assert await old.unary_unary(HEALTH)(b"") == SERVING
        assert await name_of(address) == "first"
        with capture_logs() as logs:
            identity.install("second")
            assert await name_of(address) == "second"
            identity.install("stranger")
            assert await health(address, channel_credentials(identity.files)) == SERVING
            assert await health(address, mixed("ca", "first")) is grpc.StatusCode.UNAVAILABLE
        assert [line["event"] for line in logs] == ["certificate reloaded"] * 2  # and nothing for the last connection
        assert await old.unary_unary(HEALTH)(b"") == SERVING


@both
async def test_while_files_are_half_replaced_the_last_good_ones_serve(part: Part, identity: Identity) -> None:
    """What is wrong is said once, and forgotten when it is not."""
    files = identity.files
    async with part(files) as address:
        with capture_logs() as logs:
            identity.replace(files.cert, "second.pem")
            assert [await name_of(address) for _ in range(3)] == ["first"] * 3
            identity.replace(files.key, "second.key")
            assert await name_of(address) == "second"
            files.ca.unlink()
            assert await name_of(address) == "second"
    assert [(line["event"], line.get("reason")) for line in logs] == [
        ("certificate refused", f"{files.cert} and {files.key} are not a certificate and its key without password"),
        ("certificate reloaded", None),
        ("certificate refused", f"cannot read {files.ca}: No such file or directory"),
    ]


async def test_the_pickers_client_reads_its_files_at_each_attempt(identity: Identity, tmp_path: Path) -> None:
    """Wrong ones, then none, are reasons to try again; with the right ones it is connected."""
    own = Identity(tmp_path / "picker", "stranger")
    attempts = asyncio.Queue[None]()

    def random() -> float:
        """The client asks for it when an attempt has failed."""
        attempts.put_nowait(None)
        return 1.0

    async with serving(identity.files) as (server, address), asyncio.timeout(BOUND):
        client = LoadsClient(
            *(address, Picker(lambda: 0.0), PickerMetrics()),
            node_id="picker-1",
            clock=lambda: 0.0,
            random=random,
            tls=own.files,
        )
        with capture_logs() as logs:
            task = asyncio.create_task(client.run())
            await attempts.get()
            own.files.key.unlink()
            await attempts.get()
            assert server.clients() == ()
            own.install("second")
            await server.wait_settled()
        assert [client.node_id for client in server.clients()] == ["picker-1"]
        task.cancel()
        await asyncio.wait([task])
    events = [line["event"] for line in logs if line["event"].startswith("server")]
    assert events == ["server unreachable", "server connected"]


# --- plaintext only where it is asked for ---

SERVE = ("serve", "--config", "manifests/demo")
PICKER = ("picker",)
THREE = ("--tls-cert", "c", "--tls-key", "k", "--tls-ca", "a")
TOGETHER = "--tls-cert, --tls-key and --tls-ca"


@pytest.mark.parametrize("command", [SERVE, PICKER], ids=["serve", "picker"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (THREE[2:], f"{TOGETHER} belong together: --tls-cert is missing"),
        (THREE[:4], f"{TOGETHER} belong together: --tls-ca is missing"),
        ((*THREE[:2], *THREE[4:]), f"{TOGETHER} belong together: --tls-key is missing"),
        ((*THREE, "--plaintext"), f"{TOGETHER} exclude --plaintext"),
        (
            ("--listen", "127.0.0.1:1", "--listen", "0.0.0.0:18000"),
            f"0.0.0.0:18000 is beyond loopback: give {TOGETHER}, or --plaintext to serve it without TLS",
        ),
        (("--listen", "[::]:18000"), f"[::]:18000 is beyond loopback: give {TOGETHER}"),
        (("--listen", "xds:18000"), f"xds:18000 is beyond loopback: give {TOGETHER}"),
    ],
)
def test_wrong_usage_is_2_and_a_sentence(
    command: tuple[str, ...], options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything listens."""
    assert exit_code(*command, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vllm-xds {command[0]}: {said}")


@pytest.mark.parametrize(
    ("options", "listen", "files"),
    [
        ((), ("127.0.0.1:1", "[::1]:1", "127.9.9.9:1", "localhost:1", "unix:/run/p"), None),
        (("--plaintext",), ("0.0.0.0:1", "[::]:1", "10.0.0.1:1", "xds:1"), None),
        (THREE, ("0.0.0.0:1",), TlsFiles(Path("c"), Path("k"), Path("a"))),
    ],
)
def test_what_is_asked_for_is_chosen(options: tuple[str, ...], listen: tuple[str, ...], files: TlsFiles | None) -> None:
    """Loopback and unix sockets need nothing, others TLS or the word."""
    parser = argparse.ArgumentParser()
    tls.add_arguments(parser)
    assert tls.chosen(parser.parse_args(options), listen) == files


@pytest.mark.parametrize("command", ["serve", "picker"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("tls.key", "cannot read {0}/tls.key: No such file or directory"),
        ("tls.crt", "{0}/tls.crt and {0}/tls.key are not a certificate and its key without password"),
        ("ca.crt", "{0}/ca.crt is not a certificate"),
    ],
)
def test_files_that_can_not_be_used_end_it_with_a_sentence(
    command: str, wrong: str, said: str, identity: Identity, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and one line: not there, or not what it should be."""
    if wrong == "tls.key":
        identity.files.key.unlink()
    else:
        (identity.directory / wrong).write_text("no PEM\n")
    status = f"127.0.0.1:{free_port()}"
    options = {"serve": (*SERVE[1:], "--status", status), "picker": ("--metrics-address", status)}[command]
    listen = ("--listen", f"127.0.0.1:{free_port()}")
    assert exit_code(command, *options, *listen, *identity.options) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"vllm-xds {command}: {said.format(identity.directory)}"


# --- Envoy's side ---


def test_bootstrap_wants_all_or_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and what is missing; a directory that can not be made is 1."""
    assert exit_code("bootstrap", *THREE) == 2
    assert capsys.readouterr().err == (
        "vllm-xds bootstrap: --tls-cert, --tls-key, --tls-ca, --tls-sds belong together: --tls-sds is missing\n"
    )
    (tmp_path / "file").touch()
    assert exit_code("bootstrap", *THREE, "--tls-sds", str(tmp_path / "file" / "sds")) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"vllm-xds bootstrap: cannot write {tmp_path}/file/sds: Not a directory\n"


def test_bootstrap_writes_what_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Secrets with absolute paths in the files the bootstrap names, whatever characters are in them."""
    directory = tmp_path / 'a "b": {c}'
    pem = ("--tls-cert", "/x/a'b.crt", "--tls-key", "/x/k", "--tls-ca", "relative/ca")
    assert exit_code("bootstrap", "--server", "xds.example.com:1", *pem, "--tls-sds", str(directory)) == 0
    (cluster,) = yaml.safe_load(capsys.readouterr().out)["static_resources"]["clusters"]
    context = cluster["transport_socket"]["typed_config"]["common_tls_context"]
    combined = context["combined_validation_context"]
    (name,) = combined["default_validation_context"]["match_typed_subject_alt_names"]
    assert name == {"san_type": "DNS", "matcher": {"exact": "xds.example.com"}}
    read: dict[str, Any] = {}
    for secret in (*context["tls_certificate_sds_secret_configs"], combined["validation_context_sds_secret_config"]):
        (resource,) = yaml.safe_load(Path(secret["sds_config"]["path_config_source"]["path"]).read_text())["resources"]
        assert resource["name"] == secret["name"]
        read |= resource
    assert read["tls_certificate"] == {
        "certificate_chain": {"filename": "/x/a'b.crt"},
        "private_key": {"filename": "/x/k"},
    }
    assert read["validation_context"] == {"trusted_ca": {"filename": str(Path("relative/ca").absolute())}}


def test_the_picker_is_one_of_those_named() -> None:
    """Plaintext by default; with the option its certificate has to name one of the addresses."""
    assert picker_cluster(Options()).transport_socket is None
    options = Options(pickers=("picker.example.com:1", "[fd00::1]:2", "[fd00::1]:3"), picker_tls_sds="/sds")
    context = picker_cluster(options).transport_socket.typed_config.unpack().common_tls_context
    names = context.combined_validation_context.default_validation_context.match_typed_subject_alt_names
    assert [(name.san_type.name, name.matcher.exact) for name in names] == [
        ("DNS", "picker.example.com"),
        ("IP_ADDRESS", "fd00::1"),
    ]
    (certificate,) = context.tls_certificate_sds_secret_configs
    assert certificate.sds_config.path_config_source.path == "/sds/certificate.yaml"


def test_tls_is_not_for_a_pickers_unix_socket(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2: such a picker answers in plaintext."""
    assert exit_code(*SERVE, "--picker", "unix:/run/p", "--picker-tls-sds", "/sds") == 2
    said = "--picker-tls-sds is for pickers at HOST:PORT, not unix:/run/p"
    assert capsys.readouterr().err == f"vllm-xds serve: {said}\n"
