"""The charts of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from millibert_build.report import formats
from millibert_build.report.data import (
    Abstention,
    Bin,
    Calibration,
    Candidate,
    Histogram,
    Phase,
    TokenLengths,
)
from millibert_build.report.figures import pareto_front
from millibert_build.report.svg import Plot, chart, nice_step, tag, titled

Range = tuple[float, float]
# More labels than this are too many for one picture; those that are confused most stay.
HEATMAP_LABELS = 120


def curves(phases: Sequence[Phase], series: Mapping[str, str], label: str, share: bool = False) -> Markup:
    """Values of each epoch, the phases one after the other; `series` maps an attribute of `Epoch` to a CSS class."""
    values = [getattr(epoch, name) for phase in phases for epoch in phase.epochs for name in series]
    count = sum(len(phase.epochs) for phase in phases)
    low, high = _padded(values) if share else (0.0, max(values, default=1.0) * 1.05 or 1.0)
    plot = Plot.between((0.6, count + 0.4), (low, min(high, 1.0) if share else high))
    plot.axis_y(_percent_axis(plot.y.low, plot.y.high) if share else _plain)
    start = 0
    ticks: dict[float, str] = {}
    for phase in phases:
        ticks |= _epoch_ticks(phase, start, count)
        if len(phases) > 1:
            plot.rule(start + 0.5 if start else 0.6, phase.name, "mark" if start else "hidden")
        for name, class_ in series.items():
            _curve(plot, phase, name, class_, start, share)
        start += len(phase.epochs)
    plot.axis_x(lambda at: ticks[at], "epoch", list(ticks))
    return plot.drawn(label)


def _epoch_ticks(phase: Phase, start: int, count: int) -> dict[float, str]:
    step = int(nice_step(count / 12, whole=True))
    shown = [i for i, _ in enumerate(phase.epochs) if (i + 1) % step == 0 or i == 0 < step - 1]
    return {float(start + i + 1): str(phase.epochs[i].number) for i in shown}


def _curve(plot: Plot, phase: Phase, name: str, class_: str, start: int, share: bool) -> None:
    plot.line([(start + i, getattr(epoch, name)) for i, epoch in enumerate(phase.epochs, 1)], class_)
    for index, epoch in enumerate(phase.epochs, 1):
        value, best = getattr(epoch, name), epoch.number == phase.best and name != "loss"
        shown = formats.score(value) if share else f"{value:.3f}"
        title = f"{phase.name}, epoch {epoch.number}{' (kept)' if best else ''}: {shown}"
        plot.dot((start + index, value), title, f"{class_} best" if best else class_, 5.0 if best else 2.5)


def pareto(candidates: Sequence[Candidate], score_name: str) -> Markup:
    """Score over speed; the line joins those that no other beats in both."""
    speeds, scores = [c.texts_per_second for c in candidates], [c.score for c in candidates]
    low, high = _padded(scores)
    plot = Plot.between((0, max(speeds) * 1.08), (low, min(high, 1.0)))
    plot.axis_y(_percent_axis(low, high))
    plot.axis_x(formats.number, "texts per second →")
    plot.line([(c.texts_per_second, c.score) for c in pareto_front(candidates)], "front")
    for candidate in candidates:
        _candidate(plot, candidate, score_name)
    return plot.drawn(f"{score_name} and speed of {len(candidates)} candidates")


def _candidate(plot: Plot, candidate: Candidate, score_name: str) -> None:
    c, at = candidate, (candidate.texts_per_second, candidate.score)
    kind = "chosen" if c.chosen else "passed" if c.passed else "failed"
    speed = formats.number(c.texts_per_second)
    title = f"{c.name}: {score_name} {formats.score(c.score)}, {speed} texts/s, {kind}"
    if kind == "failed":
        x, y = plot.x(at[0]), plot.y(at[1])
        path = f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"
        plot.parts.append(titled("path", title, d=path, class_="cross"))
        return
    plot.dot(at, title, "after" if c.chosen else "plain", 7.0 if c.chosen else 4.0)
    if c.chosen:
        # Above and to the right of a candidate that is not beaten there is nothing else.
        fits = plot.x(at[0]) + 9 + 7 * len(c.name) < plot.x.end
        plot.text(
            (plot.x(at[0]) + (8 if fits else 0), plot.y(at[1]) - 10), c.name, "start" if fits else "end", "strong"
        )


def reliability(calibration: Calibration) -> Markup:
    """Accuracy over confidence, before and after; on the diagonal they are the same."""
    plot = Plot.between((0, 1), (0, 1))
    plot.axis_y(_whole_percent)
    plot.axis_x(_whole_percent, "confidence →")
    plot.line([(0, 0), (1, 1)], "ideal")
    for name, class_, bins in (("before", "before", calibration.before), ("after", "after", calibration.after)):
        filled = [b for b in bins if b.confidence is not None and b.accuracy is not None]
        plot.line([(b.confidence or 0, b.accuracy or 0) for b in filled], class_)
        most = max((b.count for b in filled), default=1)
        for b in filled:
            shares = f"confidence {formats.percent(b.confidence)}, right {formats.percent(b.accuracy)}"
            title = f"{name}: {shares}, {b.count:,} answers"
            plot.dot((b.confidence or 0, b.accuracy or 0), title, class_, 2.5 + 4.5 * (b.count / most) ** 0.5)
    return plot.drawn("Reliability diagram: accuracy over confidence, before and after temperature scaling")


def confidences(before: Sequence[Bin], after: Sequence[Bin]) -> Markup:
    """How many answers have which confidence, before and after."""
    total = sum(b.count for b in after) or 1
    highest = max((b.count for b in (*before, *after)), default=1) / total
    plot = Plot.between((0, 1), (0, highest * 1.05 or 1.0))
    plot.axis_y(_whole_percent)
    plot.axis_x(_whole_percent, "confidence →")
    for b in after:
        span = f"{formats.percent(b.low, 0)} to {formats.percent(b.high, 0)}"
        plot.column((b.low, b.high), b.count / total, f"after, {span}: {b.count:,} answers", "after")
    steps = [point for b in before for point in ((b.low, b.count / total), (b.high, b.count / total))]
    plot.line(steps, "before")
    return plot.drawn("Share of the answers by confidence, before and after")


def abstention(result: Abstention) -> Markup:
    """Best scores of texts in and out of scope, and the threshold between them."""
    groups = [("in scope", "after", result.in_scope), ("out of scope", "before", result.out_of_scope)]
    drawn = [(name, class_, histogram) for name, class_, histogram in groups if histogram is not None]
    highest = max((share for _, _, histogram in drawn for share in _shares(histogram)), default=1.0)
    plot = Plot.between((0, 1), (0, highest * 1.1 or 1.0))
    plot.axis_y(_percent_axis(0, highest))
    plot.axis_x(_whole_percent, "score of the best label →")
    for name, class_, histogram in drawn:
        for low, high, share, count in zip(
            histogram.edges, histogram.edges[1:], _shares(histogram), histogram.counts, strict=False
        ):
            title = f"{name}, {formats.percent(low, 0)} to {formats.percent(high, 0)}: {count:,} texts"
            plot.column((low, high), share, title, f"{class_} half")
    plot.rule(result.threshold, f"threshold {result.threshold:.3f}")
    return plot.drawn("Score of the best label for texts in and out of scope")


def _shares(histogram: Histogram) -> list[float]:
    total = sum(histogram.counts) or 1
    return [count / total for count in histogram.counts]


def token_lengths(tokens: TokenLengths) -> Markup:
    """Texts by their number of tokens."""
    edges, counts = tokens.histogram.edges, tokens.histogram.counts
    plot = Plot.between((min(edges[0], 0), edges[-1]), (0, max(counts) * 1.12))
    plot.axis_y(formats.number, whole=True)
    plot.axis_x(formats.number, "tokens per text", whole=True)
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        span = f"{low:g}" if high - low == 1 else f"{low:g} to {high - 1:g}"
        plot.column((low, high), count, f"{span} tokens: {count:,} texts", "after")
    plot.rule(tokens.median, f"median {tokens.median:g}")
    plot.rule(tokens.p95, f"95 % ≤ {tokens.p95:g}", row=1)
    if tokens.limit is not None and tokens.limit <= edges[-1]:
        plot.rule(tokens.limit, f"limit {tokens.limit}", row=2)
    return plot.drawn("Texts by their number of tokens")


def label_counts(labels: Sequence[str], counts: Sequence[int], split: str) -> Markup:
    """Texts of each label, the most frequent first."""
    ranked = sorted(zip(counts, labels, strict=True), key=lambda pair: (-pair[0], pair[1]))
    plot = Plot.between((0, len(ranked)), (0, max(counts, default=0) * 1.08 or 1.0))
    plot.axis_y(formats.number, whole=True)
    for rank, (count, label) in enumerate(ranked):
        plot.column((rank, rank + 1), count, f"{label}: {count:,} {split} texts", "after")
    plot.axis_x(lambda _: "", f"{len(ranked)} labels, the most frequent first", [])
    return plot.drawn(f"{split.capitalize()} texts of each label")


def heatmap(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Markup:
    """Right labels by given labels. Only mistakes are coloured, relative to the worst; the diagonal stays grey."""
    order = confusion_order(counts)[:HEATMAP_LABELS]
    cell = 10
    side = cell * len(order)
    parts = [tag("rect", x=0, y=0, width=side, height=side, class_="sheet")]
    for at in range(0, len(order) + 1, 10):
        parts.append(tag("path", d=f"M{at * cell} 0V{side}M0 {at * cell}H{side}", class_="grid"))
    worst = max((_share(counts, a, b) for a in order for b in order if a != b), default=0.0) or 1.0
    for row, right in enumerate(order):
        for column, given in enumerate(order):
            if counts[right][given]:
                parts.append(_cell(labels, counts, (right, given), (column * cell, row * cell), worst))
    parts.append(tag("rect", x=-9, y=-9, width=cell, height=cell, class_="here"))
    return chart(parts, f"Confusion matrix of {len(order)} labels", side, side)


def _cell(
    labels: Sequence[str], counts: Sequence[Sequence[int]], pair: tuple[int, int], place: tuple[int, int], worst: float
) -> Markup:
    right, given = pair
    count, total = counts[right][given], sum(counts[right])
    if right == given:
        title, look = f"{labels[right]}: {count} of {total} right", {"class_": "hit"}
    else:
        strength = 0.2 + 0.8 * _share(counts, right, given) / worst
        title = f"{labels[right]} → {labels[given]}: {count} of {total}"
        look = {"class_": "miss", "fill_opacity": f"{strength:.2f}"}
    return titled("rect", title, x=place[0], y=place[1], width=10, height=10, **look)


def _share(counts: Sequence[Sequence[int]], right: int, given: int) -> float:
    return counts[right][given] / (sum(counts[right]) or 1)


def confusion_order(counts: Sequence[Sequence[int]]) -> list[int]:
    """Labels that are taken for each other next to each other: chains, joined at their ends, the worst pairs first."""
    size = len(counts)
    chains = {label: [label] for label in range(size)}
    pairs = [(counts[a][b] + counts[b][a], a, b) for a in range(size) for b in range(a + 1, size)]
    for weight, a, b in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
        one, two = chains[a], chains[b]
        if not weight or one is two or a not in (one[0], one[-1]) or b not in (two[0], two[-1]):
            continue
        joined = (one if one[-1] == a else one[::-1]) + (two if two[0] == b else two[::-1])
        chains.update(dict.fromkeys(joined, joined))
    distinct = list({id(chain): chain for chain in chains.values()}.values())
    wrong = [sum(row) - row[label] + sum(other[label] for other in counts) for label, row in enumerate(counts)]
    return [label for chain in sorted(distinct, key=lambda c: -sum(wrong[i] for i in c)) for label in chain]


def _padded(values: Sequence[float]) -> Range:
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = max((high - low) * 0.08, 0.002)
    return max(low - room, 0.0), high + room


def _plain(value: float) -> str:
    return f"{value:g}"


def _whole_percent(value: float) -> str:
    return f"{100 * value:g} %"


def _percent_axis(low: float, high: float) -> _Percent:
    return _Percent(2 if high - low < 0.004 else 1 if high - low < 0.04 else 0)


class _Percent:
    """Percent with as many digits as an axis needs."""

    def __init__(self, digits: int) -> None:
        self.digits = digits

    def __call__(self, value: float) -> str:
        """The value, written."""
        return f"{100 * value:.{self.digits}f} %"
