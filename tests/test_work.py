"""The count of the work that an engine does, and how the models tell Triton of it."""

from __future__ import annotations

import numpy as np

from millibert_ensemble.models.bert.inference import in_rows, padded
from millibert_ensemble.models.bert.work import KINDS, Ledger, work_of


def requests_of(*lengths: int) -> list[np.ndarray]:
    return [np.full((1, length), 7, np.int32) for length in lengths]


def work_in_rows(*lengths: int) -> dict[str, int]:
    (part,) = in_rows(requests_of(*lengths), 1)
    return work_of(part.inputs)


def test_work_of_rows():
    # 29 tokens share a row of 32.
    assert work_in_rows(9, 20) == {"text": 29, "computed": 32}
    assert work_in_rows(9) == {"text": 9, "computed": 16}


def test_work_of_padded_inputs():
    ids = np.array([[2, 8, 8, 3], [2, 3, 0, 0], [2, 8, 3, 0]], np.int32)
    ((_, inputs),) = padded([ids], 1)
    assert work_of(inputs) == {"text": 9, "computed": 12}


def test_a_ledger_tells_at_once_and_then_after_its_interval_and_loses_nothing():
    told: list[tuple[str, int]] = []
    ledger = Ledger(lambda kind, tokens: told.append((kind, tokens)), every_seconds=1.0)
    (part,) = in_rows(requests_of(9, 20), 1)
    inputs = part.inputs

    def news() -> dict[str, int]:
        new = dict(told)
        assert len(new) == len(told)  # each kind is told once
        told.clear()
        return new

    ledger.add([inputs], 100.0)
    assert news() == {"text": 29, "computed": 32}
    ledger.add([inputs, inputs], 100.3)
    ledger.add([inputs], 100.9)
    assert news() == {}
    ledger.add([inputs], 101.0)
    assert news() == {"text": 4 * 29, "computed": 4 * 32}
    # The interval counts from when it told the last time.
    ledger.add([inputs], 101.9)
    assert news() == {}
    ledger.add([], 500.0)
    assert news() == {"text": 29, "computed": 32}
    ledger.add([], 501.0)
    assert news() == {}


def test_a_ledger_tells_every_kind_that_has_a_metric_and_no_other():
    told: list[str] = []
    Ledger(lambda kind, _: told.append(kind)).add([in_rows(requests_of(3), 1)[0].inputs], 0.0)
    assert sorted(told) == sorted(KINDS)
