"""Labels a text by its first word; `sleep 1.5 …` takes that many seconds."""

import time

import numpy as np
import triton_python_backend_utils as pb

LABELS = ["greeting", "nap", "other"]
LABEL_OF_WORD = {"hello": 0, "sleep": 1}


class TritonPythonModel:
    """Three labels, best first."""

    def execute(self, requests):
        """Answer each request with all labels of each of its texts."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        texts = [text.decode() for text in pb.get_input_tensor_by_name(request, "TEXT").as_numpy().ravel()]
        ids = np.array([_ranked(text) for text in texts], np.int32)
        scores = np.tile(np.float32([0.8, 0.15, 0.05]), (len(texts), 1))
        labels = np.array(LABELS, dtype=object)[ids]
        return pb.InferenceResponse(
            [
                pb.Tensor("LABEL", labels),
                pb.Tensor("SCORE", scores),
                pb.Tensor("LABEL_ID", ids),
                pb.Tensor("ACCEPTED", scores > 0.1),
                pb.Tensor("TRUNCATED", np.zeros((len(texts), 1), dtype=bool)),
            ]
        )


def _ranked(text):
    word, _, rest = text.partition(" ")
    if word == "sleep":
        time.sleep(float(rest.split()[0]))
    best = LABEL_OF_WORD.get(word, len(LABELS) - 1)
    return [best, *(label for label in range(len(LABELS)) if label != best)]
