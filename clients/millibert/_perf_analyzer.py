"""NVIDIA's perf_analyzer as a closed-loop load: so many requests under way, measured until the figures are steady."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from millibert._address import parse_address
from millibert._errors import MillibertError
from millibert_ensemble.contract import TEXT

PROGRAM = "perf_analyzer"
# Three windows in a row must be this close; on a shared machine they seldom are within the default of 10, and the
# median of several runs says more than a wait for a quiet moment.
_STABILITY_PERCENT = 50
_BUSY = " busy: "
_UNSTABLE = "Failed to obtain stable measurement"
_TIMEOUT_SECONDS = 600
# Its columns; latencies in microseconds.
_RATE, _MEDIAN, _TAIL = "Inferences/Second", "p50 latency", "p99 latency"


class Refused(MillibertError):  # noqa: N818 - reads better at the call site
    """The server was too busy for so much load, and said so."""


class Measurement(NamedTuple):
    """One case under load. Latencies are of whole requests, in milliseconds."""

    texts: int  # of a request
    concurrency: int
    texts_per_second: float
    p50_ms: float
    p99_ms: float


def is_here() -> bool:
    """Whether perf_analyzer is on PATH, or beside this Python, and starts."""
    program = find()
    return (
        program is not None and subprocess.run([program, "--version"], capture_output=True, check=False).returncode == 0
    )


def find() -> str | None:
    """Where it is: on PATH, or where `python -m load.install_perf_analyzer` puts it."""
    return shutil.which(PROGRAM) or shutil.which(PROGRAM, path=str(Path(sys.executable).parent))


def write_texts(path: Path, texts: Sequence[str]) -> None:
    """The texts as perf_analyzer reads them; requests take them in turn."""
    path.write_text(json.dumps({"data": [{TEXT.name: [text]} for text in texts]}), encoding="utf-8")


def measure(
    url: str, model: str, data: Path, texts: int, concurrency: int, window_ms: int = 5000
) -> Measurement | None:
    """One run with `texts` of `data` a request; None where the figures do not become steady.

    Raises `Refused` where the server is too busy, and `MillibertError` with perf_analyzer's own words where it fails.
    """
    address = parse_address(url)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "table.csv")
        command = [find() or PROGRAM, "-m", model, "-i", address.scheme, "-u", address.netloc, "-b", str(texts)]
        command += ["--input-data", str(data), "--concurrency-range", str(concurrency)]
        command += ["--measurement-interval", str(window_ms), "-s", str(_STABILITY_PERCENT), "-f", str(table)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_SECONDS)
        if _UNSTABLE in done.stderr + done.stdout:
            return None
        if done.returncode != 0 and _BUSY in done.stderr + done.stdout:
            raise Refused(f"{texts} texts a request, {concurrency} requests under way: {_BUSY.strip()}")
        if done.returncode != 0:
            raise MillibertError(f"{PROGRAM} failed: {(done.stderr or done.stdout).strip()[-500:]}")
        return read_table(table, texts, concurrency)


def read_table(table: Path, texts: int, concurrency: int) -> Measurement:
    """The one row of perf_analyzer's CSV."""
    with table.open(encoding="utf-8", newline="") as file:
        row = next(csv.DictReader(file))
    return Measurement(texts, concurrency, float(row[_RATE]), float(row[_MEDIAN]) / 1000, float(row[_TAIL]) / 1000)
