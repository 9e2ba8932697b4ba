"""What Triton has counted for each of its models: requests, executions, and where their time went."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from operator import add, sub


@dataclass(frozen=True)
class Counters:
    """Totals of one model since it was loaded; times in nanoseconds, summed over requests."""

    requests: int = 0
    failures: int = 0
    texts: int = 0
    executions: int = 0
    total_ns: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    compute_ns: int = 0
    output_ns: int = 0

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(*map(sub, astuple(self), astuple(earlier)))

    def __add__(self, other: Counters) -> Counters:
        return Counters(*map(add, astuple(self), astuple(other)))

    @property
    def texts_per_execution(self) -> float:
        """The mean batch."""
        return self.texts / self.executions if self.executions else 0.0

    def milliseconds(self, part: str) -> float:
        """Mean of a part over all successful requests: `total`, `queue`, `input`, `compute` or `output`."""
        return float(getattr(self, f"{part}_ns")) / self.requests / 1e6 if self.requests else 0.0
