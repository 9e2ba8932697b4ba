"""Triton's side of the CPU engine: unpack requests, run them as one batch, split the logits."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from .host import Host
from .progress import Progress
from .texts import check, unpack

# The same family in every model; monitoring adds them up.
_REFUSED = ("millibert_refused_requests_total", "Requests that a model answered with an error of their own.")


class TritonPythonModel:
    """input_ids, admission -> logits."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load and warm up the engine; Triton reports ready only after it."""
        config = json.loads(args["model_config"])
        self._max_tokens = int(config["parameters"]["max_tokens"]["string_value"])
        folder = Path(args["model_repository"]) / args["model_version"]
        self._host = Host(folder, config, pb_utils)
        self._progress = Progress.of(args)
        self._family = pb_utils.MetricFamily(*_REFUSED, pb_utils.MetricFamily.COUNTER)
        labels = {"model": args["model_name"]}
        self._busy = self._family.Metric(labels={**labels, "reason": "busy"})
        self._invalid = self._family.Metric(labels={**labels, "reason": "invalid"})

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all waiting requests; what is wrong with one is told to that one only."""
        now = time.monotonic()
        responses: list[Any] = [None] * len(requests)
        good: dict[int, Any] = {}
        late, numbers = 0, []
        for index, request in enumerate(requests):
            deadline, number = _admission(request)
            numbers.append(number)
            if 1e6 * now > deadline:
                responses[index] = _error("busy: no engine free in time", pb_utils.TritonError.UNAVAILABLE)
                late += 1
                continue
            input_ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()
            try:
                check(input_ids, self._max_tokens)
                good[index] = input_ids
            except ValueError as error:
                responses[index] = _error(str(error), pb_utils.TritonError.INVALID_ARG)
                self._invalid.increment(1)
        if late:
            self._busy.increment(late)
        if good:
            batch = list(good.values())
            for index, rows in zip(good, unpack(self._host.infer(batch), batch), strict=True):
                responses[index] = pb_utils.InferenceResponse([pb_utils.Tensor("logits", rows)])
        self._progress.passed(sum(map(len, good.values())), numbers, time.monotonic())
        return responses


def _admission(request: Any) -> tuple[float, int]:
    """The deadline in microseconds, and the number of the last text; any time and 0 where nobody sent them."""
    tensor = pb_utils.get_input_tensor_by_name(request, "admission")
    if tensor is None:  # as with the config of a plan
        return math.inf, 0
    deadline, number = tensor.as_numpy()[0].tolist()
    return deadline, number


def _error(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
