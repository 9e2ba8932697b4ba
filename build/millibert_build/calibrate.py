"""Probabilities that mean what they say, and thresholds on them.

Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017): dividing all logits by one number, fitted on
validation texts, leaves every ranking as it is and brings confidence in line with accuracy.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from millibert._errors import UsageError
from millibert_build.engine import Floats
from millibert_build.scenario import Problem
from millibert_ensemble.models.postprocess.ranking import ACTIVATIONS

# A validation set without a mistake would ask for 0.
LOWEST, HIGHEST = 0.25, 4.0
_STEPS = 50
_BINS = 15
# A label with fewer positive texts than this says too little about its own threshold.
MIN_POSITIVES = 5
_FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """What turns logits into answers: one temperature, and per label the probability from which it is accepted."""

    temperature: float
    thresholds: tuple[float, ...]


def calibrate(problem: Problem, logits: Floats, targets: Floats, in_scope_recall: float) -> Calibration:
    """Fit on validation logits [texts, labels] and multi-hot targets [texts, labels].

    Single-label: the same threshold for all labels, below which the answer is "don't know". Multi-label: each
    label's own.
    """
    temperature = fit_temperature(problem, logits, targets)
    probabilities = ACTIVATIONS[problem](logits / np.float32(temperature))
    if problem == "single_label":
        thresholds = [abstention_threshold(probabilities, in_scope_recall)] * logits.shape[1]
    else:
        thresholds = label_thresholds(probabilities, targets)
    return Calibration(temperature, tuple(thresholds))


def save_calibration(folder: Path, calibration: Calibration) -> None:
    """Keep it beside the checkpoint whose validation logits it was fitted on."""
    (folder / _FILE).write_text(json.dumps(asdict(calibration)), encoding="utf-8")


def load_calibration(folder: Path) -> Calibration:
    """What `save_calibration` wrote; raises `UsageError` where there is none."""
    path = folder / _FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot read the checkpoint's thresholds: {error}; build it again") from error
    return Calibration(found["temperature"], tuple(found["thresholds"]))


def fit_temperature(problem: Problem, logits: Floats, targets: Floats) -> float:
    """The temperature with the least log loss, between `LOWEST` and `HIGHEST`.

    For softmax and sigmoid alike the loss is convex in b = 1 / temperature with the slope
    sum((p - target) * logits), so bisecting for the slope's zero finds it.
    """
    activation = ACTIVATIONS[problem]

    def slope(b: float) -> float:
        return float(((activation(logits * np.float32(b)) - targets) * logits).sum(axis=1).mean())

    low, high = 1 / HIGHEST, 1 / LOWEST
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)


def abstention_threshold(probabilities: Floats, in_scope_recall: float) -> float:
    """The highest threshold that `in_scope_recall` of these texts reach with their best label."""
    confidence = np.sort(probabilities.max(axis=1))[::-1]
    # In floating point 0.55 * 100 is above 55, and would ask for 56 texts.
    needed = int(np.ceil(round(in_scope_recall * len(confidence), 6)))
    return float(confidence[needed - 1])


def label_thresholds(probabilities: Floats, targets: Floats) -> list[float]:
    """Per label the threshold with the best F1 on these texts; rare labels get the one with the best micro-F1.

    A threshold of its own fits a rare label's few texts rather than the label (SCut: Yang, "A Study of Thresholding
    Strategies for Text Categorization", SIGIR 2001): fewer than `MIN_POSITIVES` positives share one over all labels.
    """
    common = _best_threshold(probabilities.ravel(), targets.ravel() > 0)
    return [
        _best_threshold(column, right > 0) if (right > 0).sum() >= MIN_POSITIVES else common
        for column, right in zip(probabilities.T, targets.T, strict=True)
    ]


def _best_threshold(scores: Floats, right: npt.NDArray[np.bool_]) -> float:
    """Midway between the two neighbouring scores whose parting gives the best F1; 1/2 where nothing is right."""
    if not right.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    f1 = 2 * np.cumsum(right[order]) / (np.arange(1, len(order) + 1) + right.sum())
    f1[:-1][ranked[:-1] == ranked[1:]] = 0  # equal scores cannot be parted
    cut = int(f1.argmax())
    below = ranked[cut + 1] if cut + 1 < len(ranked) else 0.0
    return float((ranked[cut] + below) / 2)


def expected_calibration_error(problem: Problem, probabilities: Floats, targets: Floats) -> float:
    """Mean distance between confidence and accuracy over 15 bins of confidence, weighted by what is in them.

    Single-label: of the best label of each text. Multi-label: of every label of every text.
    """
    if problem == "single_label":
        best = probabilities.argmax(axis=1)
        confidence, hit = probabilities.max(axis=1), targets[np.arange(len(best)), best] > 0
    else:
        confidence, hit = probabilities.ravel(), targets.ravel() > 0
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [abs(float((hit[bins == b] - confidence[bins == b]).sum())) for b in range(_BINS)]
    return sum(gaps) / len(confidence)


def auroc(inside: Floats, outside: Floats) -> float:
    """Probability that a text in scope scores higher than one out of scope, ties counted half (Mann-Whitney U)."""
    ordered = np.sort(outside)
    below = np.searchsorted(ordered, inside, side="left")
    up_to = np.searchsorted(ordered, inside, side="right")
    return float((below + up_to).sum() / (2 * len(inside) * len(outside)))
