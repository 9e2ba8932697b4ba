"""A checkpoint to the ONNX graph that a plan is built from, judged on this machine before it is published.

The plan itself can only be judged on a GPU (`millibert verify-gpu`); its graph can be run here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from millibert_build.dataset import Splits
from millibert_build.engine import Floats
from millibert_build.evaluate import Comparison
from millibert_build.export import FloatPrecision, export_packed, export_padded
from millibert_build.tensorrt.readable import check_readable
from millibert_build.tensorrt.run_graph import run_graph
from millibert_build.tensorrt.target import SECTION, Layout, Precision, Target
from millibert_build.workshop import Measured, Workshop, quantize
from millibert_ensemble.hashing import file_sha256

# What stays in floating point in an int8 graph.
_BESIDE_INT8: FloatPrecision = "fp16"
_EXPORTS = {"packed": export_packed, "padded": export_padded}


@dataclass(frozen=True)
class TensorrtGraph:
    """The graph, and what it measured on the test texts against the fp32 checkpoint."""

    onnx: Path
    target: Target
    logits: Floats
    comparison: Comparison
    refusal: str | None
    """Which gates it misses."""

    def as_json(self) -> dict[str, Any]:
        """The section of the release's manifest."""
        return {**self.target.as_json(), "test": self.comparison._asdict()}


def make_graph(shop: Workshop, precision: Precision, layout: Layout, splits: Splits, test: Measured) -> TensorrtGraph:
    """Export, check that TensorRT can be expected to read it, run it on the test texts."""
    path = shop.folder / f"{SECTION}_{layout}_{precision}.onnx"
    if precision == "int8":
        _quantize(shop, layout, splits, path)
    else:
        _EXPORTS[layout](shop.trained.model, shop.scenario.max_tokens, path, precision)
    check_readable(path, precision, layout)
    logits = run_graph(path, precision, layout, test.ids, shop.scenario.max_texts)
    found = shop.compare(logits, test)
    target = Target(
        precision=precision,
        layout=layout,
        max_texts=shop.scenario.max_texts,
        max_tokens=shop.scenario.max_tokens,
        typical_tokens=round(float(np.mean([len(row) for row in shop.validation.ids]))),
        labels=len(splits.labels),
        sparse=shop.scenario.pruning.sparsity == "2:4",
        onnx_sha256=file_sha256(path),
    )
    return TensorrtGraph(path, target, logits, found, shop.refusal(precision, found, "test"))


def _quantize(shop: Workshop, layout: Layout, splits: Splits, path: Path) -> None:
    """Q/DQ around the products of a half graph, with scales from the fp32 graph's activations."""
    half = path.with_suffix(".half.onnx")
    _EXPORTS[layout](shop.trained.model, shop.scenario.max_tokens, half, _BESIDE_INT8)
    texts, ids = shop.scenario.max_texts, shop.validation.ids
    quantize(shop, half, path, splits, lambda made: run_graph(made, "int8", layout, ids, texts))
    half.unlink()
