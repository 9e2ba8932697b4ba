from __future__ import annotations

import numpy as np
import pytest

from load.steady import find_steady, mser

RNG = np.random.default_rng(7)


def latencies(mean: np.ndarray) -> np.ndarray:
    """Noisy and skewed, as latencies are."""
    return np.asarray(mean * RNG.lognormal(0, 0.3, len(mean)))


def test_a_warm_up_is_cut_off_and_the_rest_is_steady() -> None:
    due = np.arange(0, 20, 0.01)
    found = find_steady(due, latencies(np.where(due < 3, 0.050, 0.005)))
    assert found.from_seconds == pytest.approx(3, abs=0.3)
    assert found.is_steady


def test_a_slow_decay_is_cut_off_where_it_has_faded() -> None:
    due = np.arange(0, 60, 0.01)
    found = find_steady(due, latencies(0.005 + 0.05 * np.exp(-due / 2)))
    assert 4 < found.from_seconds < 15
    assert found.is_steady


def test_of_a_run_that_is_steady_from_the_start_little_is_lost() -> None:
    due = np.arange(0, 20, 0.01)
    found = find_steady(due, latencies(np.full(len(due), 0.005)))
    assert found.from_seconds < 10
    assert found.is_steady


def test_a_queue_that_grows_is_not_steady() -> None:
    due = np.arange(0, 20, 0.01)
    found = find_steady(due, latencies(0.005 + 0.1 * due))
    assert not found.is_steady
    assert found.drift > 0.25


def test_the_order_in_which_answers_come_does_not_matter() -> None:
    due = np.arange(0, 20, 0.01)
    latency = latencies(np.where(due < 3, 0.050, 0.005))
    mixed = RNG.permutation(len(due))
    assert find_steady(due[mixed], latency[mixed]) == find_steady(due, latency)


@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_from_few_answers_nothing_is_cut(count: int) -> None:
    assert find_steady(np.arange(float(count)), np.full(count, 0.005)) == (0.0, 0.0)


def test_mser_leaves_at_least_half() -> None:
    assert mser(np.arange(100.0)) <= 50
    assert mser(np.array([9.0, *[1.0] * 50])) == 1
