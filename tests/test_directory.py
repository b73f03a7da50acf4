"""directory: real files, read and watched through the changes that editors, kubelets and people make."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest

from xds import directory as directory_module
from xds.directory import DirectoryError, DirectorySource, read, watch
from xds.index import Reading
from xds.model import Config

TIMEOUT = 10.0  # seconds for one change to be seen; it takes 0.1 with a notification, 1 to 2 without


def _pod(name: str, ip: str = "127.0.0.1") -> str:
    return f"apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nstatus: {{podIP: {ip}, phase: Running}}\n"


def _names(seen: Reading | Config) -> list[str]:
    if isinstance(seen, Config):
        return [pod.meta.ref.name for pod in seen.pods]
    return [each.ref.name for each in seen.documents if each.ref]


async def _next(configs: AsyncGenerator[Config, None]) -> Config:
    async with asyncio.timeout(TIMEOUT):
        return await anext(configs)


@pytest.fixture
async def looks(monkeypatch: pytest.MonkeyPatch) -> asyncio.Queue[Reading]:
    """Every reading of a watch, also one that is not yielded: what a test waits for to say that nothing came of it."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Reading]()

    def seen_read(directory: Path) -> Reading:
        reading = read(directory)
        loop.call_soon_threadsafe(queue.put_nowait, reading)
        return reading

    monkeypatch.setattr(directory_module, "read", seen_read)
    return queue


# --- read -------------------------------------------------------------------------------------------------------------


def test_every_file_in_order(tmp_path: Path) -> None:
    """All three suffixes at every depth, sorted by path; the source of an object is its file and line."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.yaml").write_text("# comment\n" + _pod("b1") + "---\n" + _pod("b2"))
    (tmp_path / "a.yml").write_text(_pod("a"))
    (tmp_path / "sub/c.json").write_text('{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "c"}}')
    (tmp_path / "notes.txt").write_text(_pod("txt"))
    (tmp_path / "values.yaml.bak").write_text(_pod("bak"))
    reading = read(tmp_path)
    assert _names(reading) == ["a", "b1", "b2", "c"]
    assert [each.source for each in reading.documents] == ["a.yml:1", "b.yaml:2", "b.yaml:7", "sub/c.json:1"]
    assert reading.rejections == ()


def test_list_is_expanded(tmp_path: Path) -> None:
    """The output of `kubectl get pods -o yaml` is its pods."""
    items = "".join(f"- {{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}}}\n" for name in "ab")
    (tmp_path / "list.yaml").write_text(f"apiVersion: v1\nkind: List\nitems:\n{items}")
    assert _names(read(tmp_path)) == ["a", "b"]


def test_unquoted_timestamp(tmp_path: Path) -> None:
    """YAML would make a datetime of it; it stays the text that sorts."""
    (tmp_path / "a.yaml").write_text(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\n  creationTimestamp: 2025-01-01T00:00:00Z\n"
    )
    (document,) = read(tmp_path).documents
    assert document.object is not None
    assert document.object.meta.created == "2025-01-01T00:00:00Z"


def test_hidden_files_and_a_mounted_config_map(tmp_path: Path) -> None:
    """A ConfigMap's files are read once, through their links; so is a directory that is one of its own parents."""
    data = tmp_path / "..2025_01_01"
    (data / "sub").mkdir(parents=True)
    (data / "a.yaml").write_text(_pod("a"))
    (data / "sub/b.yaml").write_text(_pod("b"))
    (tmp_path / "..data").symlink_to("..2025_01_01")
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    (tmp_path / "sub").symlink_to("..data/sub")
    (data / "sub/up").symlink_to(tmp_path)
    (tmp_path / ".hidden.yaml").write_text(_pod("hidden"))
    assert _names(read(tmp_path)) == ["a", "b"]


def test_broken_parts_cost_only_themselves(tmp_path: Path) -> None:
    """A document, a file of bytes, a dangling link and a pipe are each named with their place; the rest is read."""
    (tmp_path / "a.yaml").write_text(_pod("a1") + "---\nx: [\n---\n" + _pod("a2"))
    (tmp_path / "b.yaml").write_bytes(b"\n\nname: \xff\n")
    (tmp_path / "c.yaml").symlink_to("nowhere")
    os.mkfifo(tmp_path / "d.yaml")
    (tmp_path / "e.json").write_text("{\n")
    (tmp_path / "f.yaml").write_text("﻿" + _pod("f"))
    reading = read(tmp_path)
    assert _names(reading) == ["a1", "a2", "f"]
    assert [(each.source, each.reason) for each in reading.rejections] == [
        ("b.yaml:3", "InvalidYAML"),
        ("c.yaml", "Unreadable"),
        ("d.yaml", "Unreadable"),
    ]
    assert reading.unreadable == {"b.yaml", "c.yaml", "d.yaml"}
    broken = [each.rejections[0] for each in reading.documents if each.rejections]
    assert [(each.source, each.reason) for each in broken] == [("a.yaml:7", "InvalidYAML"), ("e.json:2", "InvalidYAML")]


@pytest.mark.parametrize(
    ("name", "shown"),
    [(b"\xff.yaml", r"\xff.yaml"), (b"a\n\x1b[2J.yaml", r"a\n\x1b[2J.yaml"), ("é.yaml".encode(), "é.yaml")],
)
def test_file_name_that_cannot_be_printed(tmp_path: Path, name: bytes, shown: str) -> None:
    """It reaches messages in a form that can, be it no UTF-8, or several lines and what a terminal obeys."""
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text(_pod("a"))
    (document,) = read(tmp_path).documents
    assert document.source == f"{shown}:1"


@pytest.mark.parametrize(
    ("limit", "value"), [("MAX_FILES", 1), ("MAX_FILE_SIZE", 90), ("MAX_TOTAL_SIZE", 100), ("MAX_DOCUMENTS", 1)]
)
def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    """What is beyond a limit is unreadable, so that its objects stay, and is named; what is within is read."""
    (tmp_path / "a.yaml").write_text(_pod("a"))
    (tmp_path / "b.yaml").write_text(_pod("b") + "# more\n" * 10)
    monkeypatch.setattr(directory_module, limit, value)
    reading = read(tmp_path)
    assert _names(reading) == ["a"]
    assert reading.unreadable == {"b.yaml"}
    assert "limits" in reading.rejections[0].message


def test_a_file_is_as_large_as_what_is_read_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever size its directory gives: a file that grows meanwhile, or one of /proc, has no end."""
    (tmp_path / "a.yaml").symlink_to("/proc/self/status")  # size 0, some hundred bytes
    monkeypatch.setattr(directory_module, "MAX_FILE_SIZE", 100)
    assert read(tmp_path).unreadable == {"a.yaml"}


@pytest.mark.parametrize("name", ["missing", "file"])
def test_no_directory(tmp_path: Path, name: str) -> None:
    """A path that is missing, or a file, is an error that names it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DirectoryError, match=f"cannot read .*/{name}: "):
        read(tmp_path / name)


async def test_watching_a_missing_directory_fails_at_once(tmp_path: Path) -> None:
    """The command can say so and exit; nothing waits for it to appear."""
    with pytest.raises(DirectoryError):
        await anext(watch(tmp_path / "x"))


# --- watch ------------------------------------------------------------------------------------------------------------


async def test_changes_are_seen(tmp_path: Path) -> None:
    """A new file, one renamed into place, one edited, a new sub-directory, a deleted file: each is one Config."""
    (tmp_path / "a.yaml").write_text(_pod("a"))
    async with aclosing(DirectorySource(tmp_path).configs()) as configs:
        assert _names(await _next(configs)) == ["a"]
        (tmp_path / "b.yaml").write_text(_pod("b"))
        assert _names(await _next(configs)) == ["a", "b"]
        (tmp_path / ".a.yaml.swp").write_text(_pod("a2"))
        (tmp_path / ".a.yaml.swp").replace(tmp_path / "a.yaml")
        assert _names(await _next(configs)) == ["a2", "b"]
        (tmp_path / "b.yaml").write_text(_pod("b") + "---\n" + _pod("c"))
        assert _names(await _next(configs)) == ["a2", "b", "c"]
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub/d.yaml").write_text(_pod("d"))
        assert _names(await _next(configs)) == ["a2", "b", "c", "d"]
        (tmp_path / "b.yaml").unlink()
        assert _names(await _next(configs)) == ["a2", "d"]


async def test_config_map_update_is_seen(tmp_path: Path) -> None:
    """The kubelet swaps the link ..data: the files that point through it change without being touched."""
    for version in ("1", "2"):
        (tmp_path / f"..{version}").mkdir()
        (tmp_path / f"..{version}/a.yaml").write_text(_pod(f"a{version}"))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    async with aclosing(DirectorySource(tmp_path).configs()) as configs:
        assert _names(await _next(configs)) == ["a1"]
        (tmp_path / "..data_tmp").symlink_to("..2")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        assert _names(await _next(configs)) == ["a2"]


async def test_changes_without_meaning_yield_nothing(tmp_path: Path, looks: asyncio.Queue[Reading]) -> None:
    """A touched file, and a comment at the end, are looked at; what is yielded next is the change that follows."""
    (tmp_path / "a.yaml").write_text(_pod("a"))
    async with aclosing(watch(tmp_path)) as readings, asyncio.timeout(TIMEOUT):
        assert _names(await anext(readings)) == ["a"]
        coming = asyncio.ensure_future(anext(readings))
        for change in (_pod("a"), _pod("a") + "# comment\n"):
            while not looks.empty():
                looks.get_nowait()
            (tmp_path / "a.yaml").write_text(change)
            assert _names(await looks.get()) == ["a"]
        (tmp_path / "b.yaml").write_text(_pod("b"))
        assert _names(await coming) == ["a", "b"]


async def test_bad_edit_keeps_the_last_good_version(tmp_path: Path) -> None:
    """A slip in one document and a file of bytes leave what was served, with rejections; mended, the new is served."""
    (tmp_path / "a.yaml").write_text(_pod("a") + "---\n" + _pod("b"))
    async with aclosing(DirectorySource(tmp_path).configs()) as configs:
        await _next(configs)
        (tmp_path / "a.yaml").write_text("kind: [\n---\n" + _pod("b", ip="localhost"))
        config = await _next(configs)
        assert _names(config) == ["a", "b"]
        assert [(each.reason, each.source) for each in config.rejections] == [
            ("InvalidYAML", "a.yaml:2"),
            ("Invalid", "a.yaml:3"),
        ]
        (tmp_path / "a.yaml").write_bytes(b"\xff")
        assert _names(await _next(configs)) == ["a", "b"]
        (tmp_path / "a.yaml").write_text(_pod("c"))
        config = await _next(configs)
        assert (_names(config), config.rejections) == (["c"], ())


@pytest.mark.parametrize("how", ["delete", "move"])
async def test_directory_that_goes_and_comes_back(tmp_path: Path, looks: asyncio.Queue[Reading], how: str) -> None:
    """While it is gone, or empty again, the last good configuration stays, with a rejection; then the new is served."""
    root = tmp_path / "config"
    root.mkdir()
    (root / "a.yaml").write_text(_pod("a"))
    async with aclosing(DirectorySource(root).configs()) as configs:
        await _next(configs)
        if how == "delete":
            shutil.rmtree(root)
        else:
            root.rename(tmp_path / "elsewhere")
        config = await _next(configs)
        assert (_names(config), [each.reason for each in config.rejections]) == (["a"], ["DirectoryMissing"])
        while not looks.empty():
            looks.get_nowait()
        coming = asyncio.ensure_future(anext(configs))
        root.mkdir()
        async with asyncio.timeout(TIMEOUT):
            assert _names(await looks.get()) == []
            (root / "b.yaml").write_text(_pod("b"))
            config = await coming
        assert (_names(config), config.rejections) == (["b"], ())
        (root / "b.yaml").write_text(_pod("c"))
        assert _names(await _next(configs)) == ["c"]


def test_load_is_one_look(tmp_path: Path) -> None:
    """What `check` uses: the Config of this moment, with the memory of the looks before it."""
    source = DirectorySource(tmp_path)
    (tmp_path / "a.yaml").write_text(_pod("a"))
    assert _names(source.load()) == ["a"]
    (tmp_path / "a.yaml").write_text(_pod("a", ip="bad"))
    assert _names(source.load()) == ["a"]
    (tmp_path / "a.yaml").unlink()
    assert _names(source.load()) == []
