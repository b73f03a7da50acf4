"""python -m bench.simulate: the command from its arguments to its tables, and the pictures."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from bench.plot import Line, Panel, svg
from bench.sim_report import BASE, OURS, Case, distributions, losses, over_time, summary
from bench.sim_requests import GENERATED
from bench.sim_run import Job, Result, simulate
from bench.simulate import main


def result(policy: str, mean: float = 1.0, hits: float = 0.5) -> Result:
    times = tuple(mean * i / 200 for i in range(201))
    return Result(policy, 100, mean, mean / 2, 3 * mean, hits, 1.2, 0.0, times, ())


def test_the_quick_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A generated workload and a trace, three policies: capacities, ratios to the endpoint picker, and all as JSON."""
    trace, out = tmp_path / "mine.jsonl", tmp_path / "all.json"
    rows = [
        {"timestamp": 100 * i, "input_length": 1500, "output_length": 20, "hash_ids": [i % 7, 100 + i % 30, 1000 + i]}
        for i in range(300)
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--quick", "--trace", str(trace), "--workload", "mine", "--workload", "chat", "--jobs", "1"]
    assert main([*arguments, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "### Capacity" in printed
    assert f"### {OURS} beside {BASE}" in printed
    results = json.loads(out.read_text())
    assert [(each["workload"], each["policy"]) for each in results] == [
        (name, policy) for name in ("chat", "mine") for policy in ("DEFAULT", BASE, OURS)
    ]
    assert all(each["requests"] > 20 and 0 < each["mean"] <= each["p99"] for each in results)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workload", "none"], "unknown workload: none (there are chat,"),
        (["--capacity", "none=2"], "unknown workload: none (there are chat,"),
        (["--capacity", "chat=fast"], "'chat=fast' is not NAME=RATE"),
        (["--trace", "/no/such/file"], "No such file"),
        (["--quick", "--write"], "--quick has no figures to --write"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2 and one line that says what is wrong, before anything is computed."""
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert words in capsys.readouterr().err


def test_ratios_and_losses() -> None:
    """The geometric mean over workloads; a loss is named with its figure, what another seed moves is none."""
    found = {
        Case("a", "8 pods", 0.85): [result(BASE), result(OURS, 0.25)],
        Case("b", "8 pods", 0.85): [result(BASE), result(OURS, 4.0, hits=0.45)],
        Case("c", "8 pods", 0.85): [result(BASE), result(OURS, 1.01, hits=0.495)],
    }
    rows = {row[0]: row for row in summary("t", found).rows}
    assert rows[OURS][:4] == (OURS, "8 pods, 85%", "1.00", "1.00")
    assert losses(found) == ("- b, 8 pods, 85%: mean 4.00 times, p50 4.00 times, p99 4.00 times, hits -5.0 points",)


def test_pictures() -> None:
    """Well-formed SVG, the same each time, one line for each policy and pod; names are escaped."""
    job = Job(GENERATED[0], 2, 4.0)
    short = Job(type(job.workload)(job.workload.name, job.workload.sessions, warm=2.0, span=12.0), 2, 4.0)
    found = list(simulate(short, ["round robin", OURS]))
    for picture, lines in ((distributions({Case("chat", "2 pods", 0.5): found}), 2), (over_time(found), 4)):
        tree = ET.fromstring(picture)  # noqa: S314 - ours
        assert len(tree.findall(".//{*}polyline")) == lines
    panel = Panel("<&>", [Line("<b>", [(0.0, 1.0), (1.0, 2.0)])])
    assert svg([panel], 1) == svg([panel], 1)
    assert ET.fromstring(svg([panel], 1)).find(".//{*}text") is not None  # noqa: S314 - ours
