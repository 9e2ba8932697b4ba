"""`millibert tune`: several ways to prune, side by side."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.conftest import Release

from millibert import UsageError
from millibert_build.report import Candidate, pareto_front, read_report
from millibert_build.scenario import Pruning
from millibert_build.tune_command import prunings

# The small model of the tests is trained too briefly for its accuracy to mean much.
LOOSE = ("gates.max_pruning_loss=0.2", "gates.min_pruning_agreement=0.5", "gates.min_agreement_int8=0.9")


TRIES = ("layers=4", "layers=5,heads=0.9")


@dataclass(frozen=True)
class Tuned:
    """A run, where it worked, and what it was given."""

    folder: Path
    release: Release
    done: subprocess.CompletedProcess[str]


def tune(release: Release, folder: Path, *arguments: str) -> Tuned:
    command = [sys.executable, "-m", "millibert.cli", "tune", "--scenario", str(release.scenario)]
    places = ["--work", str(folder / "work"), "--out", str(folder / "out"), "--precision", "fp32"]
    settings = [part for key in (*LOOSE, "pruning.recovery_epochs=1") for part in ("--set", key)]
    tries = [part for each in TRIES for part in ("--try", each)]
    whole = [*command, *places, *settings, *tries, *arguments]
    return Tuned(folder, release, subprocess.run(whole, capture_output=True, text=True, check=False))


@pytest.fixture(scope="module")
def tuned(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder = tmp_path_factory.mktemp("tune")
    shutil.copytree(release.work, folder / "work")
    return tune(release, folder, "--json")


def test_the_fastest_that_passes_is_published_and_the_others_are_shown(tuned):
    assert tuned.done.returncode == 0, tuned.done.stderr
    assert "[2/8] train    unchanged" in tuned.done.stderr
    rows = {row["name"]: row for row in json.loads(tuned.done.stdout)["candidates"]}
    assert set(rows) == {"fp32", "-4 layers, fp32", "-90% heads -5 layers, fp32"}
    ruined = rows["-90% heads -5 layers, fp32"]
    assert (ruined["passed"], ruined["chosen"], ruined["front"]) == (False, False, False)
    assert ruined["times_fp32"] > 1
    (chosen,) = [row for row in rows.values() if row["chosen"]]
    assert chosen["texts_per_second"] == max(row["texts_per_second"] for row in rows.values() if row["passed"])
    manifest = json.loads((tuned.folder / "out" / "release.json").read_text())
    assert manifest == json.loads(tuned.done.stdout)["release"]
    assert (manifest["scenario"]["pruning"]["layers"] == 4) == (chosen["name"] != "fp32")
    report = read_report(tuned.folder / "work" / "report.json")
    assert {candidate.name for candidate in report.candidates} == set(rows)
    assert report.stages[0].name == "fp32"


def test_when_nothing_passes_there_is_a_report_and_the_release_stays(tuned):
    released = (tuned.folder / "out" / "release.json").read_bytes()
    again = tune(tuned.release, tuned.folder, "--set", "gates.min_accuracy=1.0").done
    assert again.returncode == 1
    assert again.stderr.count("unchanged: ") == 3  # nothing was trained again
    assert "< min_accuracy 1.0" in again.stderr
    assert str(tuned.folder / "work" / "report.html") in again.stderr
    assert (tuned.folder / "out" / "release.json").read_bytes() == released
    assert not read_report(tuned.folder / "work" / "report.json").verdict.published


def test_tries_are_pruning_settings():
    common = Pruning(recovery_epochs=2)
    assert prunings(common, ["heads=0.25, neurons=0.4", "sparsity=2:4", "neurons=0.4,heads=0.25"]) == [
        Pruning(heads=0.25, neurons=0.4, recovery_epochs=2),
        Pruning(sparsity="2:4", recovery_epochs=2),
    ]
    assert prunings(Pruning(layers=1), ["layers=2"]) == [Pruning(layers=1), Pruning(layers=2)]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("neurons", r"--try neurons: write KEY=VALUE"),
        ("neuron=0.5", r"--try neuron=0\.5: neuron: Extra inputs are not permitted"),
        ("neurons=1.5", r"--try neurons=1\.5: neurons: Input should be less than 1"),
        ("recovery_epochs=3", r"--try recovery_epochs=3: removes nothing"),
    ],
)
def test_a_wrong_try_is_one_clear_error(written, message):
    with pytest.raises(UsageError, match=message):
        prunings(Pruning(), [written])


def test_the_front_is_what_no_other_passing_candidate_beats():
    def candidate(name: str, score: float, speed: float, passed: bool = True) -> Candidate:
        return Candidate(name, score, speed, passed)

    slow, fast = candidate("slow", 0.9, 1), candidate("fast", 0.8, 3)
    worse, refused = candidate("worse", 0.8, 2), candidate("refused", 1.0, 9, passed=False)
    assert pareto_front([fast, refused, worse, slow]) == [slow, fast]
