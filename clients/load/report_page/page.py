"""The page: verdict first, then why one may believe it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import millibert_build.report
from load import repeats
from load.comparison import Comparison, compare, describe_arrival
from load.noise import CONFIDENCE
from load.report_page import charts, resource_charts, words
from load.report_page.verdict import cautions, judge_repeats
from load.results import Run
from load.slo import LATENCIES, Objective
from millibert_build.report import formats

# The look is that of the build report, and its style sheet.
_FOLDERS = (Path(__file__).parent, Path(millibert_build.report.__file__).parent)
# So many of the reasons for errors are shown; there can be one for each request.
_MOST_REASONS = 20


class KeyFigure(NamedTuple):
    """One of the figures on top."""

    caption: str
    value: str
    note: Markup


def write_page(
    path: Path,
    runs: Sequence[Run],
    objectives: Sequence[Objective],
    previous: Sequence[Run] | None = None,
    curve: Sequence[Run] = (),
) -> None:
    """Write the page, whole or not at all.

    `runs` are repeats of one load, at least one, and what is judged; `previous` what they are compared with; `curve`
    runs under other loads.
    """
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(render(runs, objectives, previous, curve), encoding="utf-8")
    aside.replace(path)


def render(
    runs: Sequence[Run],
    objectives: Sequence[Objective],
    previous: Sequence[Run] | None = None,
    curve: Sequence[Run] = (),
) -> str:
    """The page as text: one file that needs nothing else."""
    results = judge_repeats(objectives, runs)
    comparison = compare(runs, previous) if previous else None
    answered = [run for run in runs if run.latency_ms is not None]
    points = charts.points([*runs, *curve])
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            runs=runs,
            run=shown_in_time(runs),
            objectives=objectives,
            results=results,
            held=all(result.verdict.held for result in results) if results else None,
            cautions=[*cautions(runs, results), *(comparison.warnings if comparison else ())],
            figures=list(key_figures(runs, comparison)),
            estimates=repeats.figures(runs),
            answered=answered,
            quantiles={name: repeats.medians(answered)[name] for name in ("p50", "p99")} if answered else {},
            points=points,
            previous=previous or (),
            previous_answered=[run for run in previous or () if run.latency_ms is not None],
            comparison=comparison,
            stages=mean_stages(runs),
            reasons=reasons(runs),
            configurations={name: pretty(text) for name, text in runs[0].server.items()},
            charts=charts,
            resource_charts=resource_charts,
            arrival=describe_arrival(runs[0]),
            latencies=LATENCIES,
            confidence=CONFIDENCE,
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDERS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("percent", "number", "when", "breakable"):
        environment.filters[name] = getattr(formats, name)
    for name in (
        "figure",
        "ms",
        "rate",
        "share",
        "mib",
        "named",
        "limit",
        "plain",
        "of_unit",
        "signed",
        "size",
        "judged",
        "load_name",
    ):
        environment.filters[name] = getattr(words, name)
    return environment


def shown_in_time(runs: Sequence[Run]) -> Run:
    """Of several repeats the one whose p99 is in the middle: one that really happened, second by second."""
    ordered = sorted(runs, key=lambda run: run.latency_ms.p99 if run.latency_ms else float("inf"))
    return ordered[(len(ordered) - 1) // 2]


def key_figures(runs: Sequence[Run], comparison: Comparison | None) -> Iterator[KeyFigure]:
    """Throughput, two percentiles and the errors; against the previous run where there is one."""
    found = repeats.figures(runs)
    changes = {change.name: change for change in comparison.figures} if comparison else {}

    def note(name: str, otherwise: str) -> Markup:
        change = changes.get(name)
        if change is None or change.change is None:
            return Markup("{}").format(otherwise)
        return Markup("{} {}").format(words.signed(change.change, change.unit), words.judged(change))

    throughput, errors = found["requests_per_second"], found["errors"]
    texts = sum(run.texts_per_second for run in runs) / len(runs)
    per_text = "single texts" if runs[0].texts_per_request == 1 else f"{texts:,.0f} texts a second"
    yield KeyFigure("Answered", words.rate(throughput and throughput.median), note("requests/s", per_text))
    for name, usual in (("p50", "half of the answers came sooner"), ("p99", "one of a hundred came later")):
        estimate = found[name]
        otherwise = usual if estimate else "not known: nothing was answered"
        yield KeyFigure(f"Latency, {name}", words.ms(estimate and estimate.median), note(name, otherwise))
    wrong = sum(run.counts.errors for run in runs)
    sent = sum(run.counts.sent for run in runs)
    yield KeyFigure("Errors", words.share(errors and errors.median), note("errors", f"{wrong:,} of {sent:,} requests"))


class MeanStages(NamedTuple):
    """Stages over all repeats that have them, and what is between them."""

    rows: list[dict[str, float | str]]
    between_ms: float | None
    run: Run
    """The one whose stages are drawn."""


def mean_stages(runs: Sequence[Run]) -> MeanStages | None:
    """Of the run that is shown in time, else of the first that has any."""
    with_stages = [run for run in (shown_in_time(runs), *runs) if run.stages]
    if not with_stages:
        return None
    run = with_stages[0]
    rows: list[dict[str, float | str]] = [
        {
            "name": stage.model,
            **resource_charts.parts_of(stage),
            "total": stage.total_ms,
            "texts": stage.texts_per_execution,
        }
        for stage in run.stages
    ]
    return MeanStages(rows, run.between_stages_ms, run)


def reasons(runs: Sequence[Run]) -> list[tuple[str, int]]:
    """Why there was no right answer, the most frequent first."""
    counted: dict[str, int] = {}
    for run in runs:
        for reason, count in run.reasons.items():
            counted[reason] = counted.get(reason, 0) + count
    ordered = sorted(counted.items(), key=lambda each: -each[1])
    rest = ordered[_MOST_REASONS:]
    others = [(f"… and {len(rest)} other reasons", sum(count for _, count in rest))] if rest else []
    return ordered[:_MOST_REASONS] + others


def pretty(text: str) -> str:
    """A configuration over several lines where it is JSON; else as it is."""
    try:
        document = json.loads(text)
    except ValueError:
        return text
    return json.dumps(document, indent=2, ensure_ascii=False) if isinstance(document, dict | list) else text
