"""Small inline SVG charts: scales, axes and marks. Colours come from the page's CSS classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

WIDTH, HEIGHT = 440, 264
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 16, 24, 40
# Width of a character of the charts' text, roughly.
_CHARACTER = 6.2


def tag(name: str, content: str | Markup = "", **attributes: object) -> Markup:
    """An element; everything in it is escaped, `class_` and `stroke_width` lose and change their underscores."""
    pairs = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _short(value)) for key, value in attributes.items()
    )
    return Markup("<{}{}>{}</{}>").format(name, pairs, content, name)


def titled(name: str, title: str, **attributes: object) -> Markup:
    """An element that says `title` when pointed at."""
    return tag(name, tag("title", title), **attributes)


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def chart(parts: Iterable[Markup], label: str, width: float = WIDTH, height: float = HEIGHT) -> Markup:
    """The whole drawing; `label` says to a screen reader what it shows."""
    return tag(
        "svg", Markup("").join(parts), viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label, class_="chart"
    )


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` as positions from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The position of a value."""
        span = self.high - self.low or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)

    def ticks(self, most: int = 5, whole: bool = False) -> list[float]:
        """Round values along the scale."""
        step = nice_step((self.high - self.low) / most, whole)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(index * step, 10) for index in range(first, last + 1)]


def nice_step(least: float, whole: bool = False) -> float:
    """The first of 1, 2, 2.5 or 5 times a power of ten that is not below `least`."""
    least = max(least, 1.0 if whole else 1e-9)
    power = 10.0 ** math.floor(math.log10(least))
    factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    return next(factor * power for factor in factors if factor * power >= least * (1 - 1e-9))


@dataclass
class Plot:
    """Axes, and the marks that were put on them."""

    x: Scale
    y: Scale
    parts: list[Markup] = field(default_factory=list)

    @classmethod
    def between(cls, x: tuple[float, float], y: tuple[float, float]) -> Plot:
        """Axes over these values."""
        return cls(Scale(*x, _LEFT, WIDTH - _RIGHT), Scale(*y, HEIGHT - _BOTTOM, _TOP))

    def axis_y(self, form: Callable[[float], str], most: int = 4, whole: bool = False) -> None:
        """Horizontal grid lines with their values."""
        for value in self.y.ticks(most, whole):
            at = self.y(value)
            self.parts.append(tag("line", x1=self.x.start, x2=self.x.end, y1=at, y2=at, class_="grid"))
            self.parts.append(tag("text", form(value), x=self.x.start - 6, y=at + 4, text_anchor="end"))

    def axis_x(
        self, form: Callable[[float], str], title: str, ticks: Sequence[float] | None = None, whole: bool = False
    ) -> None:
        """Values under the plot, and what they are."""
        below = self.y.start
        self.parts.append(tag("line", x1=self.x.start, x2=self.x.end, y1=below, y2=below, class_="axis"))
        for value in self.x.ticks(6, whole) if ticks is None else ticks:
            self.parts.append(tag("text", form(value), x=self.x(value), y=below + 15, text_anchor="middle"))
        middle = (self.x.start + self.x.end) / 2
        self.parts.append(tag("text", title, x=middle, y=below + 33, text_anchor="middle", class_="name"))

    def line(self, points: Sequence[tuple[float, float]], class_: str) -> None:
        """A line through all points."""
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        self.parts.append(tag("polyline", points=path, class_=f"line {class_}"))

    def dot(self, point: tuple[float, float], title: str, class_: str, radius: float = 3.5) -> None:
        """A dot that says what it is."""
        self.parts.append(
            titled("circle", title, cx=self.x(point[0]), cy=self.y(point[1]), r=radius, class_=f"dot {class_}")
        )

    def column(self, span: tuple[float, float], height: float, title: str, class_: str) -> None:
        """A column from 0 upwards over a span of x."""
        left, right, top = self.x(span[0]), self.x(span[1]), self.y(height)
        gap = 1.0 if right - left > 4 else 0.0
        self.parts.append(
            titled(
                "rect",
                title,
                x=left + gap / 2,
                y=top,
                width=max(right - left - gap, 0.5),
                height=max(self.y.start - top, 0.0),
                class_=f"bar {class_}",
            )
        )

    def rule(self, x: float, text: str, class_: str = "mark", row: int = 0) -> None:
        """A vertical line with a word above it (`row` 1, 2: below that), on the side where there is room for it."""
        at = self.x(x)
        self.parts.append(tag("line", x1=at, x2=at, y1=self.y.end, y2=self.y.start, class_=class_))
        fits = at + 4 + len(text) * _CHARACTER < self.x.end
        self.text((at + 4 if fits else at - 4, self.y.end - 7 + 13 * row), text, "start" if fits else "end")

    def text(self, place: tuple[float, float], text: str, anchor: str = "start", class_: str = "note") -> None:
        """A word at a position."""
        self.parts.append(tag("text", text, x=place[0], y=place[1], text_anchor=anchor, class_=class_))

    def drawn(self, label: str) -> Markup:
        """The chart."""
        return chart(self.parts, label)
