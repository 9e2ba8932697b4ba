"""2:4 sparsity: of every four neighbouring weights of the encoder two are zero.

Sparse tensor cores (NVIDIA Ampere and later) skip those two. The recipe is that of Mishra et al., "Accelerating
Sparse Deep Neural Networks" (2021): keep the two largest of each four by magnitude, fix that choice, and fine-tune
what is left, with the others held at zero.

Neighbours are along the contraction axis K of the product, the input features. That is the last axis of a PyTorch
weight [out, in], but the first one of what the export makes of it: a MatMul of x [tokens, in] by [in, out]. So the
groups of four run down the columns of an ONNX MatMul weight, along axis 0. That is where NVIDIA's own tool looks for
the pattern before TensorRT builds (Polygraphy, tools/sparse.py: axis 0 of MatMul's second operand, axis 1 of a Gemm
with transB), and where `check_sparsity` does.

Nothing gets smaller or faster by itself: a CPU computes the zeros too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import GraphProto, NodeProto, numpy_helper
from torch import Tensor, nn
from transformers import PreTrainedModel

from millibert._errors import UsageError
from millibert_build.precision import HEAD, PRODUCTS, WEIGHT

GROUP = 4
KEPT = 2
# Between a stored weight and its product.
_ZEROS_STAY = ("Cast", "QuantizeLinear", "DequantizeLinear", "Transpose")

Array = npt.NDArray[Any]
Masks = dict[str, Tensor]
"""For each encoder weight [out, in], by the name of its parameter: True where it is kept."""


def two_four_masks(model: PreTrainedModel) -> Masks:
    """Masks that keep the two largest of every four weights; raises `UsageError` where inputs do not come in fours."""
    return {name: two_four_mask(weight) for name, weight in _encoder_weights(model)}


def two_four_mask(weight: Tensor) -> Tensor:
    """[out, in] -> bool [out, in], exactly two True in each group of four inputs; the earlier one where two tie."""
    order = weight.detach().abs().unflatten(1, (-1, GROUP)).argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool)
    return mask.scatter(-1, order[..., :KEPT], True).flatten(1)


def apply_masks(model: PreTrainedModel, masks: Mapping[str, Tensor]) -> None:
    """Set what the masks leave out to zero; call it after every step of the optimizer."""
    with torch.no_grad():
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            weight.mul_(mask.to(weight.device))


def is_2_4(weight: Tensor | Array, axis: int = 1) -> bool:
    """Whether every group of four along `axis` (the inputs: 1 in PyTorch) has two zeros at least."""
    values = np.moveaxis(weight.detach().float().numpy() if isinstance(weight, Tensor) else weight, axis, -1)
    if values.shape[-1] % GROUP:
        return False
    zeros = (values.reshape(-1, GROUP) == 0).sum(1)
    return bool((zeros >= GROUP - KEPT).all())


def check_sparsity(source: Path | PreTrainedModel) -> dict[str, bool]:
    """Whether each weight of the encoder is 2:4 along its inputs, in a model or in an exported graph, by name."""
    if isinstance(source, Path):
        graph = onnx.load(source).graph
        found = {name: is_2_4(values, axis) for name, values, axis in _graph_weights(graph)}
        if not found:  # `all` of nothing would pass
            raise ValueError(f"{source}: no product of the graph has weights")
        return found
    return {name: is_2_4(weight) for name, weight in _encoder_weights(source, whole_groups=False)}


def _encoder_weights(model: PreTrainedModel, whole_groups: bool = True) -> Iterator[tuple[str, Tensor]]:
    encoder: Any = model.get_submodule("bert.encoder")
    for name, module in encoder.named_modules(prefix="bert.encoder"):
        if isinstance(module, nn.Linear):
            if whole_groups and module.in_features % GROUP:
                raise UsageError(f"2:4 sparsity: {name} has {module.in_features} inputs, not a multiple of {GROUP}")
            yield name + WEIGHT, module.weight


def _graph_weights(graph: GraphProto) -> Iterator[tuple[str, Array, int]]:
    """Name, values and contraction axis of the constant operand of each product outside the head."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type in PRODUCTS:
            source, axis = _origin(node.input[1], _contraction_axis(node), producers)
            name = source.removesuffix(WEIGHT)
            if source in constants and name not in HEAD:
                yield name, _values(constants[source]), axis


def _origin(operand: str, axis: int, producers: Mapping[str, NodeProto]) -> tuple[str, int]:
    """Where a weight is stored, and along which axis there: zeros stay zeros through these nodes.

    Of int8 it is the stored integers that count: the zero point is 0.
    """
    while (node := producers.get(operand)) is not None and node.op_type in _ZEROS_STAY:
        if node.op_type == "Transpose":
            axis = 1 - axis
        operand = node.input[0]
    return operand, axis


def _values(tensor: onnx.TensorProto) -> Array:
    return np.asarray(numpy_helper.to_array(tensor)).astype(np.float32)


def _contraction_axis(node: NodeProto) -> int:
    """Of the second operand [K, N], or [N, K] in a Gemm that transposes it."""
    return int(any(attribute.name == "transB" and attribute.i for attribute in node.attribute))
