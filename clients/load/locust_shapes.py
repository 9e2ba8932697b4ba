"""How a load in Locust changes with time: steady, in steps, with a spike, or for long (soak).

A shape is the same for both kinds of load. Of a closed loop it scales the users, which Locust asks for once a second;
of an open one it scales the rate, as phases of a schedule that is laid out before the load begins. Nothing here imports
Locust, which changes the whole process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from load.generator import Phase, due_times
from millibert._errors import UsageError

# A schedule without an end is laid out so many seconds at a time.
_BLOCK_SECONDS = 30.0
_STEPS = 5
# Share of the largest load before and after a spike, and of the time that the spike takes.
_BASE, _SPIKE = 0.25, 0.2
# A soak begins gently, for this share of its time.
_RAMP = 0.05


class Level(NamedTuple):
    """A share of the largest load, and for how long."""

    share: float
    seconds: float


def _steady(seconds: float) -> list[Level]:
    return [Level(1.0, seconds)]


def _step(seconds: float) -> list[Level]:
    return [Level((step + 1) / _STEPS, seconds / _STEPS) for step in range(_STEPS)]


def _spike(seconds: float) -> list[Level]:
    around = seconds * (1 - _SPIKE) / 2
    return [Level(_BASE, around), Level(1.0, seconds * _SPIKE), Level(_BASE, around)]


def _soak(seconds: float) -> list[Level]:
    return [*_step(_RAMP * seconds), Level(1.0, (1 - _RAMP) * seconds)]


SHAPES: dict[str, Callable[[float], list[Level]]] = {
    "steady": _steady,
    "step": _step,
    "spike": _spike,
    "soak": _soak,
}


class Schedule(NamedTuple):
    """When the requests of an open loop are due, all over all of Locust's workers."""

    levels: Sequence[Level]  # none: the same rate without an end
    rate: float  # requests a second at the largest level
    poisson: bool
    seed: int = 0

    @property
    def seconds(self) -> float:
        """How long it is; infinite without levels."""
        return sum(level.seconds for level in self.levels) if self.levels else float("inf")

    def share(self, first: int, own: int, total: int) -> Iterator[float]:
        """Seconds from the start at which requests are due: of every `total` those from `first` on, `own` of them.

        The shares of several workers are together exactly the schedule, since all lay out the same one.
        """
        before = 0
        for dues in self._blocks():
            place = (before + np.arange(len(dues))) % total
            yield from dues[(place >= first) & (place < first + own)].tolist()
            before += len(dues)

    def _blocks(self) -> Iterator[npt.NDArray[np.float64]]:
        if self.levels:
            phases = [Phase(self.rate * level.share, level.seconds, self.poisson) for level in self.levels]
            yield np.array(due_times(phases, self.seed))
            return
        block = 0
        # Whole gaps, so that evenly spaced requests stay so from one block to the next.
        seconds = max(1, round(_BLOCK_SECONDS * self.rate)) / self.rate
        while True:
            phase = Phase(self.rate, seconds, self.poisson)
            yield block * seconds + np.array(due_times([phase], self.seed + block))
            block += 1


def levels_of(shape: str, seconds: float) -> list[Level]:
    """The levels of one of `SHAPES`."""
    if shape not in SHAPES:
        raise UsageError(f"there is no shape {shape!r}; there are {', '.join(SHAPES)}")
    return SHAPES[shape](seconds)
