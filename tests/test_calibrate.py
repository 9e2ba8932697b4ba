"""Temperature scaling and the calibration error, on answers whose calibration is known by construction."""

from __future__ import annotations

import numpy as np
import pytest

from millibert_build.calibrate import HIGHEST, LOWEST, expected_calibration_error, fit_temperature
from millibert_ensemble.models.postprocess.ranking import softmax


@pytest.fixture(scope="module")
def calibrated():
    """Logits whose softmax is the very distribution that the right labels are drawn from."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (20_000, 5)).astype(np.float32)
    noise = generator.gumbel(size=logits.shape)
    return logits, (logits + noise).argmax(axis=1)  # the Gumbel trick draws from softmax(logits)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_it_finds_the_factor_that_was_put_in(calibrated, factor):
    logits, targets = calibrated
    assert fit_temperature(logits * np.float32(factor), targets) == pytest.approx(factor, rel=0.05)


def test_it_stays_within_bounds():
    logits = np.eye(4, dtype=np.float32)
    assert fit_temperature(logits, np.arange(4)) == pytest.approx(LOWEST)
    assert fit_temperature(logits, np.array([1, 2, 3, 0])) == pytest.approx(HIGHEST)


def test_scaling_mends_overconfidence(calibrated):
    logits, targets = calibrated
    over = logits * np.float32(3)
    before = expected_calibration_error(softmax(over), targets)
    after = expected_calibration_error(softmax(over / np.float32(fit_temperature(over, targets))), targets)
    assert before > 0.1
    assert after < 0.02


def test_the_error_of_known_answers():
    # 0.9 confident and right half the time, twice; 0.6 confident and always right, twice.
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]], np.float32)
    targets = np.array([0, 1, 1, 1])
    assert expected_calibration_error(probabilities, targets) == pytest.approx((2 * 0.4 + 2 * 0.4) / 4, abs=1e-6)
