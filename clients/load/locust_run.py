"""Locust as a tool that is run for a load and hands over its requests one by one.

Locust keeps rounded figures only, so the locustfile writes each request to a file, of every process one; this starts
Locust without its web page, in a process of its own since its import changes the whole process, and joins the files.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from load.locust_shapes import levels_of
from load.machine import describe_machine
from load.results import Answers, Arrival, Outcome, Run, joined, summarise
from millibert._errors import MillibertError, UsageError

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
_FORMAT = "millibert-locust-requests/1"
# Rows are written in one go, so that the load is seldom interrupted by a disk.
_ROWS = 1000
# What Locust takes to start and stop, and the server to be asked what is right.
_PATIENCE_SECONDS = 120.0
# Locust imports with this only where somebody else has to stay unchanged by it.
_UNPATCHED = "LOCUST_SKIP_MONKEY_PATCH"


class RequestsFile:
    """Written by one of Locust's processes: a line of JSON that says when it began, then CSV."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file)
        # Of this machine; `time.time` is what the processes have in common.
        self._began = time.perf_counter()
        self._file.write(json.dumps({"format": _FORMAT, "began": time.time()}) + "\n")
        self._rows: list[tuple[float, float, str, str]] = []

    def add(self, due: float, latency: float, outcome: Outcome, reason: str) -> None:
        """Keep a request that was due then, by `time.perf_counter`, and took so many seconds."""
        self._rows.append((due - self._began, latency, outcome.value, reason))
        if len(self._rows) >= _ROWS:
            self._write()

    def close(self) -> None:
        """Write the rest. May be called again."""
        if not self._file.closed:
            self._write()
            self._file.close()

    def _write(self) -> None:
        rows, self._rows = self._rows, []
        self._writer.writerows(rows)


class Requests(NamedTuple):
    """What Locust's processes sent, in seconds from the first request."""

    answers: Answers
    reasons: dict[str, int]


@dataclass(frozen=True)
class LocustLoad:
    """A load for Locust: `users` of a closed loop, or the `rate` of an open one."""

    url: str
    models: Mapping[str, float]  # and their weights
    texts: str  # a source, see `load.texts`
    seconds: float
    users: int | None = None
    rate: float | None = None
    poisson: bool = False
    shape: str = "steady"
    text_column: str = "text"
    texts_per_request: int = 1
    timeout: float = 10.0
    processes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.users is None) == (self.rate is None):
            raise UsageError("a load for Locust has users (closed loop) or a rate (open loop)")
        levels_of(self.shape, self.seconds)

    @property
    def arrival(self) -> Arrival:
        """The same in words."""
        shape = None if self.shape == "steady" else self.shape
        if self.rate is None:
            return Arrival(kind="closed", under_way=self.users, shape=shape)
        return Arrival(kind="open", rate=self.rate, spacing="poisson" if self.poisson else "even", shape=shape)


def run(load: LocustLoad) -> Run:
    """Let Locust send it; raises `MillibertError` with Locust's own words where that fails."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory(prefix="millibert-locust-") as folder:
        requests = read_requests(send(load, Path(folder)))
    summary = summarise(requests.answers, load.seconds)
    return Run(
        tool="locust",
        url=load.url,
        model=_names(load.models),
        texts_per_request=load.texts_per_request,
        arrival=load.arrival,
        started=started,
        texts_per_second=summary.requests_per_second * load.texts_per_request,
        machine=describe_machine(),
        reasons=requests.reasons,
        **summary._asdict(),
    )


def send(load: LocustLoad, folder: Path) -> list[Path]:
    """The same, for the files of requests, of each of Locust's processes one."""
    _run_locust([*arguments(load), "--requests-file", str(folder / "requests")], load.seconds)
    return sorted(folder.glob("requests.*"))


def arguments(load: LocustLoad) -> list[str]:
    """The command line."""
    models = ",".join(f"{name}={weight:g}" for name, weight in load.models.items())
    given = ["--headless", "--only-summary", "--exit-code-on-error", "0", "--host", load.url, "--models", models]
    given += ["--texts", load.texts, "--text-column", load.text_column, "--timeout", f"{load.timeout:g}"]
    given += ["--texts-per-request", str(load.texts_per_request), "--seed", str(load.seed)]
    given += ["--shape", load.shape, "--duration", f"{load.seconds:g}", "--users", str(load.users or load.processes)]
    if load.rate is not None:
        given += ["--rate", repr(load.rate), "--spacing", "poisson" if load.poisson else "even"]
    if load.processes > 1:
        port = str(_free_port())
        given += ["--processes", str(load.processes), "--master-bind-port", port, "--master-port", port]
        given += ["--master-bind-host", "127.0.0.1"]
    return given


def read_requests(paths: Sequence[Path]) -> Requests:
    """Join the files of Locust's processes; raises `MillibertError` where they hold nothing."""
    parts, reasons = [], Counter[str]()
    for path in paths:
        with path.open(encoding="utf-8", newline="") as file:
            header = json.loads(file.readline())
            if header.get("format") != _FORMAT:
                raise UsageError(f"{path} holds no requests in the form {_FORMAT}")
            rows = list(csv.reader(file))
        due = np.array([float(row[0]) for row in rows]) + header["began"]
        latency = np.array([float(row[1]) for row in rows])
        parts.append(Answers(due, latency, np.array([row[2] for row in rows], dtype=np.str_)))
        reasons.update(row[3] for row in rows if row[3])
    answers = joined(parts) if parts else None
    if answers is None or not len(answers.due):
        raise MillibertError("Locust has sent nothing")
    return Requests(answers._replace(due=answers.due - answers.due.min()), dict(reasons.most_common()))


def _run_locust(given: Sequence[str], seconds: float) -> None:
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *given]
    environment = {name: value for name, value in os.environ.items() if name != _UNPATCHED}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=seconds + _PATIENCE_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise MillibertError(f"Locust did not end within {error.timeout:g} s") from error
    if done.returncode != 0:
        raise MillibertError(f"Locust failed ({done.returncode}): {done.stderr.strip()[-1500:]}")


def _names(models: Mapping[str, float]) -> str:
    return next(iter(models)) if len(models) == 1 else ",".join(f"{name}={weight:g}" for name, weight in models.items())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
