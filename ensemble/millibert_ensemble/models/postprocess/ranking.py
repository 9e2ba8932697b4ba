"""Logits to the best labels, without Triton."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Ranking(NamedTuple):
    """The K best labels of each text, best first."""

    ids: npt.NDArray[np.int32]  # [B, K]
    scores: Floats  # [B, K]


class Answer(NamedTuple):
    """The outputs of one request."""

    labels: npt.NDArray[np.object_]  # [B, K], UTF-8
    scores: Floats  # [B, K]
    ids: npt.NDArray[np.int32]  # [B, K]
    accepted: npt.NDArray[np.bool_]  # [B, K]


class Ranker:
    """Labels, thresholds and temperature of a model; ranks all texts of a batch at once."""

    def __init__(self, folder: Path, parameters: dict[str, str]) -> None:
        labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        self._labels = np.array([label.encode() for label in labels], dtype=np.object_)
        thresholds = json.loads((folder / "thresholds.json").read_text(encoding="utf-8"))
        self._thresholds = np.array(thresholds, np.float32)
        self._activation = ACTIVATIONS[parameters["problem"]]
        self._temperature = np.float32(parameters["temperature"])
        self._top_k = int(parameters["top_k"])

    def requested_top_k(self, parameters: str) -> int:
        """K of a request; raises ValueError where it is none."""
        return requested_top_k(parameters, self._top_k, len(self._labels))

    def answers(self, logits: Floats, texts: Sequence[int], top_k: Sequence[int]) -> Iterator[Answer | None]:
        """The outputs of each request with so many of the rows and such a K; None where a logit is NaN."""
        # A row of NaN is an engine that could not trust its input; it only spoils its own request.
        with np.errstate(invalid="ignore"):
            scores = self._activation(logits / self._temperature)
        broken = np.isnan(scores).any(axis=1).tolist()
        ranking = best(scores, max(top_k))
        labels = self._labels[ranking.ids]
        accepted = ranking.scores >= self._thresholds[ranking.ids]
        start = 0
        for count, k in zip(texts, top_k, strict=True):
            rows = slice(start, start + count)
            whole = Answer(labels[rows, :k], ranking.scores[rows, :k], ranking.ids[rows, :k], accepted[rows, :k])
            yield None if any(broken[rows]) else whole
            start += count


def tensors(answer: Answer, pb_utils: Any) -> list[Any]:
    """The outputs as Triton's tensors, which must be contiguous."""
    arrays = {"LABEL": answer.labels, "SCORE": answer.scores, "LABEL_ID": answer.ids, "ACCEPTED": answer.accepted}
    return [pb_utils.Tensor(name, np.ascontiguousarray(values)) for name, values in arrays.items()]


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
    rows = np.arange(len(scores))[:, None]
    return Ranking(ids.astype(np.int32), scores[rows, ids].astype(np.float32))


def requested_top_k(parameters: str, default: int, labels: int) -> int:
    """`top_k` of a request's parameters (JSON), or the default; raises ValueError outside 1 to `labels`."""
    value = json.loads(parameters).get("top_k", default) if parameters else default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= labels:
        raise ValueError(f"top_k must be an integer from 1 to {labels}, not {value!r}")
    return value
