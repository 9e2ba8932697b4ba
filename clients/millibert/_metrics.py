"""How good the answers for labelled texts were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from millibert._labelled_texts import LabelledText
from millibert._types import Classification

Pair = tuple[LabelledText, Classification]
"""A labelled text and its answer."""


def accuracy(pairs: Sequence[Pair]) -> float:
    """Share of texts whose best label is the right one, 0 to 1; there must be at least one pair."""
    return sum(answer.label == row.label for row, answer in pairs) / len(pairs)


def top_k_accuracy(pairs: Sequence[Pair]) -> float:
    """Share of texts whose right label is among all the labels answered."""
    hits = sum(any(each.label == row.label for each in answer.predictions) for row, answer in pairs)
    return hits / len(pairs)


def macro_f1(pairs: Sequence[Pair]) -> float:
    """Mean of the labels' F1, over every label that was right or answered for some text."""
    right = Counter(row.label for row, answer in pairs if answer.label == row.label)
    expected = Counter(row.label for row, _ in pairs)
    answered = Counter(answer.label for _, answer in pairs)
    labels = expected.keys() | answered.keys()
    return sum(2 * right[label] / (expected[label] + answered[label]) for label in labels) / len(labels)


def labels_never_answered(pairs: Sequence[Pair]) -> list[str]:
    """Labels of the data that came up in no answer at any place, sorted."""
    answered = {each.label for _, answer in pairs for each in answer.predictions}
    return sorted({row.label for row, _ in pairs} - answered)
