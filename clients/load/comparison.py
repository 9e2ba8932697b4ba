"""A run against an earlier one: what changed, and whether that is more than noise.

Each side is one run or several repeats of one load. The figure of a side is the mean over its runs; a change is
relative to the earlier side, of shares (errors) the difference. A change inside its noise band is called the same. The
band is what Welch's t interval for the difference of two means (B. L. Welch, Biometrika 34, 1947) leaves to chance, at
99 %: a dozen figures are compared at once, and at 95 % every other comparison would raise a false alarm. Smaller
changes than 1 % are never told. How large chance is says `load.noise`; what nothing is known of is not judged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Literal

from load.noise import CONFIDENCE, Figure, of_latency, of_share, of_throughput, over_repeats, reach, relative
from load.results import Run
from load.slo import LATENCIES, SHARES

THROUGHPUT = "requests/s"
BETWEEN_STAGES = "between stages"
# Nobody acts on less; and an even load without noise would otherwise have a band of nothing.
_LEAST = 0.01
# A stage counts where it grew by so much of a request's mean time, however much that is of its own.
_LEAST_OF_REQUEST = 0.01
_PARTS = ("queue", "input", "compute", "output")


class Judgement(StrEnum):
    """What a change means."""

    BETTER = "better"
    SAME = "same"
    """Inside the noise band."""
    WORSE = "worse"
    UNKNOWN = "not judged"
    """There is no figure, or nothing is known of its noise."""


@dataclass(frozen=True)
class Change:
    """A figure of both sides."""

    name: str
    unit: Literal["requests/s", "ms", "share"]
    previous: float | None
    now: float | None
    change: float | None
    """Relative to the previous one, 0.1 is a tenth more; of a share the difference."""
    band: float | None
    """As large a change, in either direction, is still noise."""
    judgement: Judgement


@dataclass(frozen=True)
class StageChange(Change):
    """The mean time of a stage, and how many milliseconds each part of it grew."""

    parts_ms: dict[str, float]

    def __str__(self) -> str:
        if self.change is None:
            return self.name
        return f"{self.name}: {100 * self.change:+.0f} % ({self.previous:.3g} → {self.now:.3g} ms)"


@dataclass(frozen=True)
class Comparison:
    """All figures, all stages, and what makes both sides hard to compare."""

    figures: tuple[Change, ...]
    stages: tuple[StageChange, ...]
    runs: int
    previous_runs: int
    warnings: tuple[str, ...]
    """Where machine, model, tool or load differ."""
    reconfigured: tuple[str, ...]
    """Models whose configuration differs, or the server's version."""

    @property
    def slowest(self) -> StageChange | None:
        """The stage that grew by the most milliseconds of those that grew beyond their band."""
        worse = [stage for stage in self.stages if stage.judgement is Judgement.WORSE]
        return max(worse, key=lambda stage: (stage.now or 0.0) - (stage.previous or 0.0), default=None)

    @property
    def regressed(self) -> bool:
        """Whether a figure of the whole is worse; a stage alone only explains."""
        return any(change.judgement is Judgement.WORSE for change in self.figures)

    @property
    def improved(self) -> bool:
        """Whether a figure is better, and none worse."""
        return not self.regressed and any(change.judgement is Judgement.BETTER for change in self.figures)

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        slowest = self.slowest
        return {
            "regressed": self.regressed,
            "runs": self.runs,
            "previous_runs": self.previous_runs,
            "confidence": CONFIDENCE,
            "figures": [asdict(change) for change in self.figures],
            "stages": [asdict(stage) for stage in self.stages],
            "slowest_stage": slowest.name if slowest else None,
            "warnings": list(self.warnings),
            "reconfigured": list(self.reconfigured),
        }


def compare(runs: Sequence[Run], previous: Sequence[Run]) -> Comparison:
    """Compare repeats of one load, at least one a side, with earlier ones."""
    stages = _stage_changes(runs, previous)
    return Comparison(
        figures=(_throughput(runs, previous), *_latencies(runs, previous), *_shares(runs, previous)),
        stages=tuple(stages),
        runs=len(runs),
        previous_runs=len(previous),
        warnings=tuple(_warnings(runs, previous)),
        reconfigured=tuple(_reconfigured(runs[0].server, previous[0].server)),
    )


def _throughput(runs: Sequence[Run], previous: Sequence[Run]) -> Change:
    before, now = (over_repeats([of_throughput(run) for run in side]) for side in (previous, runs))
    return _judged(THROUGHPUT, "requests/s", before, now, better=1)


def _latencies(runs: Sequence[Run], previous: Sequence[Run]) -> Iterator[Change]:
    for name in LATENCIES:
        before, now = (_side([of_latency(run, name) for run in side]) for side in (previous, runs))
        yield _judged(name, "ms", before, now, better=-1)


def _shares(runs: Sequence[Run], previous: Sequence[Run]) -> Iterator[Change]:
    for name in SHARES:
        before, now = (over_repeats([of_share(run, name) for run in side]) for side in (previous, runs))
        band = reach(before, now)
        change = now.value - before.value
        yield Change(name, "share", before.value, now.value, change, band, _judgement(change, band, better=-1))


def _side(figures: Sequence[Figure | None]) -> Figure | None:
    """None where a run has no such figure."""
    known = [figure for figure in figures if figure is not None]
    return over_repeats(known) if len(known) == len(figures) else None


def _judged(
    name: str, unit: Literal["requests/s", "ms"], previous: Figure | None, now: Figure | None, better: int
) -> Change:
    """A change relative to the previous figure. `better`: 1 where more is."""
    # Between stages there can be less than nothing, as Triton counts them and the whole at different moments.
    if previous is None or now is None or previous.value <= 0:
        return Change(
            name, unit, previous and previous.value, now and now.value, None, None, judgement=Judgement.UNKNOWN
        )
    change = now.value / previous.value - 1
    # The noise there would be if nothing had changed: both errors, each of its own figure.
    band = None if name == "max" else reach(relative(previous), relative(now))
    band = band if band is None else max(band, _LEAST)
    return Change(name, unit, previous.value, now.value, change, band, _judgement(change, band, better))


def _judgement(change: float, band: float | None, better: int) -> Judgement:
    if band is None:
        return Judgement.UNKNOWN
    if abs(change) <= band:
        return Judgement.SAME
    return Judgement.BETTER if change * better > 0 else Judgement.WORSE


def _stage_changes(runs: Sequence[Run], previous: Sequence[Run]) -> Iterator[StageChange]:
    now, before = ([_budget(run) for run in side] for side in (runs, previous))
    means = [run.latency_ms.mean for run in previous if run.latency_ms]
    least_ms = _LEAST_OF_REQUEST * statistics.fmean(means) if means else 0.0
    for name in now[0]:
        if all(name in budget for budget in (*now, *before)):
            yield _stage_change(name, runs, previous, least_ms)


def _stage_change(name: str, runs: Sequence[Run], previous: Sequence[Run], least_ms: float) -> StageChange:
    def total(run: Run) -> Figure:
        """Triton's counters have no seconds: of one run, a stage is taken to be as noisy as the mean latency."""
        whole, value = of_latency(run, "mean"), sum(_budget(run)[name].values())
        if whole is None:
            return Figure(value, math.nan, 1.0)
        return Figure(value, whole.error / whole.value * abs(value), whole.freedom)

    earlier, later = (over_repeats([total(run) for run in side]) for side in (previous, runs))
    found = _judged(name, "ms", earlier, later, better=-1)
    if found.band is not None and found.previous:
        band = max(found.band, least_ms / abs(found.previous))
        found = replace(found, band=band, judgement=_judgement(found.change or 0.0, band, better=-1))
    budgets = [[_budget(run)[name] for run in side] for side in (previous, runs)]
    before, now = ({part: statistics.fmean(b[part] for b in side) for part in side[0]} for side in budgets)
    return StageChange(**vars(found), parts_ms={part: now[part] - before.get(part, 0.0) for part in now})


def _budget(run: Run) -> dict[str, dict[str, float]]:
    """Milliseconds of each part of each stage, and what is between the stages."""
    budget = {stage.model: {part: getattr(stage, f"{part}_ms") for part in _PARTS} for stage in run.stages}
    for stage in run.stages:
        # The total is what was measured: what its parts do not name is Triton's handling of the stage.
        budget[stage.model]["other"] = stage.total_ms - sum(budget[stage.model].values())
    if run.between_stages_ms is not None:
        budget[BETWEEN_STAGES] = {"between": run.between_stages_ms}
    return budget


def _warnings(runs: Sequence[Run], previous: Sequence[Run]) -> Iterator[str]:
    now, before = runs[0], previous[0]
    for name in sorted({*now.machine, *before.machine}):
        if now.machine.get(name) != before.machine.get(name):
            yield f"another machine: {name} is {now.machine.get(name)}, was {before.machine.get(name)}"
    for caption, ours, theirs in (
        ("model", now.model, before.model),
        ("tool", now.tool, before.tool),
        ("load", describe_arrival(now), describe_arrival(before)),
        ("number of texts a request", now.texts_per_request, before.texts_per_request),
    ):
        if ours != theirs:
            yield f"another {caption}: {ours}, was {theirs}"
    for caption, side in (("these runs", runs), ("the previous runs", previous)):
        if restless := sum(not run.steady for run in side):
            yield f"{restless} of {caption} not steady: its figures depend on how long it lasted"


def describe_arrival(run: Run) -> str:
    """The load in words: "open loop, 200 requests/s, at random (Poisson)"."""
    arrival = run.arrival
    rate, under_way = arrival.rate, arrival.under_way or 0
    # A rate's fraction counts where it is all there is.
    amount = f"{under_way:,} under way" if rate is None else f"{rate:,.{0 if rate >= 100 else 1}f} requests/s"
    at_most = "up to " if arrival.shape else ""
    spacing = {"even": "evenly spaced", "poisson": "at random (Poisson)"}.get(arrival.spacing or "")
    words = (f"{arrival.kind} loop", f"{at_most}{amount}", spacing, arrival.shape)
    return ", ".join(word for word in words if word)


def _reconfigured(now: dict[str, str], before: dict[str, str]) -> Iterator[str]:
    for name in sorted({*now, *before}):
        if now.get(name) != before.get(name):
            yield name
