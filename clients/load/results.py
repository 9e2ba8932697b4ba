"""One form for what a load found, whichever tool made the load: ours, Locust or perf_analyzer.

Every tool hands over its requests one by one, as `Answers`; `summarise` makes the same figures of all of them, so that
they can be judged, plotted and compared. The JSON of a `Run` is what a later run is compared with.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from load.steady import find_steady
from millibert._errors import UsageError

Floats = npt.NDArray[np.float64]
FORMAT = "millibert-load-run/1"
# Among the processes, the one that sends.
LOAD = "load"
# A hundred bins from 0.1 ms to 100 s, evenly on a logarithmic scale.
_EDGES_MS = np.geomspace(0.1, 1e5, 101)
_PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p99.9": 99.9}


class Outcome(StrEnum):
    """What became of a request."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """The server said that it is too busy."""
    TIMED_OUT = "timed out"
    WRONG = "wrong"
    """It was answered, but not as it was before or as it should be."""
    FAILED = "failed"


class Answers(NamedTuple):
    """Requests, in any order."""

    due: Floats
    """When each was to be sent, in seconds from the start; where nothing was planned, when it was sent."""
    latency: Floats
    """From then to its end, in seconds."""
    outcome: npt.NDArray[np.str_]
    """The values of `Outcome`."""

    def between(self, start: float, end: float) -> Answers:
        """Those that were due in this span of seconds."""
        return self.where((self.due >= start) & (self.due < end))

    def where(self, chosen: npt.NDArray[Any] | slice) -> Answers:
        """Some of them: a mask, positions, or a slice."""
        return Answers(self.due[chosen], self.latency[chosen], self.outcome[chosen])

    def of(self, outcome: Outcome) -> Answers:
        """Those with this outcome."""
        return self.where(self.outcome == outcome)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Counts(_Model):
    """Requests by outcome."""

    sent: int
    answered: int
    refused: int
    timed_out: int
    wrong: int
    failed: int

    @property
    def errors(self) -> int:
        """All that got no right answer."""
        return self.sent - self.answered


class Latency(_Model):
    """Of the answered requests, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float


class Histogram(_Model):
    """How many answers fell between each two edges; the first and last bins take what is outside."""

    edges_ms: list[float]
    counts: list[int]


class Second(_Model):
    """One second of a run: what was due in it."""

    at: int
    sent: int
    answered: int
    refused: int
    errors: int
    """Of any kind, `refused` among them."""
    p50_ms: float | None
    p99_ms: float | None


class Resources(_Model):
    """What processes used at one moment: CPUs since the moment before, and resident memory."""

    at: float
    cpus: dict[str, float]
    memory_mib: dict[str, float]
    shared_memory_mib: float | None = None
    """Of the server's regions in /dev/shm, where it runs on this machine."""


class Stage(_Model):
    """Means of a model's requests, in milliseconds, from Triton's counters."""

    model: str
    queue_ms: float
    input_ms: float
    compute_ms: float
    output_ms: float
    total_ms: float
    texts_per_execution: float


class Arrival(_Model):
    """How requests came: in a closed loop, so many under way; in an open one, so many a second whatever happens."""

    kind: Literal["closed", "open"]
    under_way: int | None = None
    rate: float | None = None
    spacing: Literal["even", "poisson"] | None = None
    shape: str | None = None
    """A rate or number that changes: step, spike, …; `rate` and `under_way` are then the largest."""


class Run(_Model):
    """A run under one load. Figures are of what was due after the warm-up."""

    format: Literal["millibert-load-run/1"] = "millibert-load-run/1"
    tool: Literal["millibert", "locust", "perf_analyzer"]
    url: str
    model: str
    texts_per_request: int
    arrival: Arrival
    started: str
    """ISO 8601, with the zone."""
    seconds: float
    """All of it."""
    warm_up_seconds: float
    """Found, see `load.steady`; of them only the timeline tells."""
    steady: bool
    drift: float
    requests_per_second: float
    """Answered."""
    texts_per_second: float
    counts: Counts
    latency_ms: Latency | None
    """None: nothing was answered."""
    histogram: Histogram
    timeline: list[Second]
    resources: list[Resources] = []
    stages: list[Stage] = []
    between_stages_ms: float | None = None
    """Of an ensemble's time, what is in none of its stages."""
    machine: dict[str, str | int] = {}
    server: dict[str, str] = {}
    """Name, version, and the configuration of each model as Triton shows it."""
    reasons: dict[str, int] = {}
    """What was said where there was no right answer, and how often."""

    def figures(self) -> dict[str, float | None]:
        """What an SLO may name: latencies in milliseconds, shares from 0 to 1, growth from -1."""
        counts, latency = self.counts, self.latency_ms
        sent = max(1, counts.sent)
        named = latency.model_dump() if latency else dict.fromkeys(Latency.model_fields)
        named["p99.9"] = named.pop("p999")
        shares = {
            "errors": counts.errors / sent,
            "refused": counts.refused / sent,
            "timeouts": counts.timed_out / sent,
            "wrong": counts.wrong / sent,
        }
        return {**named, **shares, "growth": growth(self.resources)}

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a run's JSON; raises `UsageError` where it is none."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise UsageError(f"cannot read the run {path}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the document"
            raise UsageError(f"{path} is not a run in the form {FORMAT}: {where}: {first['msg']}") from error


def growth(looks: Sequence[Resources]) -> float | None:
    """By how much of itself the server's memory, of all its processes and shared, grew after the first tenth of a run.

    Medians of the second and the last tenth, as one look may find a large batch at work. None where the server was not
    seen, or not long enough.
    """
    held = [
        sum(mib for name, mib in look.memory_mib.items() if name != LOAD) + (look.shared_memory_mib or 0.0)
        for look in looks
    ]
    tenth = len(held) // 10
    if not tenth or not any(held):
        return None
    return float(np.median(held[-tenth:]) / np.median(held[tenth : 2 * tenth]) - 1)


class Summary(NamedTuple):
    """The part of a `Run` that comes from its requests."""

    seconds: float
    warm_up_seconds: float
    steady: bool
    drift: float
    requests_per_second: float
    counts: Counts
    latency_ms: Latency | None
    histogram: Histogram
    timeline: list[Second]


def summarise(answers: Answers, seconds: float, warm_up_seconds: float | None = None) -> Summary:
    """Make figures of requests that were due in the first `seconds`; what was due later is left out.

    `warm_up_seconds`: None finds it.
    """
    answers = answers.between(0.0, seconds)
    found = find_steady(*answers.of(Outcome.ANSWERED)[:2])
    start = found.from_seconds if warm_up_seconds is None else warm_up_seconds
    kept = answers.between(start, seconds)
    answered = kept.of(Outcome.ANSWERED)
    return Summary(
        seconds=seconds,
        warm_up_seconds=start,
        steady=found.is_steady,
        drift=found.drift,
        requests_per_second=len(answered.due) / (seconds - start),
        counts=count(kept),
        latency_ms=latency(answered.latency),
        histogram=histogram(answered.latency),
        timeline=timeline(answers, seconds),
    )


def count(answers: Answers) -> Counts:
    """Requests by outcome."""
    found = {outcome: int((answers.outcome == outcome).sum()) for outcome in Outcome}
    return Counts(
        sent=len(answers.outcome),
        answered=found[Outcome.ANSWERED],
        refused=found[Outcome.REFUSED],
        timed_out=found[Outcome.TIMED_OUT],
        wrong=found[Outcome.WRONG],
        failed=found[Outcome.FAILED],
    )


def latency(seconds: Floats) -> Latency | None:
    """Mean, percentiles (linear between neighbours) and maximum; None of nothing."""
    if not len(seconds):
        return None
    ms = 1000 * seconds
    p50, p90, p95, p99, p999 = (float(value) for value in np.percentile(ms, list(_PERCENTILES.values())))
    return Latency(mean=float(ms.mean()), p50=p50, p90=p90, p95=p95, p99=p99, p999=p999, max=float(ms.max()))


def histogram(seconds: Floats) -> Histogram:
    """Latencies in bins that are the same for every run, so that runs can be laid over one another."""
    inside = np.clip(1000 * seconds, _EDGES_MS[0], _EDGES_MS[-1])
    counts, _ = np.histogram(inside, _EDGES_MS)
    return Histogram(edges_ms=[round(float(edge), 4) for edge in _EDGES_MS], counts=[int(number) for number in counts])


def timeline(answers: Answers, seconds: float) -> list[Second]:
    """Each second of a run."""
    ordered = answers.where(np.argsort(answers.due, kind="stable"))
    edges = np.searchsorted(ordered.due, np.arange(int(np.ceil(seconds)) + 1))
    return [_second(at, ordered.where(slice(*ends))) for at, ends in enumerate(itertools.pairwise(edges))]


def _second(at: int, answers: Answers) -> Second:
    counts, found = count(answers), latency(answers.of(Outcome.ANSWERED).latency)
    return Second(
        at=at,
        sent=counts.sent,
        answered=counts.answered,
        refused=counts.refused,
        errors=counts.errors,
        p50_ms=found.p50 if found else None,
        p99_ms=found.p99 if found else None,
    )


def joined(parts: Sequence[Answers]) -> Answers:
    """All requests of several."""
    return Answers(
        np.concatenate([part.due for part in parts]),
        np.concatenate([part.latency for part in parts]),
        np.concatenate([part.outcome for part in parts]),
    )


def write_runs(path: Path, runs: Sequence[Run]) -> None:
    """One run as an object, several as a list."""
    documents = [run.model_dump(mode="json") for run in runs]
    path.write_text(json.dumps(documents[0] if len(documents) == 1 else documents), encoding="utf-8")


def read_runs(path: Path) -> list[Run]:
    """What `write_runs` wrote: one run or several; raises `UsageError` where it is something else."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read the run {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    documents = found if isinstance(found, list) else [found]
    if not documents:
        raise UsageError(f"{path} has no run in it")
    return [_run(path, document, at if isinstance(found, list) else None) for at, document in enumerate(documents)]


def _run(path: Path, document: object, at: int | None) -> Run:
    try:
        return Run.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (*(() if at is None else (at,)), *first["loc"]))) or "the document"
        raise UsageError(f"{path} is not a run in the form {FORMAT}: {where}: {first['msg']}") from error
