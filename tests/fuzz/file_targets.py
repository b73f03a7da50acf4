"""Certificates, as files and as Secrets, and what an operator gives the bootstrap: addresses and names."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import yaml

import bootstrap
from tests.fuzz.engine import ROOT, Run, Target
from tests.fuzz.mutate import JSON
from tests.fuzz.script import dump, load, mapping, pure
from xds.parse import parse
from xds.tls import TlsError, TlsFiles

CERTS = [(ROOT / "tests" / "certs" / name).read_text() for name in ("first.pem", "first.key", "ca.pem")]


@contextmanager
def tls() -> Iterator[Run]:
    """Any three files are refused in words, or are listened with."""

    async def listen(files: TlsFiles) -> None:
        pem = files.read()
        server = grpc.aio.server()
        # A broken key that OpenSSL takes and gRPC does not: the commands say so, a running server keeps the last one.
        with suppress(RuntimeError):
            server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(pem.key, pem.cert)], pem.ca, True))
        await server.stop(None)

    with tempfile.TemporaryDirectory() as directory, asyncio.Runner() as runner:
        paths = [Path(directory) / name for name in ("tls.crt", "tls.key", "ca.crt")]

        def run(data: bytes) -> Iterable[Hashable]:
            given = load(data)
            texts = [each for each in given if isinstance(each, str)] if isinstance(given, list) else []
            for path, content in zip(paths, (*texts, "", "", ""), strict=False):
                path.write_bytes(content.encode(errors="replace"))
            try:
                runner.run(listen(TlsFiles(*paths)))
            except TlsError as error:
                return [re.sub(r"\S*/\S*", "", str(error))]
            return ["accepted"]

        yield run


def secrets(data: bytes) -> Iterable[Hashable]:
    """Any certificate and key in a Secret are served, or rejected with a reason."""
    given = load(data)
    texts = given if isinstance(given, list) else []
    fields = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "a"},
        "type": "kubernetes.io/tls",
        "stringData": dict(zip(("tls.crt", "tls.key"), texts, strict=False)),
    }
    parsed = parse(fields)
    assert (parsed.object is None) is bool(parsed.rejections)
    return [(each.reason, re.sub(r".*\(|[^A-Z_]", "", each.message)) for each in parsed.rejections]


ARGUMENTS = (
    dump({"server": "127.0.0.1:18000", "admin": "[::1]:19000", "node_id": "envoy", "node_cluster": "c"}),
    dump({"server": "xds.gateway.svc:18000", "admin": "127.0.0.1:19000", "node_id": "", "tls_sds": "/run/envoy"}),
)


def arguments(data: bytes) -> Iterable[Hashable]:
    """Any arguments give a bootstrap that says exactly them, or a sentence."""
    names = ("server", "admin", "node_id", "node_cluster", "tls_sds")
    given: dict[str, Any] = {k: v for k, v in mapping(load(data)).items() if k in names and isinstance(v, str)}
    try:
        rendered = bootstrap.render(**given)
    except ValueError as error:
        return [str(error).split(",")[0]]
    read = yaml.load(rendered, yaml.CSafeLoader)
    assert rendered.encode().isascii()
    assert read["node"]["id"] == given.get("node_id", bootstrap.DEFAULT_NODE_ID)
    host, port = bootstrap.split_address(given.get("server", bootstrap.DEFAULT_SERVER))
    xds = next(each for each in read["static_resources"]["clusters"] if each["name"] == "xds")
    address = xds["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
    assert address == {"address": host, "port_value": port}
    cert = given.get("node_id", "")
    secret = yaml.load(bootstrap.secrets(cert, "", "")[bootstrap.secret_file("certificate")], yaml.CSafeLoader)
    assert secret["resources"][0]["tls_certificate"]["certificate_chain"]["filename"] == cert
    return [xds["type"], "transport_socket" in xds]


TARGETS = (
    Target("tls", tls, (dump(CERTS),), JSON, short=20),
    Target("secrets", pure(secrets), (dump(CERTS[:2]),), JSON, short=100),
    Target("arguments", pure(arguments), ARGUMENTS, JSON, short=60),
)
