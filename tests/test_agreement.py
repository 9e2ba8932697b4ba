"""Whether the tools agree: how that is judged, and a run on a real server with a double of perf_analyzer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.conftest import CUSTOMER_SERVICE

import millibert
from load import agreement
from load.agreement import LOCUST, OURS, Figures, judge, table
from load.perf_analyzer import Expected, PerfLoad
from load.results import Run
from load.runs import Target, run_closed
from millibert._perf_analyzer import PROGRAM

if TYPE_CHECKING:
    from tests.conftest import Release

TEST = CUSTOMER_SERVICE / "test.csv"
MACHINE = {"cpu": "x", "cpus": 2, "within": 0.05, "seconds": 8.0, "rounds": 3}


def rounds(**rates: list[float]) -> dict[str, list[Figures]]:
    return {name: [Figures(rate, 1.0, 2.0, 0.1) for rate in each] for name, each in rates.items()}


def test_ratios_are_of_neighbours_and_their_median_counts() -> None:
    # The machine became half as fast; each round of its own says the same.
    found = judge(rounds(perf_analyzer=[1000, 500, 400], millibert=[960, 480, 200], locust=[800, 400, 320]), 0.05)
    assert found["tools"][OURS]["ratios"] == pytest.approx([0.96, 0.96, 0.5])
    assert found["tools"][OURS]["ratio"] == pytest.approx(0.96)
    assert found["tools"][LOCUST]["ratio"] == pytest.approx(0.8)
    assert found["tools"][PROGRAM]["requests_per_second"] == 500
    # Ours is judged, and Locust is not.
    assert found["agree"]


@pytest.mark.parametrize("rate", [94.0, 106.0])
def test_more_and_less_are_both_no_agreement(rate: float) -> None:
    found = judge(rounds(perf_analyzer=[100], millibert=[rate]), 0.05)
    assert not found["agree"]
    case = {"protocol": "grpc", "under_way": 16, **found}
    shown = table({**MACHINE, "cases": [case], "agree": False})
    assert f"{rate / 100:.3f}" in shown
    assert "FAIL" in shown


def test_without_perf_analyzer_it_says_where_to_get_it(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(agreement, "find", lambda: None)
    assert agreement.main(["--repository", "nowhere", "--data", "none.csv"]) == 1
    assert "python -m load.install_perf_analyzer" in capsys.readouterr().err


def slower(load: PerfLoad, expected: Expected) -> Run:
    """Stands for perf_analyzer, which few machines have: our load, and a quarter of what it says."""
    assert {row["TEXT"][0] for row in json.loads(load.data.read_text())["data"]} == set(expected.texts)
    with millibert.connect(load.url, load.model) as client:
        made = run_closed(Target(client, load.url, expected.texts, None), load.concurrency or 0, load.seconds)
    changes = {"tool": "perf_analyzer", "requests_per_second": made.requests_per_second / 4}
    return made.model_copy(update={**changes, "resources": []})


@pytest.mark.e2e
def test_the_tools_take_turns_on_a_real_server(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(agreement, "find", lambda: PROGRAM)
    monkeypatch.setattr("load.perf_analyzer.run", slower)
    repository = shutil.copytree(release.repository, tmp_path / "repository")
    given = ["--repository", str(repository), "--data", str(TEST), "--concurrency", "2", "--rounds", "1"]
    assert agreement.main([*given, "--seconds", "2", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(case["protocol"], case["under_way"]) for case in found["cases"]] == [("grpc", 2), ("http", 2)]
    for case in found["cases"]:
        assert set(case["tools"]) == {PROGRAM, OURS, LOCUST}
        # Four times as much as a quarter of it, give or take what a busy machine does.
        assert case["tools"][OURS]["ratio"] > 1.5
        assert not case["agree"]
        assert all(tool["cpu_ms"] > 0 for tool in case["tools"].values())
