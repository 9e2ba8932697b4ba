"""The page and the JSON beside it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from pydantic import TypeAdapter

from millibert_build.report import charts, formats
from millibert_build.report.data import LabelResult, Report, Stage

# Up to so many labels the confusion matrix is a table of counts.
SMALL = 12
_ROWS_SHOWN = 15


class KeyFigure(NamedTuple):
    """One of the figures on top."""

    caption: str
    value: str
    note: Markup


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write report.html and report.json into `folder`; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    html, document = folder / "report.html", folder / "report.json"
    _replace(document, as_json(report))
    _replace(html, render(report))
    return html, document


def read_report(path: Path) -> Report:
    """The report that a report.json holds."""
    return TypeAdapter(Report).validate_json(path.read_bytes())


def as_json(report: Report) -> str:
    """The same data for a machine."""
    document = {**dataclasses.asdict(report), "score_name": report.score_name}
    return json.dumps(document, default=_plain, ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def render(report: Report) -> str:
    """The page: one file that needs nothing else."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("percent", "score", "number", "small", "size", "points", "times", "shrunk", "when", "breakable"):
        environment.filters[name] = getattr(formats, name)
    return environment.get_template("template.html.j2").render(
        report=report,
        charts=charts,
        figures=key_figures(report),
        results=worst_first(report.per_label),
        heat=heat(report),
        small=SMALL,
        zip=zip,
        rows_shown=_ROWS_SHOWN,
    )


def key_figures(report: Report) -> list[KeyFigure]:
    """At most six figures that say how the build went."""
    stage = report.chosen or (report.stages[-1] if report.stages else None)
    figures = _stage_figures(report, stage) if stage is not None else []
    if report.calibration is not None:
        c = report.calibration
        note = Markup("{} before, temperature {:.2f}").format(formats.percent(c.error_before), c.temperature)
        figures.append(KeyFigure("Calibration error", formats.percent(c.error_after), note))
    if report.abstention is not None and report.abstention.out_of_scope_rejected is not None:
        a = report.abstention
        note = Markup("while {} of the texts in scope pass").format(formats.percent(a.in_scope_recall))
        figures.append(KeyFigure("Out of scope, rejected", formats.percent(a.out_of_scope_rejected), note))
    return figures


def _stage_figures(report: Report, stage: Stage) -> list[KeyFigure]:
    base = report.baseline
    assert base is not None
    figures = []
    same = stage is base
    if stage.test is not None:
        against = formats.points(stage.test.score, base.test.score if base.test is not None else None)
        note = escape(stage.name) if same else Markup("{} against {}").format(against, base.name)
        figures.append(KeyFigure(f"Test {report.score_name}", formats.score(stage.test.score), note))
    if stage.test is not None and stage.test.agreement is not None and not same:
        note = Markup("same answer as {}").format(base.name)
        figures.append(KeyFigure("Agreement", formats.score(stage.test.agreement), note))
    if stage.texts_per_second is not None:
        note = formats.times(stage.texts_per_second, base.texts_per_second) if not same else Markup("in process")
        figures.append(KeyFigure("Texts per second", formats.number(stage.texts_per_second), note))
    if stage.size_bytes is not None:
        note = formats.shrunk(stage.size_bytes, base.size_bytes) if not same else Markup("on disk")
        figures.append(KeyFigure("Size", formats.size(stage.size_bytes), note))
    return figures


def worst_first(results: Sequence[LabelResult]) -> list[LabelResult]:
    """Labels by F1, those without a test text last."""
    return sorted(results, key=lambda r: (not r.support, r.f1 or 0.0, r.label))


def heat(report: Report) -> list[list[int]]:
    """For a small confusion matrix: how dark each mistake is, 0 to 50; the diagonal is 0."""
    counts = report.confusion or ()
    if len(counts) > SMALL:
        return []
    shares = [[0.0 if a == b else n / (sum(row) or 1) for b, n in enumerate(row)] for a, row in enumerate(counts)]
    worst = max((max(row) for row in shares), default=0.0) or 1.0
    return [[round(50 * (share / worst) ** 0.5) for share in row] for row in shares]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} does not belong into a report")


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
