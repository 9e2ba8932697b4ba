"""Who is let in: what the engine's host says of itself, and what the tokenizer makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from millibert_ensemble.models.bert.progress import RECORD_BYTES, Progress
from millibert_ensemble.models.tokenizer.admission import Admission, Busy, Engine

MOST = 128
NOW = 1000.0
MS = 1000  # microseconds


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """The file, as the server makes it, with room for two instances."""
    path = tmp_path / "progress"
    path.write_bytes(bytes(2 * RECORD_BYTES))
    return path


def about(rate: float) -> Any:
    return pytest.approx(rate)


def admitted(admission: Admission, timeout_us: int, engine: Engine | None, most: int = 5000) -> int:
    """How many texts, one by one, are let in."""
    for count in range(most):
        try:
            admission.admit(1, timeout_us, engine)
        except Busy:
            return count
    return most


def test_texts_are_numbered_over_all_requests() -> None:
    admission = Admission(None)
    assert [admission.admit(texts, MS, None) for texts in (1, 16, 3)] == [1, 17, 20]


@pytest.mark.parametrize("named", [True, False])
def test_where_no_engine_says_anything_all_are_let_in(told: Path, named: bool) -> None:
    admission = Admission(told if named else None)
    assert admission.engine(NOW) is None
    assert admitted(admission, 1, admission.engine(NOW)) == 5000


@pytest.mark.parametrize(
    ("timeout_ms", "expected"),
    [
        # Three quarters of them within it:
        (29.9, 40),
        (49.9, 67),
        (149.9, 200),
        # All but half an execution:
        (199.9, 264),
        (999.9, 1064),
    ],
)
def test_no_more_are_let_in_than_are_computed_in_time(told: Path, timeout_ms: float, expected: int) -> None:
    Progress(told, 0, MOST).executed(100, last=0, begun=NOW - 0.1, ended=NOW)  # 1,000 a second
    admission = Admission(told)
    assert admitted(admission, round(timeout_ms * MS), admission.engine(NOW)) == expected


def test_a_request_of_many_texts_is_let_in_whole_and_a_refused_one_has_no_number(told: Path) -> None:
    Progress(told, 0, MOST).executed(100, last=0, begun=NOW - 0.1, ended=NOW)
    admission = Admission(told)
    engine = admission.engine(NOW)
    assert [admission.admit(32, 50 * MS, engine) for _ in range(3)] == [32, 64, 96]
    with pytest.raises(Busy, match="busy: more texts wait"):
        admission.admit(32, 50 * MS, engine)
    assert admission.admit(32, 1000 * MS, engine) == 128


def test_what_is_finished_makes_room_also_for_what_got_lost_on_the_way(told: Path) -> None:
    progress, admission = Progress(told, 0, MOST), Admission(told)
    progress.executed(100, last=0, begun=NOW - 0.1, ended=NOW)
    assert admitted(admission, 50 * MS, admission.engine(NOW)) == 67
    # Of the first 60, a third never came: the callers hung up.
    progress.executed(40, last=60, begun=NOW, ended=NOW + 0.04)
    assert admission.engine(NOW + 0.04) == Engine(60, about(1000), MOST)
    assert admitted(admission, 50 * MS, admission.engine(NOW + 0.04)) == 60
    # Not from the tokenizer: it says nothing of how far the engine is.
    progress.executed(40, last=0, begun=NOW + 0.04, ended=NOW + 0.08)
    assert admission.engine(NOW + 0.08) == Engine(60, about(1000), MOST)


def test_an_execution_of_few_texts_says_nothing_of_the_rate(told: Path) -> None:
    progress, admission = Progress(told, 0, MOST), Admission(told)
    progress.executed(31, last=31, begun=NOW, ended=NOW + 0.1)
    assert admission.engine(NOW + 0.1) is None
    progress.executed(32, last=63, begun=NOW + 0.1, ended=NOW + 0.2)
    progress.executed(1, last=64, begun=NOW + 0.2, ended=NOW + 0.3)
    assert admission.engine(NOW + 0.3) == Engine(64, about(320), MOST)


def test_where_executions_are_small_half_of_one_says_enough(told: Path) -> None:
    progress, admission = Progress(told, 0, 16), Admission(told)
    progress.executed(8, last=8, begun=NOW, ended=NOW + 0.1)
    assert admission.engine(NOW + 0.1) == Engine(8, about(80), 16)


@pytest.mark.parametrize(("seconds", "holds"), [(0.1, 1.0), (2.0, 6.0)])
def test_a_rate_holds_for_a_second_or_three_executions(told: Path, seconds: float, holds: float) -> None:
    Progress(told, 0, MOST).executed(64, last=64, begun=NOW - seconds, ended=NOW)
    admission = Admission(told)
    assert admission.engine(NOW + holds - 0.01) is not None
    assert admission.engine(NOW + holds + 0.01) is None


def test_after_that_it_begins_anew(told: Path) -> None:
    progress, admission = Progress(told, 0, MOST), Admission(told)
    progress.executed(64, last=64, begun=NOW - 0.64, ended=NOW)
    progress.executed(64, last=128, begun=NOW + 60, ended=NOW + 60.064)
    assert admission.engine(NOW + 60.1) == Engine(128, about(1000), MOST)


def test_what_lies_between_executions_counts_unless_it_is_a_pause(told: Path) -> None:
    progress, admission = Progress(told, 0, MOST), Admission(told)
    progress.executed(100, last=100, begun=NOW - 0.1, ended=NOW)
    progress.executed(100, last=200, begun=NOW + 0.5, ended=NOW + 0.6)
    assert admission.engine(NOW + 0.6) == Engine(200, about(1000), MOST)
    progress.executed(100, last=300, begun=NOW + 0.62, ended=NOW + 0.725)
    assert admission.engine(NOW + 0.725) == Engine(300, about(0.7 * 1000 + 0.3 * 800), MOST)


def test_one_execution_that_stood_still_does_not_shut_the_door(told: Path) -> None:
    progress, admission = Progress(told, 0, MOST), Admission(told)
    progress.executed(100, last=100, begun=NOW - 0.1, ended=NOW)
    progress.executed(100, last=200, begun=NOW, ended=NOW + 0.9)
    engine = admission.engine(NOW + 0.9)
    assert engine is not None
    assert 700 < engine.texts_per_second < 750


def test_several_instances_do_more_and_the_last_of_their_numbers_counts(told: Path) -> None:
    admission = Admission(told)
    Progress(told, 0, MOST).executed(100, last=300, begun=NOW - 0.1, ended=NOW)
    Progress(told, 1, MOST).executed(100, last=240, begun=NOW - 0.2, ended=NOW)
    assert admission.engine(NOW) == Engine(300, about(1500), 2 * MOST)


def test_an_instance_without_room_tells_nobody(told: Path) -> None:
    Progress(told, 2, MOST).executed(100, last=100, begun=NOW - 0.1, ended=NOW)
    Progress(None, 0, MOST).executed(100, last=100, begun=NOW - 0.1, ended=NOW)
    assert told.read_bytes() == bytes(2 * RECORD_BYTES)
    assert Admission(told).engine(NOW) is None


@pytest.mark.parametrize("written", range(8, RECORD_BYTES, 8))
def test_what_is_read_while_it_is_written_says_nothing(told: Path, written: int) -> None:
    progress, admission = Progress(told, 0, MOST), Admission(told)
    before = told.read_bytes()
    progress.executed(100, last=100, begun=NOW - 0.1, ended=NOW)
    after = told.read_bytes()
    told.write_bytes(after[:written] + before[written:])
    assert admission.engine(NOW) is None
    told.write_bytes(after)
    assert admission.engine(NOW) == Engine(100, about(1000), MOST)
