"""bench/demo.py, bench/stack.py and bench/table.py: the demo as a user starts it, and what it decides."""

from __future__ import annotations

import asyncio
import io
import math
import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from bench.demo import is_better
from bench.load import Summary
from bench.stack import MANIFESTS, Child, Plan, Stack, StackError, fleet_options, plan, write_manifests
from bench.table import PodRow, PortRow, Status, View, line, screen
from bench.vllm_engine import EngineConfig
from bench.vllm_pod import fleet, parser

WORSE = Summary(requests=10, errors=0, hit_ratio=0.4, ttft_p50=0.5, ttft_p99=2.0, ttft_mean=0.7)
BETTER = Summary(requests=10, errors=0, hit_ratio=0.8, ttft_p50=0.1, ttft_p99=1.0, ttft_mean=0.2)
NOTHING = Summary(0, 0, math.nan, math.nan, math.nan, math.nan)
STATUS = Status(
    phase="2 of 2: port 8081, PREFIX_CACHE",
    elapsed=5.2,
    duration=25.0,
    pods=(PodRow("qwen-0", 80, (3, 1, 0.25), 12, 0.5), PodRow("qwen-1", 100, None, 0, math.nan)),
    ports=(PortRow("8080 round robin", WORSE), PortRow("8081 PREFIX_CACHE", BETTER)),
    events=("10:00:00 weight changed endpoint=default/qwen-0",),
)


# --- decisions


def test_better_is_better_in_everything() -> None:
    """More hits, both times lower and no error on either port; anything else, or no answers, is not better."""
    assert is_better(WORSE, BETTER)
    assert not is_better(BETTER, WORSE)
    for change in ({"hit_ratio": 0.4}, {"ttft_p50": 0.5}, {"ttft_p99": 2.0}, {"errors": 1}):
        assert not is_better(WORSE, replace(BETTER, **change))
    assert not is_better(replace(WORSE, errors=1), BETTER)
    assert not is_better(WORSE, NOTHING)


def test_a_busy_port_is_replaced_and_said() -> None:
    """What is in use elsewhere gets another port and one line; the plan's own addresses are free."""
    usual = Plan()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):  # in use already: as good
            taken.bind(("127.0.0.1", 8080))
            taken.listen()
        where = plan(2)
    assert where.plain != usual.plain
    assert any(note.startswith("127.0.0.1:8080 is in use") and where.plain in note for note in where.notes)
    assert len(where.pods) == 2


def test_busy_pods_move(tmp_path: Path) -> None:
    """One busy pod address moves all; a port that is busy everywhere moves the pods' port, in the objects too."""
    with socket.create_server(("127.1.0.2", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.stack.POD_PORT", port)
        with socket.create_server(("127.1.0.2", port)):
            assert plan(2).pods == (f"127.2.0.1:{port}", f"127.2.0.2:{port}")
        with socket.create_server(("0.0.0.0", port)):
            moved = plan(2)
    first, other = moved.pods[0].split(":")
    assert (first, int(other) != port) == ("127.1.0.1", True)

    write_manifests(moved, tmp_path / "config")
    pool, _, service = yaml.safe_load_all((tmp_path / "config" / "pool.yaml").read_text())
    pod = next(yaml.safe_load_all((tmp_path / "config" / "pods.yaml").read_text()))
    assert (pool["spec"]["targetPortNumber"], service["spec"]["ports"]) == (
        int(other),
        [{"port": 8000, "targetPort": int(other)}],
    )
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == other


def test_the_usual_manifests_are_the_demo_s(tmp_path: Path) -> None:
    """With the usual addresses the objects are copied byte by byte."""
    usual = Plan(pods=tuple(f"127.1.0.{index}:8000" for index in range(1, 9)))
    write_manifests(usual, tmp_path / "config")
    for path in MANIFESTS.iterdir():
        assert (tmp_path / "config" / path.name).read_bytes() == path.read_bytes()


def test_the_manifests_follow_the_plan(tmp_path: Path) -> None:
    """Other ports, and as many pods as asked for."""
    pods = tuple(f"127.2.0.{index}:8000" for index in range(1, 13))
    write_manifests(Plan(plain="127.0.0.1:28080", llm="127.0.0.1:28081", pods=pods), tmp_path / "config")
    gateway = next(
        document
        for document in yaml.safe_load_all((tmp_path / "config" / "gateway.yaml").read_text())
        if document["kind"] == "Gateway"
    )
    assert [listener["port"] for listener in gateway["spec"]["listeners"]] == [28080, 28081]
    documents = list(yaml.safe_load_all((tmp_path / "config" / "pods.yaml").read_text()))
    assert [pod["metadata"]["name"] for pod in documents] == [f"qwen-{index}" for index in range(12)]
    assert [pod["status"]["podIP"] for pod in documents] == [f"127.2.0.{index}" for index in range(1, 13)]
    assert {pod["metadata"]["labels"]["app"] for pod in documents} == {"qwen"}


def test_the_pool_s_strategy_can_be_another(tmp_path: Path) -> None:
    """The annotation alone differs."""
    usual = Plan(pods=tuple(f"127.1.0.{index}:8000" for index in range(1, 9)))
    write_manifests(usual, tmp_path / "config", "DEFAULT")
    pool = (tmp_path / "config" / "pool.yaml").read_text()
    assert next(yaml.safe_load_all(pool))["metadata"]["annotations"] == {
        "inference.networking.x-k8s.io/routing-strategy": "DEFAULT"
    }
    assert pool.replace(": DEFAULT\n", ": PREFIX_CACHE\n") == (MANIFESTS / "pool.yaml").read_text()


def test_a_fleet_is_what_was_asked_for() -> None:
    """The pods' command line understands every option; the last pod alone is slower."""
    config = EngineConfig(speed=0.5, num_gpu_blocks=300, step_base=0.01)
    made = fleet(parser().parse_args(["--count", "3", *fleet_options(config, 3, slow=True)]))
    assert [pod.config for pod in made] == [config, config, replace(config, speed=0.25)]


# --- view


def test_the_screen_has_the_facts() -> None:
    """Every figure of ports and pods, and the log; a pod never read has no load."""
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as capture:
        console.print(screen(STATUS))
    text = capture.get()
    for pattern in (
        r"2 of 2: port 8081, PREFIX_CACHE +20 s left",
        r"8080 round robin +10 +0 +40% +0\.500 s +2\.000 s +0\.700 s",
        r"qwen-0 +80 +3 +1 +25% +12 +50%",
        r"qwen-1 +100 +\? +\? +\? +0 +-",
        r"10:00:00 weight changed endpoint=default/qwen-0",
    ):
        assert re.search(pattern, text), pattern


def test_a_line_has_the_facts() -> None:
    """The port under way, and the range over the pods; nothing at all yet is no error."""
    assert line(STATUS) == (
        "8081 PREFIX_CACHE   5 s: 10 answers, 0 errors, prefix hits 80%, TTFT p50 0.100 s p99 1.000 s; "
        "pods: running 3-3, waiting 1-1, KV 25%-25%, weights 80-100"
    )
    assert "TTFT p50 - p99 -" in line(replace(STATUS, ports=(PortRow("8080", NOTHING),), pods=STATUS.pods[1:]))


def test_no_terminal_gets_a_line_now_and_then() -> None:
    """One line each five seconds of each phase, and no control characters."""
    out = io.StringIO()
    with View(Console(file=out)) as view:
        for elapsed in (0.5, 4.9, 5.1, 5.6, 9.9, 10.4, 0.5, 5.0):
            view.show(replace(STATUS, elapsed=elapsed))
    assert re.findall(r"PREFIX_CACHE +(\d+) s:", out.getvalue()) == ["5", "10", "5"]
    assert "\x1b" not in out.getvalue()


# --- processes


async def test_a_child_that_will_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM first, then SIGKILL."""
    monkeypatch.setattr("bench.child.STOP_GRACE", 0.1)
    monkeypatch.chdir(tmp_path)
    deaf = asyncio.Event()

    def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        deaf.set()
        writer.close()

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server, asyncio.timeout(20):
        address = server.sockets[0].getsockname()
        (tmp_path / "deaf.py").write_text(
            "import signal, socket; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            f"socket.create_connection({address}); signal.pause()"
        )
        child = Child("deaf", ("deaf",), tmp_path / "log")
        await child.start()
        await deaf.wait()
        await child.stop()
    assert child.status == -signal.SIGKILL


@pytest.mark.envoy
async def test_a_child_that_fails_is_shown(tmp_path: Path) -> None:
    """A process that ends before it is ready is named, with its exit status and the end of its log."""
    where = plan(2)
    write_manifests(where, tmp_path / "config")
    with pytest.raises(StackError) as raised:
        async with Stack(where, tmp_path / "config", tmp_path, ("--speed", "0")):
            pass
    assert str(raised.value).startswith("the simulated pods ended with status 2; ")
    assert str(raised.value).endswith("every speed must be above 0")


@asynccontextmanager
async def demo(tmp_path: Path, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`vllm-xds demo` with a pipe as its standard output; its processes know `tmp_path` from their environment."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "xds", "demo", "--pods", "4", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def family(tmp_path: Path) -> list[int]:
    """The processes that a demo with this directory has begun, itself included."""
    pids = []
    for directory in Path("/proc").iterdir():
        with suppress(OSError):
            if directory.name.isdigit() and f"TMPDIR={tmp_path}\0".encode() in (directory / "environ").read_bytes():
                pids.append(int(directory.name))
    return pids


async def until_ready(process: asyncio.subprocess.Process) -> str:
    """What it prints up to its line that says that all is ready."""
    assert process.stdout is not None
    text = ""
    while "ready after" not in text:
        received = await process.stdout.readline()
        assert received, text
        text += received.decode()
    return text


@pytest.mark.alone
@pytest.mark.envoy
@pytest.mark.timeout(120)
async def test_the_demo_compares_both_ports(tmp_path: Path) -> None:
    """From start to end with the real Envoy: every request answered on both ports, the comparison, and no process left.

    The exit status is not asked to be 0: on a machine that is busy with other tests, times are what they are.
    """
    async with demo(tmp_path, "--duration", "6", "--log-dir", str(tmp_path / "logs")) as process:
        out = (await process.communicate())[0].decode()
    rows = re.findall(r"^(\d+) (round robin|PREFIX_CACHE) +(\d+) +(\d+) +(\d+)% ", out, re.MULTILINE)
    assert [(policy, errors) for _, policy, _, errors, _ in rows] == [("round robin", "0"), ("PREFIX_CACHE", "0")], out
    (_, _, requests, _, plain_hits), (_, _, llm_requests, _, llm_hits) = rows
    assert f" {requests} requests of 24 shared system prompts" in out
    assert llm_requests == requests
    assert int(llm_hits) > int(plain_hits)
    assert re.search(r"round robin +5 s: \d+ answers", out)
    assert "Traceback" not in out
    assert (process.returncode, "NOT better" in out) in {(0, False), (1, True)}
    assert {path.name for path in (tmp_path / "logs").iterdir()} >= {
        "serve.log",
        "picker.log",
        "envoy.log",
        "pods.log",
    }
    assert family(tmp_path) == []


@pytest.mark.alone
@pytest.mark.envoy
@pytest.mark.timeout(60)
async def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """SIGINT in the middle of the traffic: exit status 130 in a few seconds, one line, no process left."""
    async with demo(tmp_path) as process:
        await until_ready(process)
        assert len(family(tmp_path)) == 5
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        out = (await process.communicate())[0].decode()
    assert (process.returncode, out) == (130, "vllm-xds demo: interrupted\n")
    assert time.monotonic() - began < 8
    assert family(tmp_path) == []


@pytest.mark.alone
@pytest.mark.envoy
@pytest.mark.timeout(60)
async def test_a_killed_demo_leaves_nothing(tmp_path: Path) -> None:
    """SIGKILL, which no process can answer: the kernel ends the children."""
    async with demo(tmp_path) as process:
        await until_ready(process)
        ends = [os.pidfd_open(pid) for pid in family(tmp_path) if pid != process.pid]
        assert len(ends) == 4
        process.kill()
        await process.wait()
        for end in ends:
            readable, _, _ = await asyncio.to_thread(select.select, [end], [], [], 10)
            assert readable, "a process that has not ended"
            os.close(end)
