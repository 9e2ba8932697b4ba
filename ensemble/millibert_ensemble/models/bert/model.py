"""Triton's side of the CPU engine: unpack requests, run them as one packed batch, split the logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from .engines import ENGINES
from .packing import Ids, check, divide, pack, unpack
from .threads import cpu_limit
from .warmup import batches


class TritonPythonModel:
    """input_ids, span -> logits."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load and warm up the engine; Triton reports ready only after it."""
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        threads = cpu_limit()
        self._max_tokens = int(parameters["max_tokens"])
        self._engine = ENGINES[parameters["engine"]](path, parameters["precision"], threads)
        for batch in batches(config["max_batch_size"], self._max_tokens):
            self._engine.infer(pack(batch))
        pb_utils.Logger.log_info(f"bert: {parameters['engine']} {parameters['precision']}, {threads} threads")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all waiting requests; what is wrong with one is told to that one only."""
        responses: list[Any] = [None] * len(requests)
        good = {}
        for index, request in enumerate(requests):
            input_ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()
            try:
                check(input_ids, self._max_tokens)
                good[index] = input_ids
            except ValueError as error:
                refusal = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
                responses[index] = pb_utils.InferenceResponse(error=refusal)
        if good:
            batch = list(good.values())
            for index, rows in zip(good, unpack(self._infer(batch), batch), strict=True):
                responses[index] = pb_utils.InferenceResponse([pb_utils.Tensor("logits", rows)])
        return responses

    def _infer(self, batch: list[Ids]) -> npt.NDArray[np.float32]:
        """Logits [texts, labels] of all texts of the requests, in their order."""
        parts = [(texts, self._engine.infer(inputs)) for texts, inputs in divide(batch)]
        logits = np.empty((sum(len(texts) for texts, _ in parts), parts[0][1].shape[1]), np.float32)
        for texts, rows in parts:
            logits[texts] = rows
        return logits
