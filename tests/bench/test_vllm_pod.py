"""bench/vllm_pod.py: the command line."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys

import aiohttp
import pytest

from bench.vllm_pod import fleet, main, parser


def test_pods_stand_side_by_side() -> None:
    """Consecutive addresses across the octet's end, names by number, speeds in turn, options in every pod."""
    args = ["--count", "4", "--bind", "127.1.0.254", "--speed", "10,5", "--block-size", "32", "--lora", "a"]
    pods = fleet(parser().parse_args(args))
    assert [pod.address for pod in pods] == ["127.1.0.254", "127.1.0.255", "127.1.1.0", "127.1.1.1"]
    assert [(pod.name, pod.config.speed) for pod in pods[:3]] == [("sim-0", 10), ("sim-1", 5), ("sim-2", 10)]
    assert {(pod.config.block_size, pod.adapters, pod.port) for pod in pods} == {(32, ("a",), 8000)}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--count", "0"], "at least 1 pod"),
        (["--speed", "0"], "above 0"),
        (["--block-size", "0"], "block_size must be above 0, not 0"),
        (["--bind", "nowhere"], "'nowhere' does not appear to be an IPv4 or IPv6 address"),
    ],
)
def test_impossible_options(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    """Exit status 2 and a sentence that names the option."""
    with pytest.raises(SystemExit, match="2"):
        main(args)
    assert message in capsys.readouterr().err


def test_a_busy_port_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1 and one line with the address; pods that had started are stopped, or this would not return."""
    with socket.create_server(("127.1.0.2", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--count", "2", "--port", str(port)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert f"('127.1.0.2', {port})" in err


@pytest.mark.parametrize(("number", "whole"), [(signal.SIGTERM, True), (signal.SIGINT, False)])
async def test_it_runs_until_a_signal(number: signal.Signals, whole: bool) -> None:
    """One line when ready; SIGTERM waits for a stream as told, Ctrl-C does not; the exit is clean and silent."""
    args = ("-m", "bench.vllm_pod", "--port", "0", "--shutdown-timeout", "30")
    process = await asyncio.create_subprocess_exec(
        sys.executable, *args, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(20), aiohttp.ClientSession() as http:
        ready = (await process.stdout.readline()).decode()
        address = ready.split(",")[1].strip()
        body = {"prompt": "x", "max_tokens": 60, "stream": True}
        async with http.post(f"{address}/v1/completions", json=body) as reply:
            await reply.content.readuntil(b"\n\n")
            process.send_signal(number)
            rest = await reply.text()
        out, err = await process.communicate()
    assert (rest.count('"text"') == 59, '"error"' in rest, "[DONE]" in rest) == (whole, not whole, True)
    assert (process.returncode, out, err) == (0, b"", b"")
