"""What the load report's charts have in common: logarithmic axes, time axes with the warm-up shaded, descriptions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup

from millibert_build.report.svg import Plot, Scale, chart, tag

# A line of more points than this is drawn no better by more.
MOST_POINTS = 240
_STEPS = (1, 2, 5)


def log_plot(x: tuple[float, float], values: Iterable[float]) -> Plot:
    """Axes with a logarithmic y that all values, above 0, fit on; give `math.log10` of a value to its marks."""
    low, high = log_range(values)
    return Plot.between(x, (low, high))


def log_range(values: Iterable[float]) -> tuple[float, float]:
    """Powers of ten around values above 0, with some room; at least half a decade."""
    logs = [math.log10(value) for value in values if value > 0] or [0.0]
    low, high = min(logs) - 0.05, max(logs) + 0.05
    lacking = max(0.0, 0.5 - (high - low))
    return low - lacking / 2, high + lacking / 2


def log_axis_y(plot: Plot) -> None:
    """Grid lines at 1, 2 and 5 of each power of ten, or at powers only where there are many."""
    for value in log_ticks(plot.y, 6):
        at = plot.y(math.log10(value))
        plot.parts.append(tag("line", x1=plot.x.start, x2=plot.x.end, y1=at, y2=at, class_="grid"))
        plot.parts.append(tag("text", figure_short(value), x=plot.x.start - 6, y=at + 4, text_anchor="end"))


def log_axis_x(plot: Plot, title: str) -> None:
    """The same below the plot, with thin lines."""
    ticks = log_ticks(plot.x, 7)
    for value in ticks:
        at = plot.x(math.log10(value))
        plot.parts.append(tag("line", x1=at, x2=at, y1=plot.y.start, y2=plot.y.start + 4, class_="axis"))
    plot.axis_x(lambda at: figure_short(10**at), title, [math.log10(value) for value in ticks])


def log_ticks(scale: Scale, most: int) -> list[float]:
    """Round values of a scale of logarithms, as many as there is room for."""
    powers = range(math.floor(scale.low), math.ceil(scale.high) + 1)
    for steps in (_STEPS, (1, 3), (1,)):
        values = [step * 10.0**power for power in powers for step in steps]
        inside = [value for value in values if scale.low - 1e-9 <= math.log10(value) <= scale.high + 1e-9]
        if len(inside) <= most:
            return inside
    return inside[:: math.ceil(len(inside) / most)]


def figure_short(value: float) -> str:
    """A round number: "0.2", "5", "1,000"."""
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def time_axis(plot: Plot, warm_up_seconds: float) -> None:
    """Seconds below; what is warm-up is shaded, before anything else is drawn."""
    if warm_up_seconds > 0:
        left, right = plot.x(0.0), plot.x(min(warm_up_seconds, plot.x.high))
        plot.parts.insert(
            0,
            tag(
                "rect",
                tag("title", f"warm-up, {warm_up_seconds:.1f} s: not counted"),
                x=left,
                y=plot.y.end,
                width=max(right - left, 0.5),
                height=plot.y.start - plot.y.end,
                class_="warm-up",
            ),
        )
    plot.axis_x(lambda at: f"{at:g}", "seconds", whole=True)


def broken(plot: Plot, points: Sequence[tuple[float, float | None]], class_: str) -> None:
    """A line that stops where there is no value; a lone value is a dot."""
    part: list[tuple[float, float]] = []
    for x, y in (*points, (math.inf, None)):
        if y is not None:
            part.append((x, y))
            continue
        if len(part) == 1:
            plot.parts.append(
                tag("circle", cx=plot.x(part[0][0]), cy=plot.y(part[0][1]), r=2.5, class_=f"dot {class_}")
            )
        elif part:
            plot.line(part, class_)
        part = []


def thinned(values: Sequence[float | None], combine: Callable[[list[float]], float]) -> list[tuple[int, float | None]]:
    """At most `MOST_POINTS` values, each with its place: of more, so many neighbours become one."""
    width = math.ceil(len(values) / MOST_POINTS) or 1
    found: list[tuple[int, float | None]] = []
    for start in range(0, len(values), width):
        known = [value for value in values[start : start + width] if value is not None]
        found.append((start, combine(known) if known else None))
    return found


def drawn(plot: Plot, label: str, description: str, height: float | None = None) -> Markup:
    """The chart with a name and, for those who do not see it, what it shows."""
    parts = [tag("desc", description), *plot.parts]
    return chart(parts, label) if height is None else chart(parts, label, height=height)
