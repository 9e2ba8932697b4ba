"""How the load report writes times, rates, shares and changes."""

from __future__ import annotations

from markupsafe import Markup

from load.comparison import Change, Judgement
from load.results import Run
from load.slo import LATENCIES
from millibert_build.report.formats import NONE, number

# Between a number and its unit.
GAP = "\N{NARROW NO-BREAK SPACE}"
_MARKS = {Judgement.BETTER: "good", Judgement.WORSE: "bad"}


def digits(value: float) -> int:
    """How many digits behind the point a person wants of it: three in all, where there are not more before it."""
    size = abs(value)
    return 0 if size >= 100 else 1 if size >= 10 else 2


def figure(value: float | None) -> str:
    """A number whose unit stands elsewhere, as in "12.3"."""
    return NONE if value is None else number(value, digits(value)).replace("-", "−")


def ms(value: float | None) -> str:
    """A time given in milliseconds, as in "12.3 ms" or "2.10 s"."""
    if value is None:
        return NONE
    return f"{figure(value / 1000)}{GAP}s" if value >= 10_000 else f"{figure(value)}{GAP}ms"


def rate(value: float | None) -> str:
    """Requests a second, as in "1,234/s"."""
    return NONE if value is None else f"{figure(value) if value else 0}/s"


def share(value: float | None) -> str:
    """A share, as in "0.13 %"; what is not nothing never looks like it."""
    if value is None:
        return NONE
    percent = 100 * value
    if not percent:
        return f"0{GAP}%"
    return f"{percent:.2g}{GAP}%" if percent < 1 else f"{number(percent, digits(percent) and 1)}{GAP}%"


def mib(value: float | None) -> str:
    """Memory, as in "813 MiB" or "1.2 GiB"."""
    if value is None:
        return NONE
    return f"{value / 1024:,.2f}{GAP}GiB" if value >= 10_240 else f"{figure(value)}{GAP}MiB"


def named(value: float | None, name: str) -> str:
    """A figure of an SLO in its own unit."""
    return ms(value) if name in LATENCIES else share(value)


def limit(value: float, name: str) -> str:
    """What an objective asks for, as it was written: "25 ms", "0.1 %"."""
    return f"{plain(value)}{GAP}ms" if name in LATENCIES else f"{plain(100 * value)}{GAP}%"


def plain(value: float) -> str:
    """A number that somebody chose, without zeros at its end: "30", "0.1"."""
    return f"{value:,.4f}".rstrip("0").rstrip(".")


def of_unit(value: float | None, unit: str) -> str:
    """A figure of a comparison in its own unit."""
    return {"ms": ms, "share": share}.get(unit, rate)(value)


def signed(value: float | None, unit: str = "") -> str:
    """A change, as in "+3.2 %", or of a share "+0.30 points"."""
    if value is None:
        return NONE
    told = size(abs(value), unit)
    # What rounds to nothing has no sign.
    sign = "−" if value < 0 else "+"
    return f"{sign}{told}" if any(digit in "123456789" for digit in told) else told


def size(value: float | None, unit: str = "") -> str:
    """The same without a sign."""
    if value is None:
        return NONE
    if unit == "share":
        return f"{100 * value:.2f}{GAP}points"
    return f"{100 * value:,.{0 if value >= 0.1 else 1}f}{GAP}%"


def judged(change: Change) -> Markup:
    """What a change means, with a mark that is not only a colour."""
    class_ = _MARKS.get(change.judgement, "")
    mark = {Judgement.SAME: "=", Judgement.UNKNOWN: "·"}.get(change.judgement)
    if mark is None:
        mark = "▲" if (change.change or 0.0) > 0 else "▼"
    return Markup('<span class="delta {}">{} {}</span>').format(class_, mark, change.judgement.value)


def load_name(run: Run) -> str:
    """The load as short as it goes: "200/s" or "64 under way"."""
    arrival = run.arrival
    amount = rate(arrival.rate) if arrival.rate is not None else f"{arrival.under_way or 0:,} under way"
    return f"{arrival.shape} up to {amount}" if arrival.shape else amount
