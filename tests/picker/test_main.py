"""picker/__main__.py: the command."""

import argparse
import asyncio
import json
import os
import signal
import socket
import sys

import aiohttp
import pytest

from picker.__main__ import add_arguments, run


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    add_arguments(made)
    return made


async def test_it_serves_until_told_to_stop() -> None:
    """A process of its own, its server absent: it starts, drains at SIGTERM, ends at once at the second, with 0.

    Its status address has its metrics, and says ready until it drains.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "picker", "--listen", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0",
        "--server", "127.0.0.1:1", "--log-format", "json", stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    events, url = [], ""
    async with asyncio.timeout(30), aiohttp.ClientSession() as client:
        async for line in process.stderr:
            fields = json.loads(line)
            events.append(fields["event"])
            if events[-1] == "picker started":
                url = f"http://{fields['metrics']}"
                async with client.get(f"{url}/metrics") as page:
                    assert "vllm_xds_picker_chunks 0.0" in await page.text()
                async with client.get(f"{url}/readyz") as page:
                    assert (page.status, await page.text()) == (200, "ready\n")
            elif events[-1] == "picker draining":
                async with client.get(f"{url}/readyz") as page:
                    assert (page.status, await page.text()) == (503, "not ready\n")
            if events[-1] in ("picker started", "picker draining"):
                os.kill(process.pid, signal.SIGTERM)
        assert await process.wait() == 0
    assert [event for event in events if event.startswith("picker")] == [
        "picker started",
        "picker draining",
        "picker stopped",
    ]


@pytest.mark.parametrize("option", ["--listen", "--metrics-address"])
def test_a_busy_address_is_one_line(option: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 and what to change, without a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        arguments = ["--metrics-address", "127.0.0.1:0", "--listen", "127.0.0.1:0", "--log-level", "error"]
        if option == "--listen":
            arguments = arguments[:2] + arguments[4:]
        assert run(parser().parse_args([*arguments, option, address])) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("vllm-xds picker: cannot ")
    assert line.endswith(f"{address}: Address already in use")


@pytest.mark.parametrize(
    "wrong",
    [
        ["--listen", "8080"],
        ["--listen", "unix:"],
        ["--listen", ":80"],
        ["--listen", "a:65536"],
        ["--server", "unix:/x"],
        ["--pickers", "0"],
        ["--pickers", "many"],
    ],
)
def test_wrong_options_are_explained(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and the value that is wrong."""
    with pytest.raises(SystemExit) as left:
        parser().parse_args(wrong)
    assert left.value.code == 2
    assert repr(wrong[1]) in capsys.readouterr().err


def test_listen_may_be_given_again() -> None:
    """Each address is one more."""
    args = parser().parse_args(["--listen", "0.0.0.0:1", "--listen", "unix:/run/p", "--listen", "[::1]:2"])
    assert args.listen == ["0.0.0.0:1", "unix:/run/p", "[::1]:2"]
