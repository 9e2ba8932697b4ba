"""Whether TensorRT can be expected to read a graph: operators and their types, opset, file format, inputs.

The operators are those that NVIDIA documents, kept in `operators.json` with their source. A graph is checked when it is
made, on a machine that has no TensorRT; the parser has the last word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import GraphProto, NodeProto, TensorProto

from millibert_build.precision import PrecisionError, assert_precision
from millibert_build.tensorrt.target import Layout, Precision

# The newest operator set and file format that TensorRT 10.9 and 11 both read.
MAX_OPSET = 20
MAX_IR = 10
INPUTS: dict[Layout, dict[str, int]] = {
    "packed": {
        "input_ids": TensorProto.INT32,
        "lengths": TensorProto.INT32,
        "max_length": TensorProto.FLOAT,
        "span": TensorProto.INT32,
    },
    "padded": {"input_ids": TensorProto.INT32, "span": TensorProto.INT32},
}
OUTPUTS = {"logits": TensorProto.FLOAT}
OPERATORS_FILE = Path(__file__).with_name("operators.json")

_NAMES: dict[int, str] = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8",
    TensorProto.BOOL: "BOOL",
}
# The input whose type the table means, where it is not the first.
_MEANT = {"Where": 1}


class GraphError(RuntimeError):
    """TensorRT would not read a graph, or not as it is meant; each line names a node or a tensor."""


def check_readable(path: Path, precision: Precision, layout: Layout) -> None:
    """Raise `GraphError` that lists everything in the graph that TensorRT would stumble over."""
    try:
        assert_precision(path, precision)
        model = onnx.load(path)
    except PrecisionError as error:
        raise GraphError(str(error)) from error
    except Exception as error:  # protobuf's own DecodeError is no public class
        raise GraphError(f"{path}: not an ONNX file: {error}") from error
    found = [*_check_format(model), *_check_bindings(model.graph, layout), *_check_operators(model)]
    if found:
        raise GraphError("\n".join([f"{path}: TensorRT would not read this graph:", *(f"  {line}" for line in found)]))


def documented_operators() -> dict[str, list[str]]:
    """Operators that TensorRT documents, each with the types it takes."""
    operators: dict[str, list[str]] = json.loads(OPERATORS_FILE.read_text(encoding="utf-8"))["operators"]
    return operators


def _check_format(model: onnx.ModelProto) -> Iterator[str]:
    for entry in model.opset_import:
        if entry.domain not in ("", "ai.onnx"):
            yield f"operators of the domain {entry.domain!r}"
        elif entry.version > MAX_OPSET:
            yield f"opset {entry.version}; at most {MAX_OPSET}"
    if model.ir_version > MAX_IR:
        yield f"IR {model.ir_version}; at most {MAX_IR}"


def _check_bindings(graph: GraphProto, layout: Layout) -> Iterator[str]:
    """Triton binds by name and type; an INT64 input would stay INT64."""
    for side, given, wanted in (("input", graph.input, INPUTS[layout]), ("output", graph.output, OUTPUTS)):
        types = {value.name: value.type.tensor_type.elem_type for value in given}
        if set(types) != set(wanted):
            yield f"its {side}s are {sorted(types)}; those of the {layout} layout are {sorted(wanted)}"
            continue
        for name, found in types.items():
            if found != wanted[name]:
                yield f"{side} {name!r} is {_name(found)}, not {_name(wanted[name])}"


def _check_operators(model: onnx.ModelProto) -> Iterator[str]:
    operators = documented_operators()
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in operators:
            yield f"{node.op_type} {node.name!r}: not a documented operator"
        elif (found := _type(node, types)) not in operators[node.op_type]:
            yield f"{node.op_type} {node.name!r} of {found}: documented for {', '.join(operators[node.op_type])}"


def _type(node: NodeProto, types: dict[str, int]) -> str:
    if node.op_type == "Constant":
        return _name(next(a.t.data_type for a in node.attribute if a.name == "value"))
    return _name(types.get(node.input[_MEANT.get(node.op_type, 0)], 0))


def _name(kind: int) -> str:
    return _NAMES.get(kind, TensorProto.DataType.Name(kind))
