"""Where a run's warm-up ends and whether what follows is steady: found in the latencies, not assumed.

The warm-up is what MSER-5 cuts off (K. P. White, "An effective truncation heuristic for bias reduction in simulation
output", Simulation 69, 1997): of all cuts, the one after which the mean is known best. It minimises the squared
standard error of what is kept, var(kept) / len(kept), over batches of consecutive answers, and looks at the first half
only: a minimum behind that means that no steady state was reached.

A run that is left is steady where its second half is as fast as its first. In an open loop above the capacity it is
not: the queue, and with it every latency, grows for as long as the load lasts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# MSER's batches: as many as this, or of 5 answers each where there are few.
_BATCHES = 200
_SMALLEST_BATCH = 5
# Fewer batches than this say nothing about where the warm-up ends.
_FEWEST_BATCHES = 10
# By how much the median of the second half may differ from that of the first.
_DRIFT = 0.25


class Steady(NamedTuple):
    """When the warm-up was over, in seconds from the start, and how the rest moves."""

    from_seconds: float
    drift: float
    """Median latency of the second half over that of the first, less 1."""

    @property
    def is_steady(self) -> bool:
        """Whether the two halves are alike."""
        return abs(self.drift) <= _DRIFT


def find_steady(due: Floats, latency: Floats) -> Steady:
    """Judge the answered requests of a run: when each was due (seconds from the start) and how long it took (seconds).

    With too few answers to tell, nothing is cut off.
    """
    order = np.argsort(due, kind="stable")
    due, latency = due[order], latency[order]
    size = max(_SMALLEST_BATCH, len(due) // _BATCHES)
    count = len(due) // size
    if count < _FEWEST_BATCHES:
        return Steady(0.0, _drift(due, latency))
    means = latency[: count * size].reshape(count, size).mean(axis=1)
    start = due[mser(means) * size]
    kept = due >= start
    return Steady(float(start), _drift(due[kept], latency[kept]))


def mser(values: Floats) -> int:
    """How many of the first values to leave out, at most half of them."""
    most = len(values) // 2
    kept = np.arange(len(values), 0, -1)
    # Sums over what is kept, for every cut at once.
    total, squares = (np.cumsum(part[::-1])[::-1] for part in (values, values**2))
    error = (squares / kept - (total / kept) ** 2) / kept
    return int(np.argmin(error[: most + 1]))


def _drift(due: Floats, latency: Floats) -> float:
    if len(due) < 2:
        return 0.0
    middle = (due[0] + due[-1]) / 2
    first, second = np.median(latency[due <= middle]), np.median(latency[due >= middle])
    return float(second / first - 1)
