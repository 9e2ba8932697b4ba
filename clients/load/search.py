"""The highest rate that keeps an SLO, found by halving."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from load.results import Run

# How close the rate that holds and the rate that does not must come, and how many runs that may take.
_CLOSE = 0.05
_MOST_RUNS = 12
# Where even this is too much, there is nothing to find.
_LEAST_RATE = 1.0


class Found(NamedTuple):
    """The highest rate that held, or None, and every run on the way."""

    rate: float | None
    tried: list[Run]


def highest_rate(try_rate: Callable[[float], Run], holds: Callable[[Run], bool], guess: float) -> Found:
    """Double or halve from the guess until the answer changes, then halve what lies between.

    A rate that holds by luck or is missed by a disturbance misleads this, as any search on a noisy machine: whoever
    wants to rely on the rate tries it once more, for longer.
    """
    tried: list[Run] = []

    def good(rate: float) -> bool:
        tried.append(try_rate(rate))
        return holds(tried[-1])

    low, high = _bracket(good, guess, tried)
    if low is None or high is None:
        return Found(low, tried)
    while high / low > 1 + _CLOSE and len(tried) < _MOST_RUNS:
        middle = (low + high) / 2
        if good(middle):
            low = middle
        else:
            high = middle
    return Found(low, tried)


def _bracket(good: Callable[[float], bool], guess: float, tried: list[Run]) -> tuple[float | None, float | None]:
    """A rate that holds and a higher one that does not; one is None where it was not found."""
    if good(guess):
        low = guess
        while len(tried) < _MOST_RUNS:
            if not good(2 * low):
                return low, 2 * low
            low *= 2
        return low, None
    high = guess
    while high / 2 >= _LEAST_RATE and len(tried) < _MOST_RUNS:
        if good(high / 2):
            return high / 2, high
        high /= 2
    return None, high
