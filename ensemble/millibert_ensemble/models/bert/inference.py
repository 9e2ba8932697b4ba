"""All texts of the requests through the engine, in the layout of its graph; without Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .dividing import Indices, divide
from .engines import Engine, Floats
from .packing import Ids, Inputs, pack_rows, rows_of


class Part(NamedTuple):
    """One execution: which texts it holds, and its inputs."""

    texts: Indices
    inputs: Inputs


def infer(engine: Engine, parts: Sequence[Part]) -> Floats:
    """Logits [texts, labels], in the order of the texts."""
    outputs = engine.infer_all([part.inputs for part in parts])
    logits = np.empty((sum(len(part.texts) for part in parts), outputs[0].shape[1]), np.float32)
    for part, rows in zip(parts, outputs, strict=True):
        logits[part.texts] = rows
    return logits


def packed(requests: Sequence[Ids], streams: int) -> list[Part]:
    """Executions without padding, texts of about the same length together."""
    rows = rows_of(requests)
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return [Part(texts, pack_rows([rows[index] for index in texts])) for texts in divide(lengths, streams)]


def padded(requests: Sequence[Ids], streams: int) -> list[Part]:
    """Requests of one shape [B, L], padding and all, shared out evenly."""
    ids = np.concatenate(requests)
    shares = np.array_split(np.arange(len(ids)), min(streams, len(ids)))
    return [Part(texts, {"input_ids": ids[texts], "span": np.zeros((len(texts), 1), np.int32)}) for texts in shares]


LAYOUTS: dict[str, Callable[[Sequence[Ids], int], list[Part]]] = {"packed": packed, "padded": padded}
