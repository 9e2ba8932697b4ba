"""Probabilities that mean what they say: temperature scaling, and how far off they are.

Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017): dividing all logits by one number, fitted on
validation texts, leaves every ranking as it is and brings confidence in line with accuracy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from millibert_build.engine import Floats
from millibert_ensemble.models.postprocess.ranking import softmax

# A validation set without a mistake would ask for 0.
LOWEST, HIGHEST = 0.25, 4.0
_STEPS = 50
_BINS = 15


def fit_temperature(logits: Floats, targets: npt.NDArray[np.int_]) -> float:
    """The temperature with the least log loss on logits [texts, labels], between `LOWEST` and `HIGHEST`.

    The loss is convex in b = 1 / temperature with the slope mean(sum(p * logits) - logit of the right label),
    so bisecting for the slope's zero finds it.
    """
    right = logits[np.arange(len(targets)), targets]

    def slope(b: float) -> float:
        return float(((softmax(logits * np.float32(b)) * logits).sum(axis=1) - right).mean())

    low, high = 1 / HIGHEST, 1 / LOWEST
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)


def expected_calibration_error(probabilities: Floats, targets: npt.NDArray[np.int_]) -> float:
    """Mean distance between confidence and accuracy over 15 bins of confidence, weighted by their texts."""
    confidence = probabilities.max(axis=1)
    hit = probabilities.argmax(axis=1) == targets
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [abs(float((hit[bins == b] - confidence[bins == b]).sum())) for b in range(_BINS)]
    return sum(gaps) / len(targets)
