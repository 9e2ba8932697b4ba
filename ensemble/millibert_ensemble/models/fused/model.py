"""Triton's side of the fused model: texts to answers in one execution, by the files of the other models."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton_python_backend_utils as pb_utils

from .arrivals import Arrivals
from .host import Host
from .ranking import Ranker, tensors
from .tokenization import decode, load, requested_timeout, tokenize

# The same family in every model; monitoring adds them up.
_REFUSED = ("millibert_refused_requests_total", "Requests that a model answered with an error of their own.")


class _Request(NamedTuple):
    place: int  # in the execution
    texts: list[str]
    top_k: int
    deadline: float  # seconds of the monotonic clock


class TritonPythonModel:
    """TEXT -> LABEL, SCORE, LABEL_ID, ACCEPTED, TRUNCATED."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load everything and warm up the engine; Triton reports ready only after it."""
        # Unlike the tokenizer of an ensemble: while this one works, the engine waits for it anyway.
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        self._tokenizer = load(folder / "tokenizer.json")
        self._ranker = Ranker(folder, parameters)
        self._host = Host(folder, config, pb_utils)
        self._family = pb_utils.MetricFamily(*_REFUSED, pb_utils.MetricFamily.COUNTER)
        labels = {"model": args["model_name"]}
        self._busy = self._family.Metric(labels={**labels, "reason": "busy"})
        self._invalid = self._family.Metric(labels={**labels, "reason": "invalid"})
        self._timeout_us, self._max_texts = int(parameters["queue_timeout_us"]), int(parameters["max_texts"])
        # The largest request that waits might not have fitted.
        self._arrivals = Arrivals(config["max_batch_size"] - self._max_texts + 1, time.monotonic())

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all waiting requests; what is wrong with one, or too late, is told to that one only.

        They are answered as many at a time as the engine merges, and who is late is asked before each time. The late
        take room from the others, so that an execution is shorter where many are late: without that all wait longer
        (docs/log.md).
        """
        responses: list[Any] = [None] * len(requests)
        for part in self._parts(self._read(requests, responses)):
            now = time.monotonic()
            in_time = [request for request in part if request.deadline >= now]
            for request in part:
                if request.deadline < now:
                    responses[request.place] = _error("busy: no engine free in time", pb_utils.TritonError.UNAVAILABLE)
            if late := len(part) - len(in_time):
                self._busy.increment(late)
            if in_time:
                self._answer(in_time, responses)
        self._arrivals.end(len(requests), time.monotonic())
        return responses

    def _read(self, requests: Sequence[Any], responses: list[Any]) -> list[_Request]:
        """Those that can be answered; the others get their errors."""
        now = time.monotonic()
        texts = [pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy() for request in requests]
        arrived = self._arrivals.begin(len(requests), sum(map(len, texts)), now)
        good = []
        for index, request in enumerate(requests):
            try:
                parameters = request.parameters()
                top_k = self._ranker.requested_top_k(parameters)
                timeout = requested_timeout(parameters, self._timeout_us) / 1e6
                if len(texts[index]) > self._max_texts:
                    raise ValueError(f"{len(texts[index])} texts in a request; this model takes {self._max_texts}")
                good.append(_Request(index, decode(texts[index]), top_k, arrived[index] + timeout))
            except ValueError as error:
                responses[index] = _error(str(error), pb_utils.TritonError.INVALID_ARG)
                self._invalid.increment(1)
        return good

    def _parts(self, requests: Sequence[_Request]) -> Iterator[list[_Request]]:
        """In their order, of as many texts as the engine merges."""
        part: list[_Request] = []
        texts = 0
        for request in requests:
            if texts + len(request.texts) > self._max_texts:
                yield part
                part, texts = [], 0
            part.append(request)
            texts += len(request.texts)
        if part:
            yield part

    def _answer(self, requests: Sequence[_Request], responses: list[Any]) -> None:
        tokens = tokenize(self._tokenizer, [request.texts for request in requests])
        logits = self._host.infer([each.input_ids for each in tokens])
        counts = [len(request.texts) for request in requests]
        answers = self._ranker.answers(logits, counts, [request.top_k for request in requests])
        for request, one, answer in zip(requests, tokens, answers, strict=True):
            if answer is None:
                reason = "the engine returned NaN for this request"
                responses[request.place] = _error(reason, pb_utils.TritonError.INTERNAL)
            else:
                truncated = pb_utils.Tensor("TRUNCATED", one.truncated)
                responses[request.place] = pb_utils.InferenceResponse([*tensors(answer, pb_utils), truncated])


def _error(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
