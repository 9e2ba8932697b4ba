"""Accuracy of a checkpoint and of the engine made from it, and the gates between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from millibert._errors import MillibertError
from millibert_build.calibrate import expected_calibration_error
from millibert_build.engine import Floats, agreement
from millibert_build.scenario import Gates
from millibert_ensemble.models.postprocess.ranking import softmax


class GateError(MillibertError):
    """The engine misses a gate of the scenario; nothing was published."""


class Comparison(NamedTuple):
    """The engine against the fp32 checkpoint on the same texts. Accuracies, F1 and agreement are shares.

    `calibration_error` is the expected calibration error of the engine's probabilities at `temperature`, and
    `_before` that of its plain softmax.
    """

    texts: int
    checkpoint_accuracy: float
    engine_accuracy: float
    engine_macro_f1: float
    agreement: float
    max_probability_change: float
    temperature: float
    calibration_error: float
    calibration_error_before: float


def compare(reference: Floats, logits: Floats, targets: Sequence[int], temperature: float) -> Comparison:
    """Measure both sets of logits [texts, labels] against the right label ids."""
    right = np.asarray(targets)
    served = softmax(logits / np.float32(temperature))
    change = np.abs(served - softmax(reference / np.float32(temperature))).max()
    return Comparison(
        texts=len(right),
        checkpoint_accuracy=float((reference.argmax(1) == right).mean()),
        engine_accuracy=float((logits.argmax(1) == right).mean()),
        engine_macro_f1=macro_f1(right, logits.argmax(1), logits.shape[1]),
        agreement=agreement(logits, reference),
        max_probability_change=float(change),
        temperature=temperature,
        calibration_error=expected_calibration_error(served, right),
        calibration_error_before=expected_calibration_error(softmax(logits), right),
    )


def macro_f1(right: npt.NDArray[np.int_], predicted: npt.NDArray[np.int_], labels: int) -> float:
    """Mean F1 over the labels that occur: 2 tp / (2 tp + fp + fn)."""
    hits = np.bincount(right[right == predicted], minlength=labels)
    total = np.bincount(right, minlength=labels) + np.bincount(predicted, minlength=labels)
    return float((2 * hits[total > 0] / total[total > 0]).mean())


def check_gates(test: Comparison, gates: Gates) -> None:
    """Raise `GateError` that names every missed gate with its figure."""
    loss = test.checkpoint_accuracy - test.engine_accuracy
    missed = []
    if test.engine_accuracy < gates.min_accuracy:
        missed.append(f"accuracy {test.engine_accuracy:.4f} < min_accuracy {gates.min_accuracy}")
    if loss > gates.max_accuracy_loss:
        missed.append(f"accuracy loss {loss:.4f} > max_accuracy_loss {gates.max_accuracy_loss}")
    if test.agreement < gates.min_agreement:
        missed.append(f"agreement {test.agreement:.4f} < min_agreement {gates.min_agreement}")
    if missed:
        raise GateError(
            f"gates missed on {test.texts} test texts: {'; '.join(missed)}. Nothing was published; the previous "
            "repository, if any, is untouched. Train longer, use --precision fp32, or change [gates]."
        )
