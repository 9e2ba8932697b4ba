"""Run the engine in process, exactly as the server will, and choose its precision by measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from millibert._errors import UsageError
from millibert_ensemble.models.bert.engines import ENGINES, PRECISIONS, Engine, EngineError
from millibert_ensemble.models.bert.packing import pack
from millibert_ensemble.models.bert.threads import cpu_limit

Floats = npt.NDArray[np.float32]
ROUNDS = 3
QUANTIZED = ("int8", "int8_dynamic")


class Candidate(NamedTuple):
    """One precision as measured on this machine."""

    precision: str
    texts_per_second: float
    agreement: float  # share of texts with the fp32 checkpoint's best label


def open_engine(kind: str, path: Path, precision: str) -> Engine:
    """The CPU engine with as many threads as this process may use."""
    try:
        return ENGINES[kind](path, precision, cpu_limit())
    except EngineError as error:
        raise UsageError(str(error)) from error


def run_packed(engine: Engine, ids: Sequence[Sequence[int]], max_texts: int) -> Floats:
    """Logits [texts, labels] in order, in packed batches of `max_texts`."""
    return np.concatenate([engine.infer(pack(batch)) for batch in _batches(ids, max_texts)])


def measure(
    kind: str,
    artefacts: Mapping[str, Path],
    ids: Sequence[Sequence[int]],
    reference: Floats,
    max_texts: int,
) -> list[Candidate]:
    """Speed (median of rounds, taken in turn) and agreement of each precision's ONNX file on the same texts."""
    engines = {precision: open_engine(kind, path, precision) for precision, path in artefacts.items()}
    logits = {precision: run_packed(engine, ids, max_texts) for precision, engine in engines.items()}
    seconds: dict[str, list[float]] = {precision: [] for precision in engines}
    for _ in range(ROUNDS):
        for precision, engine in engines.items():
            start = time.perf_counter()
            run_packed(engine, ids, max_texts)
            seconds[precision].append(time.perf_counter() - start)
    return [
        Candidate(precision, len(ids) / statistics.median(times), agreement(logits[precision], reference))
        for precision, times in seconds.items()
    ]


def choose(candidates: Sequence[Candidate], min_agreement: float, min_agreement_int8: float | None = None) -> Candidate:
    """The fastest that agrees enough; fp32 always may be chosen. int8 has a bar of its own, if one is given."""

    def bar(precision: str) -> float:
        return min_agreement if min_agreement_int8 is None or "int8" not in precision else min_agreement_int8

    allowed = [c for c in candidates if c.precision == "fp32" or c.agreement >= bar(c.precision)]
    return max(allowed, key=lambda candidate: candidate.texts_per_second)


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


def agreement(logits: Floats, reference: Floats) -> float:
    """Share of texts on which both have the same best label."""
    return float((logits.argmax(1) == reference.argmax(1)).mean())


def _batches(ids: Sequence[Sequence[int]], size: int) -> Iterator[list[npt.NDArray[np.int32]]]:
    for start in range(0, len(ids), size):
        yield [np.array([row], np.int32) for row in ids[start : start + size]]
