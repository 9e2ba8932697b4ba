"""Triton's side of the fused model: texts to answers in one execution, by the files of the other models."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from .host import Host
from .ranking import Ranker, tensors
from .tokenization import decode, load, requested_timeout, tokenize

# The same family in every model; monitoring adds them up.
_REFUSED = ("millibert_refused_requests_total", "Requests that a model answered with an error of their own.")


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
        self._invalid = self._family.Metric(labels={"model": args["model_name"], "reason": "invalid"})

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all waiting requests; what is wrong with one is told to that one only."""
        responses: list[Any] = [None] * len(requests)
        texts: dict[int, list[str]] = {}
        top_k: dict[int, int] = {}
        for index, request in enumerate(requests):
            try:
                parameters = request.parameters()
                wanted = self._ranker.requested_top_k(parameters)
                # Only looked at: Triton does not say when a request came, so that nobody here knows how long it waited.
                requested_timeout(parameters, 0)
                texts[index] = decode(pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy())
                top_k[index] = wanted
            except ValueError as error:
                responses[index] = _error(str(error), pb_utils.TritonError.INVALID_ARG)
                self._invalid.increment(1)
        if texts:
            tokens = tokenize(self._tokenizer, list(texts.values()))
            logits = self._host.infer([each.input_ids for each in tokens])
            counts = [len(each) for each in texts.values()]
            answers = self._ranker.answers(logits, counts, list(top_k.values()))
            for index, one, answer in zip(texts, tokens, answers, strict=True):
                if answer is None:
                    reason = "the engine returned NaN for this request"
                    responses[index] = _error(reason, pb_utils.TritonError.INTERNAL)
                else:
                    truncated = pb_utils.Tensor("TRUNCATED", one.truncated)
                    responses[index] = pb_utils.InferenceResponse([*tensors(answer, pb_utils), truncated])
        return responses


def _error(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
