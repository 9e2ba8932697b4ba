"""Charts of what processes used, of where a request's time goes, and of how figures changed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from load.comparison import Change, Comparison
from load.report_page.axes import broken, drawn, thinned, time_axis
from load.report_page.charts import SERIES
from load.report_page.words import figure, ms, signed, size
from load.results import Run, Stage
from millibert_build.report.svg import WIDTH, Plot, Scale, tag, titled

PARTS = ("queue", "input", "compute", "output", "other")
SHARED = "shared memory"
_LEFT, _RIGHT, _ROW = 114.0, 72.0, 26.0
# A change beyond this leaves the chart of changes; the table has its number.
_MOST_CHANGE = 1.0


def processes(run: Run) -> list[str]:
    """All that were seen, in the order of their first appearance."""
    return list(dict.fromkeys(name for look in run.resources for name in look.cpus))


def cpu(run: Run) -> Markup:
    """CPUs of each process."""
    return _over_time(run, "CPUs used by each process", lambda at: run.resources[at].cpus, lambda value: f"{value:g}")


def memory(run: Run) -> Markup:
    """Resident memory of each process, and the server's shared memory."""

    def of_look(at: int) -> Mapping[str, float]:
        look = run.resources[at]
        shared = {} if look.shared_memory_mib is None else {SHARED: look.shared_memory_mib}
        return {**look.memory_mib, **shared}

    return _over_time(run, "Resident memory of each process, MiB", of_look, lambda value: f"{value:,.0f}")


def class_of(run: Run, name: str) -> str:
    """The colour of a process, the same in every chart."""
    names = [*processes(run), SHARED]
    return f"s{names.index(name) % SERIES + 1}"


class Used(NamedTuple):
    """What a process used over a run."""

    name: str
    cpus_mean: float | None
    cpus_most: float | None
    memory_first: float | None
    memory_last: float | None


def rows(run: Run) -> list[Used]:
    """Of each process, and of the shared memory."""
    found = []
    for name in processes(run):
        cpus = [look.cpus[name] for look in run.resources if name in look.cpus]
        held = [look.memory_mib[name] for look in run.resources if name in look.memory_mib]
        found.append(Used(name, statistics.fmean(cpus), max(cpus), *((held[0], held[-1]) if held else (None, None))))
    shared = [look.shared_memory_mib for look in run.resources if look.shared_memory_mib is not None]
    return [*found, Used(SHARED, None, None, shared[0], shared[-1])] if shared else found


def _over_time(
    run: Run, label: str, of_look: Callable[[int], Mapping[str, float]], form: Callable[[float], str]
) -> Markup:
    looks = [of_look(at) for at in range(len(run.resources))]
    names = [name for name in (*processes(run), SHARED) if any(name in look for look in looks)]
    most = max((value for look in looks for value in look.values()), default=0.0)
    end = max(run.seconds, run.resources[-1].at)
    plot = Plot.between((0.0, end), (0.0, 1.08 * most or 1.0))
    plot.axis_y(form)
    time_axis(plot, run.warm_up_seconds)
    for name in names:
        line = thinned([look.get(name) for look in looks], statistics.fmean)
        broken(plot, [(run.resources[at].at, value) for at, value in line], class_of(run, name))
    text = "; ".join(f"{name} up to {figure(max(look.get(name, 0.0) for look in looks))}" for name in names)
    return drawn(plot, label, text)


def parts_of(stage: Stage) -> dict[str, float]:
    """Milliseconds of each part of a stage; `other` is Triton's handling, which no part names."""
    named = {part: getattr(stage, f"{part}_ms") for part in PARTS[:-1]}
    return {**named, "other": max(0.0, stage.total_ms - sum(named.values()))}


def stages(found: Sequence[Stage], between_ms: float | None) -> Markup:
    """A bar for each stage, its parts side by side."""
    rows = [(stage.model, parts_of(stage)) for stage in found]
    if between_ms is not None:
        rows.append(("between stages", {"other": max(0.0, between_ms)}))
    most = max(sum(parts.values()) for _, parts in rows) or 1.0
    x = Scale(0.0, most, _LEFT, WIDTH - _RIGHT)
    plot = Plot(x, Scale(0.0, 1.0, 10 + _ROW * len(rows), 10))
    for value in x.ticks(4):
        plot.parts.append(tag("line", x1=x(value), x2=x(value), y1=plot.y.end, y2=plot.y.start, class_="grid"))
    plot.axis_x(lambda value: f"{value:g}", "milliseconds a request, mean →", x.ticks(4))
    for row, (name, parts) in enumerate(rows):
        _bar(plot, 10 + _ROW * row, name, parts)
    text = "; ".join(f"{name} {ms(sum(parts.values()))}" for name, parts in rows)
    return drawn(plot, "Mean time of a request in each stage", text, plot.y.start + 42)


def _bar(plot: Plot, top: float, name: str, parts: Mapping[str, float]) -> None:
    plot.text((plot.x.start - 8, top + 17), shortened(name), "end", "side")
    at = 0.0
    for part, value in parts.items():
        if value > 0:
            left, right = plot.x(at), plot.x(at + value)
            title = f"{name}, {part}: {ms(value)}"
            plot.parts.append(
                titled("rect", title, x=left, y=top + 4, width=max(right - left, 0.3), height=18, class_=f"bar {part}")
            )
            at += value
    plot.text((plot.x(at) + 5, top + 17), ms(at))


def shortened(name: str, most: int = 15) -> str:
    """A name that fits beside a bar."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def changes(comparison: Comparison) -> Markup:
    """How much each figure changed, on the band inside which a change is noise; left is less."""
    shown = [
        each for each in (*comparison.figures, *comparison.stages) if each.unit != "share" and each.change is not None
    ]
    reach = max((min(max(abs(each.change or 0.0), each.band or 0.0), _MOST_CHANGE) for each in shown), default=0.0)
    reach = 1.1 * max(reach, 0.05)
    x = Scale(-reach, reach, _LEFT, WIDTH - _RIGHT)
    plot = Plot(x, Scale(0.0, 1.0, 10 + _ROW * len(shown), 10))
    ticks = x.ticks(5)
    for value in ticks:
        class_ = "axis" if value == 0 else "grid"
        plot.parts.append(tag("line", x1=x(value), x2=x(value), y1=plot.y.end, y2=plot.y.start, class_=class_))
    plot.axis_x(
        lambda value: f"{100 * value:+g} %".replace("-", "−") if value else "0",
        "change against the previous run",
        ticks,
    )
    for row, each in enumerate(shown):
        _change(plot, 10 + _ROW * row, each)
    text = "; ".join(f"{each.name} {signed(each.change)}, {each.judgement.value}" for each in shown)
    return drawn(plot, "Changes and their noise bands", text, plot.y.start + 42)


def _change(plot: Plot, top: float, found: Change) -> None:
    x, value, middle = plot.x, found.change or 0.0, top + _ROW / 2
    plot.text((x.start - 8, middle + 4), shortened(found.name), "end", "side")
    if found.band is not None:
        band = min(found.band, x.high)
        title = f"{found.name}: up to ±{size(band)} is noise"
        left = x(-band)
        plot.parts.append(titled("rect", title, x=left, y=middle - 7, width=x(band) - left, height=14, class_="noise"))
    inside = math.copysign(min(abs(value), x.high), value)
    class_ = found.judgement.name.lower()
    title = f"{found.name}: {signed(found.change)}, {found.judgement.value}"
    plot.parts.append(titled("circle", title, cx=x(inside), cy=middle, r=4.5, class_=f"dot {class_}"))
    plot.text((x.end + 6, middle + 4), signed(found.change))
