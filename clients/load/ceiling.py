"""What the engine of a release does alone, in process: the rate that no service around it can exceed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from millibert._errors import UsageError
from millibert_ensemble import contract
from millibert_ensemble.models.bert.engines import ENGINES, Engine
from millibert_ensemble.models.bert.inference import in_rows, infer
from millibert_ensemble.models.bert.texts import Ids
from millibert_ensemble.models.bert.threads import cpu_limit
from millibert_ensemble.models.bert.warmup import warm_up_rows
from millibert_ensemble.models.tokenizer.tokenization import load
from millibert_ensemble.repository_check import CONFIG, parse_config

# Single texts that the latency at batch 1 is the median of.
_SINGLE = 200


class Ceiling(NamedTuple):
    """The engine alone, on the same texts."""

    precision: str
    texts_per_second: float  # sorted by length, in batches of the model's limit: the best it can do
    batch_1_ms: float
    best_labels: npt.NDArray[np.intp]  # of each text, in order

    def as_json(self) -> dict[str, float]:
        """The figures."""
        return {"texts_per_second": self.texts_per_second, "batch_1_ms": self.batch_1_ms}


def load_tokenizer(repository: Path) -> tuple[Tokenizer, int]:
    """A release's tokenizer, and the most tokens of a text that its model reads."""
    limit = parse_config(repository / contract.BERT / CONFIG).parameters["max_tokens"].string_value
    return load(repository / contract.TOKENIZER / contract.VERSION / "tokenizer.json"), int(limit)


def measure_ceiling(repository: Path, texts: Sequence[str], rounds: int = 3) -> Ceiling:
    """Medians of the rounds, after a warm-up."""
    config = parse_config(repository / contract.BERT / CONFIG)
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    engine = _open(repository, parameters)
    tokenizer, _ = load_tokenizer(repository)
    rows = [np.array([encoding.ids], np.int32) for encoding in tokenizer.encode_batch_fast(list(texts))]
    order = sorted(range(len(rows)), key=lambda index: rows[index].shape[1])
    size = config.max_batch_size
    batches = [[rows[index] for index in order[start : start + size]] for start in range(0, len(rows), size)]
    seconds = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        logits = [infer(engine, in_rows(batch, engine.streams)) for batch in batches]
        seconds.append(time.perf_counter() - start)
    labels = np.empty(len(rows), np.intp)
    labels[order] = np.concatenate(logits).argmax(axis=1)
    rate = len(rows) / statistics.median(seconds[1:])
    return Ceiling(parameters["precision"], rate, _single(engine, rows[:_SINGLE]), labels)


def _open(repository: Path, parameters: dict[str, str]) -> Engine:
    path = repository / contract.BERT / contract.VERSION / "model.onnx"
    if parameters["layout"] != "rows":
        raise UsageError(
            f"{repository}: made by another version of millibert (layout {parameters['layout']!r}); build it anew"
        )
    engine = ENGINES[parameters["engine"]](path, parameters["precision"], cpu_limit(), few_shapes=True)
    warm_up_rows(engine, int(parameters["max_tokens"]))
    return engine


def _single(engine: Engine, rows: Sequence[Ids]) -> float:
    """Milliseconds of a text alone: median."""
    times: list[Any] = []
    for row in rows:
        start = time.perf_counter()
        infer(engine, in_rows([row], engine.streams))
        times.append(time.perf_counter() - start)
    return 1000 * float(statistics.median(times))
