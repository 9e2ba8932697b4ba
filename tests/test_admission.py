"""Who is let in: what who computes says of itself, and what the tokenizer makes of it."""

from __future__ import annotations

import json
import multiprocessing
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from millibert_ensemble.models.bert.progress import RECORD_BYTES, Progress, room
from millibert_ensemble.models.tokenizer.admission import Admission, Asking, Engine

MOST = 128
NOW = 1000.0
MS = 1000  # microseconds
FOREVER = 10**9


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """The file, as the server makes it, with room for two instances."""
    path = tmp_path / "admission"
    path.write_bytes(bytes(room(2)))
    return path


@pytest.fixture
def admission(told: Path) -> Admission:
    return Admission(told)


@pytest.fixture
def progress(told: Path) -> Progress:
    return Progress(told, 0, MOST)


def about(rate: float) -> Any:
    return pytest.approx(rate)


def admit(admission: Admission, texts: int, now: float = NOW) -> int:
    """Let in whatever waits; returns the number of the last."""
    (number,) = admission.admit([Asking(texts, FOREVER)], now)
    assert number is not None
    return number


def admitted(admission: Admission, timeout_us: int, now: float, most: int = 5000) -> int:
    """How many texts, one by one, are let in."""
    numbers = admission.admit([Asking(1, timeout_us)] * most, now)
    count = most - numbers.count(None)
    assert None not in numbers[:count]
    return count


def a_thousand_a_second(admission: Admission, progress: Progress) -> None:
    """300 texts one after the other, 100 in a tenth of a second, up to `NOW`."""
    first = admit(admission, 300, NOW - 0.5) - 300
    for begun in (0, 100, 200):
        progress.passed(100, range(first + begun + 1, first + begun + 101), NOW - 0.2 + begun / 1000)


def test_texts_are_numbered_over_all_requests(told: Path) -> None:
    for path in (None, told):
        admission = Admission(path)
        assert admission.admit([Asking(texts, MS) for texts in (1, 16, 3)], NOW) == [1, 17, 20]
        assert admission.admit([Asking(5, MS)], NOW) == [25]


def test_where_nobody_says_anything_all_are_let_in(told: Path) -> None:
    for path in (None, told):
        admission = Admission(path)
        assert admission.engine(NOW) is None
        assert admitted(admission, 1, NOW) == 5000


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
def test_no_more_are_let_in_than_are_computed_in_time(
    admission: Admission, progress: Progress, timeout_ms: float, expected: int
) -> None:
    a_thousand_a_second(admission, progress)
    assert admission.engine(NOW) == Engine(300, about(1000), MOST)
    assert admitted(admission, round(timeout_ms * MS), NOW) == expected


def test_a_request_of_many_texts_is_let_in_whole_and_a_refused_one_has_no_number(
    admission: Admission, progress: Progress
) -> None:
    a_thousand_a_second(admission, progress)
    asked = [*[Asking(32, 50 * MS)] * 4, Asking(32, 1000 * MS), Asking(1, 50 * MS)]
    assert admission.admit(asked, NOW) == [332, 364, 396, None, 428, None]


def test_what_is_finished_makes_room_also_for_what_got_lost_on_the_way(
    admission: Admission, progress: Progress
) -> None:
    a_thousand_a_second(admission, progress)
    assert admitted(admission, 50 * MS, NOW) == 67
    # Of the first 60, a third never came: the callers hung up.
    progress.passed(40, [310, 360], NOW + 0.04)
    assert admission.engine(NOW + 0.04) == Engine(360, about(1000), MOST)
    assert admitted(admission, 50 * MS, NOW + 0.04) == 60
    # Not from the tokenizer: it says nothing of how far the engine is.
    progress.passed(40, [0], NOW + 0.08)
    assert admission.engine(NOW + 0.08) == Engine(360, about(1000), MOST)


def test_where_there_was_nothing_to_do_nothing_is_said(admission: Admission, progress: Progress) -> None:
    """One request after another, of few texts and of many: how long it waited for the next one is not known."""
    for step, texts in enumerate((1, 64, 31, 64, 64, 1, 64)):
        last = admit(admission, texts, NOW + step)
        progress.passed(texts, [last], NOW + step + 0.1)
        assert admission.engine(NOW + step + 0.1) is None


def test_what_is_measured_began_with_enough_that_waited(admission: Admission, progress: Progress) -> None:
    admit(admission, 10)
    progress.passed(10, [10], NOW)
    admit(admission, 31)
    progress.passed(0, [0], NOW)  # a look: 31 wait, one too few
    admit(admission, 100)
    progress.passed(31, [41], NOW + 0.031)  # 100 wait
    assert admission.engine(NOW + 0.031) is None
    progress.passed(20, [61], NOW + 0.06)  # too few to say anything
    assert admission.engine(NOW + 0.06) is None
    progress.passed(20, [81], NOW + 0.081)
    assert admission.engine(NOW + 0.081) == Engine(81, about(800), MOST)


def test_when_all_that_waited_is_done_the_stretch_is_over(admission: Admission, progress: Progress) -> None:
    """What was too late was not computed, so nothing can be said of the rate; and then came a pause."""
    admit(admission, 1)
    progress.passed(1, [1], NOW)
    admit(admission, 40)
    progress.passed(0, [1], NOW)
    progress.passed(10, [20, 41], NOW + 0.01)
    admit(admission, 64)
    progress.passed(64, [105], NOW + 60)
    assert admission.engine(NOW + 60) is None


def test_when_all_that_waited_got_lost_the_stretch_is_over(admission: Admission, progress: Progress) -> None:
    admit(admission, 1)
    progress.passed(1, [1], NOW)
    admit(admission, 40)
    progress.passed(0, [1], NOW)
    admit(admission, 64)  # a minute later
    progress.passed(64, [42, 105], NOW + 60)
    assert admission.engine(NOW + 60) is None


def test_where_executions_are_small_half_of_one_says_enough(admission: Admission, told: Path) -> None:
    progress = Progress(told, 0, 16)
    admit(admission, 16)
    progress.passed(8, [8], NOW)
    progress.passed(8, [16], NOW + 0.1)
    assert admission.engine(NOW + 0.1) == Engine(16, about(80), 16)


def test_a_request_that_was_wrong_says_nothing_where_executions_are_of_one_text(
    admission: Admission, told: Path
) -> None:
    progress = Progress(told, 0, 1)
    admit(admission, 4)
    progress.passed(1, [1], NOW)
    progress.passed(0, [2], NOW + 0.1)
    assert admission.engine(NOW + 0.1) is None
    progress.passed(1, [3], NOW + 0.2)
    assert admission.engine(NOW + 0.2) == Engine(3, about(5), 1)
    assert admission.admit([Asking(1, 100 * MS), Asking(1, 1000 * MS)], NOW + 0.2) == [None, 5]


@pytest.mark.parametrize(("seconds", "holds"), [(0.1, 1.0), (2.0, 6.0)])
def test_a_rate_holds_for_a_second_or_three_executions(
    admission: Admission, progress: Progress, seconds: float, holds: float
) -> None:
    admit(admission, 128)
    progress.passed(64, [64], NOW - seconds)
    progress.passed(64, [128], NOW)
    assert admission.engine(NOW + holds - 0.01) is not None
    assert admission.engine(NOW + holds + 0.01) is None


def test_after_that_it_begins_anew(admission: Admission, progress: Progress) -> None:
    a_thousand_a_second(admission, progress)
    admit(admission, 128)
    progress.passed(64, [364], NOW + 60)
    progress.passed(64, [428], NOW + 60.032)
    assert admission.engine(NOW + 60.1) == Engine(428, about(2000), MOST)


def test_one_execution_that_stood_still_does_not_shut_the_door(admission: Admission, progress: Progress) -> None:
    a_thousand_a_second(admission, progress)
    admit(admission, 200)
    progress.passed(50, [350], NOW + 0.05)
    progress.passed(50, [400], NOW + 0.95)
    engine = admission.engine(NOW + 0.95)
    assert engine is not None
    assert 700 < engine.texts_per_second < 750


def test_several_instances_do_more_and_the_last_of_their_numbers_counts(admission: Admission, told: Path) -> None:
    first, second = Progress(told, 0, MOST), Progress(told, 1, MOST)
    admit(admission, 700)
    first.passed(100, [100], NOW)
    second.passed(100, [200], NOW)
    first.passed(100, [400], NOW + 0.1)
    second.passed(50, [300], NOW + 0.1)
    assert admission.engine(NOW + 0.1) == Engine(400, about(1500), 2 * MOST)


def test_an_instance_without_room_tells_nobody(admission: Admission, told: Path) -> None:
    admit(admission, 300)
    before = told.read_bytes()
    for progress in (Progress(told, 2, MOST), Progress(None, 0, MOST)):
        progress.passed(100, [100], NOW)
        progress.passed(100, [200], NOW)
    assert told.read_bytes() == before
    assert admission.engine(NOW) is None


@pytest.mark.parametrize("written", range(8, RECORD_BYTES, 8))
def test_what_is_read_while_it_is_written_says_nothing(
    admission: Admission, progress: Progress, told: Path, written: int
) -> None:
    before = told.read_bytes()
    a_thousand_a_second(admission, progress)
    after = told.read_bytes()
    told.write_bytes(after[: room(0) + written] + before[room(0) + written :])
    assert admission.engine(NOW) is None
    told.write_bytes(after)
    assert admission.engine(NOW) == Engine(300, about(1000), MOST)


def _admit_many(path: Path, results: Any) -> None:
    admission = Admission(path)
    results.put([n for _ in range(500) for n in admission.admit([Asking(1, MS), Asking(2, MS)], NOW)])


def test_several_tokenizers_count_together(told: Path) -> None:
    processes = multiprocessing.get_context("fork")
    results = processes.Queue()
    workers = [processes.Process(target=_admit_many, args=(told, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    numbers: list[Sequence[int]] = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert sorted(n for each in numbers for n in each) == [n for k in range(1500) for n in (3 * k + 1, 3 * k + 3)]
    assert struct.unpack_from("=Q", told.read_bytes()) == (4500,)


@pytest.mark.parametrize(("tensors", "tells"), [(["logits", "admission"], True), (["logits"], False)])
def test_who_gets_numbers_tells(monkeypatch: Any, admission: Admission, told: Path, tensors: Any, tells: bool) -> None:
    monkeypatch.setenv("MILLIBERT_ADMISSION", str(told))
    config = {"input": [{"name": name} for name in tensors], "max_batch_size": 64}
    progress = Progress.of({"model_config": json.dumps(config), "model_instance_name": "postprocess_0_1"})
    admit(admission, 128)
    progress.passed(64, [64], NOW)
    progress.passed(64, [128], NOW + 0.1)
    assert admission.engine(NOW + 0.1) == (Engine(128, about(640), 64) if tells else None)
    assert any(told.read_bytes()[room(1) :]) == tells
