"""Scores, agreement and gates, on answers that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from millibert_build.calibrate import Calibration
from millibert_build.evaluate import (
    GateError,
    check_gates,
    check_pruning_gates,
    compare,
    macro_f1,
    predicted,
    score,
)
from millibert_build.scenario import Gates

RIGHT = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]


def logits(*best: int) -> np.ndarray:
    return 4 * np.eye(3, dtype=np.float32)[list(best)]


def single(reference, engine, thresholds=(0.0,) * 3):
    return compare("single_label", reference, engine, RIGHT, Calibration(1.0, thresholds))


def test_one_label_a_text():
    found = single(logits(0, 1, 2, 1), logits(0, 1, 0, 1))
    assert (found.texts, found.score_name) == (4, "accuracy")
    assert (found.checkpoint_score, found.engine_score, found.agreement) == (0.75, 0.5, 0.75)
    assert found.loss == 0.25
    e = np.exp(4)
    assert found.max_probability_change == pytest.approx((e - 1) / (e + 2))
    assert found.mean_probability_change == pytest.approx(2 * (e - 1) / (e + 2) / 12)


def test_several_labels_a_text_count_as_sets():
    right = np.array([[1, 1, 0], [0, 0, 0]], np.float32)
    reference = np.array([[1, 1, -1], [-1, -1, -1]], np.float32)
    engine = np.array([[1, -1, -1], [-1, -1, 1]], np.float32)
    found = compare("multi_label", reference, engine, right, Calibration(1.0, (0.5, 0.5, 0.5)))
    assert found.score_name == "micro-F1"
    assert found.checkpoint_score == 1
    assert found.engine_score == pytest.approx(2 / (2 + 1 + 1))
    assert found.agreement == 0


def test_each_label_has_its_threshold():
    probabilities = np.array([[0.4, 0.6], [0.3, 0.7]], np.float32)
    assert predicted("multi_label", probabilities, (0.35, 0.65)).tolist() == [[True, False], [False, True]]


def test_f1_of_labels_that_occur():
    right = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0]], bool)
    given = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0]], bool)
    assert macro_f1(given, right) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert score("multi_label", given, right) == pytest.approx(2 * 2 / 6)


def test_gates_name_every_figure_missed():
    found = single(logits(0, 1, 2, 0), logits(0, 1, 0, 1))
    with pytest.raises(GateError) as refusal:
        check_gates(found, Gates(min_accuracy=0.9), "bf16")
    for part in (
        "accuracy 0.5000 < min_accuracy 0.9",
        "loss 0.5000 > max_accuracy_loss 0.005",
        "agreement 0.5000 < 0.99",
    ):
        assert part in str(refusal.value)
    check_gates(found, Gates(max_accuracy_loss=0.5, min_agreement=0.5), "bf16")


def test_int8_and_pruning_have_gates_of_their_own():
    found = single(logits(0, 1, 2, 0), logits(0, 1, 0, 0))  # 0.75 agree
    gates = Gates(max_accuracy_loss=1, min_agreement=0.8, min_agreement_int8=0.7, max_pruning_loss=0.3)
    check_gates(found, gates, "int8")
    with pytest.raises(GateError, match=r"agreement 0\.7500 < 0\.8"):
        check_gates(found, gates, "bf16")
    with pytest.raises(GateError, match=r"-1 layer misses .*: agreement 0\.7500 < min_pruning_agreement 0\.9"):
        check_pruning_gates(found, gates, "-1 layer")


def test_validation_texts_are_not_held_to_the_accuracy_of_the_test():
    found = single(logits(0, 1, 0, 1), logits(0, 1, 0, 1))
    check_gates(found, Gates(min_accuracy=0.9), "fp32", "validation")
