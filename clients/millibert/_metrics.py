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


def micro_f1(pairs: Sequence[Pair]) -> float:
    """Of the accepted labels, over all texts: 2 tp / (2 tp + fp + fn); 1 where there is nothing to find."""
    hits = sum(len(set(row.labels) & set(answer.accepted)) for row, answer in pairs)
    total = sum(len(row.labels) + len(answer.accepted) for row, answer in pairs)
    return 2 * hits / total if total else 1.0


def exact_match(pairs: Sequence[Pair]) -> float:
    """Share of texts whose accepted labels are exactly the right ones."""
    return sum(set(row.labels) == set(answer.accepted) for row, answer in pairs) / len(pairs)


def multi_label_macro_f1(pairs: Sequence[Pair]) -> float:
    """Mean of the labels' F1 on accepted labels, over every label that was right or accepted for some text."""
    right = Counter(label for row, answer in pairs for label in set(row.labels) & set(answer.accepted))
    expected = Counter(label for row, _ in pairs for label in row.labels)
    answered = Counter(label for _, answer in pairs for label in answer.accepted)
    labels = expected.keys() | answered.keys()
    return sum(2 * right[label] / (expected[label] + answered[label]) for label in labels) / max(1, len(labels))


def known(pairs: Sequence[Pair]) -> float:
    """Share of texts to which the answer is not "don't know"."""
    return sum(answer.known for _, answer in pairs) / len(pairs)


def labels_never_answered(pairs: Sequence[Pair]) -> list[str]:
    """Labels of the data that came up in no answer at any place, sorted."""
    answered = {each.label for _, answer in pairs for each in answer.predictions}
    return sorted({label for row, _ in pairs for label in row.labels} - answered)
