"""Labels a text by its first word; `sleep 0.5` takes that many seconds, `busy` and `crash` fail."""

import json
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

LABELS = ["greeting", "nap", "other", "größe"]
SCORES = [0.8, 0.1, 0.06, 0.04]
LABEL_OF_WORD = {"hello": 0, "sleep": 1}
ACCEPTED_ABOVE = 0.5
LONGEST = 20_000


class TritonPythonModel:
    """Four labels, best first."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request by itself."""
        return [_response(request) for request in requests]


def _response(request: Any) -> Any:
    top_k = json.loads(request.parameters() or "{}").get("top_k", 3)
    texts = [text.decode() for text in pb.get_input_tensor_by_name(request, "TEXT").as_numpy().ravel()]
    if not 1 <= top_k <= len(LABELS):
        return _error(f"top_k must be 1 to {len(LABELS)}, not {top_k}", pb.TritonError.INVALID_ARG)
    if "busy" in texts:
        return _error("the queue is full", pb.TritonError.UNAVAILABLE)
    if "crash" in texts:
        raise RuntimeError("boom")
    ids = np.array([_ranked(text)[:top_k] for text in texts], np.int32)
    scores = np.tile(np.array(SCORES[:top_k], np.float32), (len(texts), 1))
    names = np.array([label.encode() for label in LABELS], dtype=object)
    return pb.InferenceResponse(
        [
            pb.Tensor("LABEL", names[ids]),
            pb.Tensor("SCORE", scores),
            pb.Tensor("LABEL_ID", ids),
            pb.Tensor("ACCEPTED", scores > ACCEPTED_ABOVE),
            pb.Tensor("TRUNCATED", np.array([[len(text) > LONGEST] for text in texts])),
        ]
    )


def _error(message: str, kind: Any) -> Any:
    return pb.InferenceResponse(error=pb.TritonError(message, kind))


def _ranked(text: str) -> list[int]:
    words = text.split() or [""]
    if words[0] == "sleep":
        time.sleep(float(words[1]))
    best = LABEL_OF_WORD.get(words[0], 2)
    return [best, *(label for label in range(len(LABELS)) if label != best)]
