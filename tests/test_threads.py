"""How many threads an execution alone is given."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest

from millibert_ensemble.models.bert.threads import fastest


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [
        ({1: 10.0}, 1),
        ({2: 10.0}, 2),
        ({2: 6.0, 4: 5.5}, 2),  # faster, but not clearly
        ({2: 9.0, 4: 7.6}, 4),
        ({2: 6.0, 4: 12.0, 8: 3.0}, 8),
        ({2: 12.0, 3: 5.0}, 3),
        ({2: 12.0, 4: 12.0}, 2),
    ],
)
def test_threads_are_as_many_as_are_clearly_faster_than_two(milliseconds, expected, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    started = []
    kept: weakref.WeakSet[Any] = weakref.WeakSet()

    class Run:
        """Holds the weights once more, so that only few may be kept."""

        def __init__(self, threads: int) -> None:
            self.seconds = milliseconds[threads] / 1000
            started.append(threads)
            kept.add(self)
            assert len(kept) <= 2

        def __call__(self) -> None:
            clock[0] += self.seconds

    assert fastest(max(milliseconds), Run) == expected
    # With no choice there is no trial.
    assert started == ([*milliseconds] if len(milliseconds) > 1 else [])


def test_a_machine_that_is_busy_most_of_the_time_does_not_mislead_the_choice(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def start(threads):
        runs = itertools.count()

        def run() -> None:
            # With two threads all runs are undisturbed, with four only each twentieth.
            clock[0] += 1.0 if threads == 2 else 0.6 if next(runs) % 20 == 19 else 3.0

        return run

    assert fastest(4, start) == 4
