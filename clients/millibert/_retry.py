"""When a call is tried again: few times, not at once, and never so often that it feeds an outage."""

from __future__ import annotations

import math
import random
import threading
from dataclasses import dataclass

from millibert._errors import UsageError


@dataclass(frozen=True)
class Retry:
    """How calls are repeated that never got an answer.

    The n-th pause is drawn evenly from 0 to `pause_seconds` * 2^(n-1), at most `longest_pause_seconds` ("full
    jitter": https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/). All calls of a client share a
    budget: `budget` repeats at most in a row, and one more for every 1 / `budget_ratio` calls that were answered, so
    that in an outage the servers get at most (1 + `budget_ratio`) times the load.
    """

    attempts: int = 4
    pause_seconds: float = 0.05
    longest_pause_seconds: float = 1.0
    budget: float = 20.0
    budget_ratio: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int) or self.attempts < 1:
            raise UsageError(f"attempts must be an integer of at least 1, not {self.attempts!r}")
        for name in ("pause_seconds", "longest_pause_seconds", "budget", "budget_ratio"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise UsageError(f"{name} must be a number of at least 0, not {value!r}")

    def pause(self, attempt: int) -> float:
        """Seconds to wait after the n-th attempt, n from 1."""
        return random.uniform(0, min(self.longest_pause_seconds, self.pause_seconds * 2 ** (attempt - 1)))  # noqa: S311


class Budget:
    """How many more repeats a client may make. Safe to share between threads."""

    def __init__(self, retry: Retry) -> None:
        self._retry = retry
        self._left = retry.budget
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Spend one; False where none is left."""
        with self._lock:
            if self._left < 1:
                return False
            self._left -= 1
            return True

    def answered(self) -> None:
        """A call was answered: part of a repeat is earned back."""
        if self._left < self._retry.budget:
            with self._lock:
                self._left = min(self._retry.budget, self._left + self._retry.budget_ratio)
