"""Charts of throughput and latency: the curve over several loads, the histogram, and what happened when."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from load.report_page.axes import (
    broken,
    drawn,
    figure_short,
    log_axis_x,
    log_axis_y,
    log_plot,
    thinned,
    time_axis,
)
from load.report_page.words import GAP, load_name, ms, rate, share
from load.report_page.words import limit as written
from load.results import Histogram, Run
from load.slo import LATENCIES, Objective
from millibert_build.report.formats import number
from millibert_build.report.svg import Plot

# Colours that are told apart; see load.css. A line more takes the first again.
SERIES = 7
_QUANTILES = ("p50", "p99")


class Point(NamedTuple):
    """A load of the curve; of repeats, medians."""

    name: str
    kind: str
    rate: float
    latencies: dict[str, float]
    """By percentile, in milliseconds."""
    errors: float
    runs: int


def points(runs: Iterable[Run]) -> list[Point]:
    """One for each load under which anything was answered, the lightest first."""

    def key(run: Run) -> tuple[str, int, float, str]:
        arrival = run.arrival
        amount = arrival.rate if arrival.rate is not None else float(arrival.under_way or 0)
        return arrival.kind, run.texts_per_request, amount, arrival.shape or ""

    answered = sorted((run for run in runs if run.latency_ms is not None), key=key)
    return [_point(list(group)) for _, group in itertools.groupby(answered, key)]


def _point(runs: Sequence[Run]) -> Point:
    figures = [run.figures() for run in runs]
    first = runs[0]
    texts = "" if first.texts_per_request == 1 else f", {first.texts_per_request} texts a request"
    return Point(
        load_name(first),
        f"{first.arrival.kind} loop{texts}",
        statistics.median(run.requests_per_second for run in runs),
        {name: statistics.median(each[name] or 0.0 for each in figures) for name in ("p50", "p90", "p99", "p99.9")},
        statistics.median(each["errors"] or 0.0 for each in figures),
        len(runs),
    )


def curve(found: Sequence[Point], objectives: Sequence[Objective]) -> Markup:
    """Percentiles over what was answered a second; limits of the objectives on latency as lines."""
    limits = [each for each in objectives if each.name in LATENCIES]
    values = [point.latencies[name] for point in found for name in _QUANTILES] + [each.limit for each in limits]
    plot = log_plot((0.0, 1.08 * max(point.rate for point in found)), values)
    log_axis_y(plot)
    plot.axis_x(lambda at: number(at), "answered requests per second →")
    for limit in limits:
        _limit(plot, limit)
    for kind, group in itertools.groupby(found, lambda point: point.kind):
        _add_curve(plot, list(group), kind)
    text = "; ".join(f"{p.name}: {rate(p.rate)}, p99 {ms(p.latencies['p99'])}" for p in found)
    return drawn(plot, "Latency over throughput", text)


def _limit(plot: Plot, objective: Objective, *, at_end: bool = False) -> None:
    """A line across, with its name where the least else is: at the start of a curve, at the end of a run."""
    y = math.log10(objective.limit)
    plot.line([(plot.x.low, y), (plot.x.high, y)], "limit")
    place = (plot.x.end if at_end else plot.x.start + 4, plot.y(y) - 5)
    plot.text(
        place, f"{objective.name} limit, {written(objective.limit, objective.name)}", "end" if at_end else "start"
    )


def _add_curve(plot: Plot, group: Sequence[Point], kind: str) -> None:
    for name, class_ in zip(_QUANTILES, ("s1", "s2"), strict=True):
        places = [(point.rate, math.log10(max(point.latencies[name], 1e-3))) for point in group]
        plot.line(places, class_)
        for place, point in zip(places, group, strict=True):
            said = f"{point.name} ({kind}): {rate(point.rate)} answered, {name} {ms(point.latencies[name])}"
            plot.dot(place, f"{said}, errors {share(point.errors)}", class_)


def joined(runs: Sequence[Run]) -> Histogram:
    """The answers of all runs in one histogram."""
    counts = [sum(column) for column in zip(*(run.histogram.counts for run in runs), strict=True)]
    return Histogram(edges_ms=runs[0].histogram.edges_ms, counts=counts)


def histogram(found: Sequence[Histogram], objectives: Sequence[Objective], quantiles: Mapping[str, float]) -> Markup:
    """Share of the answers by latency: columns of the only one, or a line each of several; with quantiles marked.

    At least one histogram has an answer in it.
    """
    shown = [each for each in found if any(each.counts)]
    bins = _bins(shown)
    edges = shown[0].edges_ms[bins.start : bins.stop + 1]
    shares = [[count / sum(each.counts) for count in each.counts[bins]] for each in shown]
    highest = max(max(each) for each in shares)
    plot = Plot.between((math.log10(edges[0]), math.log10(edges[-1])), (0.0, 1.08 * highest))
    plot.axis_y(lambda part: f"{100 * part:g}{GAP}%")
    log_axis_x(plot, "latency, ms (logarithmic) →")
    for at, each in enumerate(shares):
        _add_histogram(plot, edges, each, f"s{at % SERIES + 1}", columns=len(shares) == 1)
    limits = {f"{each.name} limit": each.limit for each in objectives if each.name in LATENCIES}
    for row, (name, value) in enumerate(sorted({**quantiles, **limits}.items(), key=lambda each: each[1])):
        if plot.x.low <= math.log10(value) <= plot.x.high:
            plot.rule(math.log10(value), name, "mark limit" if name in limits else "mark", row)
    text = f"{len(shown)} of them, latencies from {ms(edges[0])} to {ms(edges[-1])}"
    return drawn(plot, "Histogram of latencies", text)


def _bins(histograms: Sequence[Histogram]) -> slice:
    """Those between the first and the last that any run has answers in, and one on each side."""
    filled = [at for each in histograms for at, count in enumerate(each.counts) if count]
    return slice(max(min(filled) - 1, 0), min(max(filled) + 2, len(histograms[0].counts)))


def _add_histogram(plot: Plot, edges: Sequence[float], shares: Sequence[float], class_: str, *, columns: bool) -> None:
    spans = [(math.log10(low), math.log10(high)) for low, high in itertools.pairwise(edges)]
    if columns:
        for (low, high), part in zip(spans, shares, strict=True):
            plot.column((low, high), part, f"{ms(10**low)} to {ms(10**high)}: {share(part)} of the answers", class_)
        return
    plot.line(
        [place for span, part in zip(spans, shares, strict=True) for place in ((span[0], part), (span[1], part))],
        class_,
    )


def latency_over_time(run: Run, objectives: Sequence[Objective]) -> Markup:
    """p50 and p99 of what was due in each second."""
    series = {
        "p99": thinned([second.p99_ms for second in run.timeline], max),
        "p50": thinned([second.p50_ms for second in run.timeline], statistics.median),
    }
    limits = [each for each in objectives if each.name in series]
    values = [value for each in series.values() for _, value in each if value is not None]
    plot = log_plot((0.0, _end(run)), [*values, *(each.limit for each in limits)])
    log_axis_y(plot)
    time_axis(plot, run.warm_up_seconds)
    for limit in limits:
        _limit(plot, limit, at_end=True)
    for name, class_ in (("p99", "s2"), ("p50", "s1")):
        logs = [(at + 0.5, None if value is None else math.log10(max(value, 1e-3))) for at, value in series[name]]
        broken(plot, logs, class_)
    text = f"p50 from {ms(min(values))}, p99 up to {ms(max(values))}" if values else "nothing was answered"
    return drawn(plot, "Percentiles of latency in each second", text)


def rate_over_time(run: Run) -> Markup:
    """What was due and what of it was answered in each second."""
    whole = [second for second in run.timeline if second.at + 1 <= run.seconds] or run.timeline
    series = {
        "s3 sent": thinned([float(second.sent) for second in whole], statistics.fmean),
        "s1": thinned([float(second.answered) for second in whole], statistics.fmean),
    }
    most = max((value or 0.0 for each in series.values() for _, value in each), default=0.0)
    plot = Plot.between((0.0, _end(run)), (0.0, 1.1 * most or 1.0))
    plot.axis_y(figure_short, whole=most >= 4)
    time_axis(plot, run.warm_up_seconds)
    for class_, each in series.items():
        broken(plot, [(at + 0.5, value) for at, value in each], class_)
    sent, answered = sum(second.sent for second in whole), sum(second.answered for second in whole)
    return drawn(plot, "Requests in each second", f"{sent:,} sent, {answered:,} of them answered")


def errors_over_time(run: Run) -> Markup:
    """Requests without a right answer: refused, and all others on top of them."""
    refused = thinned([float(second.refused) for second in run.timeline], sum)
    errors = thinned([float(second.errors) for second in run.timeline], sum)
    width = refused[1][0] if len(refused) > 1 else 1
    most = max(value or 0.0 for _, value in errors)
    plot = Plot.between((0.0, _end(run)), (0.0, 1.1 * most or 1.0))
    plot.axis_y(figure_short, whole=True)
    time_axis(plot, run.warm_up_seconds)
    for (at, all_), (_, busy) in zip(errors, refused, strict=True):
        span = (float(at), float(at + width))
        title = f"second {at}: {all_ or 0:.0f} without a right answer, {busy or 0:.0f} of them refused"
        for height, class_ in ((all_, "s2"), (busy, "s6")):
            if height:
                plot.column(span, height, title, class_)
    return drawn(
        plot, "Errors in each second", f"{sum(s.errors for s in run.timeline):,} requests without a right answer"
    )


def _end(run: Run) -> float:
    return max(run.seconds, 1.0)
