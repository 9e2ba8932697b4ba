from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from load.repeats import estimate, medians
from load.search import highest_rate


def search(limit: float, guess: float) -> Any:
    """A server that holds up to a limit."""

    def run_at(rate: float) -> Any:
        return SimpleNamespace(rate=rate)

    def holds(run: Any) -> bool:
        return bool(run.rate <= limit)

    return highest_rate(run_at, holds, guess)


@pytest.mark.parametrize("guess", [10.0, 900.0, 1000.0, 30_000.0])
def test_the_rate_is_found_from_any_guess(guess: float) -> None:
    found = search(1000, guess)
    assert 1000 / 1.06 <= found.rate <= 1000
    assert len(found.tried) <= 12


def test_where_no_rate_holds_none_is_found() -> None:
    found = search(0.1, 100)
    assert found.rate is None
    assert min(run.rate for run in found.tried) < 2


def test_where_every_rate_holds_the_search_ends() -> None:
    found = search(float("inf"), 100)
    assert found.rate == 100 * 2**11
    assert len(found.tried) == 12


def test_an_interval_is_students() -> None:
    """Of 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(2 degrees, 97.5 %) = 4.3027."""
    found = estimate([3.0, 1.0, 2.0])
    assert found.median == 2
    assert found.each == [3.0, 1.0, 2.0]
    assert found.interval == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)


def test_a_single_run_is_as_sure_as_it_is() -> None:
    assert estimate([5.0]).interval is None


def test_a_figure_that_one_run_lacks_is_none() -> None:
    runs: Any = [
        SimpleNamespace(figures=lambda value=value: {"p99": value, "errors": 0.0}, requests_per_second=10.0)
        for value in (3.0, None, 5.0)
    ]
    assert medians(runs) == {"p99": None, "errors": 0.0, "requests_per_second": 10.0}
