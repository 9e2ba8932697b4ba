"""What a call returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prediction:
    """One label of one text."""

    label: str
    id: int
    """Index of the label in the model's label list."""
    score: float
    """Calibrated probability, 0 to 1."""

    def __str__(self) -> str:
        return f"{self.label} {self.score:.3f}"


@dataclass(frozen=True, slots=True)
class Classification:
    """The answer for one text."""

    text: str
    predictions: tuple[Prediction, ...]
    """At least one, best first."""
    truncated: bool
    """The text was longer than the model reads: its end had no influence."""

    @property
    def best(self) -> Prediction:
        """The prediction with the highest score."""
        return self.predictions[0]

    @property
    def label(self) -> str:
        """The best label."""
        return self.best.label

    @property
    def score(self) -> float:
        """The best label's score."""
        return self.best.score

    def __str__(self) -> str:
        listed = ", ".join(str(prediction) for prediction in self.predictions)
        return f"{listed} (text truncated)" if self.truncated else listed
