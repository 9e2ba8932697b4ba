"""A run against an earlier one: what changed, and whether that is more than noise.

Each side is one run or several repeats of one load. The figure of a side is the mean over its runs; a change is
relative to the earlier side, of shares (errors) the difference. A change inside its noise band is called the same. The
band is what Welch's t interval for the difference of two means (B. L. Welch, Biometrika 34, 1947) leaves to chance, at
99 %: a dozen figures are compared at once, and at 95 % every other comparison would raise a false alarm. Smaller
changes than 1 % are never told.

How far a side's figure may be off by chance:

- of several runs, their spread; repeats see what differs from run to run, which no run can know of itself (T. Kalibera
  and R. Jones, "Rigorous benchmarking in reasonable time", ISMM 2013);
- of one run, and of repeats that agree by luck, the seconds after the warm-up: the standard error of the mean of what
  each second says (answers, p50, p99) by the circular block bootstrap (H. R. Künsch, Annals of Statistics 17, 1989;
  D. N. Politis and J. P. Romano, 1992), as neighbouring seconds are alike. Of a mean it needs no drawing: the variance
  over all blocks is known. Percentiles also have what so few requests leave open, the interval of W. G. Woodruff
  (Journal of the American Statistical Association 47, 1952) read off the histogram; shares have the binomial error
  after A. Agresti and B. Caffo (The American Statistician 54, 2000). The greater one counts.

One run a side therefore cannot tell a slower program from a slower quarter of an hour: on a shared machine, repeat.
What nothing is known of is not judged: a maximum hangs on one request, and p99.9 of 500 requests is a maximum.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

from load.results import Histogram, Run, Second
from load.slo import LATENCIES, SHARES

THROUGHPUT = "requests/s"
BETWEEN_STAGES = "between stages"
CONFIDENCE = 0.99
# Nobody acts on less; and an even load without noise would otherwise have a band of nothing.
_LEAST = 0.01
# A stage counts where it grew by so much of a request's mean time, however much that is of its own.
_LEAST_OF_REQUEST = 0.01
# From fewer whole seconds than this no noise is read.
_FEWEST_SECONDS = 5
# The percentiles of each second that stand for a figure of the whole run.
_SECONDS_SAY: dict[str, tuple[str, ...]] = {
    "p50": ("p50_ms",),
    **dict.fromkeys(("mean", "p90", "p95", "p99", "p99.9"), ("p50_ms", "p99_ms")),
}
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
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


class _Figure(NamedTuple):
    """A side's figure, how far chance may have moved it, and from how much that is known."""

    value: float
    error: float
    """Standard error, in the figure's unit; NaN: unknown."""
    freedom: float


def _throughput(runs: Sequence[Run], previous: Sequence[Run]) -> Change:
    def of_run(run: Run) -> _Figure:
        error, freedom = _relative_error([float(second.answered) for second in _whole_seconds(run)])
        return _Figure(run.requests_per_second, error * run.requests_per_second, freedom)

    before, now = (_over_repeats([of_run(run) for run in side]) for side in (previous, runs))
    return _judged(THROUGHPUT, "requests/s", before, now, better=1)


def _latencies(runs: Sequence[Run], previous: Sequence[Run]) -> Iterator[Change]:
    for name in LATENCIES:
        before, now = (_side([_latency(run, name) for run in side]) for side in (previous, runs))
        yield _judged(name, "ms", before, now, better=-1)


def _shares(runs: Sequence[Run], previous: Sequence[Run]) -> Iterator[Change]:
    for name in SHARES:
        before, now = (_over_repeats([_share(run, name) for run in side]) for side in (previous, runs))
        band = _reach(before, now)
        change = now.value - before.value
        yield Change(name, "share", before.value, now.value, change, band, _judgement(change, band, better=-1))


def _side(figures: Sequence[_Figure | None]) -> _Figure | None:
    """None where a run has no such figure."""
    known = [figure for figure in figures if figure is not None]
    return _over_repeats(known) if len(known) == len(figures) else None


def _judged(
    name: str, unit: Literal["requests/s", "ms"], previous: _Figure | None, now: _Figure | None, better: int
) -> Change:
    """A change relative to the previous figure. `better`: 1 where more is."""
    # Between stages there can be less than nothing, as Triton counts them and the whole at different moments.
    if previous is None or now is None or previous.value <= 0:
        return Change(
            name, unit, previous and previous.value, now and now.value, None, None, judgement=Judgement.UNKNOWN
        )
    change = now.value / previous.value - 1
    # The noise there would be if nothing had changed: both errors, each of its own figure.
    band = None if name == "max" else _reach(_relative(previous), _relative(now))
    band = band if band is None else max(band, _LEAST)
    return Change(name, unit, previous.value, now.value, change, band, _judgement(change, band, better))


def _relative(figure: _Figure) -> _Figure:
    return figure._replace(error=figure.error / abs(figure.value) if figure.value else 0.0)


def _judgement(change: float, band: float | None, better: int) -> Judgement:
    if band is None:
        return Judgement.UNKNOWN
    if abs(change) <= band:
        return Judgement.SAME
    return Judgement.BETTER if change * better > 0 else Judgement.WORSE


def _reach(one: _Figure, other: _Figure) -> float | None:
    """Half of Welch's interval for the difference of the two; None where an error is unknown."""
    parts = (one.error**2, other.error**2)
    total = sum(parts)
    if math.isnan(total):
        return None
    if not total:
        return 0.0
    unsure = sum(part**2 / figure.freedom for part, figure in zip(parts, (one, other), strict=True))
    freedom = total**2 / unsure if unsure else math.inf
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(total)


def _over_repeats(figures: Sequence[_Figure]) -> _Figure:
    """Their mean, and the error of that: by their spread, or by what each says of itself where that is more."""
    count = len(figures)
    value = statistics.fmean(figure.value for figure in figures)
    inside = math.sqrt(sum(figure.error**2 for figure in figures)) / count
    freedom = sum(figure.freedom for figure in figures)
    if count == 1:
        return _Figure(value, inside, freedom)
    spread = statistics.stdev(figure.value for figure in figures) / math.sqrt(count)
    # What is unknown of each alone, as NaN is not more, the spread knows.
    return _Figure(value, inside, freedom) if inside > spread else _Figure(value, spread, count - 1)


def _latency(run: Run, name: str) -> _Figure | None:
    value = run.figures()[name]
    if value is None:
        return None
    errors = [_of_requests(run, name), *(_of_seconds(run, field) for field in _SECONDS_SAY.get(name, ()))]
    error, freedom = max(errors, key=lambda found: -1.0 if math.isnan(found[0]) else found[0])
    # Requests are counted as if they did not know of each other; only the seconds tell whether they do.
    unknown = math.isnan(errors[0][0]) or all(math.isnan(found[0]) for found in errors[1:])
    return _Figure(value, math.nan if unknown else error * value, freedom)


def _of_seconds(run: Run, field: str) -> tuple[float, float]:
    values = [getattr(second, field) for second in _whole_seconds(run)]
    return _relative_error([value for value in values if value is not None])


def _of_requests(run: Run, name: str) -> tuple[float, float]:
    """Relative error of a latency, were its requests independent."""
    count = run.counts.answered
    if name == "mean" and count:
        return _spread(run.histogram) / math.sqrt(count), math.inf
    part = _QUANTILES.get(name)
    if part is None or not count:
        return math.nan, math.inf
    reach = math.sqrt(part * (1 - part) / count)
    if part + reach > 1 or part - reach < 0:
        return math.nan, math.inf
    low, high = (quantile(run.histogram, at) for at in (part - reach, part + reach))
    return (high - low) / (high + low), math.inf


def _share(run: Run, name: str) -> _Figure:
    value, sent = run.figures()[name] or 0.0, run.counts.sent
    # One more of each: that none of a hundred failed does not say that none ever does.
    drawn = (value * sent + 1) / (sent + 2)
    binomial = math.sqrt(drawn * (1 - drawn) / (sent + 2))
    if name not in ("errors", "refused"):
        return _Figure(value, binomial, math.inf)
    seconds = [getattr(second, name) / second.sent for second in _whole_seconds(run) if second.sent]
    relative, freedom = _relative_error(seconds)
    in_bursts = relative * statistics.fmean(seconds) if seconds else math.nan
    return _Figure(value, in_bursts, freedom) if in_bursts > binomial else _Figure(value, binomial, math.inf)


def _whole_seconds(run: Run) -> list[Second]:
    """Those after the warm-up of which the run has all."""
    return [each for each in run.timeline if each.at >= run.warm_up_seconds and each.at + 1 <= run.seconds]


def _relative_error(values: Sequence[float]) -> tuple[float, float]:
    """Standard error of the mean of a series over that mean, and its degrees of freedom, by circular blocks."""
    count = len(values)
    mean = statistics.fmean(values) if values else 0.0
    if count < _FEWEST_SECONDS:
        return math.nan, 1.0
    if not mean:
        return 0.0, math.inf
    length = math.ceil(count ** (1 / 3))
    wrapped = np.concatenate([values, values[: length - 1]])
    blocks = np.convolve(wrapped, np.full(length, 1 / length), mode="valid")
    # Blocks of one series lie closer to its own mean than to the true one.
    variance = float(np.mean((blocks - mean) ** 2)) / (1 - length / count)
    return math.sqrt(variance * length / count) / mean, count / length - 1


def quantile(histogram: Histogram, part: float) -> float:
    """Milliseconds below which a part of the answers is, evenly spread (on the logarithmic axis) within a bin."""
    sums = np.cumsum([0, *histogram.counts])
    logs = np.log(histogram.edges_ms)
    # Of bins without answers, the sums stay as they are; interpolation wants them to grow.
    rising = np.concatenate([[True], np.diff(sums) > 0])
    rising[:-1] |= rising[1:]
    return float(np.exp(np.interp(part * sums[-1], sums[rising], logs[rising])))


def _spread(histogram: Histogram) -> float:
    """Standard deviation over the mean."""
    counts, edges = np.array(histogram.counts, dtype=float), np.array(histogram.edges_ms)
    middles = np.sqrt(edges[1:] * edges[:-1])
    mean = np.average(middles, weights=counts)
    return float(np.sqrt(np.average((middles - mean) ** 2, weights=counts)) / mean)


def _stage_changes(runs: Sequence[Run], previous: Sequence[Run]) -> Iterator[StageChange]:
    now, before = ([_budget(run) for run in side] for side in (runs, previous))
    means = [run.latency_ms.mean for run in previous if run.latency_ms]
    least_ms = _LEAST_OF_REQUEST * statistics.fmean(means) if means else 0.0
    for name in now[0]:
        if all(name in budget for budget in (*now, *before)):
            yield _stage_change(name, runs, previous, least_ms)


def _stage_change(name: str, runs: Sequence[Run], previous: Sequence[Run], least_ms: float) -> StageChange:
    def total(run: Run) -> _Figure:
        """Triton's counters have no seconds: of one run, a stage is taken to be as noisy as the mean latency."""
        whole, value = _latency(run, "mean"), sum(_budget(run)[name].values())
        if whole is None:
            return _Figure(value, math.nan, 1.0)
        return _Figure(value, whole.error / whole.value * abs(value), whole.freedom)

    earlier, later = (_over_repeats([total(run) for run in side]) for side in (previous, runs))
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
