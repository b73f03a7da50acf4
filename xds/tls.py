"""Mutual TLS between Envoy, management server and picker: from PEM files, read again at each handshake.

Each part proves itself by a certificate of one CA that is for these parts alone: whoever has one may connect. A client
also checks that the server's certificate names the host it called. Unix sockets stay plaintext.
"""

from __future__ import annotations

import argparse
import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

OPTIONS = ("--tls-cert", "--tls-key", "--tls-ca")

log = structlog.get_logger()


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
    """For one port: only clients with a certificate of the CA; changed files count from the next handshake on.

    While they can not be used the last good ones do. Raises TlsError when they are wrong from the start.
    """
    current = files.read()
    refusal = ""

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC at each handshake, in a thread of its own; None: as before."""
        nonlocal current, refusal
        try:
            found = files.read()
        except TlsError as error:
            if refusal != str(error):
                refusal = str(error)
                log.error("certificate refused", reason=refusal)  # noqa: TRY400 - a sentence, no traceback
            return None
        refusal = ""
        if found == current:
            return None
        current = found
        log.info("certificate reloaded", cert=str(files.cert))
        return _configuration(current)

    return grpc.dynamic_ssl_server_credentials(_configuration(current), fetch, require_client_authentication=True)


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
