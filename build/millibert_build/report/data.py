"""What a build report says, as plain data.

Scores, agreements, probabilities and errors are shares from 0 to 1. None means "not measured". Sequences that speak of
labels are in the order of `Report.labels`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from millibert_build.learning_curve import Epoch

Problem = Literal["single_label", "multi_label"]


@dataclass(frozen=True)
class Verdict:
    """Whether the build was published; `reasons` names the missed gates, or whatever else is worth a line."""

    published: bool
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` values lie between `edges[i]` and `edges[i + 1]`."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class TokenLengths:
    """Texts in tokens, special tokens included. `truncated` of them are longer than `limit`."""

    mean: float
    median: float
    p95: float
    max: int
    histogram: Histogram
    limit: int | None = None
    truncated: int = 0


@dataclass(frozen=True)
class DataSummary:
    """The texts. `texts` and `label_counts` by split: train, validation, test."""

    texts: Mapping[str, int]
    label_counts: Mapping[str, tuple[int, ...]]
    tokens: TokenLengths | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Phase:
    """One run of training, such as "fine-tune" or "recovery". `best` is the number of the epoch that was kept."""

    name: str
    epochs: tuple[Epoch, ...]
    best: int


@dataclass(frozen=True)
class Measure:
    """One stage on one split. All but the score compare it with the fp32 checkpoint."""

    score: float
    agreement: float | None = None
    mean_change: float | None = None
    """Mean absolute change of a probability, over all texts and labels."""
    max_change: float | None = None


@dataclass(frozen=True)
class Stage:
    """One form of the model on its way to the engine. The first stage of a report is what the others are held against.

    `why_not` says in words why it was not chosen.
    """

    name: str
    validation: Measure | None = None
    test: Measure | None = None
    size_bytes: int | None = None
    texts_per_second: float | None = None
    chosen: bool = False
    passed: bool = True
    why_not: str | None = None


@dataclass(frozen=True)
class Candidate:
    """A setting that `millibert tune` tried."""

    name: str
    score: float
    texts_per_second: float
    passed: bool = True
    chosen: bool = False


@dataclass(frozen=True)
class LabelResult:
    """One label on the test texts. Precision is None where it was never given, recall where it never was right."""

    label: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    tp: int
    fp: int
    fn: int
    tn: int
    threshold: float | None = None


@dataclass(frozen=True)
class Confused:
    """`count` test texts with the label `right` were given `given` instead; some of them."""

    right: str
    given: str
    count: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mistake:
    """A test text and its wrong answer. `score`: how sure the model was of the wrong thing."""

    text: str
    right: tuple[str, ...]
    given: tuple[str, ...]
    score: float


@dataclass(frozen=True)
class Bin:
    """Answers of similar confidence. An empty bin has None for both shares."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """Reliability before and after temperature scaling; the errors are expected calibration errors."""

    temperature: float
    before: tuple[Bin, ...]
    after: tuple[Bin, ...]
    error_before: float
    error_after: float


@dataclass(frozen=True)
class Abstention:
    """The threshold on the best score below which the answer is "don't know"."""

    threshold: float
    in_scope_recall: float
    out_of_scope_rejected: float | None = None
    auroc: float | None = None
    in_scope: Histogram | None = None
    out_of_scope: Histogram | None = None


@dataclass(frozen=True)
class LayerRemoved:
    """What pruning left of one encoder layer. A layer that was dropped has 0 heads and 0 neurons after."""

    layer: int
    heads_before: int
    heads_after: int
    neurons_before: int
    neurons_after: int


@dataclass(frozen=True)
class Pruned:
    """What pruning removed."""

    layers: tuple[LayerRemoved, ...]
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class Release:
    """One release of the lineage, oldest first."""

    id: str
    created: str
    parent: str | None = None
    added: str | None = None


@dataclass(frozen=True)
class Environment:
    """What the release was made from and with, and the gates as configured."""

    base: str
    data_sha256: str
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    gates: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    name: str
    problem: Problem
    created: str
    labels: tuple[str, ...]
    verdict: Verdict
    data: DataSummary
    environment: Environment
    phases: tuple[Phase, ...] = ()
    stages: tuple[Stage, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    per_label: tuple[LabelResult, ...] = ()
    confusion: tuple[tuple[int, ...], ...] | None = None
    """Test texts by right label (row) and given label (column); None for multi-label problems."""
    confused: tuple[Confused, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    calibration: Calibration | None = None
    abstention: Abstention | None = None
    pruned: Pruned | None = None
    lineage: tuple[Release, ...] = ()

    @property
    def score_name(self) -> str:
        """What the scores are."""
        return "accuracy" if self.problem == "single_label" else "micro-F1"

    @property
    def baseline(self) -> Stage | None:
        """The stage that the others are held against."""
        return self.stages[0] if self.stages else None

    @property
    def chosen(self) -> Stage | None:
        """The stage that is served, or would have been."""
        return next((stage for stage in self.stages if stage.chosen), None)
