"""How the page writes numbers: shares in percent, differences in points, with a mark that is not only a colour."""

from __future__ import annotations

from datetime import datetime

from markupsafe import Markup

NONE = "–"


def percent(value: float | None, digits: int = 1) -> str:
    """A share, as in "93.1 %"."""
    return NONE if value is None else f"{100 * value:.{digits}f}\N{NARROW NO-BREAK SPACE}%"


def score(value: float | None) -> str:
    """A share whose hundredths count, as in "93.08 %"."""
    return percent(value, 2)


def number(value: float | None, digits: int = 0) -> str:
    """A number with separators, as in "12,345"."""
    return NONE if value is None else f"{value:,.{digits}f}"


def small(value: float | None) -> str:
    """A change of a probability, as in "0.0031"."""
    return NONE if value is None else f"{value:.4f}"


def size(value: int | None) -> str:
    """Bytes, as in "66.9 MB"."""
    if value is None:
        return NONE
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:,.1f}\N{NARROW NO-BREAK SPACE}{unit}"
    return f"{value}\N{NARROW NO-BREAK SPACE}B"


def points(value: float | None, base: float | None) -> Markup:
    """A difference of two shares in percentage points: ▲ better, ▼ worse."""
    if value is None or base is None:
        return Markup("")
    rounded = round(100 * (value - base), 2)
    if not rounded:
        return Markup('<span class="delta">= same</span>')
    mark, class_ = ("▲", "good") if rounded > 0 else ("▼", "bad")
    sign = "+" if rounded > 0 else "−"
    return Markup('<span class="delta {}">{} {}{:.2f} pt</span>').format(class_, mark, sign, abs(rounded))


def times(value: float | None, base: float | None) -> Markup:
    """A speed against another: ▲ 3.1×."""
    if not value or not base:
        return Markup("")
    ratio = value / base
    if f"{ratio:.2f}" == "1.00":
        return Markup('<span class="delta">= same</span>')
    mark, class_ = ("▲", "good") if ratio > 1 else ("▼", "bad")
    return Markup('<span class="delta {}">{} {:.2f}×</span>').format(class_, mark, ratio)


def shrunk(value: float | None, base: float | None) -> Markup:
    """A size against another, where less is better: ▼ −75 %."""
    if not value or not base:
        return Markup("")
    change = round(100 * (value / base - 1))
    if not change:
        return Markup('<span class="delta">= same</span>')
    mark, class_, sign = ("▼", "good", "−") if change < 0 else ("▲", "bad", "+")
    return Markup('<span class="delta {}">{} {}{} %</span>').format(class_, mark, sign, abs(change))


def when(value: str) -> str:
    """An ISO time as one reads it; what is none stays as it is."""
    try:
        return f"{datetime.fromisoformat(value):%-d %B %Y, %H:%M %Z}".strip()
    except ValueError:
        return value


def breakable(name: str) -> Markup:
    """A name that may go on in the next line behind an underscore."""
    return Markup("_<wbr>").join(name.split("_"))
