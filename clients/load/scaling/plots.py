"""Drawings: a service curve, and the course of a scenario."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from load.scaling.curve import Curve
from load.scaling.scenarios import Scenario
from load.scaling.simulation import Moment, Setting
from millibert_build.report.svg import HEIGHT, WIDTH, Plot, chart, nice_step, tag

_STYLE = Markup("""
svg { background: #fcfcfa; font: 11px system-ui, sans-serif; fill: #1d1f21 } .grid { stroke: #dcdcd5 }
.axis { stroke: #5c6166 } .line { fill: none; stroke-width: 1.6 } .name, .note { fill: #5c6166 }
.a { stroke: #0b66a8 } .b { stroke: #c75a00 } .c { stroke: #00684f; stroke-dasharray: 4 3 }
.dot { stroke: none } .dot.a { fill: #0b66a8 } .dot.b { fill: #c75a00 }
.mark, .limit { stroke: #b03a00; stroke-dasharray: 3 3 }
.out { fill: #b03a00; fill-opacity: .14 } .event { stroke: #5c6166; stroke-dasharray: 2 3 }
""")
# Points of a line: more are not seen, and make the file large.
_POINTS = 400
_FEWEST_MS, _MOST_MS = 0, 4  # powers of ten of a millisecond, on axes of latency


def write_curve(path: Path, curve: Curve, p99_ms: float, highest: float) -> None:
    """Latency and what waits against the rate, and where the objective ends; a dot is a median of what was measured."""
    latency = Plot.between((0, curve.highest), (_FEWEST_MS, _MOST_MS))
    latency.parts.append(tag("style", _STYLE))
    latency.axis_y(_power_ms, whole=True)
    _measured(latency, curve, "p50_ms", "a")
    _measured(latency, curve, "p99_ms", "b")
    _limit(latency, math.log10(p99_ms))
    latency.rule(highest, f"{highest:,.0f}/s within {p99_ms:g} ms")
    waiting = Plot.between((0, curve.highest), (-2, 4))
    waiting.axis_y(lambda power: f"{10**power:,g}", whole=True)
    _measured(waiting, curve, "waiting", "a")
    waiting.rule(highest, f"{curve.at('waiting')(highest):.1f} wait")
    for plot in (latency, waiting):
        plot.axis_x(lambda rate: f"{rate:,.0f}", "requests a second, at random")
    what = f"{curve.model}, {curve.precision}, {curve.cpus} CPUs"
    _write(
        path,
        [latency, waiting],
        [f"{what}, measured: p50 (blue) and p99 (orange)", "requests that wait, of all models"],
    )


def _measured(plot: Plot, curve: Curve, name: str, class_: str) -> None:
    """A figure at each measured rate, on a logarithmic axis."""
    points = [(point.rate, math.log10(max(getattr(point.median, name), 0.01))) for point in curve.points]
    plot.line(points, class_)
    for rate, power in points:
        plot.dot((rate, power), f"{10**power:.3g} at {rate:,.0f}/s", class_, radius=2.5)


def write_scenario(path: Path, setting: Setting, scenario: Scenario, moments: Sequence[Moment]) -> None:
    """Requests, replicas and p99 over time; seconds outside the objective are shaded."""
    shown = moments[:: max(1, len(moments) // _POINTS)]
    end = moments[-1].at
    unit, size = ("hours", 3600) if end > 4 * 3600 else ("minutes", 60)

    def panel(top: float, low: float = 0.0) -> Plot:
        plot = Plot.between((0, end / size), (low, top))
        _shade(plot, moments, size)
        for at, what in _events(scenario):
            plot.rule(at / size, what, "event")
        return plot

    def line(plot: Plot, name: str, class_: str) -> None:
        plot.line(_corners([(moment.at / size, getattr(moment, name)) for moment in shown]), class_)

    rates = panel(1.1 * max(moment.rate for moment in moments))
    rates.parts.insert(0, tag("style", _STYLE))
    rates.axis_y(lambda value: f"{value:,.0f}")
    line(rates, "rate", "a")
    replicas = panel(1.1 * max(max(moment.there, moment.replicas) for moment in moments))
    replicas.axis_y(lambda value: f"{value:g}", whole=True)
    for name, class_ in (("replicas", "a"), ("ready", "b"), ("ideal", "c")):
        line(replicas, name, class_)
    latency = panel(_MOST_MS, _FEWEST_MS)
    latency.axis_y(_power_ms, whole=True)
    _limit(latency, math.log10(setting.p99_ms))
    # The worst of each stretch: what is short must not be lost.
    every = max(1, len(moments) // _POINTS)
    worst = [max(moments[at : at + every], key=lambda it: it.second.p99_ms) for at in range(0, len(moments), every)]
    latency.line(_corners([(it.at / size, math.log10(max(it.second.p99_ms, 1.0))) for it in worst]), "a")
    for plot in (rates, replicas, latency):
        plot.axis_x(lambda value: f"{value:g}", unit, ticks=_ticks(end / size))
    titles = [
        f"requests/s: {scenario.says}",
        "replicas, simulated: wanted (blue), ready (orange), ideal (green)",
        f"p99, simulated; above {setting.p99_ms:g} ms, or requests refused or lost: shaded",
    ]
    _write(path, [rates, replicas, latency], titles)


def _corners(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same line without the points inside its horizontal parts."""
    inner = zip(points, points[1:], points[2:], strict=False)
    return [points[0], *(here for before, here, after in inner if not before[1] == here[1] == after[1]), points[-1]]


def _power_ms(power: float) -> str:
    return f"{10**power:g} ms" if power < 3 else f"{10 ** (power - 3):g} s"


def _ticks(end: float) -> list[float]:
    step = 3.0 if end == 24 or 23 < end < 24 else nice_step(end / 6, whole=True)
    return [index * step for index in range(int(end / step + 1e-3) + 1)]


def _limit(plot: Plot, y: float) -> None:
    plot.parts.append(tag("line", x1=plot.x.start, x2=plot.x.end, y1=plot.y(y), y2=plot.y(y), class_="limit"))


def _shade(plot: Plot, moments: Sequence[Moment], size: float) -> None:
    """A band for each stretch of seconds outside the objective."""
    start = None
    for moment in (*moments, None):
        out = moment is not None and not moment.within
        if out and start is None:
            start = moment.at if moment is not None else None
        if not out and start is not None:
            stop = moments[-1].at + 1 if moment is None else moment.at
            left, right = plot.x(start / size), plot.x(stop / size)
            height = plot.y.start - plot.y.end
            plot.parts.append(
                tag("rect", x=left, y=plot.y.end, width=max(right - left, 0.7), height=height, class_="out")
            )
            start = None


def _events(scenario: Scenario) -> list[tuple[float, str]]:
    found = []
    if scenario.zone_lost is not None:
        found.append((scenario.zone_lost, "a zone goes"))
    if scenario.metrics_lost is not None:
        found += list(zip(scenario.metrics_lost, ("metrics go", "metrics are back"), strict=True))
    return found


def _write(path: Path, plots: Sequence[Plot], titles: Sequence[str]) -> None:
    """One panel under the other."""
    parts = []
    for row, (plot, title) in enumerate(zip(plots, titles, strict=True)):
        plot.text((8, plot.y.end - 20), title)
        parts.append(tag("g", Markup("").join(plot.parts), transform=f"translate(0 {row * (HEIGHT + 14) + 14})"))
    drawing = chart(parts, titles[0], WIDTH, len(plots) * (HEIGHT + 14))
    path.parent.mkdir(parents=True, exist_ok=True)
    # As a file of its own, a drawing must say what it is.
    path.write_text(str(drawing).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1), encoding="utf-8")
