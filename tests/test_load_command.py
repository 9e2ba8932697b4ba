"""`millibert load` on a real server, and the commands of docs/load.md as they stand there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tests.conftest import CUSTOMER_SERVICE

from load.results import Run, read_runs
from millibert import connect

PAGE = (Path(__file__).parents[1] / "docs" / "load.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line) for line in re.findall(r"^    (millibert .+)$", PAGE, re.MULTILINE)]
LOAD = ["--texts", str(CUSTOMER_SERVICE / "test.csv"), "--repeats", "2", "--duration", "2", "--json"]


@pytest.fixture(scope="module")
def service(triton, release):
    with triton(release.repository) as server:
        yield server


def millibert(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "millibert.cli", *arguments], capture_output=True, text=True, check=False, cwd=cwd
    )


def load(service, *arguments: str) -> tuple[int, dict]:
    done = millibert("load", "--url", service.grpc_url, "--model", service.models[0], *LOAD, *arguments)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_an_slo_that_is_kept_ends_with_0(service, tmp_path):
    out = tmp_path / "runs.json"
    status, found = load(service, "--rate", "20", "--slo", "max<30s,errors<1%", "--out", str(out))
    assert status == 0
    assert found["held"]
    assert found["answers"] == "checked"
    runs = read_runs(out)
    assert len(runs) == 2
    for run in runs:
        assert run.counts.errors == 0
        assert run.counts.sent == pytest.approx(20 * (2 - run.warm_up_seconds), rel=0.6)
        assert {stage.model for stage in run.stages} == {"tokenizer", "bert", "postprocess"}
        assert {"tritonserver", "bert", "load"} <= run.resources[0].cpus.keys()
        assert run.resources[0].shared_memory_mib
        assert run.server["name"] == "triton"


def test_an_slo_that_is_missed_ends_with_1_and_says_which(service):
    status, found = load(service, "--under-way", "2", "--slo", "p50<1us,errors<1%")
    assert status == 1
    assert [verdict["held"] for verdict in found["verdicts"]] == [False, True]


def test_the_rate_that_is_found_keeps_the_slo_and_higher_ones_were_tried(service, tmp_path):
    page = tmp_path / "report.html"
    status, found = load(
        service, "--find-rate", "--slo", "p50<20s,refused<50%", "--repeats", "1", "--report", str(page)
    )
    assert found["tried"]
    assert status in (0, 1)  # the rate is tried once more at the end, and a machine may have changed its mind
    assert found["arrival"]["rate"] in [tried["rate"] for tried in found["tried"]]
    assert "<svg" in page.read_text()


def test_a_load_that_is_killed_sends_no_more(service):
    where = ["--url", service.grpc_url, "--model", service.models[0], *LOAD[:2]]
    command = [sys.executable, "-m", "millibert.cli", "load", *where, "--rate", "20", "--duration", "60", "--no-check"]
    with (
        connect(service.grpc_url, service.models[0]) as client,
        subprocess.Popen(command, stdout=subprocess.DEVNULL) as process,
    ):
        before = client.statistics()[client.model].requests
        deadline = time.monotonic() + 60
        while client.statistics()[client.model].requests < before + 20:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        senders = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert senders
    _, alive = psutil.wait_procs(senders, timeout=10)
    assert alive == []


@pytest.mark.parametrize(
    ("arguments", "says", "status"),
    [
        (["--find-rate"], "give --slo", 2),
        (["--rate", "0"], "above 0", 2),
        (["--rate", "5", "--slo", "p99<5"], "in us, ms or s", 2),
        (["--rate", "5", "--texts-per-request", "1000"], "this model takes 16 at most", 1),
        (["--rate", "5", "--texts", "none.csv"], "none.csv", 1),
    ],
)
def test_what_cannot_be_done_is_told(service, arguments, says, status):
    done = millibert("load", "--url", service.grpc_url, "--model", service.models[0], *arguments)
    assert done.returncode == status
    assert says in done.stderr


def test_the_page_has_five_commands():
    assert [command[1] for command in COMMANDS] == ["serve", "load", "load", "load-report", "stages"]


def test_the_commands_of_the_page_work(service, tmp_path):
    """All but the first, which the fixture is; in a folder with the page's file names, with shorter loads."""
    shutil.copy(CUSTOMER_SERVICE / "test.csv", tmp_path)
    # Seconds 0: what the loads before it did.
    here = {"grpc://127.0.0.1:8001": service.grpc_url, "customer_service": service.models[0], "10": "0", "200": "20"}
    shorter = ["--duration", "2", "--repeats", "1"]
    for command in COMMANDS[1:]:
        arguments = [here.get(part, part) for part in command[1:]]
        if arguments[0] == "load-report":
            (tmp_path / "second.json").write_bytes((tmp_path / "first.json").read_bytes())
        done = millibert(*arguments, *(shorter if arguments[0] == "load" else []), cwd=tmp_path)
        # A busy machine may miss the page's objectives; a command that failed would have said nothing but why.
        assert done.returncode == 0 or arguments[0] != "stages", done.stderr
        assert done.stdout, done.stderr
    assert isinstance(read_runs(tmp_path / "first.json")[0], Run)
    for page in ("report.html", "compared.html"):
        assert (tmp_path / page).stat().st_size > 10_000
