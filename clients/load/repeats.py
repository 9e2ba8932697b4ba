"""What several runs of one load say together: medians, and how sure they are."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

from load.results import Run

_CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A figure over repeats: its median, the runs' own figures, and an interval for the mean."""

    median: float
    each: list[float]
    interval: tuple[float, float] | None
    """95 %, by Student's t with one degree of freedom less than there are runs; None of a single run."""


def estimate(values: Sequence[float]) -> Estimate:
    """Of at least one value."""
    each = list(values)
    if len(each) < 2:
        return Estimate(each[0], each, None)
    mean, error = statistics.mean(each), statistics.stdev(each) / len(each) ** 0.5
    reach = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(each) - 1)) * error
    return Estimate(statistics.median(each), each, (mean - reach, mean + reach))


def figures(runs: Sequence[Run]) -> dict[str, Estimate | None]:
    """Every figure that an SLO may name, and `requests_per_second`; None where a run has none."""
    documents = [{**run.figures(), "requests_per_second": run.requests_per_second} for run in runs]
    found: dict[str, Estimate | None] = {}
    for name in documents[0]:
        values = [document[name] for document in documents]
        known = [value for value in values if value is not None]
        found[name] = estimate(known) if len(known) == len(values) else None
    return found


def medians(runs: Sequence[Run]) -> dict[str, float | None]:
    """The same without how sure they are; for `slo.judge`."""
    return {name: found and found.median for name, found in figures(runs).items()}
