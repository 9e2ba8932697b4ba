"""A TensorRT graph on the CPU: fp32, fp16 and int8 in ONNX Runtime, bf16 in OpenVINO.

They compute what the graph says, in kernels of their own: the reference that a plan is held against.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from millibert_build.layouts import packed, padded
from millibert_build.tensorrt.target import Layout, Precision
from millibert_ensemble.models.bert.engines import ENGINES, Arrays
from millibert_ensemble.models.bert.threads import cpu_limit


def run_graph(
    path: Path, precision: Precision, layout: Layout, ids: Sequence[Sequence[int]], texts: int
) -> npt.NDArray[np.float32]:
    """Logits [texts, labels] in order, in batches of at most `texts`."""
    kind = "openvino" if precision == "bf16" else "onnxruntime"
    engine = ENGINES[kind](path, "int8" if precision == "int8" else "fp32", cpu_limit())
    return np.concatenate([engine.infer(arranged(batch, layout)) for batch in batches_of(ids, texts)])


def arranged(batch: Sequence[Sequence[int]], layout: Layout) -> Arrays:
    """Texts as ids to the inputs of a graph of that layout."""
    return packed(batch) if layout == "packed" else padded(batch)


def batches_of(ids: Sequence[Sequence[int]], texts: int) -> list[Sequence[Sequence[int]]]:
    """Batches of `texts` texts in order; the last one may be smaller."""
    return [ids[start : start + texts] for start in range(0, len(ids), texts)]
