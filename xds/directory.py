"""The objects in a directory of YAML and JSON files: read them, and read them again whenever they change.

Every `*.yaml`, `*.yml` and `*.json` below the directory counts, in sorted order. A name that starts with a dot does
not: that leaves out editors' files, and the `..data` of a mounted ConfigMap, whose files are links into it, followed.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from dataclasses import replace
from itertools import islice
from pathlib import Path

from watchfiles import awatch

from xds.index import Index, Reading
from xds.manifest import BadDocument, Document, expand, read_json, read_yaml
from xds.model import Config, Rejection, printable
from xds.parse import Parsed, parse

SUFFIXES = (".yaml", ".yml", ".json")
MAX_FILES = 10_000  # one for each object of a large cluster
MAX_FILE_SIZE = 16 * 2**20  # bytes; 1,000 pods with all their fields, as `kubectl get -o yaml` has them, are 8 MiB
MAX_TOTAL_SIZE = 64 * 2**20  # bytes of all files: some seconds of reading
MAX_DOCUMENTS = 50_000  # of all files, items of a List and empty ones included: those sizes hold millions of tiny ones
LIMITS = f"{MAX_FILES} files, {MAX_FILE_SIZE} bytes in one, {MAX_TOTAL_SIZE} bytes and {MAX_DOCUMENTS} documents in all"
DEBOUNCE = 100  # ms of quiet after a change: an editor or `git checkout` writes several files
# ms between looks without a notification: network file systems give none, nor does a directory put in another's place.
RECHECK = 1000


class DirectoryError(Exception):
    """The directory is missing, is not a directory, or may not be read; the text says which, with its path."""


def read(directory: Path) -> Reading:
    """Everything below the directory; raises DirectoryError when it cannot be listed."""
    documents: list[Parsed] = []
    rejections: list[Rejection] = []
    unreadable: set[str] = set()
    left = MAX_TOTAL_SIZE
    for i, (path, status) in enumerate(sorted(_scan(directory).items())):
        name = printable(os.fsencode(path).decode(errors="backslashreplace"))
        try:
            room = min(left, MAX_FILE_SIZE) if i < MAX_FILES else -1
            data = _load(directory / path, status, room)
            left -= len(data)
            found = _within(read_documents(name, data.decode("utf-8-sig")), MAX_DOCUMENTS - len(documents))
        except OSError as error:
            unreadable.add(name)
            rejections.append(Rejection(None, "Unreadable", error.strerror or str(error), source=name))
        except UnicodeDecodeError as error:
            unreadable.add(name)
            line = error.object.count(b"\n", 0, error.start) + 1
            rejections.append(Rejection(None, "InvalidYAML", f"not UTF-8: {error.reason}", source=f"{name}:{line}"))
        else:
            documents += found
    return Reading(tuple(documents), tuple(rejections), frozenset(unreadable))


async def watch(directory: Path) -> AsyncGenerator[Reading, None]:
    """The directory's content at once, and again after each change of it; raises DirectoryError only at the start.

    While the directory is gone, and until its successor holds a document, the last content stays, with a rejection.
    Reading runs in a thread: a large directory takes longer than the event loop may stand still.
    """
    last = await asyncio.to_thread(read, directory)
    yield last
    lost = False
    async with aclosing(_changes(directory)) as changes:
        async for _ in changes:
            try:
                reading = await asyncio.to_thread(read, directory)
            except DirectoryError as error:
                if not lost:
                    message = f"{error}; the last good configuration is served"
                    rejection = Rejection(None, "DirectoryMissing", message, source=str(directory))
                    yield replace(last, rejections=(*last.rejections, rejection))
                lost = True
                continue
            if reading == last and not lost:
                continue
            if lost and not reading.documents:
                continue
            lost, last = False, reading
            yield reading


class DirectorySource:
    """A directory as a stream of `Config`s, with the memory of the last good version of each object.

    Mutable: `index` is what the last `Config` was made of.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index = Index()

    def __str__(self) -> str:
        return str(self.directory)

    def load(self) -> Config:
        """One look, without watching; raises DirectoryError."""
        return self._update(read(self.directory))

    async def configs(self) -> AsyncGenerator[Config, None]:
        """The configuration at once, and again after each change; raises DirectoryError only at the start.

        Leave it with `contextlib.aclosing`, or by cancelling its task: then the watch ends at once.
        """
        async with aclosing(watch(self.directory)) as readings:
            async for reading in readings:
                yield self._update(reading)

    def _update(self, reading: Reading) -> Config:
        self.index = self.index.update(reading)
        return self.index.config()


def read_documents(name: str, text: str) -> Iterator[Parsed]:
    """What each document of the file `name` came to."""
    documents: Iterable[Document | BadDocument] = [read_json(text)] if name.endswith(".json") else read_yaml(text)
    for document in documents:
        source = f"{name}:{document.line}"
        if isinstance(document, BadDocument):
            yield Parsed(source, rejections=(Rejection(None, "InvalidYAML", document.message, source=source),))
        else:
            yield from (parse(value, source) for value in expand(document.value))


def _load(path: Path, status: os.stat_result | OSError, room: int) -> bytes:
    if isinstance(status, OSError):
        raise status
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        raise OSError("not a regular file")
    if status.st_size > room:
        raise OSError(f"beyond the limits of a directory: {LIMITS}")
    with path.open("rb") as file:
        data = file.read(room + 1)
    if len(data) > room:  # it has grown, or is no real file: those of /proc have size 0
        raise OSError(f"beyond the limits of a directory: {LIMITS}")
    return data


def _within(documents: Iterator[Parsed], room: int) -> list[Parsed]:
    found = list(islice(documents, room + 1))
    if len(found) > room:
        raise OSError(f"beyond the limits of a directory: {LIMITS}")
    return found


def _scan(directory: Path) -> dict[str, os.stat_result | OSError]:
    """Every file that counts, and every directory that cannot be listed, by its path below the directory."""
    found: dict[str, os.stat_result | OSError] = {}
    seen: set[tuple[int, int]] = set()
    pending = [directory]
    while pending:
        here = pending.pop()
        try:
            status = here.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue  # a link to a directory that is read already, or that holds this one
            seen.add((status.st_dev, status.st_ino))
            entries = list(here.iterdir())
        except OSError as error:
            if here == directory:
                raise DirectoryError(f"cannot read {directory}: {error.strerror}") from error
            found[str(here.relative_to(directory))] = error
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            of_entry = _stat(entry)
            if isinstance(of_entry, os.stat_result) and stat.S_ISDIR(of_entry.st_mode):
                pending.append(entry)
            elif entry.suffix in SUFFIXES:
                found[str(entry.relative_to(directory))] = of_entry
    return found


def _stat(path: Path) -> os.stat_result | OSError:
    try:
        return path.stat()
    except OSError as error:
        return error


def _signature(directory: Path) -> tuple[tuple[int, ...], frozenset[tuple[object, ...]]]:
    """What changes when the directory is another one, or a file in it was written or replaced."""
    files = {
        (name, status.errno)
        if isinstance(status, OSError)
        else (name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        for name, status in _scan(directory).items()
    }
    status = directory.stat()
    return (status.st_dev, status.st_ino), frozenset(files)


async def _changes(directory: Path) -> AsyncGenerator[None, None]:
    """Something may have changed: a notification, or a new signature at a look without one. Outlives the directory."""
    seen = None
    while True:
        try:
            watched = await asyncio.to_thread(_signature, directory)
            if watched != seen:  # at the start, and after another directory has come in the place of this one
                seen = watched
                yield
            notifications = awatch(
                directory,
                watch_filter=None,
                debounce=DEBOUNCE,
                step=DEBOUNCE // 2,
                rust_timeout=RECHECK,
                yield_on_timeout=True,
                ignore_permission_denied=True,
            )
            async with aclosing(notifications):
                async for changes in notifications:
                    now = await asyncio.to_thread(_signature, directory)
                    if changes or now != seen:
                        seen = now
                        if not changes:  # nobody has waited for the writer to come to its end
                            await asyncio.sleep(DEBOUNCE / 1000)
                        yield
                    if now[0] != watched[0]:
                        break  # the one being watched is gone
        except (OSError, DirectoryError):
            yield
            await asyncio.sleep(RECHECK / 1000)
