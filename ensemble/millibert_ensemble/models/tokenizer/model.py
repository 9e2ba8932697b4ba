"""Triton's side of the tokenizer: unpack requests, tokenize them together, pack the answers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import triton_python_backend_utils as pb_utils

from .admission import Admission, Asking
from .tokenization import decode, load, requested_timeout, tokenize

# The same family in every model; monitoring adds them up.
_REFUSED = ("millibert_refused_requests_total", "Requests that a model answered with an error of their own.")
_BUSY = "busy: more texts wait for the engine than it computes in time"


class _Request(NamedTuple):
    place: int  # in the execution
    texts: Any  # UTF-8 bytes [B, 1]
    timeout_us: int


class _Admitted(NamedTuple):
    place: int
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
        parameters = json.loads(args["model_config"])["parameters"]
        self._buckets = json.loads(parameters.get("buckets", {"string_value": "[]"})["string_value"])
        self._timeout_us = int(parameters["queue_timeout_us"]["string_value"])
        told = os.environ.get("MILLIBERT_ADMISSION")  # the server names a file
        self._admission = Admission(Path(told) if told else None)
        self._family = pb_utils.MetricFamily(*_REFUSED, pb_utils.MetricFamily.COUNTER)
        labels = {"model": args["model_name"]}
        self._busy = self._family.Metric(labels={**labels, "reason": "busy"})
        self._invalid = self._family.Metric(labels={**labels, "reason": "invalid"})

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all waiting requests; what is wrong with one is told to that one only."""
        responses: list[Any] = [None] * len(requests)
        admitted = self._admit(self._read(requests, responses), responses)
        tokenized = tokenize(self._tokenizer, [each.texts for each in admitted], self._buckets)
        for each, tokens in zip(admitted, tokenized, strict=True):
            made = {
                "input_ids": tokens.input_ids,
                "span": tokens.span,
                "admission": np.full((len(each.texts), 2), each.admission, np.int64),
                "TRUNCATED": tokens.truncated,
            }
            # Which engine reads them decides what is wanted; the rest need not be copied.
            wanted = requests[each.place].requested_output_names()
            responses[each.place] = pb_utils.InferenceResponse([pb_utils.Tensor(name, made[name]) for name in wanted])
        return responses

    def _read(self, requests: Sequence[Any], responses: list[Any]) -> list[_Request]:
        """Those that may be answered; the others get their errors."""
        good = []
        for index, request in enumerate(requests):
            try:
                timeout_us = requested_timeout(request.parameters(), self._timeout_us)
                texts = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy()
                good.append(_Request(index, texts, timeout_us))
            except ValueError as error:
                responses[index] = self._wrong(error)
        return good

    def _admit(self, requests: Sequence[_Request], responses: list[Any]) -> list[_Admitted]:
        """Those that are computed in time; only these are looked into."""
        now = time.monotonic()
        numbers = self._admission.admit([Asking(len(each.texts), each.timeout_us) for each in requests], now)
        good = []
        for request, number in zip(requests, numbers, strict=True):
            if number is None:
                responses[request.place] = _error(_BUSY, pb_utils.TritonError.UNAVAILABLE)
                continue
            try:
                admission = (int(1e6 * now) + request.timeout_us, number)
                good.append(_Admitted(request.place, decode(request.texts), admission))
            except ValueError as error:
                responses[request.place] = self._wrong(error)
        if refused := numbers.count(None):
            self._busy.increment(refused)
        return good

    def _wrong(self, error: ValueError) -> Any:
        self._invalid.increment(1)
        return _error(str(error), pb_utils.TritonError.INVALID_ARG)


def _error(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
