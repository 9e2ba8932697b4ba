"""How training went, epoch by epoch, and which epoch is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Epoch:
    """How one epoch went. `validation_score` is accuracy or micro-F1, 0 to 1."""

    number: int
    loss: float
    validation_score: float
    validation_loss: float

    @property
    def rank(self) -> tuple[float, float]:
        """What the best epoch is chosen by: the score, and where a small validation set ties, the lower loss."""
        return self.validation_score, -self.validation_loss


def best_epoch(curve: Sequence[Epoch]) -> Epoch:
    """The epoch whose checkpoint was kept: the first of the best."""
    return max(curve, key=lambda epoch: epoch.rank)
