"""The measured service curve: how it is taken on a real server, and what is read off it."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from tests.conftest import CUSTOMER_SERVICE
from tests.manifests import ROOT

from load import service_curve
from load.generator import Answers, Phase, due_times
from load.scaling.curve import Curve, Figures, Point, read_curve
from millibert._errors import MillibertError, UsageError


def figures(rate, p99_ms=20.0, refused=0.0, waiting=1.0, cpu=0.5):
    return Figures(
        achieved=rate * (1 - refused),
        refused=refused,
        p50_ms=p99_ms / 2,
        p90_ms=p99_ms * 0.9,
        p99_ms=p99_ms,
        waiting=waiting,
        batch=1.0,
        cpu=cpu,
        others=0.0,
    )


def curve_of(*points):
    """A curve from pairs of a rate and what was found in each of its runs."""
    return Curve(
        date="2026-01-01",
        model="support",
        release="2026-01-01T00:00:00+00:00",
        precision="fp32",
        cpu="any",
        cpus=1,
        load="none",
        seconds=5,
        queue_timeout_ms=1000,
        start_seconds=5,
        points=[Point(rate=rate, runs=runs) for rate, *runs in points],
    )


def test_random_arrivals_are_a_poisson_process():
    due = due_times([Phase(1000, 20, poisson=True), Phase(10, 2)], seed=1)
    random = np.array([at for at in due if at < 20])
    assert random.tolist() == sorted(random)
    assert len(due) - len(random) == 20
    assert len(random) == pytest.approx(20_000, abs=5 * 20_000**0.5)
    gaps = np.diff(random)
    # Gaps are exponential: mean and deviation are equal, and a share of 1/e is longer than the mean.
    assert gaps.mean() == pytest.approx(1e-3, rel=0.05)
    assert gaps.std() == pytest.approx(1e-3, rel=0.05)
    assert (gaps > 1e-3).mean() == pytest.approx(np.exp(-1), abs=0.02)


def test_random_arrivals_are_the_same_for_the_same_seed_only():
    phases = [Phase(50, 2, poisson=True)]
    assert due_times(phases, seed=3) == due_times(phases, seed=3) != due_times(phases, seed=4)


def test_cpus_are_divided():
    assert service_curve.divide_cpus([2, 3, 5], None) == ({2, 3, 5}, {2, 3, 5})
    assert service_curve.divide_cpus([2, 3, 5], 2) == ({2, 3}, {5})
    with pytest.raises(UsageError, match="must be left for the load"):
        service_curve.divide_cpus([2, 3], 2)


def test_cpus_are_given_back():
    before = os.sched_getaffinity(0)
    with service_curve.running_on({min(before)}):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before


def answers(due, latency, status="answered"):
    return Answers(
        np.array(due), np.array(latency), np.array([status] * len(due) if isinstance(status, str) else status)
    )


COUNTED = service_curve._Counted(queue_seconds=22.0, texts=300, executions=100, cpu_seconds=11.0, other_seconds=1.1)


def test_figures_of_a_run():
    due = np.arange(0, 10, 0.1)
    found = service_curve.figures(answers(due, np.full(100, 1.1)), 10, COUNTED)
    # The last answer came at 11 s; two requests have waited on average for all that time.
    assert found.waiting == pytest.approx(2, rel=0.01)
    assert found.cpu == pytest.approx(1, rel=0.01)
    assert found.others == pytest.approx(0.1, rel=0.01)
    assert found.batch == 3
    assert found.p50_ms == found.p99_ms == pytest.approx(1100)
    # Answers that came between 2 and 10 s.
    assert found.achieved == pytest.approx(10, abs=0.2)
    assert found.refused == 0


def test_refused_requests_are_counted_and_have_no_latency():
    due = np.arange(0, 10, 0.1)
    status = ["answered" if index % 4 else "UNAVAILABLE" for index in range(100)]
    found = service_curve.figures(answers(due, np.where(np.arange(100) % 4, 0.01, 5.0), status), 10, COUNTED)
    assert found.refused == pytest.approx(0.25)
    assert found.achieved == pytest.approx(7.5)
    assert found.p99_ms == pytest.approx(10)


def test_a_run_with_failures_or_without_answers_is_none():
    with pytest.raises(MillibertError, match="failed: NOT_FOUND"):
        service_curve.figures(answers([0.0, 5.0], [0.1, 0.1], ["answered", "NOT_FOUND"]), 10, COUNTED)
    with pytest.raises(MillibertError, match="no request was answered"):
        service_curve.figures(answers([0.0, 5.0], [0.1, 0.1], "UNAVAILABLE"), 10, COUNTED)


def test_figures_of_several_runs_are_their_medians():
    point = Point(rate=10, runs=[figures(10, p99_ms=each) for each in (30, 10, 20)])
    assert point.median.p99_ms == 20
    assert point.spread("p99_ms") == 1
    assert point.spread("refused") == 0


def test_between_measured_rates_a_figure_is_interpolated_and_beyond_them_it_is_kept():
    curve = curve_of((100, figures(100, p99_ms=10, waiting=1)), (300, figures(300, p99_ms=30, waiting=5)))
    p99, waiting = curve.at("p99_ms"), curve.at("waiting")
    assert [p99(rate) for rate in (1, 100, 200, 300, 9999)] == [10, 10, 20, 30, 30]
    # Without requests nobody waits.
    assert [waiting(rate) for rate in (0, 50, 100, 250, 9999)] == [0, 0.5, 1, 4, 5]


def test_the_highest_rate_is_interpolated_up_to_the_first_that_is_too_slow():
    curve = curve_of(
        (100, figures(100, p99_ms=10)),
        (200, figures(200, p99_ms=30)),
        (300, figures(300, p99_ms=50)),
        # Luck: what comes after a rate that is too slow does not count.
        (400, figures(400, p99_ms=20)),
    )
    assert curve.highest_rate(40) == pytest.approx(250)
    assert curve.highest_rate(10) == pytest.approx(100)
    assert curve.highest_rate(30) == pytest.approx(200)
    assert curve.highest_rate(50) == 400


def test_refusals_bound_the_highest_rate_too():
    curve = curve_of((100, figures(100)), (200, figures(200, refused=0.01)))
    assert curve.highest_rate(1000) == pytest.approx(110)
    assert curve.highest_rate(1000, refused_at_most=0.01) == 200


def test_an_objective_that_no_rate_meets_is_refused():
    curve = curve_of((100, figures(100, p99_ms=12)), (200, figures(200)))
    with pytest.raises(UsageError, match=r"no measured rate is within a p99 of 5 ms: at the lowest, 100.* 12\.0 ms"):
        curve.highest_rate(5)


def test_a_curve_is_read_back(tmp_path):
    curve = curve_of((100, figures(100)), (200, figures(200)))
    path = tmp_path / "curve.json"
    path.write_text(curve.model_dump_json())
    assert read_curve(path) == curve


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda it: it.update(format="other/1"), "format"),
        (lambda it: it["points"].reverse(), "rates must rise"),
        (lambda it: it["points"].pop(), "points"),
        (lambda it: it["points"][0]["runs"][0].update(refused=2), "refused"),
        (lambda it: it.update(more=1), "more"),
    ],
)
def test_what_is_no_curve_is_refused(tmp_path, change, reason):
    document = curve_of((100, figures(100)), (200, figures(200))).model_dump(mode="json")
    change(document)
    path = tmp_path / "curve.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match=reason):
        read_curve(path)


def test_a_file_that_is_not_there_or_not_json_is_told(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_curve(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("p99")
    with pytest.raises(UsageError, match="not a service curve"):
        read_curve(tmp_path / "text.json")


def test_waiting_for_quiet_ends():
    service_curve.wait_for_quiet(others_at_most=1e6)
    service_curve.wait_for_quiet(others_at_most=1e-9, patience=0)
    assert service_curve.busy_seconds() > 0


def test_the_page_shows_the_kept_curve():
    page = (ROOT / "docs" / "scaling.md").read_text()
    kept = read_curve(ROOT / "docs" / "scaling" / "curve.json")
    for line in service_curve.table(kept.model_dump()).splitlines():
        assert line in page


@pytest.mark.e2e
def test_a_curve_is_measured_on_a_real_server(release, capsys, tmp_path, triton):
    data = ["--repository", str(release.repository), "--data", str(CUSTOMER_SERVICE / "test.csv")]
    options = ["--rates", "60", "20", "--seconds", "1.5", "--rounds", "2", "--json", "--others-at-most", "64"]
    assert service_curve.main([*data, *options]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "curve.json"
    path.write_text(printed)
    curve = read_curve(path)
    assert curve.rates == [20, 60]
    assert (curve.model, curve.precision, curve.cpus) == ("support", "fp32", len(os.sched_getaffinity(0)))
    assert curve.start_seconds > 0
    for point in curve.points:
        assert len(point.runs) == 2
        for run in point.runs:
            assert 0 < run.p50_ms <= run.p90_ms <= run.p99_ms
            assert run.achieved == pytest.approx(point.rate, rel=0.6)
            assert 1 <= run.batch <= 16
            assert 0 < run.cpu <= len(os.sched_getaffinity(0)) + 0.5
            assert run.waiting >= 0
            assert run.refused == 0
    last = service_curve.table(json.loads(printed)).splitlines()[-1].split()
    assert last[0] == "60"
    assert float(last[5]) == pytest.approx(curve.points[-1].median.p99_ms, abs=0.01)
