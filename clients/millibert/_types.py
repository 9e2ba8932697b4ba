"""What a call returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from millibert._errors import ServiceError


@dataclass(frozen=True, slots=True)
class Prediction:
    """One label of one text."""

    label: str
    id: int
    """Index of the label in the model's label list."""
    score: float
    """Calibrated probability, 0 to 1."""
    accepted: bool = True
    """The score reaches the threshold that the build chose on validation texts."""

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
    def known(self) -> bool:
        """Whether any label is accepted; if not, the answer is "don't know", whatever the best label is."""
        return any(prediction.accepted for prediction in self.predictions)

    @property
    def accepted(self) -> tuple[str, ...]:
        """The accepted labels among those asked for: of a multi-label model, the labels of the text."""
        return tuple(prediction.label for prediction in self.predictions if prediction.accepted)

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
        notes = ["don't know"] * (not self.known) + ["text truncated"] * self.truncated
        return f"{listed} ({', '.join(notes)})" if notes else listed


@dataclass(frozen=True, slots=True)
class Failure:
    """In the place of a `Classification`: this text alone could not be classified."""

    text: object
    """What was given; it may not even be text."""
    error: ServiceError

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {self.error.reason}"


@dataclass(frozen=True, slots=True)
class ModelState:
    """One version of a model on a server."""

    name: str
    version: str
    state: str
    """`READY`, or what Triton says instead; empty for a model that nobody has told the server to load."""
    reason: str
    """Why it is not; may have several lines."""

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self.state == "READY"


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says of itself."""

    name: str
    version: str
    extensions: tuple[str, ...]


ANSWERED, CANCELLED = "answered", "cancelled"


@dataclass(frozen=True, slots=True)
class Call:
    """One finished call, as the `on_call` hook of a client gets it. Never holds a text."""

    method: str
    """`classify`, `ready`, …"""
    model: str
    request_id: str
    endpoint: str
    """Where the last attempt went."""
    texts: int
    attempts: int
    seconds: float
    outcome: str
    """`answered`, `cancelled`, or the name of what was raised."""
    error: ServiceError | None
    """Where it was one."""
