"""Run the engine in process, exactly as the server will, and choose its precision by measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from millibert._errors import UsageError
from millibert_build.layouts import requests_of
from millibert_ensemble.models.bert.engines import ENGINES, PRECISIONS, Engine, EngineError
from millibert_ensemble.models.bert.inference import in_rows, infer
from millibert_ensemble.models.bert.threads import cpu_limit

Floats = npt.NDArray[np.float32]
ROUNDS = 3
Key = TypeVar("Key")
QUANTIZED = ("int8", "int8_dynamic")


class Artefact(NamedTuple):
    """A graph, and the precision to run it in."""

    onnx: Path
    precision: str


def open_engine(kind: str, path: Path, precision: str) -> Engine:
    """The CPU engine on a graph of rows, with as many streams as this process may use CPUs."""
    try:
        return ENGINES[kind](path, precision, cpu_limit(), few_shapes=True)
    except EngineError as error:
        raise UsageError(str(error)) from error


def run_texts(engine: Engine, ids: Sequence[Sequence[int]], max_texts: int) -> Floats:
    """Logits [texts, labels] in order, in batches of `max_texts`."""
    return np.concatenate([infer(engine, in_rows(batch, engine.streams)) for batch in _batches(ids, max_texts)])


def texts_per_second(
    kind: str, artefacts: Mapping[Key, Artefact], ids: Sequence[Sequence[int]], max_texts: int
) -> dict[Key, float]:
    """Speed of each artefact on the same texts: median of rounds, taken in turn after a warm-up."""
    engines = {key: open_engine(kind, artefact.onnx, artefact.precision) for key, artefact in artefacts.items()}
    seconds: dict[Key, list[float]] = {key: [] for key in engines}
    for _ in range(1 + ROUNDS):
        for key, engine in engines.items():
            start = time.perf_counter()
            run_texts(engine, ids, max_texts)
            seconds[key].append(time.perf_counter() - start)
    return {key: len(ids) / statistics.median(times[1:]) for key, times in seconds.items()}


def available_precisions(kind: str, path: Path) -> list[str]:
    """Floating-point precisions that this engine has on this machine for the fp32 graph at `path`."""
    found = ["fp32"]
    for precision in PRECISIONS[kind]:
        if precision == "fp32" or precision in QUANTIZED:
            continue
        try:
            ENGINES[kind](path, precision, cpu_limit())
        except EngineError:
            continue
        found.append(precision)
    return found


def quantized_precisions(kind: str) -> list[str]:
    """Precisions that this engine has and that need a quantised graph."""
    return [precision for precision in PRECISIONS[kind] if precision in QUANTIZED]


def _batches(ids: Sequence[Sequence[int]], size: int) -> Iterator[list[npt.NDArray[np.int32]]]:
    for start in range(0, len(ids), size):
        yield requests_of(ids[start : start + size])
