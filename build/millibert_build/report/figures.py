"""The figures of a report that follow from targets and probabilities alone.

Targets are label ids [texts] of a single-label problem, or 0 and 1 [texts, labels] of a multi-label one. Predictions
have the same form. Probabilities are [texts, labels] in both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from millibert_build import evaluate
from millibert_build.calibrate import auroc
from millibert_build.report.data import (
    Abstention,
    Bin,
    Candidate,
    Confused,
    Histogram,
    LabelResult,
    Measure,
    Mistake,
    TokenLengths,
)

Array = npt.NDArray[Any]
Thresholds = float | Sequence[float]


def predictions(probabilities: Array, thresholds: Thresholds | None = None) -> Array:
    """The best label's id of each text; with thresholds, 0 and 1 for each label."""
    if thresholds is None:
        best: Array = np.asarray(probabilities).argmax(1)
        return best
    return (np.asarray(probabilities) >= np.asarray(thresholds)).astype(int)


def one_hot(ids: Array, labels: int) -> Array:
    """Ids as 0 and 1 [texts, labels]; what has that form already stays."""
    ids = np.asarray(ids)
    return ids.astype(int) if ids.ndim == 2 else np.eye(labels, dtype=int)[ids]


def confusion(targets: Array, predicted: Array, labels: int) -> tuple[tuple[int, ...], ...]:
    """Texts by right label (row) and given label (column) of a single-label problem."""
    counts = np.zeros((labels, labels), dtype=int)
    np.add.at(counts, (np.asarray(targets), np.asarray(predicted)), 1)
    return tuple(tuple(row) for row in counts.tolist())


def label_counts(targets: Array, labels: int) -> tuple[int, ...]:
    """Texts of each label."""
    return tuple(one_hot(targets, labels).sum(0).tolist())


def per_label(
    labels: Sequence[str], targets: Array, predicted: Array, thresholds: Thresholds | None = None
) -> tuple[LabelResult, ...]:
    """Each label's precision, recall and F1, and the counts they are made of."""
    right, given = one_hot(targets, len(labels)), one_hot(predicted, len(labels))
    tp, fp, fn = (right & given).sum(0), ((1 - right) & given).sum(0), (right & (1 - given)).sum(0)
    limits = [None] * len(labels) if thresholds is None else np.broadcast_to(thresholds, len(labels)).tolist()
    rows = zip(labels, tp.tolist(), fp.tolist(), fn.tolist(), limits, strict=True)
    return tuple(
        _label_result(label, (hits, extra, missed), len(right), limit) for label, hits, extra, missed, limit in rows
    )


def _label_result(label: str, counts: tuple[int, int, int], texts: int, threshold: float | None) -> LabelResult:
    tp, fp, fn = counts
    return LabelResult(
        label=label,
        precision=_ratio(tp, tp + fp),
        recall=_ratio(tp, tp + fn),
        f1=_ratio(2 * tp, 2 * tp + fp + fn),
        support=tp + fn,
        tp=tp,
        fp=fp,
        fn=fn,
        tn=texts - tp - fp - fn,
        threshold=threshold,
    )


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def confused_pairs(
    labels: Sequence[str], targets: Array, predicted: Array, texts: Sequence[str], most: int = 15, examples: int = 2
) -> tuple[Confused, ...]:
    """The pairs of labels most often taken for each other: one that was missed, one given where it was wrong."""
    right, given = one_hot(targets, len(labels)), one_hot(predicted, len(labels))
    wrong = np.flatnonzero((right != given).any(1))
    pairs: dict[tuple[int, int], list[str]] = {}
    for index in wrong.tolist():
        missed = np.flatnonzero(right[index] > given[index]).tolist()
        extra = np.flatnonzero(given[index] > right[index]).tolist()
        for pair in ((a, b) for a in missed for b in extra):
            pairs.setdefault(pair, []).append(texts[index])
    ranked = Counter({pair: len(found) for pair, found in pairs.items()}).most_common(most)
    return tuple(Confused(labels[a], labels[b], n, tuple(pairs[a, b][:examples])) for (a, b), n in ranked)


def worst_mistakes(
    labels: Sequence[str],
    targets: Array,
    probabilities: Array,
    texts: Sequence[str],
    thresholds: Thresholds | None = None,
    most: int = 20,
) -> tuple[Mistake, ...]:
    """The wrong answers that the model was most sure of, the surest first.

    Single-label: sure is the probability of the label given. Multi-label: that of the worst single decision, a label
    given wrongly (its probability) or missed (1 minus that).
    """
    probabilities = np.asarray(probabilities)
    right = one_hot(targets, len(labels))
    given = one_hot(predictions(probabilities, thresholds), len(labels))
    sure = np.where(given > right, probabilities, -1.0)
    if thresholds is not None:
        sure = np.where(right > given, 1 - probabilities, sure)
    score = sure.max(1)
    worst = [index for index in np.argsort(-score, kind="stable")[:most].tolist() if score[index] >= 0]

    def names(row: Array) -> tuple[str, ...]:
        return tuple(labels[label] for label in np.flatnonzero(row))

    return tuple(Mistake(texts[i], names(right[i]), names(given[i]), float(score[i])) for i in worst)


def measure(
    probabilities: Array, reference: Array | None, targets: Array, thresholds: Thresholds | None = None
) -> Measure:
    """Score of some probabilities, and how far they are from the fp32 checkpoint's."""
    probabilities = np.asarray(probabilities)
    given = predictions(probabilities, thresholds)
    right = score(given, targets)
    if reference is None:
        return Measure(right)
    change = np.abs(probabilities - reference)
    same = given == predictions(reference, thresholds)
    agreement = float((same if same.ndim == 1 else same.all(1)).mean())
    return Measure(right, agreement, float(change.mean()), float(change.max()))


def score(predicted: Array, targets: Array) -> float:
    """Accuracy of ids, micro-F1 of 0 and 1."""
    predicted, targets = np.asarray(predicted), np.asarray(targets)
    if targets.ndim == 1:
        return float((predicted == targets).mean())
    return evaluate.score("multi_label", predicted > 0, targets > 0)


def calibration_bins(probabilities: Array, targets: Array, bins: int = 15) -> tuple[Bin, ...]:
    """Answers by confidence. Multi-label: each label of each text is an answer, its probability the confidence."""
    probabilities, targets = np.asarray(probabilities, dtype=float), np.asarray(targets)
    confidence = probabilities.max(1) if targets.ndim == 1 else probabilities.ravel()
    hit = probabilities.argmax(1) == targets if targets.ndim == 1 else targets.ravel().astype(bool)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return tuple(_bin(index, bins, confidence[place == index], hit[place == index]) for index in range(bins))


def _bin(index: int, bins: int, confidence: Array, hit: Array) -> Bin:
    means = (float(confidence.mean()), float(hit.mean())) if len(hit) else (None, None)
    return Bin(index / bins, (index + 1) / bins, len(hit), *means)


def abstention(in_scope: Array, out_of_scope: Array | None, threshold: float, bins: int = 25) -> Abstention:
    """How a threshold on the best score divides texts in scope from texts out of it."""
    inside = np.asarray(in_scope, dtype=float)
    recall, histogram = float((inside >= threshold).mean()), score_histogram(inside, bins)
    if out_of_scope is None or not len(out_of_scope):
        return Abstention(threshold, recall, in_scope=histogram)
    outside = np.asarray(out_of_scope, dtype=float)
    rejected = float((outside < threshold).mean())
    return Abstention(threshold, recall, rejected, auroc(inside, outside), histogram, score_histogram(outside, bins))


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that passed and that no other one that passed beats in speed and score, the slowest first."""
    passed = [c for c in candidates if c.passed]
    return sorted((c for c in passed if not _beaten(c, passed)), key=lambda c: c.texts_per_second)


def _beaten(one: Candidate, by: Sequence[Candidate]) -> bool:
    mine = (one.texts_per_second, one.score)
    others = [(c.texts_per_second, c.score) for c in by]
    return any(other != mine and other[0] >= mine[0] and other[1] >= mine[1] for other in others)


def score_histogram(scores: Array, bins: int = 25) -> Histogram:
    """Scores from 0 to 1 in equal bins."""
    return _histogram(np.asarray(scores), np.linspace(0, 1, bins + 1))


def token_lengths(lengths: Sequence[int], limit: int | None = None, bins: int = 32) -> TokenLengths:
    """Lengths of texts in tokens, measured before truncation to `limit`."""
    values = np.asarray(lengths)
    step = max(1, -(-int(values.max() + 1 - values.min()) // bins))
    edges = np.arange(values.min(), values.max() + step + 1, step)
    return TokenLengths(
        mean=float(values.mean()),
        median=float(np.median(values)),
        p95=float(np.percentile(values, 95)),
        max=int(values.max()),
        histogram=_histogram(values, edges),
        limit=limit,
        truncated=int((values > limit).sum()) if limit is not None else 0,
    )


def _histogram(values: Array, edges: Array) -> Histogram:
    counts, _ = np.histogram(values, edges)
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))
