"""What the matrix products of an ONNX graph are computed in, read from the graph itself.

Engines build what the graph says: from an fp32 graph a strongly typed TensorRT network is an fp32 engine, without a
word. So a graph is checked against the precision that was asked for before an engine is built from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

PRODUCTS = ("MatMul", "Gemm")
_DYNAMIC = "MatMulInteger"
# Products that stay in fp32 whatever the precision: they run once per text and decide the answer.
HEAD = ("pooler", "classifier")
WEIGHT = ".weight"

_NAMES: dict[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


class PrecisionError(RuntimeError):
    """A graph does not compute in what it was meant to compute in; names the node."""


class Product(NamedTuple):
    """One matrix product of a graph."""

    name: str  # of its weights, without ".weight"; of its node where both operands are activations
    precision: str  # fp32, fp16, bf16, int8: both operands are dequantised, int8_dynamic: both are integers
    constant: bool  # one operand holds weights

    @property
    def in_encoder(self) -> bool:
        """Whether it has weights and is no part of the head."""
        return self.constant and self.name not in HEAD


def products(path: Path) -> list[Product]:
    """All products in the order of the graph; raises `PrecisionError` where int8 breaks its rules."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info)}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    types |= {name: tensor.data_type for name, tensor in weights.items()}
    producers = {output: node for node in graph.node for output in node.output}
    kinds = (*PRODUCTS, _DYNAMIC)
    return [_product(node, types, weights, producers) for node in graph.node if node.op_type in kinds]


def assert_precision(path: Path, precision: str) -> Counter[str]:
    """How many products the graph has of each precision, if it is of `precision`; else raises `PrecisionError`.

    fp32: all products. fp16, bf16: all but the head. int8, int8_dynamic: at least one product, of those with weights
    outside the head only; the others may be of any floating type.
    """
    found = products(path)
    for product in found:
        allowed = _allowed(product, precision)
        if product.precision not in allowed:
            raise PrecisionError(
                f"{path}: the product {product.name!r} is computed in {product.precision}, not in "
                f"{' or '.join(allowed)} as a graph of precision {precision} has it"
            )
    if not any(product.precision == precision for product in found):
        raise PrecisionError(f"{path}: no product of the graph is computed in {precision}")
    return Counter(product.precision for product in found)


def _allowed(product: Product, precision: str) -> tuple[str, ...]:
    if product.name in HEAD:
        return ("fp32",)
    if not precision.startswith("int8"):
        return (precision,)
    return (*([precision] if product.constant else []), *_NAMES.values())


def _product(
    node: NodeProto,
    types: Mapping[str, int],
    weights: Mapping[str, TensorProto],
    producers: Mapping[str, NodeProto],
) -> Product:
    sources = [producers.get(operand) for operand in node.input[:2]]
    dequantised = [source for source in sources if source is not None and source.op_type == "DequantizeLinear"]
    second = sources[1].input[0] if sources[1] in dequantised else node.input[1]
    constant = second in weights
    name = second.removesuffix(WEIGHT) if constant else node.name
    if node.op_type == _DYNAMIC:
        return Product(name, "int8_dynamic", constant)
    if dequantised:
        if len(dequantised) == 1:
            raise PrecisionError(f"product {name!r}: one operand is quantised, the other is not")
        for source in dequantised:
            _check_symmetric(name, source, weights)
        _check_per_channel(name, dequantised[1], weights)
        return Product(name, "int8", constant)
    kinds = {_NAMES.get(types.get(operand, 0), "an unknown type") for operand in node.input[:2]}
    return Product(name, " and ".join(sorted(kinds)), constant)


def _check_symmetric(name: str, source: NodeProto, weights: Mapping[str, TensorProto]) -> None:
    """TensorRT reads int8 with zero points of 0 only; without a zero point, ONNX means uint8."""
    zero = weights.get(source.input[2]) if len(source.input) > 2 else None
    if zero is None or zero.data_type != TensorProto.INT8 or np.any(numpy_helper.to_array(zero)):
        raise PrecisionError(f"product {name!r}: {source.input[0]!r} is not symmetric int8 with a zero point of 0")


def _check_per_channel(name: str, source: NodeProto, weights: Mapping[str, TensorProto]) -> None:
    scale, values = weights.get(source.input[1]), weights.get(source.input[0])
    if values is None or values.data_type != TensorProto.INT8 or scale is None:
        raise PrecisionError(f"product {name!r}: its weights are not stored as int8")
    axis = next((attribute.i for attribute in source.attribute if attribute.name == "axis"), 1)
    if list(scale.dims) != [values.dims[axis]]:
        raise PrecisionError(f"product {name!r}: its weights have no scale per channel")
