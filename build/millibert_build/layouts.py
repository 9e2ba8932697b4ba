"""Texts as token ids to the inputs of a graph, packed or padded, in one execution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from millibert_ensemble.models.bert.engines import Arrays

# Engines are faster in shapes that they have seen: tokens in all, and the longest text, are rounded up to multiples.
_TOKENS, _LONGEST = 16, 8


def requests_of(batch: Sequence[Sequence[int]]) -> list[npt.NDArray[np.int32]]:
    """A request [1, L] for each text."""
    return [np.array([ids], np.int32) for ids in batch]


def packed(batch: Sequence[Sequence[int]]) -> Arrays:
    """The four inputs of the packed graph; what is added belongs to no text."""
    lengths = np.array([len(ids) for ids in batch], np.int32)
    input_ids = np.zeros(_round_up(int(lengths.sum()), _TOKENS), np.int32)
    input_ids[: lengths.sum()] = np.concatenate(batch)
    return {
        "input_ids": input_ids,
        "lengths": lengths,
        "max_length": np.zeros(_round_up(int(lengths.max()), _LONGEST), np.float32),
        "span": np.zeros(1, np.int32),
    }


def rectangle(batch: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    """One request [N, S], rows as long as the longest text."""
    ids = np.zeros((len(batch), max(map(len, batch))), np.int32)
    for row, text in zip(ids, batch, strict=True):
        row[: len(text)] = text
    return ids


def padded(batch: Sequence[Sequence[int]]) -> Arrays:
    """The inputs of the padded graph."""
    return {"input_ids": rectangle(batch), "span": np.zeros((len(batch), 1), np.int32)}


def without_padding(ids: Sequence[Sequence[int]], size: int) -> list[Arrays]:
    """Inputs of the graph of rows that hold nothing but text: texts of one length, at most `size`, a row each.

    For calibration: what a model makes of padding says nothing of what it makes of texts.
    """
    of_length: dict[int, list[Sequence[int]]] = {}
    for text in ids:
        of_length.setdefault(len(text), []).append(text)
    return [
        _grid(np.array(texts[start : start + size], np.int32))
        for _, texts in sorted(of_length.items())
        for start in range(0, len(texts), size)
    ]


def _grid(input_ids: npt.NDArray[np.int32]) -> Arrays:
    texts, length = input_ids.shape
    return {
        "input_ids": input_ids,
        "position": np.tile(np.arange(length, dtype=np.int32), (texts, 1)),
        "text": np.zeros_like(input_ids),
        "first": np.arange(texts, dtype=np.int32) * length,
    }


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
