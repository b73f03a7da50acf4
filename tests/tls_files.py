"""TLS files a test can replace, from those in tests/certs."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

from xds.tls import TlsFiles

CERTS = Path(__file__).parent / "certs"


class Identity:
    """One part's files as Kubernetes mounts a Secret: links into `..data`, a link that is replaced as a whole."""

    def __init__(self, directory: Path, name: str = "first") -> None:
        directory.mkdir()
        self.directory = directory
        self.files = TlsFiles(directory / "tls.crt", directory / "tls.key", directory / "ca.crt")
        self._versions = itertools.count()
        self.install(name)

    def install(self, name: str) -> None:
        """Replace all three by those of `name`: first, second or stranger."""
        version = self.directory / f"..{next(self._versions)}"
        version.mkdir()
        ca = "strange-ca.pem" if name == "stranger" else "ca.pem"
        for path, source in zip(self._paths(), (f"{name}.pem", f"{name}.key", ca), strict=True):
            shutil.copy(CERTS / source, version / path.name)
            if not path.is_symlink():
                path.symlink_to(Path("..data") / path.name)
        link = self.directory / "..data_tmp"
        link.symlink_to(version.name)
        link.replace(self.directory / "..data")

    def replace(self, path: Path, source: str) -> None:
        """One of the files alone, by a file."""
        new = self.directory / "new"
        shutil.copy(CERTS / source, new)
        new.replace(path)

    def _paths(self) -> tuple[Path, ...]:
        return self.files.cert, self.files.key, self.files.ca

    @property
    def options(self) -> tuple[str, ...]:
        """As a command takes them."""
        cert, key, ca = map(str, self._paths())
        return "--tls-cert", cert, "--tls-key", key, "--tls-ca", ca
