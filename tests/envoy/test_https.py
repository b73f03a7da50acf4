"""HTTPS listeners with the real Envoy, in both protocol variants: server names, certificates replaced live, HTTP/2."""

from __future__ import annotations

import asyncio
import ssl
from base64 import b64encode

import aiohttp
import pytest

from bench.envoy import free_port
from tests.envoy.conftest import BOUND, Gateway
from tests.tls_files import CERTS

pytestmark = [pytest.mark.envoy, pytest.mark.timeout(90)]

OBJECTS = """\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: https}}
spec:
  gatewayClassName: envoy
  listeners:
  - {{name: a, protocol: HTTPS, port: {port}, hostname: a.test, tls: {{certificateRefs: [{{name: one}}]}}}}
  - {{name: b, protocol: HTTPS, port: {port}, hostname: "*.b.test", tls: {{certificateRefs: [{{name: two}}]}}}}
  - {{name: lost, protocol: HTTPS, port: {port}, hostname: lost.test, tls: {{certificateRefs: [{{name: missing}}]}}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: https}}
spec:
  parentRefs: [{{name: https}}]
  rules:
  - backendRefs: [{{name: qwen, port: 8000}}]
  - matches: [{{path: {{value: /moved}}}}]
    filters: [{{type: RequestRedirect, requestRedirect: {{path: {{type: ReplaceFullPath, replaceFullPath: /there}}}}}}]
"""
SECRET = """\
apiVersion: v1
kind: Secret
type: kubernetes.io/tls
metadata: {{name: {name}}}
data: {{tls.crt: {certificate}, tls.key: {key}}}
"""


class Https:
    """The gateway's port of HTTPS."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.port = free_port()

    def write(self) -> None:
        (self.gateway.config / "https.yaml").write_text(OBJECTS.format(port=self.port))
        self.write_secret("one", "first")
        self.write_secret("two", "second")

    def write_secret(self, name: str, of: str) -> None:
        certificate, key = (b64encode((CERTS / f"{of}.{end}").read_bytes()).decode() for end in ("pem", "key"))
        text = SECRET.format(name=name, certificate=certificate, key=key)
        (self.gateway.config / f"secret-{name}.yaml").write_text(text)

    async def ask(
        self, server_name: str, host: str = "", path: str = "/v1/models", alpn: str = "http/1.1"
    ) -> tuple[str, str, bytes]:
        """Who answers (which of tests/certs, "" for nobody), by which protocol, and the head of the answer."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(CERTS / "ca.pem")
        context.set_alpn_protocols([alpn])
        try:
            async with asyncio.timeout(BOUND):
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", self.port, ssl=context, server_hostname=server_name
                )
        except (ssl.SSLError, ConnectionError):
            return "", "", b""
        tls = writer.get_extra_info("ssl_object")
        name = dict(pair[0] for pair in tls.getpeercert()["subject"])["commonName"]
        answer = b""
        if alpn == "http/1.1":
            request = f"GET {path} HTTP/1.1\r\nhost: {host or server_name}\r\nconnection: close\r\n\r\n"
            writer.write(request.encode())
            async with asyncio.timeout(BOUND):
                answer = (await reader.read()).partition(b"\r\n\r\n")[0]
        writer.close()
        return name, tls.selected_alpn_protocol(), answer


async def test_https(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    """Each server name has its certificate and its routes; one without a certificate has neither, and harms no other.
    A replaced Secret is served from the next connection on, without touching the listener; HTTP goes on beside it."""
    https = Https(gateway)
    https.write()
    await gateway.until(lambda control: len(control.topology.secrets) == 2)

    for server_name, certificate in (("a.test", "first"), ("x.b.test", "second")):
        name, protocol, answer = await https.ask(server_name)
        assert (name, protocol, answer[:12]) == (certificate, "http/1.1", b"HTTP/1.1 200")
    assert await https.ask("lost.test") == await https.ask("other.test") == ("", "", b"")
    assert (await https.ask("a.test", alpn="h2"))[:2] == ("first", "h2")

    assert (await https.ask("a.test", "x.b.test"))[2][:12] == b"HTTP/1.1 421"
    assert (await https.ask("a.test", "other.test"))[2][:12] == b"HTTP/1.1 404"
    moved = (await https.ask("a.test", path="/moved"))[2]
    assert moved[:12] == b"HTTP/1.1 302"
    assert f"location: https://a.test:{https.port}/there".encode() in moved

    (lost,) = [each for each in gateway.control.rejections if each.reason == "InvalidCertificateRef"]
    assert lost.field == "spec.listeners[2].tls.certificateRefs[0]"
    assert (await gateway.ask(session, gateway.plain_port, "hello"))[0] == 200

    before = await _listener_changes(gateway)
    https.write_secret("one", "second")
    await gateway.until(
        lambda control: control.topology.secrets[0].certificate == control.topology.secrets[1].certificate
    )
    assert (await https.ask("a.test"))[0] == "second"
    assert await _listener_changes(gateway) == before

    https.write_secret("missing", "first")
    await gateway.until(lambda control: not control.rejections)
    name, _, answer = await https.ask("lost.test")
    assert (name, answer[:12]) == ("first", b"HTTP/1.1 200")


async def _listener_changes(gateway: Gateway) -> int:
    stats = await gateway.envoy.get("/stats?format=json&filter=listener_manager.listener_(added|modified|removed)")
    return sum(stat["value"] for stat in stats["stats"])
