"""Int8: the encoder's products with weights, as one Q/DQ graph that OpenVINO, ONNX Runtime and TensorRT all read.

Weights are symmetric int8 with a scale per output channel and stored as int8; activations are symmetric int8 with
one scale, set from calibration texts. Embeddings, norms, softmax, the products of attention, biases, pooler and
classifier stay in the floating type of the source graph.

BERT's activations have two kinds of outliers, and a plain largest value as scale spends most of int8 on them:

- Behind a LayerNorm a few channels are 10 times larger than all others, in every text. They are divided by a factor
  per channel, which the weights of the product make up for (Xiao et al., "SmoothQuant", ICML 2023). The norm's output
  is the residual too, so the division is a node of its own and not folded into the norm.
- Between the two feed-forward products single values of single tokens stand out. They are clipped.

Where that does not reach the gates, the most harmful products stay in floating point, see `quantize_to_gate`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from millibert_build.precision import HEAD, PRODUCTS, WEIGHT, PrecisionError, assert_precision, products

Floats = npt.NDArray[np.float32]
Batch = Mapping[str, npt.NDArray[np.generic]]

# Products behind a LayerNorm, by the last part of their names.
SMOOTHED = ("query_key_value", "query", "key_value", "intermediate")
# How much of the difficulty moves from the activations to the weights (alpha of SmoothQuant).
SMOOTHING = 0.7
CLIPPED = ("output",)
# Share of values that clipping leaves as they are.
KEPT = 0.9999
_LEVELS = 127
_TINY = 1e-5


class Activations(NamedTuple):
    """What a product was fed with on the calibration texts."""

    largest: Floats  # [in] largest magnitude of each channel
    usual: float  # the `KEPT` quantile of all magnitudes, mean of the batches


class Effect(NamedTuple):
    """What is left of the damage when one product stays in floating point."""

    product: str
    error: float  # root mean square difference of the logits to the reference
    agreement: float  # share of texts with the reference's best label


class Verdict(NamedTuple):
    """Whether a graph may be served, and the figures that say why."""

    passed: bool
    figures: str


class Attempt(NamedTuple):
    """One graph that was tried: what stayed in floating point, and its verdict."""

    excluded: tuple[str, ...]
    verdict: Verdict


class Outcome(NamedTuple):
    """The search for a graph that passes; the last attempt is the one on disk."""

    products: list[str]
    attempts: list[Attempt]
    effects: list[Effect]

    @property
    def passed(self) -> bool:
        """Whether the last attempt may be served."""
        return self.attempts[-1].verdict.passed

    @property
    def excluded(self) -> tuple[str, ...]:
        """What the last attempt left in floating point."""
        return self.attempts[-1].excluded

    def describe(self) -> str:
        """All attempts and their figures in one line."""
        tried = (f"{', '.join(a.excluded) or 'nothing'} left out: {a.verdict.figures}" for a in self.attempts)
        return f"int8 {'passes' if self.passed else 'misses its gates'} ({'; '.join(tried)})"


def weight_products(path: Path) -> list[str]:
    """Names of the products that can be quantised, in the order of the graph."""
    return [product.name for product in products(path) if product.in_encoder]


def quantize_static(source: Path, out: Path, batches: Iterable[Batch], excluded: Collection[str] = ()) -> list[str]:
    """Write `source` as a Q/DQ graph, calibrated on packed batches; returns the quantised products."""
    return write_quantized(source, out, calibrate(source, batches), excluded)


def calibrate(source: Path, batches: Iterable[Batch]) -> dict[str, Activations]:
    """Run the floating-point graph and look at what each product is fed with, batch by batch."""
    import onnxruntime

    model = onnx.load(source)
    inputs = {name: node.input[0] for name, node in _linears(model).items()}
    model.graph.output.extend(helper.make_empty_tensor_value_info(tensor) for tensor in sorted(set(inputs.values())))
    session: Any = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    largest: dict[str, list[Floats]] = {name: [] for name in inputs}
    usual: dict[str, list[float]] = {name: [] for name in inputs}
    for batch in batches:
        for name, values in zip(inputs, session.run(list(inputs.values()), dict(batch)), strict=True):
            magnitudes = np.abs(values.astype(np.float32))
            largest[name].append(magnitudes.max(axis=0))
            usual[name].append(float(np.quantile(magnitudes, KEPT)))
    return {name: Activations(np.max(largest[name], axis=0), float(np.mean(usual[name]))) for name in inputs}


def write_quantized(
    source: Path, out: Path, activations: Mapping[str, Activations], excluded: Collection[str] = ()
) -> list[str]:
    """Write `source` as a Q/DQ graph with scales for these activations; returns the quantised products.

    The activations may come from another precision of the same graph: ONNX Runtime cannot calibrate bf16.
    """

    def replace(linear: _Linear) -> list[NodeProto]:
        return _static(linear, activations[linear.name])

    done = _rewrite(source, out, replace, excluded)
    assert_precision(out, "int8")
    return done


def quantize_dynamic(source: Path, out: Path, excluded: Collection[str] = ()) -> list[str]:
    """Write `source` with int8 weights and scales of the activations taken anew for each batch (ONNX Runtime only)."""
    done = _rewrite(source, out, _dynamic, excluded)
    assert_precision(out, "int8_dynamic")
    return done


def sensitivity(
    source: Path,
    activations: Mapping[str, Activations],
    logits: Callable[[Path], Floats],
    reference: Floats,
    scratch: Path,
) -> list[Effect]:
    """Leave one product at a time in floating point; the one that brings most back comes first.

    `logits` runs a graph on the texts whose fp32 logits [texts, labels] are `reference`; `scratch` is a file to
    write each graph to.
    """
    effects = []
    for name in activations:
        write_quantized(source, scratch, activations, {name})
        result = logits(scratch)
        error = float(np.sqrt(np.square(result - reference).mean()))
        effects.append(Effect(name, error, float((result.argmax(1) == reference.argmax(1)).mean())))
    scratch.unlink(missing_ok=True)
    return sorted(effects, key=lambda effect: effect.error)


def quantize_to_gate(
    source: Path,
    out: Path,
    activations: Mapping[str, Activations],
    judge: Callable[[Path], Verdict],
    rank: Callable[[], Sequence[Effect]],
    max_excluded: int,
) -> Outcome:
    """Quantise all products; while the verdict is no, leave the most harmful ones out, one more at a time.

    `rank` orders the products, most harmful first (see `sensitivity`); it is asked only if the first verdict is no.
    """
    done = write_quantized(source, out, activations)
    attempts = [Attempt((), judge(out))]
    effects: Sequence[Effect] = ()
    # At least one product is int8, else it is another precision.
    limit = min(max_excluded, len(activations) - 1)
    while not attempts[-1].verdict.passed and len(attempts) <= limit:
        effects = effects or rank()
        excluded = tuple(effect.product for effect in effects[: len(attempts)])
        done = write_quantized(source, out, activations, excluded)
        attempts.append(Attempt(excluded, judge(out)))
    return Outcome(done, attempts, list(effects))


class _Linear:
    """One product of the source graph, x @ weights + bias, and the initializers that replace its own."""

    def __init__(self, name: str, node: NodeProto, stored: npt.NDArray[Any]) -> None:
        self.name = name
        self.node = node
        self.dtype = stored.dtype  # also of the scales: a strongly typed engine wants them in the type of the rest
        self.weights: Floats = stored.astype(np.float32).T  # [in, out]
        self.initializers: list[onnx.TensorProto] = []

    def add(self, part: str, values: npt.NDArray[Any]) -> str:
        """A new initializer; returns its name."""
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), f"{self.name}.{part}"))
        return self.initializers[-1].name

    def make(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> NodeProto:
        """A node that gives the tensor `output`, its own part of the product's name."""
        return helper.make_node(kind, list(inputs), [output], name=f"{output}_node", **attributes)

    def add_weights(self, weights: Floats) -> tuple[str, str, str]:
        """Weights [in, out] as int8, their scales [out] and zero points [out]; returns the names."""
        scale = self.scale(np.abs(weights).max(axis=0))
        rounded = np.clip(np.round(weights / scale.astype(np.float32)), -_LEVELS, _LEVELS).astype(np.int8)
        zero = np.zeros(len(scale), np.int8)
        return self.add("weight", rounded), self.add("weight_scale", scale), self.add("weight_zero", zero)

    def scale(self, largest: npt.ArrayLike) -> npt.NDArray[Any]:
        """The scale that maps `largest` to 127, in the type of the graph and a normal number there."""
        smallest = np.finfo(np.float16 if self.dtype == np.float16 else np.float32).tiny
        return np.maximum(np.asarray(largest, np.float32) / _LEVELS, smallest).astype(self.dtype)

    def finish(self, kind: str, inputs: Sequence[str]) -> list[NodeProto]:
        """The last node of the product, and the sum with the bias; the exporter drops a bias of nothing but zeros."""
        output = self.node.output[0]
        if len(self.node.input) < 3:
            return [self.make(kind, inputs, output)]
        product = f"{self.name}.product"
        return [self.make(kind, inputs, product), self.make("Add", [product, self.node.input[2]], output)]


def _static(linear: _Linear, activations: Activations) -> list[NodeProto]:
    """Q/DQ of input and weights around a MatMul."""
    name, source, weights = linear.name, linear.node.input[0], linear.weights
    role = name.rpartition(".")[2]
    nodes = []
    largest = float(activations.largest.max())
    if role in SMOOTHED:
        factors = _smoothing(activations.largest, weights)
        nodes.append(
            linear.make("Mul", [source, linear.add("smooth", (1 / factors).astype(linear.dtype))], f"{name}.x")
        )
        source, weights, largest = f"{name}.x", weights * factors[:, None], float((activations.largest / factors).max())
    elif role in CLIPPED:
        largest = activations.usual
    scale, zero = linear.add("scale", linear.scale(largest)), linear.add("zero", np.zeros((), np.int8))
    stored = linear.add_weights(weights)
    return [
        *nodes,
        linear.make("QuantizeLinear", [source, scale, zero], f"{name}.quantized"),
        linear.make("DequantizeLinear", [f"{name}.quantized", scale, zero], f"{name}.dequantized"),
        linear.make("DequantizeLinear", stored, f"{name}.weight_dequantized", axis=1),
        *linear.finish("MatMul", [f"{name}.dequantized", f"{name}.weight_dequantized"]),
    ]


def _dynamic(linear: _Linear) -> list[NodeProto]:
    """Integer product with scales from the input itself; the pattern that ONNX Runtime runs as one kernel."""
    name = linear.name
    weight, weight_scale, weight_zero = linear.add_weights(linear.weights)
    quantized = [f"{name}.quantized", f"{name}.scale", f"{name}.zero"]
    split = helper.make_node("DynamicQuantizeLinear", [linear.node.input[0]], quantized, name=f"{name}.quantized_node")
    return [
        split,
        linear.make("MatMulInteger", [quantized[0], weight, quantized[2], weight_zero], f"{name}.integers"),
        linear.make("Cast", [f"{name}.integers"], f"{name}.floats", to=onnx.TensorProto.FLOAT),
        linear.make("Mul", [quantized[1], weight_scale], f"{name}.scales"),
        *linear.finish("Mul", [f"{name}.floats", f"{name}.scales"]),
    ]


def _smoothing(largest: Floats, weights: Floats) -> Floats:
    """Factors [in] that the activations are divided by and the weights [in, out] multiplied with; geometric mean 1."""
    activation, weight = np.maximum(largest, _TINY), np.maximum(np.abs(weights).max(axis=1), _TINY)
    factors = activation**SMOOTHING / weight ** (1 - SMOOTHING)
    return np.asarray(factors / np.exp(np.log(factors).mean()), np.float32)


def _rewrite(
    source: Path, out: Path, replace: Callable[[_Linear], list[NodeProto]], excluded: Collection[str]
) -> list[str]:
    """Replace all products but the excluded ones; returns the names of those replaced."""
    model = onnx.load(source)
    linears = _linears(model)
    unknown = sorted(set(excluded) - set(linears))
    if unknown:
        raise ValueError(f"{source}: no such product: {', '.join(unknown)}; there are: {', '.join(linears)}")
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: dict[str, list[NodeProto]] = {}
    for name, node in linears.items():
        if name not in excluded:
            linear = _Linear(name, node, numpy_helper.to_array(stored.pop(node.input[1])))
            nodes[node.output[0]] = replace(linear)
            stored |= {tensor.name: tensor for tensor in linear.initializers}
    rewritten = [part for node in model.graph.node for part in nodes.get(node.output[0], [node])]
    _assign(model.graph.node, rewritten)
    _assign(model.graph.initializer, list(stored.values()))
    # The weights keep their names, but not the type that the exporter noted down for them.
    _assign(model.graph.value_info, [value for value in model.graph.value_info if value.name not in stored])
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, out)
    return [name for name in linears if name not in excluded]


def _assign(field: Any, values: Sequence[Any]) -> None:
    """Replace a repeated field; `values` may hold what is in it."""
    kept = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(kept)


def _linears(model: ModelProto) -> dict[str, NodeProto]:
    """The encoder's products with weights by name, all x @ weights.T + bias (or without)."""
    stored = {tensor.name for tensor in model.graph.initializer}
    expected = {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}
    found: dict[str, NodeProto] = {}
    for node in model.graph.node:
        if node.op_type not in PRODUCTS or node.input[1] not in stored:
            continue
        name = node.input[1].removesuffix(WEIGHT)
        form = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if name in HEAD:
            continue
        if node.op_type != "Gemm" or {**expected, "transB": 0, **form} != expected:
            raise PrecisionError(f"product {name!r}: {node.op_type} {form} cannot be quantised")
        found[name] = node
    return found
