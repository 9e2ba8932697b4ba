"""Texts as token ids to the inputs of a graph, packed or padded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from millibert_ensemble.models.bert.engines import Arrays
from millibert_ensemble.models.bert.packing import pack


def packed(batch: Sequence[Sequence[int]]) -> Arrays:
    """The four inputs of the packed graph."""
    return pack([np.array([row], np.int32) for row in batch])


def padded(batch: Sequence[Sequence[int]]) -> Arrays:
    """The inputs of the padded graph: rows as long as the batch's longest text."""
    ids = np.zeros((len(batch), max(map(len, batch))), np.int32)
    for row, text in zip(ids, batch, strict=True):
        row[: len(text)] = text
    return {"input_ids": ids, "span": np.zeros((len(batch), 1), np.int32)}
