"""Batches of real texts in both layouts, for the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from millibert._errors import UsageError
from millibert_build.dataset import load_texts
from millibert_build.tokens import limited, load_tokenizer, token_ids
from millibert_ensemble.models.bert.engines import Arrays
from millibert_ensemble.models.bert.packing import pack

Ids = list[list[int]]


def read_ids(checkpoint: Path, data: str, text_column: str, max_tokens: int) -> Ids:
    """Token ids of each text, by the checkpoint's own tokenizer, in the order of the file."""
    if not (checkpoint / "config.json").is_file():
        raise UsageError(f"{checkpoint}: not a checkpoint; `millibert build` keeps them in its --work folder")
    tokenizer = limited(load_tokenizer(str(checkpoint)), max_tokens)
    return token_ids(tokenizer, load_texts(data, text_column))


def batches_of(ids: Ids, size: int) -> list[Ids]:
    """Batches of `size` texts; the last one may be smaller."""
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def packed(batch: Sequence[Sequence[int]]) -> Arrays:
    """The four inputs of the packed graph."""
    return pack([np.array([row], np.int32) for row in batch])


def padded(batch: Sequence[Sequence[int]]) -> Arrays:
    """The input of the padded graph: rows as long as the batch's longest text."""
    ids = np.zeros((len(batch), max(map(len, batch))), np.int32)
    for row, text in zip(ids, batch, strict=True):
        row[: len(text)] = text
    return {"input_ids": ids}
