"""The loss of fine-tuning, for each problem type, with or without a teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from millibert_build.scenario import Distillation, Problem, Training

_MAX_POSITIVE_WEIGHT = 10.0
_SMOOTHING = 0.1


@dataclass(frozen=True)
class Teacher:
    """What a larger or earlier model says of the training texts."""

    logits: Tensor  # [training texts, labels]
    weight: float
    temperature: float

    @classmethod
    def of(cls, logits: Tensor, distillation: Distillation) -> Teacher:
        """A teacher as the scenario weighs it."""
        return cls(logits, distillation.weight, distillation.temperature)


class Objective:
    """Loss of a batch; smaller is better.

    Single-label: cross entropy. Multi-label: binary cross entropy, summed over the labels. Labels are smoothed
    towards the uniform distribution, or towards 1/2 each. A teacher adds what `scenario.Distillation` says.
    """

    def __init__(self, problem: Problem, training: Training, targets: Tensor, teacher: Teacher | None = None) -> None:
        """`targets` multi-hot [training texts, labels]: what class weights are counted from."""
        self._single = problem == "single_label"
        default = _SMOOTHING if self._single else 0.0
        self._smoothing = default if training.label_smoothing is None else training.label_smoothing
        self._teacher = teacher
        self._weights: Tensor | None = None
        if training.class_weights == "balanced":
            self._weights = balanced_weights(targets, problem)

    def __call__(self, logits: Tensor, targets: Tensor, texts: list[int] | None = None) -> Tensor:
        """Mean over the batch of logits [B, labels] fp32 and multi-hot targets [B, labels].

        `texts` are the indices of the batch in the training set; without them the teacher is not asked.
        """
        loss = self._plain(logits, targets)
        if self._teacher is None or texts is None:
            return loss
        taught = self._distance(logits, self._teacher.logits[texts], self._teacher.temperature)
        return (1 - self._teacher.weight) * loss + self._teacher.weight * taught

    def _plain(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self._single:
            return F.cross_entropy(logits, targets.argmax(1), self._weights, label_smoothing=self._smoothing)
        smoothed = targets * (1 - self._smoothing) + self._smoothing / 2
        loss = F.binary_cross_entropy_with_logits(logits, smoothed, pos_weight=self._weights, reduction="sum")
        return loss / len(logits)

    def _distance(self, logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        student, soft = logits / temperature, teacher / temperature
        if self._single:
            distance = F.kl_div(F.log_softmax(student, 1), F.softmax(soft, 1), reduction="batchmean")
        else:
            # Cross entropy less the teacher's own entropy, which no student can change.
            probabilities = torch.sigmoid(soft)
            crossed = F.binary_cross_entropy_with_logits(student, probabilities, reduction="sum")
            own = F.binary_cross_entropy_with_logits(soft, probabilities, reduction="sum")
            distance = (crossed - own) / len(logits)
        return temperature**2 * distance


def balanced_weights(targets: Tensor, problem: Problem) -> Tensor:
    """Weights [labels]: texts / (labels * texts of the label); multi-label: negatives / positives, 1 to 10."""
    texts, labels = targets.shape
    positives = targets.sum(0).clamp(min=1)
    if problem == "single_label":
        return texts / (labels * positives)
    return ((texts - positives) / positives).clamp(1, _MAX_POSITIVE_WEIGHT)


def prior_logits(targets: Tensor) -> Tensor:
    """Log odds [labels] of the share of texts that each label has: what a new classifier starts from.

    From even odds, the first steps of a multi-label model would all push every label down together, far enough
    to saturate the pooler for good (Lin et al., "Focal Loss for Dense Object Detection", 2017, section 3.3).
    """
    share = targets.mean(0).clamp(1 / len(targets), 0.5)
    return torch.log(share / (1 - share))


def validation_loss(logits: Tensor, targets: Tensor, problem: Problem) -> float:
    """Plain log loss per text, neither smoothed nor weighted: comparable between settings."""
    if problem == "single_label":
        return float(F.cross_entropy(logits, targets.argmax(1)))
    return float(F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits))


def validation_score(logits: Tensor, targets: Tensor, problem: Problem) -> float:
    """Accuracy, or micro-F1 at a probability of 1/2."""
    if problem == "single_label":
        return float((logits.argmax(1) == targets.argmax(1)).float().mean())
    given, right = logits > 0, targets > 0
    both = int(given.sum() + right.sum())
    return 2 * int((given & right).sum()) / both if both else 1.0
