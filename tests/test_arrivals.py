"""How long the requests of a fused model are taken to have waited."""

from __future__ import annotations

from typing import Any

import pytest

from millibert_ensemble.models.fused.arrivals import Arrivals

FULL = 100


def ages(arrivals: Arrivals, requests: int, now: float, took: float, texts: int | None = None) -> Any:
    """Seconds, of the requests of an execution that begins now."""
    came = arrivals.begin(requests, requests if texts is None else texts, now)
    arrivals.end(requests, now + took)
    return [pytest.approx(now - each, abs=1e-9) for each in came]


def test_what_finds_nothing_under_way_has_just_come():
    arrivals = Arrivals(FULL, now=0.0)
    assert ages(arrivals, 2, now=100.0, took=0.05) == [0, 0]
    assert ages(arrivals, 3, now=160.0, took=0.05) == [0, 0, 0]


def test_what_waits_came_evenly_since_the_execution_before_began():
    arrivals = Arrivals(FULL, now=0.0)
    ages(arrivals, 1, now=10.0, took=0.08)
    assert ages(arrivals, 4, now=10.08, took=0.03) == [0.07, 0.05, 0.03, 0.01]
    assert ages(arrivals, 1, now=10.11, took=0.03) == [0.015]


def test_handing_over_many_answers_takes_its_time():
    arrivals = Arrivals(FULL, now=0.0)
    ages(arrivals, 90, now=10.0, took=0.08)
    assert ages(arrivals, 2, now=10.10, took=0.08) == [0.075, 0.025]
    assert ages(arrivals, 2, now=10.21, took=0.08) == [0, 0]  # after two requests, 30 ms later, there is nothing left


def test_behind_a_full_execution_all_count_from_where_it_counted_from():
    arrivals = Arrivals(FULL, now=0.0)
    ages(arrivals, 1, now=10.0, took=0.1)
    assert ages(arrivals, 2, now=10.1, took=0.1, texts=FULL) == [0.075, 0.025]
    assert ages(arrivals, 2, now=10.2, took=0.1, texts=FULL) == [0.15, 0.05]
    assert ages(arrivals, 2, now=10.3, took=0.1, texts=FULL - 1) == [0.225, 0.075]
    assert ages(arrivals, 2, now=10.4, took=0.1) == [0.075, 0.025]  # it took all that waited
