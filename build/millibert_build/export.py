"""Checkpoint to ONNX: the packed, the padded or the graph of rows, dynamic in all that a batch brings.

The precision of a graph is explicit: casts of `packed_bert`, checked on the file by `precision.assert_precision`.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Literal

import onnx
import torch
from torch.export import Dim
from transformers import PreTrainedModel

from millibert_build.packed_bert import PackedBert, PaddedBert
from millibert_build.precision import assert_precision
from millibert_build.rows_bert import RowsBert

# The newest operator set and file format that TensorRT 10.9 and 11 both read.
OPSET = 20
MAX_IR = 10

PACKED_INPUTS = ("input_ids", "lengths", "max_length", "span")
PADDED_INPUTS = ("input_ids", "span")
ROWS_INPUTS = ("input_ids", "position", "text", "first")
OUTPUT = "logits"

FloatPrecision = Literal["fp32", "fp16", "bf16"]
_TYPES: dict[FloatPrecision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_packed(model: PreTrainedModel, max_tokens: int, path: Path, precision: FloatPrecision = "fp32") -> None:
    """Write the packed graph; see `PackedBert` for its inputs, which do not depend on the precision."""
    lengths = torch.tensor([5, 7, 3], dtype=torch.int32)
    arguments = (
        torch.arange(1, 16, dtype=torch.int32),
        lengths,
        torch.zeros(7, dtype=torch.float32),
        torch.zeros(4, dtype=torch.int32),
    )
    dims = ("tokens", "texts", "longest", "span")
    shapes = {name: {0: Dim(dim)} for name, dim in zip(PACKED_INPUTS, dims, strict=True)}
    _export(PackedBert(model, max_tokens, _TYPES[precision]), arguments, shapes, path)
    assert_precision(path, precision)


def export_padded(model: PreTrainedModel, max_tokens: int, path: Path, precision: FloatPrecision = "fp32") -> None:
    """Write the padded graph; see `PaddedBert` for its inputs, which do not depend on the precision."""
    arguments = (torch.ones((3, 7), dtype=torch.int32), torch.zeros((3, 2), dtype=torch.int32))
    texts = Dim("texts")
    shapes = {"input_ids": {0: texts, 1: Dim("longest")}, "span": {0: texts, 1: Dim("span")}}
    _export(PaddedBert(model, max_tokens, _TYPES[precision]), arguments, shapes, path)
    assert_precision(path, precision)


def export_rows(model: PreTrainedModel, max_tokens: int, path: Path, precision: FloatPrecision = "fp32") -> None:
    """Write the graph of rows; see `RowsBert` for its inputs, which do not depend on the precision."""
    grid = torch.ones((3, 7), dtype=torch.int32)
    arguments = (grid, grid.clone(), grid.clone(), torch.zeros(4, dtype=torch.int32))
    rows, width = Dim("rows"), Dim("width")
    shapes = {name: {0: rows, 1: width} for name in ROWS_INPUTS[:3]}
    _export(RowsBert(model, max_tokens, _TYPES[precision]), arguments, {**shapes, "first": {0: Dim("texts")}}, path)
    assert_precision(path, precision)


def _export(
    graph: torch.nn.Module,
    arguments: tuple[torch.Tensor, ...],
    shapes: dict[str, dict[int, Dim]],
    path: Path,
) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # The exporter warns of its own internals; what concerns us is checked on the result.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph.eval(),
            arguments,
            path,
            dynamo=True,
            input_names=list(shapes),
            output_names=[OUTPUT],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            external_data=False,
            optimize=True,
            verbose=False,
        )
    exported = onnx.load(path)
    onnx.checker.check_model(exported, full_check=True)
    if exported.ir_version > MAX_IR:
        raise RuntimeError(f"{path}: ONNX IR {exported.ir_version}, TensorRT reads at most {MAX_IR}")
