"""All texts of the requests through the engine, in the layout of its graph; without Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .engines import Arrays, Engine, Floats
from .rows import arrange, divide
from .texts import Ids, texts_of


class Part(NamedTuple):
    """One execution: which texts its first logits are of, and its inputs."""

    texts: npt.NDArray[np.int64]
    inputs: Arrays


def infer(engine: Engine, parts: Sequence[Part]) -> Floats:
    """Logits [texts, labels], in the order of the texts."""
    outputs = engine.infer_all([part.inputs for part in parts])
    logits = np.empty((sum(len(part.texts) for part in parts), outputs[0].shape[1]), np.float32)
    for part, rows in zip(parts, outputs, strict=True):
        logits[part.texts] = rows[: len(part.texts)]
    return logits


def in_rows(requests: Sequence[Ids], streams: int) -> list[Part]:
    """Executions of rows that several texts share."""
    texts = texts_of(requests)
    parts = []
    for execution in divide([len(text) for text in texts], streams):
        indices = np.array([index for row in execution.rows for index in row], np.int64)
        parts.append(Part(indices, arrange(texts, execution)))
    return parts


def padded(requests: Sequence[Ids], streams: int) -> list[Part]:
    """Requests of one shape [B, L], padding and all, shared out evenly."""
    ids = np.concatenate(requests)
    shares = np.array_split(np.arange(len(ids)), min(streams, len(ids)))
    return [Part(texts, {"input_ids": ids[texts], "span": np.zeros((len(texts), 1), np.int32)}) for texts in shares]


LAYOUTS: dict[str, Callable[[Sequence[Ids], int], list[Part]]] = {"rows": in_rows, "padded": padded}
