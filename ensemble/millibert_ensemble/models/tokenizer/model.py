"""Triton's side of the tokenizer: unpack requests, tokenize them together, pack the answers."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import triton_python_backend_utils as pb_utils

from .admission import Admission, Busy, Engine
from .tokenization import decode, load, requested_timeout, tokenize

# The same family in every model; monitoring adds them up.
_REFUSED = ("millibert_refused_requests_total", "Requests that a model answered with an error of their own.")


class _Admitted(NamedTuple):
    texts: list[str]
    admission: tuple[int, int]


class TritonPythonModel:
    """TEXT -> input_ids, span, admission, TRUNCATED."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer; a file that is missing or wrong keeps the model from becoming ready."""
        # Its threads would only take the CPU from the engine.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        folder = Path(args["model_repository"]) / args["model_version"]
        self._tokenizer = load(folder / "tokenizer.json")
        config = json.loads(args["model_config"])
        parameters = config["parameters"]
        self._buckets = json.loads(parameters.get("buckets", {"string_value": "[]"})["string_value"])
        self._timeout_us = int(parameters["queue_timeout_us"]["string_value"])
        # The server names a file. Several instances know nothing of each other, and let all in.
        told, instances = os.environ.get("MILLIBERT_PROGRESS"), sum(it["count"] for it in config["instance_group"])
        self._admission = Admission(Path(told) if told and instances == 1 else None)
        self._family = pb_utils.MetricFamily(*_REFUSED, pb_utils.MetricFamily.COUNTER)
        labels = {"model": args["model_name"]}
        self._busy = self._family.Metric(labels={**labels, "reason": "busy"})
        self._invalid = self._family.Metric(labels={**labels, "reason": "invalid"})

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all waiting requests; what is wrong with one is told to that one only."""
        responses: list[Any] = [None] * len(requests)
        good: dict[int, _Admitted] = {}
        busy = 0
        now = time.monotonic()
        engine = self._admission.engine(now)
        for index, request in enumerate(requests):
            try:
                good[index] = self._admit(request, now, engine)
            except ValueError as error:
                responses[index] = _error(str(error), pb_utils.TritonError.INVALID_ARG)
                self._invalid.increment(1)
            except Busy as error:
                responses[index] = _error(str(error), pb_utils.TritonError.UNAVAILABLE)
                busy += 1
        if busy:
            self._busy.increment(busy)
        texts = [each.texts for each in good.values()]
        for (index, each), tokens in zip(good.items(), tokenize(self._tokenizer, texts, self._buckets), strict=True):
            made = {
                "input_ids": tokens.input_ids,
                "span": tokens.span,
                "admission": np.full((len(each.texts), 2), each.admission, np.int64),
                "TRUNCATED": tokens.truncated,
            }
            # Which engine reads them decides what is wanted; the rest need not be copied.
            wanted = requests[index].requested_output_names()
            responses[index] = pb_utils.InferenceResponse([pb_utils.Tensor(name, made[name]) for name in wanted])
        return responses

    def _admit(self, request: Any, now: float, engine: Engine | None) -> _Admitted:
        timeout_us = requested_timeout(request.parameters(), self._timeout_us)
        texts = decode(pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy())
        number = self._admission.admit(len(texts), timeout_us, engine)
        return _Admitted(texts, (int(1e6 * now) + timeout_us, number))


def _error(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
