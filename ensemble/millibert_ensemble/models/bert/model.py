"""Triton's side of the CPU engine: unpack requests, run them as one batch, split the logits."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from .host import Host
from .texts import check, unpack

# The same family in every model; monitoring adds them up.
_REFUSED = ("millibert_refused_requests_total", "Requests that a model answered with an error of their own.")


class TritonPythonModel:
    """input_ids, deadline -> logits."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load and warm up the engine; Triton reports ready only after it."""
        config = json.loads(args["model_config"])
        self._max_tokens = int(config["parameters"]["max_tokens"]["string_value"])
        folder = Path(args["model_repository"]) / args["model_version"]
        self._host = Host(folder, config, pb_utils)
        self._family = pb_utils.MetricFamily(*_REFUSED, pb_utils.MetricFamily.COUNTER)
        labels = {"model": args["model_name"]}
        self._busy = self._family.Metric(labels={**labels, "reason": "busy"})
        self._invalid = self._family.Metric(labels={**labels, "reason": "invalid"})

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all waiting requests; what is wrong with one is told to that one only."""
        responses: list[Any] = [None] * len(requests)
        good: dict[int, Any] = {}
        late = 0
        now = time.monotonic_ns() // 1000
        for index, request in enumerate(requests):
            deadline = pb_utils.get_input_tensor_by_name(request, "deadline")
            if deadline is not None and now > deadline.as_numpy().max():
                refusal = pb_utils.TritonError("busy: no engine free in time", pb_utils.TritonError.UNAVAILABLE)
                responses[index] = pb_utils.InferenceResponse(error=refusal)
                late += 1
                continue
            input_ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()
            try:
                check(input_ids, self._max_tokens)
                good[index] = input_ids
            except ValueError as error:
                refusal = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
                responses[index] = pb_utils.InferenceResponse(error=refusal)
                self._invalid.increment(1)
        if late:
            self._busy.increment(late)
        if good:
            batch = list(good.values())
            for index, rows in zip(good, unpack(self._host.infer(batch), batch), strict=True):
                responses[index] = pb_utils.InferenceResponse([pb_utils.Tensor("logits", rows)])
        return responses
