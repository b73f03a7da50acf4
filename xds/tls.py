"""Mutual TLS between Envoy, management server and picker: from PEM files, read again at each handshake.

Each part proves itself by a certificate of one CA that is for these parts alone: whoever has one may connect. A client
also checks that the server's certificate names the host it called. Unix sockets stay plaintext.
"""

from __future__ import annotations

import argparse
import ipaddress
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import grpc
import structlog

OPTIONS = ("--tls-cert", "--tls-key", "--tls-ca")

log = structlog.get_logger()
Made = TypeVar("Made")


class TlsError(Exception):
    """The files can not be used; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Pem:
    """The contents of TlsFiles."""

    cert: bytes
    key: bytes
    ca: bytes


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where our certificate (with its chain), its key and the CA of our peers are."""

    cert: Path
    key: Path
    ca: Path

    def read(self) -> Pem:
        """What they hold now. Raises TlsError, also for what gRPC would refuse without a word: a key of another's."""
        try:
            pem = Pem(self.cert.read_bytes(), self.key.read_bytes(), self.ca.read_bytes())
        except OSError as error:
            raise TlsError(f"cannot read {error.filename}: {error.strerror}") from None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.cert, self.key, password="")  # or OpenSSL asks the terminal for one
        except OSError:
            raise TlsError(f"{self.cert} and {self.key} are not a certificate and its key without password") from None
        try:
            context.load_verify_locations(self.ca)
        except OSError:
            raise TlsError(f"{self.ca} is not a certificate") from None
        return pem


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """For one port of gRPC's own server: only clients with a certificate of the CA.

    Changed files count from the next handshake on; while they can not be used the last good ones do. Raises TlsError
    when they are wrong from the start.
    """
    watched = _Watched(files, _configuration)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC at each handshake, in a thread of its own; None: as before."""
        return watched.made if watched.changed() else None

    return grpc.dynamic_ssl_server_credentials(watched.made, fetch, require_client_authentication=True)


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """The same for a port of asyncio's."""
    watched = _Watched(files, lambda _: _context(files))

    def choose(handshake: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        """Called by OpenSSL at each handshake, whether or not the client names a server."""
        watched.changed()
        handshake.context = watched.made

    context = _context(files)
    context.sni_callback = choose
    return context


class _Watched(Generic[Made]):
    """What was made of the files when they last could be used. Mutable. Raises TlsError when they never could."""

    def __init__(self, files: TlsFiles, make: Callable[[Pem], Made]) -> None:
        self._files = files
        self._make = make
        self._refusal = ""
        self._pem = files.read()
        self.made = make(self._pem)

    def changed(self) -> bool:
        """Read them again; whether they are other ones, and good."""
        try:
            found = self._files.read()
            if found == self._pem:
                self._refusal = ""
                return False
            self.made = self._make(found)
        except (TlsError, OSError) as error:  # OSError: they were replaced between two readings
            if self._refusal != str(error):
                self._refusal = str(error)
                log.error("certificate refused", reason=self._refusal)  # noqa: TRY400 - a sentence, no traceback
            return False
        self._refusal, self._pem = "", found
        log.info("certificate reloaded", cert=str(self._files.cert))
        return True


def _context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(files.cert, files.key, password="")
    context.load_verify_locations(files.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])
    context.options |= ssl.OP_NO_TICKET  # a resumed session would not ask for the certificate again
    context.num_tickets = 0  # the same for TLS 1.3
    return context


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """For one connection, with what the files hold now. Raises TlsError."""
    pem = files.read()
    return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.ca)


# --- options of a command ---


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--tls-cert`, `--tls-key`, `--tls-ca` and `--plaintext`."""
    for option, text in zip(
        OPTIONS,
        (
            "certificate (chain) in PEM for mutual TLS with every peer; read again at each handshake",
            "its key, without a password",
            "the CA, for these parts alone, that peers' certificates have to be of",
        ),
        strict=True,
    ):
        parser.add_argument(option, metavar="FILE", type=Path, help=text)
    parser.add_argument(
        "--plaintext", action="store_true", help="listen beyond loopback without TLS: anyone there may connect"
    )


def chosen(args: argparse.Namespace, listen: Sequence[str]) -> TlsFiles | None:
    """The files named, or None for plaintext on `listen`. ValueError with a sentence: a mistake, or not asked for."""
    files: tuple[Path | None, ...] = (args.tls_cert, args.tls_key, args.tls_ca)
    together = f"{', '.join(OPTIONS[:-1])} and {OPTIONS[-1]}"
    if any(files):
        for option, path in zip(OPTIONS, files, strict=True):
            if path is None:
                raise ValueError(f"{together} belong together: {option} is missing")
        if args.plaintext:
            raise ValueError(f"{together} exclude --plaintext")
        return TlsFiles(args.tls_cert, args.tls_key, args.tls_ca)
    for address in listen:
        if not (args.plaintext or _is_local(address)):
            raise ValueError(f"{address} is beyond loopback: give {together}, or --plaintext to serve it without TLS")
    return None


def _is_local(address: str) -> bool:
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
