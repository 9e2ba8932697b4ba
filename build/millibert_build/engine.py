"""Run the engine in process, exactly as the server will, and choose its precision by measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from millibert._errors import UsageError
from millibert_ensemble.models.bert.engines import ENGINES, PRECISIONS, Engine, EngineError
from millibert_ensemble.models.bert.packing import pack
from millibert_ensemble.models.bert.threads import cpu_limit

Floats = npt.NDArray[np.float32]
ROUNDS = 3
QUANTIZED = ("int8", "int8_dynamic")


def open_engine(kind: str, path: Path, precision: str) -> Engine:
    """The CPU engine with as many threads as this process may use."""
    try:
        return ENGINES[kind](path, precision, cpu_limit())
    except EngineError as error:
        raise UsageError(str(error)) from error


def run_packed(engine: Engine, ids: Sequence[Sequence[int]], max_texts: int) -> Floats:
    """Logits [texts, labels] in order, in packed batches of `max_texts`."""
    return np.concatenate([engine.infer(pack(batch)) for batch in _batches(ids, max_texts)])


def texts_per_second(
    kind: str, artefacts: Mapping[str, Path], ids: Sequence[Sequence[int]], max_texts: int
) -> dict[str, float]:
    """Speed of each precision's ONNX file on the same texts: median of rounds, taken in turn after a warm-up."""
    engines = {precision: open_engine(kind, path, precision) for precision, path in artefacts.items()}
    seconds: dict[str, list[float]] = {precision: [] for precision in engines}
    for _ in range(1 + ROUNDS):
        for precision, engine in engines.items():
            start = time.perf_counter()
            run_packed(engine, ids, max_texts)
            seconds[precision].append(time.perf_counter() - start)
    return {precision: len(ids) / statistics.median(times[1:]) for precision, times in seconds.items()}


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
        yield [np.array([row], np.int32) for row in ids[start : start + size]]
