"""Logits to the best labels, without Triton."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Ranking(NamedTuple):
    """The K best labels of each text, best first."""

    ids: npt.NDArray[np.int32]  # [B, K]
    scores: Floats  # [B, K]


def softmax(logits: Floats) -> Floats:
    """Probabilities [B, labels] of labels that exclude each other."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)  # type: ignore[no-any-return]


def sigmoid(logits: Floats) -> Floats:
    """Probabilities [B, labels] of labels that may hold together; stable for large logits."""
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1, small) / (1 + small)  # type: ignore[no-any-return]


# A scenario's problem type decides which.
ACTIVATIONS = {"single_label": softmax, "multi_label": sigmoid}


def best(scores: Floats, top_k: int) -> Ranking:
    """The `top_k` highest of [B, labels]; equal scores in the order of their ids."""
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    return Ranking(ids.astype(np.int32), np.take_along_axis(scores, ids, axis=1))


def requested_top_k(parameters: str, default: int, labels: int) -> int:
    """`top_k` of a request's parameters (JSON), or the default; raises ValueError outside 1 to `labels`."""
    value = json.loads(parameters).get("top_k", default) if parameters else default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= labels:
        raise ValueError(f"top_k must be an integer from 1 to {labels}, not {value!r}")
    return value
