"""Triton's side of the tokenizer: unpack requests, tokenize them together, pack the answers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from .tokenization import decode, load, tokenize


class TritonPythonModel:
    """TEXT -> input_ids, span, TRUNCATED."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer; a file that is missing or wrong keeps the model from becoming ready."""
        # Its threads would only take the CPU from the engine.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        folder = Path(args["model_repository"]) / args["model_version"]
        self._tokenizer = load(folder / "tokenizer.json")
        parameters = json.loads(args["model_config"]).get("parameters", {})
        self._buckets = json.loads(parameters.get("buckets", {"string_value": "[]"})["string_value"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all waiting requests; what is wrong with one is told to that one only."""
        responses: list[Any] = [None] * len(requests)
        good: dict[int, list[str]] = {}
        for index, request in enumerate(requests):
            try:
                good[index] = decode(pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy())
            except ValueError as error:
                refusal = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
                responses[index] = pb_utils.InferenceResponse(error=refusal)
        for index, tokens in zip(good, tokenize(self._tokenizer, list(good.values()), self._buckets), strict=True):
            responses[index] = pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor("input_ids", tokens.input_ids),
                    pb_utils.Tensor("span", tokens.span),
                    pb_utils.Tensor("TRUNCATED", tokens.truncated),
                ]
            )
        return responses
