"""Texts as token ids to the inputs of a graph, packed or padded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from millibert_ensemble.models.bert.engines import Arrays
from millibert_ensemble.models.bert.packing import pack


def rows_of_texts(batch: Sequence[Sequence[int]]) -> list[npt.NDArray[np.int32]]:
    """A request [1, L] for each text."""
    return [np.array([row], np.int32) for row in batch]


def packed(batch: Sequence[Sequence[int]]) -> Arrays:
    """The four inputs of the packed graph."""
    return pack(rows_of_texts(batch))


def rectangle(batch: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    """One request [N, S], rows as long as the longest text."""
    ids = np.zeros((len(batch), max(map(len, batch))), np.int32)
    for row, text in zip(ids, batch, strict=True):
        row[: len(text)] = text
    return ids


def padded(batch: Sequence[Sequence[int]]) -> Arrays:
    """The inputs of the padded graph."""
    return {"input_ids": rectangle(batch), "span": np.zeros((len(batch), 1), np.int32)}
