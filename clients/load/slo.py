"""Service-level objectives: `p99<25ms,errors<0.1%`, and whether measured figures keep them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from millibert._errors import UsageError

# What may stand before the `<`; latencies in milliseconds, shares from 0 to 1.
LATENCIES = ("mean", "p50", "p90", "p95", "p99", "p99.9", "max")
SHARES = ("errors", "refused", "timeouts", "wrong")
# A share as well, but not of requests: by how much the server's memory grew.
GROWTH = "growth"
_MILLISECONDS = {"us": 0.001, "ms": 1.0, "s": 1000.0}
_OBJECTIVE = re.compile(r"(?P<name>[a-z0-9.]+)\s*<\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[a-z%]*)")
_EXAMPLE = "p99<25ms,errors<0.1%"


@dataclass(frozen=True)
class Objective:
    """A figure and what it must stay below: milliseconds, or a share from 0 to 1."""

    name: str
    limit: float

    def __str__(self) -> str:
        return f"{self.name}<{self.limit:.6g}ms" if self.name in LATENCIES else f"{self.name}<{100 * self.limit:.4g}%"


@dataclass(frozen=True)
class Verdict:
    """An objective, the figure that was measured, and whether it keeps the objective."""

    objective: Objective
    measured: float | None
    """None: nothing was answered, so there is no latency; or the server's memory could not be seen."""

    @property
    def held(self) -> bool:
        """Whether the figure is below the limit. What could not be measured is not."""
        return self.measured is not None and self.measured < self.objective.limit

    @property
    def margin(self) -> float | None:
        """How much of the limit is left, 0 to 1; negative where it is exceeded."""
        if self.measured is None:
            return None
        return 1 - self.measured / self.objective.limit

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "objective": str(self.objective),
            "name": self.objective.name,
            "limit": self.objective.limit,
            "measured": self.measured,
            "held": self.held,
            "margin": self.margin,
        }


def parse_slo(text: str) -> tuple[Objective, ...]:
    """Read objectives that are separated by commas; raises `UsageError` with what can be written."""
    objectives = tuple(_parse(part.strip()) for part in text.split(",") if part.strip())
    if not objectives:
        raise UsageError(f"an SLO has at least one objective, such as {_EXAMPLE}")
    names = [objective.name for objective in objectives]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"{text!r} limits {', '.join(sorted(doubled))} twice")
    return objectives


def slo_argument(text: str) -> tuple[Objective, ...]:
    """`parse_slo` for argparse."""
    try:
        return parse_slo(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def judge(objectives: Sequence[Objective], figures: Mapping[str, float | None]) -> tuple[Verdict, ...]:
    """Compare each objective with the figure of its name."""
    return tuple(Verdict(objective, figures[objective.name]) for objective in objectives)


def _parse(text: str) -> Objective:
    match = _OBJECTIVE.fullmatch(text.lower())
    if match is None:
        raise UsageError(f"{text!r} is no objective: NAME<LIMIT, as in {_EXAMPLE}")
    name, number, unit = match["name"], float(match["number"]), match["unit"]
    if name in LATENCIES:
        limit = number * _factor(_MILLISECONDS, unit, text, "a time, in us, ms or s")
    elif name in (*SHARES, GROWTH):
        limit = number * _factor({"%": 0.01}, unit, text, "a share, in %")
    else:
        raise UsageError(f"{text!r}: there is no figure {name!r}; there are {', '.join((*LATENCIES, *SHARES, GROWTH))}")
    if limit <= 0:
        raise UsageError(f"{text!r}: nothing is below {number:g}; the smallest share that can be asked for is above 0")
    return Objective(name, limit)


def _factor(factors: Mapping[str, float], unit: str, text: str, what: str) -> float:
    if unit not in factors:
        raise UsageError(f"{text!r}: this is {what}")
    return factors[unit]
