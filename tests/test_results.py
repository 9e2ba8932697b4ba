from __future__ import annotations

import json

import numpy as np
import pytest

from load.results import Answers, Arrival, Outcome, Resources, Run, growth, joined, summarise, write_runs
from millibert import UsageError


def answers(due: np.ndarray, latency: np.ndarray, outcomes: list[Outcome] | None = None) -> Answers:
    return Answers(due, latency, np.array(outcomes or [Outcome.ANSWERED] * len(due)))


@pytest.fixture
def run() -> Run:
    due = np.arange(0, 10, 0.01)
    found = summarise(answers(due, np.full(1000, 0.004)), 10.0, warm_up_seconds=2.0)
    return Run(
        tool="millibert",
        url="grpc://127.0.0.1:8001",
        model="support",
        texts_per_request=1,
        arrival=Arrival(kind="open", rate=100, spacing="even"),
        started="2026-11-25T10:00:00+00:00",
        texts_per_second=found.requests_per_second,
        **found._asdict(),
    )


def test_figures_are_of_what_was_due_after_the_warm_up_and_before_the_end() -> None:
    due = np.array([0.5, 1.0, 1.5, 2.5, 9.0])
    found = summarise(answers(due, np.array([9.0, 0.010, 0.020, 0.030, 0.001])), 3.0, warm_up_seconds=1.0)
    assert found.counts.sent == 3
    assert found.requests_per_second == 1.5
    assert found.latency_ms is not None
    assert found.latency_ms.p50 == pytest.approx(20)
    assert found.latency_ms.max == pytest.approx(30)
    assert sum(found.histogram.counts) == 3
    assert [(second.at, second.sent) for second in found.timeline] == [(0, 1), (1, 2), (2, 1)]


def test_every_request_is_accounted_for_by_what_became_of_it() -> None:
    outcomes = [Outcome.ANSWERED] * 6 + [Outcome.REFUSED, Outcome.TIMED_OUT, Outcome.WRONG, Outcome.FAILED]
    found = summarise(answers(np.linspace(0, 0.9, 10), np.full(10, 0.01), outcomes), 1.0, 0.0)
    counts = found.counts
    assert (counts.sent, counts.answered, counts.errors) == (10, 6, 4)
    assert (counts.refused, counts.timed_out, counts.wrong, counts.failed) == (1, 1, 1, 1)
    assert found.timeline[0].errors == 4


def test_latencies_are_of_answers_only() -> None:
    found = summarise(
        answers(np.array([0.1, 0.2]), np.array([0.010, 5.0]), [Outcome.ANSWERED, Outcome.TIMED_OUT]), 1.0, 0.0
    )
    assert found.latency_ms is not None
    assert found.latency_ms.max == pytest.approx(10)


def test_where_nothing_was_answered_there_is_no_latency() -> None:
    found = summarise(answers(np.array([0.1]), np.array([1.0]), [Outcome.FAILED]), 1.0)
    assert found.latency_ms is None
    assert found.timeline[0].p99_ms is None


def test_the_warm_up_is_found() -> None:
    due = np.arange(0, 20, 0.01)
    noise = np.random.default_rng(3).uniform(0.9, 1.1, len(due))
    found = summarise(answers(due, noise * np.where(due < 4, 0.1, 0.005)), 20.0)
    assert found.warm_up_seconds == pytest.approx(4, abs=0.5)
    assert found.latency_ms is not None
    assert found.latency_ms.max < 6


def test_what_is_outside_the_bins_is_in_the_outermost() -> None:
    found = summarise(answers(np.array([0.1, 0.2]), np.array([1e-6, 1000.0])), 1.0, 0.0)
    assert (found.histogram.counts[0], found.histogram.counts[-1]) == (1, 1)


def test_a_run_is_read_as_it_was_written(run: Run, tmp_path) -> None:
    write_runs(tmp_path / "run.json", [run])
    assert Run.read(tmp_path / "run.json") == run
    assert run.figures()["p99"] == pytest.approx(4)
    assert run.figures()["errors"] == 0


def test_what_is_no_run_is_told(run: Run, tmp_path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        Run.read(tmp_path / "none.json")
    (tmp_path / "other.json").write_text(json.dumps({**run.model_dump(mode="json"), "format": "other"}))
    with pytest.raises(UsageError, match="not a run in the form millibert-load-run/1: format"):
        Run.read(tmp_path / "other.json")


def test_parts_are_joined() -> None:
    part = answers(np.array([0.1]), np.array([1.0]))
    assert len(joined([part, part]).due) == 2


def looks(server_mib: list[float], shared_mib: float | None = 1.0) -> list[Resources]:
    return [
        Resources(at=at, cpus={}, memory_mib={"tritonserver": mib, "bert": mib, "load": 50.0 * at},
                  shared_memory_mib=shared_mib)
        for at, mib in enumerate(server_mib)
    ]  # fmt: skip


def test_growth_is_of_the_server_after_its_first_tenth() -> None:
    # The first tenth may grow as it likes, and one look finds a batch at work; what the load takes does not count.
    held = [10.0, 500.0, *[99.5] * 16, 109.5, 109.5]
    assert growth(looks(held)) == pytest.approx(20 / 200)
    assert growth(looks([100.0] * 20)) == 0
    assert growth(looks([*[99.5] * 18, 89.5, 89.5])) == pytest.approx(-20 / 200)


def test_leaked_shared_memory_is_growth() -> None:
    held = [look.model_copy(update={"shared_memory_mib": 10.0 * at}) for at, look in enumerate(looks([100.0] * 10))]
    assert growth(held) == pytest.approx(80 / 210)


def test_what_was_not_seen_has_no_growth() -> None:
    elsewhere = [look.model_copy(update={"memory_mib": {"load": 1.0}}) for look in looks([1.0] * 20, None)]
    assert growth(elsewhere) is None
    assert growth(looks([1.0] * 9)) is None
