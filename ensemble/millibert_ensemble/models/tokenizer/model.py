"""Triton's side of the tokenizer: unpack requests, tokenize them together, pack the answers."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from .tokenization import decode, load, requested_timeout, tokenize

# The same family in every model; monitoring adds them up.
_REFUSED = ("millibert_refused_requests_total", "Requests that a model answered with an error of their own.")


class TritonPythonModel:
    """TEXT -> input_ids, span, deadline, TRUNCATED."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer; a file that is missing or wrong keeps the model from becoming ready."""
        # Its threads would only take the CPU from the engine.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        folder = Path(args["model_repository"]) / args["model_version"]
        self._tokenizer = load(folder / "tokenizer.json")
        parameters = json.loads(args["model_config"])["parameters"]
        self._buckets = json.loads(parameters.get("buckets", {"string_value": "[]"})["string_value"])
        self._timeout_us = int(parameters["queue_timeout_us"]["string_value"])
        self._family = pb_utils.MetricFamily(*_REFUSED, pb_utils.MetricFamily.COUNTER)
        self._invalid = self._family.Metric(labels={"model": args["model_name"], "reason": "invalid"})

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all waiting requests; what is wrong with one is told to that one only."""
        responses: list[Any] = [None] * len(requests)
        good: dict[int, list[str]] = {}
        deadlines: dict[int, int] = {}
        now = time.monotonic_ns() // 1000
        for index, request in enumerate(requests):
            try:
                deadlines[index] = now + requested_timeout(request.parameters(), self._timeout_us)
                good[index] = decode(pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy())
            except ValueError as error:
                refusal = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
                responses[index] = pb_utils.InferenceResponse(error=refusal)
                self._invalid.increment(1)
        for index, tokens in zip(good, tokenize(self._tokenizer, list(good.values()), self._buckets), strict=True):
            made = {
                "input_ids": tokens.input_ids,
                "span": tokens.span,
                "deadline": np.full((len(tokens.input_ids), 1), deadlines[index], np.int64),
                "TRUNCATED": tokens.truncated,
            }
            # Which engine reads them decides what is wanted; the rest need not be copied.
            wanted = requests[index].requested_output_names()
            responses[index] = pb_utils.InferenceResponse([pb_utils.Tensor(name, made[name]) for name in wanted])
        return responses
