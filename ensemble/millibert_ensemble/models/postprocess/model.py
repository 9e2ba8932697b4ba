"""Triton's side of the postprocessor: unpack requests, rank them together, pack the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from .ranking import ACTIVATIONS, best, requested_top_k


class TritonPythonModel:
    """logits -> LABEL, SCORE, LABEL_ID, ACCEPTED."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load labels and thresholds; problem type, temperature and default K are parameters of the config."""
        parameters = json.loads(args["model_config"])["parameters"]
        folder = Path(args["model_repository"]) / args["model_version"]
        labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        self._labels = np.array([label.encode() for label in labels], dtype=np.object_)
        thresholds = json.loads((folder / "thresholds.json").read_text(encoding="utf-8"))
        self._thresholds = np.array(thresholds, np.float32)
        self._activation = ACTIVATIONS[parameters["problem"]["string_value"]]
        self._temperature = np.float32(parameters["temperature"]["string_value"])
        self._top_k = int(parameters["top_k"]["string_value"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all waiting requests; what is wrong with one is told to that one only."""
        logits = [pb_utils.get_input_tensor_by_name(request, "logits").as_numpy() for request in requests]
        # A row of NaN is an engine that could not trust its input; it only spoils its own request.
        with np.errstate(invalid="ignore"):
            scores = self._activation(np.concatenate(logits) / self._temperature)
        ends = np.cumsum([len(rows) for rows in logits])
        return [
            self._answer(request, rows) for request, rows in zip(requests, np.split(scores, ends[:-1]), strict=True)
        ]

    def _answer(self, request: Any, scores: Any) -> Any:
        try:
            top_k = requested_top_k(request.parameters(), self._top_k, len(self._labels))
        except ValueError as error:
            return _error(str(error), pb_utils.TritonError.INVALID_ARG)
        if np.isnan(scores).any():
            return _error("the engine returned NaN for this request", pb_utils.TritonError.INTERNAL)
        ranking = best(scores, top_k)
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("LABEL", self._labels[ranking.ids]),
                pb_utils.Tensor("SCORE", ranking.scores.astype(np.float32)),
                pb_utils.Tensor("LABEL_ID", ranking.ids),
                pb_utils.Tensor("ACCEPTED", ranking.scores >= self._thresholds[ranking.ids]),
            ]
        )


def _error(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
