"""A stage that became slow: the SLO turns red, and the comparison with the runs before it names the stage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.conftest import CUSTOMER_SERVICE, rewrite

if TYPE_CHECKING:
    from tests.conftest import Release, RunningServer

    Serve = Callable[..., AbstractContextManager[RunningServer]]

# The stage itself as it is, and after each batch a pause.
SLOWLY = """

import time

_execute = TritonPythonModel.execute


def _slowly(self, requests):
    responses = _execute(self, requests)
    time.sleep(0.15)
    return responses


TritonPythonModel.execute = _slowly
"""
# Between what a busy machine takes for the stage as it is, and the pause.
SLO = "p50<100ms,errors<1%"


def millibert(*arguments: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "millibert.cli", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def load(service: RunningServer, out: Path) -> tuple[int, dict[str, Any]]:
    where = ["--url", service.grpc_url, "--model", service.models[0], "--texts", str(CUSTOMER_SERVICE / "test.csv")]
    # Two repeats that a busy machine sets apart leave next to nothing beyond chance (one degree of freedom); of four
    # short ones the spread is known.
    how = ["--rate", "12", "--spacing", "even", "--duration", "4", "--repeats", "4", "--slo", SLO, "--out", str(out)]
    return millibert("load", *where, *how)


@pytest.fixture(scope="module")
def before(release: Release, triton: Serve, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on the release as it was built."""
    out = tmp_path_factory.mktemp("load") / "first.json"
    with triton(release.repository) as service:
        status, found = load(service, out)
    assert status == 0, found
    assert [verdict["held"] for verdict in found["verdicts"]] == [True, True]
    return out


@pytest.mark.e2e
@pytest.mark.parametrize("stage", ["bert", "postprocess"])
def test_a_slow_stage_is_found(release: Release, triton: Serve, before: Path, tmp_path: Path, stage: str) -> None:
    slowed = Path(shutil.copytree(release.repository, tmp_path / "repository", copy_function=os.link))
    model = slowed / stage / "1" / "model.py"
    rewrite(model, model.read_text(encoding="utf-8") + SLOWLY)
    after = tmp_path / "second.json"
    with triton(slowed) as service:
        status, found = load(service, after)
    assert status == 1
    assert [verdict["held"] for verdict in found["verdicts"]] == [False, True]

    page = tmp_path / "report.html"
    compared = ["--previous", str(before), "--fail-on-regression", "--slo", SLO, "--out", str(page)]
    status, found = millibert("load-report", str(after), *compared)
    assert status == 1
    assert not found["held"]
    comparison = found["comparison"]
    assert comparison["regressed"], comparison
    assert comparison["slowest_stage"] == stage
    (worst,) = [change for change in comparison["stages"] if change["name"] == stage]
    # What it took more is the pause, and is in no part but the stage's own work and its queue.
    assert worst["now"] - worst["previous"] > 100
    assert worst["parts_ms"]["compute"] > 100
    assert stage in page.read_text(encoding="utf-8")
