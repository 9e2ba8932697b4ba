"""A service curve: what one replica does with so many requests a second, as `python -m load.service_curve` measured it.

Between measured rates figures are interpolated linearly. Above the highest measured rate nothing is known, and nothing
is guessed: `at` keeps the last measured figure there, and `Curve.highest` says from where on that is so.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from millibert._errors import UsageError

FORMAT = "millibert-service-curve/1"
# A rate at which more than this share of requests is refused is not served.
REFUSED_AT_MOST = 0.001


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figures(_Strict):
    """What was found at one rate."""

    achieved: float = Field(ge=0)
    """Requests answered a second."""
    refused: float = Field(ge=0, le=1)
    """Share of requests that were told that the server is busy."""
    p50_ms: float = Field(gt=0)
    p90_ms: float = Field(gt=0)
    p99_ms: float = Field(gt=0)
    waiting: float = Field(ge=0)
    """Mean number of requests in the queues of all models."""
    batch: float = Field(gt=0)
    """Mean number of texts that the engine takes at once."""
    cpu: float = Field(ge=0)
    """CPUs that the server used."""
    others: float = Field(ge=0)
    """CPUs that neither the server nor the load used, but something else on the machine, or below it."""


class Point(_Strict):
    """One rate, and what each run at that rate found."""

    rate: float = Field(gt=0)
    """Requests a second that were due."""
    runs: tuple[Figures, ...] = Field(min_length=1)

    @cached_property
    def median(self) -> Figures:
        """The median of each figure over the runs."""
        fields = Figures.model_fields
        return Figures(**{name: statistics.median(getattr(run, name) for run in self.runs) for name in fields})

    def spread(self, name: str) -> float:
        """By how much the runs differ: largest less smallest, as a share of the median; 0 where that is 0."""
        values = [getattr(run, name) for run in self.runs]
        middle = statistics.median(values)
        return (max(values) - min(values)) / middle if middle else 0.0


class Curve(_Strict):
    """The curve, and what it was measured on."""

    format: Literal["millibert-service-curve/1"] = "millibert-service-curve/1"
    date: str
    model: str
    release: str
    """When the release was built: together with the model's name that says which it is."""
    precision: str
    cpu: str
    cpus: int = Field(ge=1)
    """CPUs that the server could use."""
    load: str
    """Where the load came from, and which CPUs that took."""
    seconds: float = Field(gt=0)
    queue_timeout_ms: float = Field(gt=0)
    """The longest that a request may wait for the engine."""
    start_seconds: float = Field(gt=0)
    """From the start of tritonserver until each service had answered a text."""
    points: tuple[Point, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        rates = [point.rate for point in self.points]
        if sorted(set(rates)) != rates:
            raise ValueError("rates must rise from point to point")
        return self

    @cached_property
    def rates(self) -> list[float]:
        """The measured rates, rising."""
        return [point.rate for point in self.points]

    @property
    def highest(self) -> float:
        """The highest measured rate."""
        return self.rates[-1]

    @cached_property
    def capacity(self) -> float:
        """The most requests a second that were answered, at whatever rate."""
        return max(point.median.achieved for point in self.points)

    def at(self, name: str) -> Callable[[float], float]:
        """A figure as a function of the rate: linear between measured rates, and what was measured last beyond them.

        Below the lowest rate: linear from 0 for what is 0 without requests, else what was measured first.
        """
        values = [getattr(point.median, name) for point in self.points]
        rates = self.rates
        if name in ("achieved", "refused", "waiting", "cpu"):
            rates, values = [0.0, *rates], [0.0, *values]
        return Interpolation(rates, values)

    def highest_rate(self, p99_ms: float, refused_at_most: float = REFUSED_AT_MOST) -> float:
        """The highest rate up to which every one is within both limits, interpolated between measured ones.

        Raises `UsageError` where not even the lowest measured rate is.
        """
        within = [point.median.p99_ms <= p99_ms and point.median.refused <= refused_at_most for point in self.points]
        if not within[0]:
            first = self.points[0]
            raise UsageError(
                f"no measured rate is within a p99 of {p99_ms:g} ms: at the lowest, {first.rate:,.0f} requests/s, it "
                f"is {first.median.p99_ms:.1f} ms with {first.median.refused:.2%} refused"
            )
        if all(within):
            return self.highest
        beyond = within.index(False)
        last, over = self.points[beyond - 1], self.points[beyond]
        limits = (("p99_ms", p99_ms), ("refused", refused_at_most))
        return min(_crossing(last, over, name, limit) for name, limit in limits)


def _crossing(last: Point, over: Point, name: str, limit: float) -> float:
    """The rate between two points where a figure reaches its limit; that of the second where it never does."""
    low: float = getattr(last.median, name)
    high: float = getattr(over.median, name)
    if high <= limit:
        return over.rate
    return last.rate + (limit - low) / (high - low) * (over.rate - last.rate)


class Interpolation:
    """A piecewise linear function, constant beyond its ends."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self._xs, self._ys = list(xs), list(ys)

    def __call__(self, x: float) -> float:
        """The value there; `np.interp` takes ten times as long for a single one."""
        after = bisect_left(self._xs, x)
        if after == 0:
            return self._ys[0]
        if after == len(self._xs):
            return self._ys[-1]
        x0, x1 = self._xs[after - 1], self._xs[after]
        y0, y1 = self._ys[after - 1], self._ys[after]
        return y0 + (x - x0) / (x1 - x0) * (y1 - y0)


def read_curve(path: Path) -> Curve:
    """Read what `python -m load.service_curve --json` has printed; raises `UsageError`."""
    try:
        return Curve.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise UsageError(
            f"{path}: not a service curve: {where}: {first['msg']}; `python -m load.service_curve --json` makes one"
        ) from error
