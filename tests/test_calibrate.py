"""Temperature scaling and the calibration error, on answers whose calibration is known by construction."""

from __future__ import annotations

import numpy as np
import pytest

from millibert import UsageError
from millibert_build.calibrate import (
    HIGHEST,
    LOWEST,
    MIN_POSITIVES,
    Calibration,
    abstention_threshold,
    auroc,
    calibrate,
    expected_calibration_error,
    fit_temperature,
    label_thresholds,
    load_calibration,
    save_calibration,
)
from millibert_ensemble.models.postprocess.ranking import sigmoid, softmax


@pytest.fixture(scope="module")
def calibrated():
    """Logits whose softmax is the very distribution that the right labels are drawn from."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (20_000, 5)).astype(np.float32)
    noise = generator.gumbel(size=logits.shape)
    right = (logits + noise).argmax(axis=1)  # the Gumbel trick draws from softmax(logits)
    return logits, np.eye(5, dtype=np.float32)[right]


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_it_finds_the_factor_that_was_put_in(calibrated, factor):
    logits, targets = calibrated
    assert fit_temperature("single_label", logits * np.float32(factor), targets) == pytest.approx(factor, rel=0.05)


def test_it_stays_within_bounds():
    logits = np.eye(4, dtype=np.float32)
    assert fit_temperature("single_label", logits, np.eye(4, dtype=np.float32)) == pytest.approx(LOWEST)
    assert fit_temperature("single_label", logits, np.eye(4, dtype=np.float32)[[1, 2, 3, 0]]) == pytest.approx(HIGHEST)


def test_scaling_mends_overconfidence(calibrated):
    logits, targets = calibrated
    over = logits * np.float32(3)
    before = expected_calibration_error("single_label", softmax(over), targets)
    after = expected_calibration_error(
        "single_label", softmax(over / np.float32(fit_temperature("single_label", over, targets))), targets
    )
    assert before > 0.1
    assert after < 0.02


def test_the_error_of_known_answers():
    # 0.9 confident and right half the time, twice; 0.6 confident and always right, twice.
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]], np.float32)
    targets = np.eye(2, dtype=np.float32)[[0, 1, 1, 1]]
    assert expected_calibration_error("single_label", probabilities, targets) == pytest.approx(
        (2 * 0.4 + 2 * 0.4) / 4, abs=1e-6
    )


def test_the_temperature_of_several_labels_is_found_too():
    generator = np.random.default_rng(1)
    logits = generator.normal(-1, 2, (5_000, 8)).astype(np.float32)
    right = (generator.random(logits.shape) < sigmoid(logits)).astype(np.float32)
    found = fit_temperature("multi_label", logits * np.float32(2.5), right)
    assert found == pytest.approx(2.5, rel=0.05)
    over = sigmoid(logits * np.float32(2.5))
    assert expected_calibration_error("multi_label", over, right) > 0.05
    assert expected_calibration_error("multi_label", sigmoid(logits), right) < 0.01


def test_the_abstention_threshold_keeps_the_wanted_share_and_is_the_highest_that_does():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4], [0.5, 0.5]], np.float32)
    assert abstention_threshold(probabilities, 0.8) == pytest.approx(0.6)
    assert abstention_threshold(probabilities, 0.81) == pytest.approx(0.5)


@pytest.mark.parametrize("recall", [0.07, 0.55, 0.95])
def test_the_kept_share_is_not_blurred_by_floating_point(recall):
    probabilities = np.linspace(0.01, 0.99, 100, dtype=np.float32)[:, None]
    assert (probabilities >= abstention_threshold(probabilities, recall)).sum() == round(100 * recall)


def test_it_is_kept_beside_its_checkpoint(tmp_path):
    found = Calibration(1.25, (0.1, float(np.float32(0.3))))
    save_calibration(tmp_path, found)
    assert load_calibration(tmp_path) == found
    with pytest.raises(UsageError, match=r"calibration\.json: cannot read the checkpoint's thresholds"):
        load_calibration(tmp_path / "absent")


def test_each_label_gets_the_threshold_of_its_best_f1():
    scores = np.array([0.9, 0.8, 0.7, 0.3, 0.25, 0.2, 0.1, 0.05], np.float32)
    first = np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32)
    second = np.array([1, 1, 1, 1, 1, 1, 1, 0], np.float32)
    found = label_thresholds(np.stack([scores, scores], 1), np.stack([first, second], 1))
    assert found == pytest.approx([0.225, 0.075])


def test_a_rare_label_gets_the_common_threshold():
    generator = np.random.default_rng(2)
    targets = (generator.random((200, 3)) < [0.5, 0.3, 0.0]).astype(np.float32)
    targets[: MIN_POSITIVES - 1, 2] = 1
    probabilities = (0.3 + 0.4 * targets).astype(np.float32)
    assert label_thresholds(probabilities, targets) == pytest.approx([0.5, 0.5, 0.5])


def test_equal_scores_are_not_parted():
    scores = np.full((6, 1), 0.4, np.float32)
    (threshold,) = label_thresholds(scores, np.array([[1, 1, 1, 1, 1, 0]], np.float32).T)
    assert threshold <= 0.4


def test_the_auroc_of_known_orders():
    inside, outside = np.array([0.9, 0.8, 0.7]), np.array([0.1, 0.2])
    assert auroc(inside, outside) == 1
    assert auroc(outside, inside) == 0
    assert auroc(np.array([0.5, 0.5]), np.array([0.5])) == 0.5


def test_one_label_a_text_has_one_threshold_for_all_labels(calibrated):
    logits, targets = calibrated
    found = calibrate("single_label", logits, targets, 0.9)
    assert len(set(found.thresholds)) == 1
    kept = softmax(logits / np.float32(found.temperature)).max(axis=1) >= found.thresholds[0]
    assert kept.mean() == pytest.approx(0.9, abs=1e-3)
