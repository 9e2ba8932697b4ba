"""A text classifier as a LitServe service on ONNX Runtime; runs in the environment of requirements/litserve.txt.

    python litserve_onnxruntime.py --checkpoint DIR --port N [--threads N]

POST /classify {"texts": [...]} gives {"labels": [...], "scores": [...]}, the best label of each text and its
probability.

How it is set up, and why (what is said of speed was measured on two CPUs):

- fp32, exported at every start, so that it is never stale (export_onnx.py).
- A worker process for each CPU, with one thread, as LitServe's documentation advises; an HTTP process for each four.
- Each worker merges what waits into a batch, up to 64 requests. Its window of 2 ms is what a lone request may pay for
  that; with none at all LitServe polls its queue without a pause.
- The texts of a batch are sorted by length and given to the model 8 at a time, padded to the longest of the 8. One call
  for all of them, padded to the longest of all, takes twice as long.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import litserve
import numpy as np
import numpy.typing as npt
import onnxruntime
from tokenizers import Encoding, Tokenizer

MAX_REQUESTS = 64
WINDOW_SECONDS = 0.002
TEXTS_A_CALL = 8

Best = tuple[str, float]
Answer = dict[str, list[str] | list[float]]


class Service(litserve.LitAPI):
    """The hooks that LitServe calls in a worker process, in the order in which it calls them."""

    def __init__(self, checkpoint: Path, onnx: Path) -> None:
        super().__init__(max_batch_size=MAX_REQUESTS, batch_timeout=WINDOW_SECONDS, api_path="/classify")
        self._checkpoint, self._onnx = checkpoint, onnx

    def setup(self, device: str) -> None:
        """Load the graph, the tokenizer and the labels."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(self._onnx, options, providers=["CPUExecutionProvider"])
        config = json.loads((self._checkpoint / "config.json").read_text())
        self._labels = [config["id2label"][str(index)] for index in range(len(config["id2label"]))]
        self._pad_id = config["pad_token_id"]
        self._tokenizer = Tokenizer.from_file(str(self._checkpoint / "tokenizer.json"))
        self._tokenizer.enable_truncation(config["max_position_embeddings"])
        self._tokenizer.no_padding()  # whatever the file says: some pad every text to one length

    def decode_request(self, request: dict[str, list[str]]) -> list[str]:
        """The texts of a request."""
        return request["texts"]

    def batch(self, inputs: list[list[str]]) -> list[list[str]]:
        """Keep the requests apart, since they differ in their number of texts."""
        return inputs

    def predict(self, requests: list[list[str]]) -> list[Answer]:
        """The answers to merged requests."""
        best = iter(self._classify([text for request in requests for text in request]))
        return [_answer(list(islice(best, len(request)))) for request in requests]

    def _classify(self, texts: list[str]) -> list[Best]:
        encodings = self._tokenizer.encode_batch_fast(texts)
        order = sorted(range(len(texts)), key=lambda index: len(encodings[index].ids))
        best: dict[int, Best] = {}
        for start in range(0, len(order), TEXTS_A_CALL):
            indices = order[start : start + TEXTS_A_CALL]
            rows = self._probabilities([encodings[index] for index in indices])
            best |= {i: (self._labels[row.argmax()], float(row.max())) for i, row in zip(indices, rows, strict=True)}
        return [best[index] for index in range(len(texts))]

    def _probabilities(self, encodings: list[Encoding]) -> npt.NDArray[np.float32]:
        tokens = max(len(encoding.ids) for encoding in encodings)
        for encoding in encodings:
            encoding.pad(tokens, pad_id=self._pad_id)
        feed = {
            "input_ids": np.array([encoding.ids for encoding in encodings], np.int64),
            "attention_mask": np.array([encoding.attention_mask for encoding in encodings], np.int64),
        }
        (logits,) = self._session.run(["logits"], feed)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities: npt.NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
        return probabilities


def _answer(best: list[Best]) -> Answer:
    return {"labels": [label for label, _ in best], "scores": [score for _, score in best]}


def main() -> None:
    """Export, then serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder, "model.onnx")
        # In a process of its own: serving needs no torch, and LitServe forks its HTTP processes from this one.
        export = Path(__file__).with_name("export_onnx.py")
        subprocess.run([sys.executable, export, "--checkpoint", args.checkpoint, "--out", onnx], check=True)
        service = Service(args.checkpoint, onnx)
        server = litserve.LitServer(service, accelerator="cpu", workers_per_device=args.threads)
        server.run(
            host="127.0.0.1",
            port=args.port,
            num_api_servers=max(1, args.threads // 4),
            generate_client_file=False,
            log_level="warning",
        )


if __name__ == "__main__":
    main()
