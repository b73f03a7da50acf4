"""Whether a certificate and a key are fit for a listener: Envoy refuses all that a Secret holds for one that is not."""

from __future__ import annotations

import os
import ssl

# OpenSSL's level at which a key is too short for the same sizes as for Envoy: RSA below 2,048 bits.
LEVEL = "DEFAULT@SECLEVEL=2"


def problem(certificate: bytes, key: bytes) -> str:
    """Why this PEM certificate (with its chain) and this PEM key can not be served together; "" if they can.

    OpenSSL reads them from files alone, so they are put into ones that exist in memory only.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers(LEVEL)
    paths, files = [], []
    try:
        for content in (certificate, key):
            files.append(os.memfd_create("pem"))
            os.write(files[-1], content)
            paths.append(f"/proc/self/fd/{files[-1]}")
        context.load_cert_chain(paths[0], paths[1], password="")  # or OpenSSL asks the terminal for one
    except ssl.SSLError as error:
        return f"tls.crt and tls.key are not a certificate and its key without password ({error.reason or 'no PEM'})"
    finally:
        for file in files:
            os.close(file)
    return ""
