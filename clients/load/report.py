"""A benchmark's figures for people: a table, and a plot of throughput against latency."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from millibert_build.report.svg import WIDTH, Plot, chart, tag

_COLOURS = ("#0b66a8", "#c75a00", "#00684f", "#8a3ffc", "#b03a00", "#5c6166", "#a8328c", "#7a7a00", "#00808a")
_STYLE = Markup("""
svg { background: #fcfcfa; font: 11px system-ui, sans-serif; fill: #1d1f21 } .grid { stroke: #dcdcd5 }
.axis { stroke: #5c6166 } .line { fill: none; stroke-width: 1.6 } .name, .note { fill: #5c6166 }
""")
_LEGEND_ROW = 15
# A series is a line of the plot: all but the concurrency.
_SERIES = ("form", "transport", "texts")


def table(report: Mapping[str, Any]) -> str:
    """What was measured, on what, and every case."""
    lines = [
        f"{report['model']}, {report['precision']}, {report['cpus']} CPUs ({report['cpu']}), {report['texts']} texts; "
        f"load from {report['load']}, on the same machine; medians of {report['rounds']} runs",
        *_engines(report),
        f"accuracy served {report['served_accuracy']:.2%}, in process {report['engine_accuracy']:.2%}, same label "
        f"{report['same_label']:.2%}",
        f"{'form':>7} {'mix':>6} {'':>5} {'texts each':>11} {'under way':>10} {'texts/s':>9} {'of engine':>10} "
        f"{'p50 ms':>8} {'p99 ms':>8}",
        *map(_row, report["cases"]),
    ]
    return "\n".join(lines)


def _engines(report: Mapping[str, Any]) -> Iterable[str]:
    for mix, engine in report["engine"].items():
        lengths = report["mixes"][mix]
        yield (
            f"engine alone, in process, {mix} ({lengths['mean_tokens']:.0f} tokens a text, longest "
            f"{lengths['longest']}): {engine['texts_per_second']:,.0f} texts/s sorted by length, "
            f"{engine['batch_1_ms']:.2f} ms for one text"
        )


def _row(case: Mapping[str, Any]) -> str:
    head = f"{case['form']:>7} {case['mix']:>6} {case['transport']:>5} {case['texts']:>11} {case['concurrency']:>10}"
    if not case["runs"]:
        return f"{head}  refused (busy), or never steady"
    # One text after the other: what is on top of the engine's own time says more than a share of its rate.
    above = case.get("above_engine_ms")
    engine = f"{case['of_engine']:.2f}" if above is None else f"{above:+.2f} ms"
    return f"{head} {case['texts_per_second']:>9,.0f} {engine:>10} {case['p50_ms']:>8.2f} {case['p99_ms']:>8.2f}"


def write_plot(path: Path, report: Mapping[str, Any]) -> None:
    """Throughput against the 99th percentile of latency, a line for each form, transport and size of requests."""
    shown = [case for case in report["cases"] if case["runs"] and case["mix"] == "data"]
    series = [list(group) for _, group in itertools.groupby(sorted(shown, key=_key), key=_key)]
    drawing = _drawn(series, f"{report['model']}, {report['precision']}, {report['cpus']} CPUs")
    # As a file of its own, a drawing must say what it is.
    path.write_text(str(drawing).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1), encoding="utf-8")


def _key(case: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(case[name] for name in _SERIES)


def _drawn(series: Sequence[Sequence[Mapping[str, Any]]], title: str) -> Markup:
    cases = [case for group in series for case in group]
    if not cases:
        return chart([tag("style", _STYLE)], f"{title}: no steady figures")
    low = math.floor(math.log10(min(case["p99_ms"] for case in cases)))
    high = math.ceil(math.log10(max(case["p99_ms"] for case in cases)))
    plot = Plot.between((0, 1.05 * max(case["texts_per_second"] for case in cases)), (low, max(high, low + 1)))
    plot.parts.append(tag("style", _STYLE))
    plot.axis_y(lambda power: f"{10**power:g} ms", whole=True)
    plot.axis_x(lambda rate: f"{rate:,.0f}", "texts a second")
    plot.text((plot.x.start, plot.y.end - 9), f"{title}: 99th percentile of latency")
    bottom = plot.y.start + 48.0
    for row, (group, colour) in enumerate(zip(series, itertools.cycle(_COLOURS), strict=False)):
        _add_line(plot, sorted(group, key=lambda case: case["concurrency"]), colour, bottom + row * _LEGEND_ROW)
    return chart(plot.parts, title, WIDTH, bottom + len(series) * _LEGEND_ROW)


def _add_line(plot: Plot, group: Sequence[Mapping[str, Any]], colour: str, legend_y: float) -> None:
    points = [(case["texts_per_second"], math.log10(case["p99_ms"])) for case in group]
    path = " ".join(f"{plot.x(x):.1f},{plot.y(y):.1f}" for x, y in points)
    plot.parts.append(tag("polyline", points=path, class_="line", stroke=colour))
    for (x, y), case in zip(points, group, strict=True):
        label = f"{case['concurrency']} under way: {case['texts_per_second']:,.0f} texts/s, {case['p99_ms']:.1f} ms"
        plot.parts.append(tag("circle", tag("title", label), cx=plot.x(x), cy=plot.y(y), r=3, fill=colour))
    first = group[0]
    under_way = ", ".join(str(case["concurrency"]) for case in group)
    name = f"{first['form']}, {first['transport']}, {first['texts']} texts a request; under way: {under_way}"
    plot.parts.append(tag("rect", x=plot.x.start, y=legend_y - 8, width=12, height=3, fill=colour))
    plot.text((plot.x.start + 18, legend_y - 3), name)
