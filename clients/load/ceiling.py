"""What the engine of a release does alone, in process: the rate that no service around it can exceed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from millibert._errors import UsageError
from millibert_ensemble import contract
from millibert_ensemble.models.bert.engines import ENGINES, Engine, Floats
from millibert_ensemble.models.bert.inference import in_rows, infer
from millibert_ensemble.models.bert.texts import Ids
from millibert_ensemble.models.bert.threads import cpu_limit
from millibert_ensemble.models.bert.warmup import warm_up_rows
from millibert_ensemble.models.tokenizer.tokenization import load
from millibert_ensemble.repository_check import CONFIG, parse_config

# Single texts that a latency is the median of, and texts that a rate is measured on: for about a second.
_SINGLE = 100
_TEXTS = 1024


class Pace(NamedTuple):
    """How fast the engine alone is at the moment."""

    texts_per_second: float  # sorted by length, in batches of the model's limit: the best it can do
    batch_1_ms: float

    @staticmethod
    def median(paces: Sequence[Pace]) -> Pace:
        """Of each figure by itself."""
        return Pace(*(statistics.median(values) for values in zip(*paces, strict=True)))


def load_tokenizer(repository: Path) -> tuple[Tokenizer, int]:
    """A release's tokenizer, and the most tokens of a text that its model reads."""
    limit = parse_config(repository / contract.BERT / CONFIG).parameters["max_tokens"].string_value
    return load(repository / contract.TOKENIZER / contract.VERSION / "tokenizer.json"), int(limit)


class EngineAlone:
    """The engine of a release in this process, warmed up."""

    def __init__(self, repository: Path) -> None:
        config = parse_config(repository / contract.BERT / CONFIG)
        parameters = {key: value.string_value for key, value in config.parameters.items()}
        self.precision = parameters["precision"]
        self._engine = _open(repository, parameters)
        self._tokenizer, _ = load_tokenizer(repository)
        self._batch = config.max_batch_size

    def best_labels(self, texts: Sequence[str]) -> npt.NDArray[np.intp]:
        """Index of the best label of each text, in order."""
        rows = self._ids(texts)
        batches = (rows[start : start + self._batch] for start in range(0, len(rows), self._batch))
        logits: Floats = np.concatenate([self._infer(batch) for batch in batches])
        best: npt.NDArray[np.intp] = logits.argmax(axis=1)
        return best

    def pace_on(self, texts: Sequence[str]) -> Callable[[], Pace]:
        """What measures the pace on these texts, or evenly chosen batches of them, whenever it is called."""
        rows = self._ids(texts)
        by_length = sorted(rows, key=lambda row: row.shape[1])
        batches = [by_length[start : start + self._batch] for start in range(0, len(rows), self._batch)]
        some = batches[:: -(-len(rows) // _TEXTS)]
        count = sum(map(len, some))

        def measure() -> Pace:
            start = time.perf_counter()
            for batch in some:
                self._infer(batch)
            return Pace(count / (time.perf_counter() - start), self._single(rows[:_SINGLE]))

        measure()  # the first is slower
        return measure

    def _ids(self, texts: Sequence[str]) -> list[Ids]:
        return [np.array([encoding.ids], np.int32) for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def _infer(self, batch: Sequence[Ids]) -> Floats:
        return infer(self._engine, in_rows(batch, self._engine.streams))

    def _single(self, rows: Sequence[Ids]) -> float:
        """Milliseconds of a text alone: median."""
        times = []
        for row in rows:
            start = time.perf_counter()
            self._infer([row])
            times.append(time.perf_counter() - start)
        return 1000 * statistics.median(times)


def _open(repository: Path, parameters: dict[str, str]) -> Engine:
    path = repository / contract.BERT / contract.VERSION / "model.onnx"
    if parameters["layout"] != "rows":
        raise UsageError(
            f"{repository}: made by another version of millibert (layout {parameters['layout']!r}); build it anew"
        )
    engine = ENGINES[parameters["engine"]](path, parameters["precision"], cpu_limit(), few_shapes=True)
    warm_up_rows(engine, int(parameters["max_tokens"]))
    return engine
