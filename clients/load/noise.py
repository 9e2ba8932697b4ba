"""How far a figure of one side, a run or several repeats of one load, may be off by chance.

- Of several runs, their spread; repeats see what differs from run to run, which no run can know of itself (T. Kalibera
  and R. Jones, "Rigorous benchmarking in reasonable time", ISMM 2013).
- Of one run, and of repeats that agree by luck, the seconds after the warm-up: the standard error of the mean of what
  each second says (answers, p50, p99) by the circular block bootstrap (H. R. Künsch, Annals of Statistics 17, 1989;
  D. N. Politis and J. P. Romano, 1992), as neighbouring seconds are alike. Of a mean it needs no drawing: the variance
  over all blocks is known. Percentiles also have what so few requests leave open, the interval of W. G. Woodruff
  (Journal of the American Statistical Association 47, 1952) read off the histogram; shares have the binomial error
  after A. Agresti and B. Caffo (The American Statistician 54, 2000). The greater one counts.

One run a side therefore cannot tell a slower program from a slower quarter of an hour: on a shared machine, repeat.
What nothing is known of has NaN as its error: a maximum hangs on one request, and p99.9 of 500 requests is a maximum.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from load.results import Histogram, Run, Second

CONFIDENCE = 0.99
# From fewer whole seconds than this no noise is read.
_FEWEST_SECONDS = 5
# The percentiles of each second that stand for a figure of the whole run.
_SECONDS_SAY: dict[str, tuple[str, ...]] = {
    "p50": ("p50_ms",),
    **dict.fromkeys(("mean", "p90", "p95", "p99", "p99.9"), ("p50_ms", "p99_ms")),
}
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}


class Figure(NamedTuple):
    """A side's figure, how far chance may have moved it, and from how much that is known."""

    value: float
    error: float
    """Standard error, in the figure's unit; NaN: unknown."""
    freedom: float


def relative(figure: Figure) -> Figure:
    """The same with the error as a share of the figure's size."""
    return figure._replace(error=figure.error / abs(figure.value) if figure.value else 0.0)


def over_repeats(figures: Sequence[Figure]) -> Figure:
    """Their mean, and the error of that: by their spread, or by what each says of itself where that is more."""
    count = len(figures)
    value = statistics.fmean(figure.value for figure in figures)
    inside = math.sqrt(sum(figure.error**2 for figure in figures)) / count
    freedom = sum(figure.freedom for figure in figures)
    if count == 1:
        return Figure(value, inside, freedom)
    spread = statistics.stdev(figure.value for figure in figures) / math.sqrt(count)
    # What is unknown of each alone, as NaN is not more, the spread knows.
    return Figure(value, inside, freedom) if inside > spread else Figure(value, spread, count - 1)


def reach(one: Figure, other: Figure) -> float | None:
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


def of_throughput(run: Run) -> Figure:
    """Answers a second."""
    error, freedom = _relative_error([float(second.answered) for second in _whole_seconds(run)])
    return Figure(run.requests_per_second, error * run.requests_per_second, freedom)


def of_latency(run: Run, name: str) -> Figure | None:
    """A latency of a run in milliseconds, named as in an SLO; None where nothing was answered."""
    value = run.figures()[name]
    if value is None:
        return None
    errors = [_of_requests(run, name), *(_of_seconds(run, field) for field in _SECONDS_SAY.get(name, ()))]
    error, freedom = max(errors, key=lambda found: -1.0 if math.isnan(found[0]) else found[0])
    # Requests are counted as if they did not know of each other; only the seconds tell whether they do.
    unknown = math.isnan(errors[0][0]) or all(math.isnan(found[0]) for found in errors[1:])
    return Figure(value, math.nan if unknown else error * value, freedom)


def of_share(run: Run, name: str) -> Figure:
    """A share of a run's requests, 0 to 1, named as in an SLO."""
    value, sent = run.figures()[name] or 0.0, run.counts.sent
    # One more of each: that none of a hundred failed does not say that none ever does.
    drawn = (value * sent + 1) / (sent + 2)
    binomial = math.sqrt(drawn * (1 - drawn) / (sent + 2))
    if name not in ("errors", "refused"):
        return Figure(value, binomial, math.inf)
    seconds = [getattr(second, name) / second.sent for second in _whole_seconds(run) if second.sent]
    relative, freedom = _relative_error(seconds)
    in_bursts = relative * statistics.fmean(seconds) if seconds else math.nan
    return Figure(value, in_bursts, freedom) if in_bursts > binomial else Figure(value, binomial, math.inf)


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
