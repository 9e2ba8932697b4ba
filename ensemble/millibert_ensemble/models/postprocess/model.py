"""Triton's side of the postprocessor: unpack requests, rank them together, pack the answers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from .progress import Progress
from .ranking import Ranker, tensors

# The same family in every model; monitoring adds them up.
_REFUSED = ("millibert_refused_requests_total", "Requests that a model answered with an error of their own.")


class TritonPythonModel:
    """logits (behind a plan: admission) -> LABEL, SCORE, LABEL_ID, ACCEPTED."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load labels and thresholds; problem type, temperature and default K are parameters of the config."""
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self._ranker = Ranker(Path(args["model_repository"]) / args["model_version"], parameters)
        # A plan does not tell how far it is; what comes out of it does.
        self._progress = Progress.of(args)
        self._family = pb_utils.MetricFamily(*_REFUSED, pb_utils.MetricFamily.COUNTER)
        self._invalid = self._family.Metric(labels={"model": args["model_name"], "reason": "invalid"})

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all waiting requests; what is wrong with one is told to that one only."""
        responses: list[Any] = [None] * len(requests)
        logits, top_k = {}, {}
        for index, request in enumerate(requests):
            try:
                top_k[index] = self._ranker.requested_top_k(request.parameters())
                logits[index] = pb_utils.get_input_tensor_by_name(request, "logits").as_numpy()
            except ValueError as error:
                responses[index] = _error(str(error), pb_utils.TritonError.INVALID_ARG)
                self._invalid.increment(1)
        if logits:
            rows = list(logits.values())
            answers = self._ranker.answers(np.concatenate(rows), list(map(len, rows)), list(top_k.values()))
            for index, answer in zip(logits, answers, strict=True):
                if answer is None:
                    reason = "the engine returned NaN for this request"
                    responses[index] = _error(reason, pb_utils.TritonError.INTERNAL)
                else:
                    responses[index] = pb_utils.InferenceResponse(tensors(answer, pb_utils))
        self._progress.passed(sum(map(len, logits.values())), map(_number, requests), time.monotonic())
        return responses


def _number(request: Any) -> int:
    """That of the last text, as the tokenizer gave it; 0 where nobody sent one."""
    admission = pb_utils.get_input_tensor_by_name(request, "admission")
    return 0 if admission is None else int(admission.as_numpy()[0, 1])


def _error(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
