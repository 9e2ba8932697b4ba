"""How good a checkpoint and the engine made from it are, and the gates between them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from millibert._errors import MillibertError
from millibert_build.calibrate import Calibration, expected_calibration_error
from millibert_build.engine import Floats
from millibert_build.scenario import Gates, Problem
from millibert_ensemble.models.postprocess.ranking import ACTIVATIONS

Given = npt.NDArray[np.bool_]


class GateError(MillibertError):
    """A gate of the scenario is missed; nothing was published."""


class Comparison(NamedTuple):
    """An engine against an fp32 checkpoint on the same texts. Scores, F1 and agreement are shares.

    The score is accuracy for one label a text, micro-F1 for several. Texts agree when both give the same label, or
    the same set of labels. Changes are of the calibrated probabilities, over all texts and labels; the mean is of
    absolute values. `calibration_error` is that of the engine's probabilities, `_before` without temperature.
    """

    texts: int
    score_name: str
    checkpoint_score: float
    engine_score: float
    engine_macro_f1: float
    agreement: float
    mean_probability_change: float
    max_probability_change: float
    temperature: float
    calibration_error: float
    calibration_error_before: float

    @property
    def loss(self) -> float:
        """Score lost against the checkpoint; negative where the engine is better."""
        return self.checkpoint_score - self.engine_score


def compare(
    problem: Problem, reference: Floats, logits: Floats, targets: Floats, calibration: Calibration
) -> Comparison:
    """Measure both sets of logits [texts, labels] against multi-hot targets [texts, labels]."""
    activation = ACTIVATIONS[problem]
    temperature = np.float32(calibration.temperature)
    expected, served = activation(reference / temperature), activation(logits / temperature)
    right = targets > 0
    before, after = (predicted(problem, rows, calibration.thresholds) for rows in (expected, served))
    change = np.abs(served - expected)
    return Comparison(
        texts=len(targets),
        score_name="accuracy" if problem == "single_label" else "micro-F1",
        checkpoint_score=score(problem, before, right),
        engine_score=score(problem, after, right),
        engine_macro_f1=macro_f1(after, right),
        agreement=float((before == after).all(axis=1).mean()),
        mean_probability_change=float(change.mean()),
        max_probability_change=float(change.max()),
        temperature=calibration.temperature,
        calibration_error=expected_calibration_error(problem, served, targets),
        calibration_error_before=expected_calibration_error(problem, activation(logits), targets),
    )


def predicted(problem: Problem, probabilities: Floats, thresholds: npt.ArrayLike) -> Given:
    """The labels given to each text, [texts, labels]: the best one, or all that reach their threshold."""
    if problem == "single_label":
        best: Given = np.arange(probabilities.shape[1]) == probabilities.argmax(axis=1)[:, None]
        return best
    accepted: Given = probabilities >= np.asarray(thresholds, np.float32)
    return accepted


def score(problem: Problem, given: Given, right: Given) -> float:
    """Accuracy, or micro-F1: 2 tp / (2 tp + fp + fn) over all texts and labels; 1 where there is nothing to find."""
    if problem == "single_label":
        return float((given & right).any(axis=1).mean())
    total = int(given.sum() + right.sum())
    return 2 * int((given & right).sum()) / total if total else 1.0


def macro_f1(given: Given, right: Given) -> float:
    """Mean F1 over the labels that occur: 2 tp / (2 tp + fp + fn)."""
    hits = (given & right).sum(axis=0)
    total = given.sum(axis=0) + right.sum(axis=0)
    return float((2 * hits[total > 0] / total[total > 0]).mean()) if total.any() else 1.0


def check_gates(found: Comparison, gates: Gates, precision: str, split: str = "test") -> None:
    """Raise `GateError` that names every missed gate with its figure; `min_accuracy` is for the test texts."""
    wanted = gates.min_agreement_int8 if precision.startswith("int8") else gates.min_agreement
    missed = []
    if split == "test" and found.engine_score < gates.min_accuracy:
        missed.append(f"{found.score_name} {found.engine_score:.4f} < min_accuracy {gates.min_accuracy}")
    if found.loss > gates.max_accuracy_loss:
        missed.append(f"{found.score_name} loss {found.loss:.4f} > max_accuracy_loss {gates.max_accuracy_loss}")
    if found.agreement < wanted:
        missed.append(f"agreement {found.agreement:.4f} < {wanted}")
    if missed:
        raise GateError(f"{precision} misses gates on {found.texts} {split} texts: {', '.join(missed)}")


def check_pruning_gates(found: Comparison, gates: Gates, removed: str, split: str = "test") -> None:
    """The same for a pruned checkpoint against the one before pruning; `removed` says what was."""
    missed = []
    if found.loss > gates.max_pruning_loss:
        missed.append(f"{found.score_name} loss {found.loss:.4f} > max_pruning_loss {gates.max_pruning_loss}")
    if found.agreement < gates.min_pruning_agreement:
        missed.append(f"agreement {found.agreement:.4f} < min_pruning_agreement {gates.min_pruning_agreement}")
    if missed:
        raise GateError(f"{removed} misses gates on {found.texts} {split} texts: {', '.join(missed)}")
