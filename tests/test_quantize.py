"""Explicit precision: graphs of each, what is said of wrong ones, and the search for an int8 graph that passes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from tests.test_packed_bert import LIMIT, texts
from tests.test_packed_bert import small_bert as bert_without_biases

from millibert_build.engine import (
    Artefact,
    available_precisions,
    open_engine,
    quantized_precisions,
    run_texts,
    texts_per_second,
)
from millibert_build.export import MAX_IR, OPSET, export_packed, export_rows
from millibert_build.layouts import packed, without_padding
from millibert_build.packed_bert import PackedBert
from millibert_build.precision import HEAD, PrecisionError, assert_precision, products
from millibert_build.quantize import (
    Effect,
    Verdict,
    calibrate,
    quantize_dynamic,
    quantize_static,
    quantize_to_gate,
    sensitivity,
    weight_products,
    write_quantized,
)
from millibert_ensemble.models.bert.engines import ENGINES, EngineError

ENCODER = [
    *(
        f"layers.{n}.{part}"
        for n in (0, 1)
        for part in ("query_key_value", "attention_output", "intermediate", "output")
    ),
    *(f"last_layer.{part}" for part in ("query", "key_value", "attention_output", "intermediate", "output")),
]


def small_bert():
    model = bert_without_biases()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """fp32.onnx, fp16.onnx, bf16.onnx, int8.onnx and int8_dynamic.onnx of the same weights."""
    folder: Path = tmp_path_factory.mktemp("precisions")
    export_rows(small_bert(), LIMIT, folder / "fp32.onnx")
    export_rows(small_bert(), LIMIT, folder / "fp16.onnx", "fp16")
    export_rows(small_bert(), LIMIT, folder / "bf16.onnx", "bf16")
    quantize_static(folder / "fp32.onnx", folder / "int8.onnx", batches())
    quantize_dynamic(folder / "fp32.onnx", folder / "int8_dynamic.onnx")
    return folder


def ids(count: int = 64, seed: int = 1) -> list[list[int]]:
    lengths = np.random.default_rng(seed).integers(3, LIMIT, count)
    return [row.tolist() for row in texts(*lengths, seed=seed)]


def batches(count: int = 64):
    return without_padding(ids(count, seed=9), 16)


def logits(path: Path, precision: str, kind: str = "openvino"):
    return run_texts(open_engine(kind, path, precision), ids(), 16)


def error(result, reference) -> float:
    """Of the logits, as a share of their spread."""
    return float(np.sqrt(np.square(result - reference).mean()) / reference.std())


@pytest.fixture(scope="module")
def reference(folder):
    return logits(folder / "fp32.onnx", "fp32")


# Floating point.


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_graphs_agree_with_fp32(folder, reference, precision):
    result = logits(folder / f"{precision}.onnx", "fp32")
    assert result.dtype == np.float32
    assert 0 < error(result, reference) < {"fp16": 0.01, "bf16": 0.08}[precision]


def test_onnx_runtime_reads_fp16(folder, reference):
    assert error(logits(folder / "fp16.onnx", "fp32", "onnxruntime"), reference) < 0.01


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_products_are_of_the_precision_and_the_head_of_fp32(folder, precision):
    found = {product.name: product.precision for product in products(folder / f"{precision}.onnx")}
    assert {name for name in found if not name.startswith("node_")} == {*ENCODER, *HEAD}
    assert {found[name] for name in HEAD} == {"fp32"}
    assert {kind for name, kind in found.items() if name not in HEAD} == {precision}
    # 13 products of the encoder, 2 of attention in each of 3 layers, and the head.
    assert sum(assert_precision(folder / f"{precision}.onnx", precision).values()) == 13 + 6 + 2


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_softmax_norms_inputs_and_logits_stay_as_they_are(folder, precision):
    graph = onnx.shape_inference.infer_shapes(onnx.load(folder / f"{precision}.onnx")).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    inner = [node for node in graph.node if node.op_type in ("Softmax", "LayerNormalization")]
    assert len(inner) == 3 + 7
    assert {types[node.input[0]] for node in inner} == {TensorProto.FLOAT}
    expected = onnx.load(folder / "fp32.onnx").graph
    assert [(i.name, i.type) for i in graph.input] == [(i.name, i.type) for i in expected.input]
    assert graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_the_model_keeps_its_type():
    model = small_bert()
    PackedBert(model, LIMIT, torch.float16)
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}


@pytest.mark.parametrize(
    ("file", "asked", "message"),
    [
        ("fp32", "fp16", r"'layers\.0\.query_key_value' is computed in fp32, not in fp16"),
        ("bf16", "fp16", "computed in bf16, not in fp16"),
        ("fp16", "fp32", "computed in fp16, not in fp32"),
        ("fp32", "int8", "no product of the graph is computed in int8"),
        ("int8", "fp32", r"'layers\.0\.query_key_value' is computed in int8, not in fp32"),
        ("int8_dynamic", "int8", "computed in int8_dynamic, not in int8 or"),
    ],
)
def test_a_graph_of_another_precision_is_named(folder, file, asked, message):
    with pytest.raises(PrecisionError, match=message):
        assert_precision(folder / f"{file}.onnx", asked)


# Int8.


def test_both_engines_run_the_same_int8_graph_and_agree(folder, reference):
    openvino = logits(folder / "int8.onnx", "int8")
    runtime = logits(folder / "int8.onnx", "int8", "onnxruntime")
    assert 0 < error(openvino, reference) < 0.2
    assert 0 < error(runtime, reference) < 0.2
    # OpenVINO may compute in bf16 what is not quantised.
    assert error(openvino, runtime) < 0.2
    assert (openvino.argmax(1) == runtime.argmax(1)).mean() > 0.9


def test_dynamic_int8_runs_in_onnx_runtime(folder, reference):
    assert 0 < error(logits(folder / "int8_dynamic.onnx", "int8_dynamic", "onnxruntime"), reference) < 0.2
    assert assert_precision(folder / "int8_dynamic.onnx", "int8_dynamic") == {"int8_dynamic": 13, "fp32": 8}


def test_onnx_runtime_computes_the_products_in_int8(folder, tmp_path):
    """Its fusions are what makes a Q/DQ graph fast; without them it computes in fp32, and nobody says so."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(folder / "int8.onnx", options, disabled_optimizers=["MatMulAddFusion"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["MatMulIntegerToFloat"] == 13


def test_the_int8_graph_is_symmetric_and_per_channel_and_of_the_encoder_only(folder):
    model = onnx.load(folder / "int8.onnx")
    assert (model.ir_version <= MAX_IR, model.opset_import[0].version, len(model.opset_import)) == (True, OPSET, 1)
    assert assert_precision(folder / "int8.onnx", "int8") == {"int8": 13, "fp32": 8}
    assert [product.name for product in products(folder / "int8.onnx") if product.precision == "int8"] == ENCODER
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    quantizing = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(quantizing) == 13 * 3
    for node in quantizing:
        zero = stored[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
    for name in ENCODER:
        weights = stored[f"{name}.weight"]
        assert weights.dtype == np.int8
        assert (np.abs(weights.astype(int)).max(axis=0) == 127).all()
        assert stored[f"{name}.weight_scale"].shape == (weights.shape[1],)
        assert stored[f"{name}.bias"].dtype == np.float32
    assert stored["words.weight"].dtype == np.float32


def test_the_file_shrinks(folder):
    sizes = {name: (folder / f"{name}.onnx").stat().st_size for name in ("fp32", "int8")}
    weights = sum(t.raw_data.__len__() for t in onnx.load(folder / "int8.onnx").graph.initializer if t.data_type == 3)
    assert sizes["fp32"] - sizes["int8"] > 2.5 * weights


def test_scales_are_of_the_type_of_a_half_graph(folder, tmp_path):
    activations = calibrate(folder / "fp32.onnx", batches())
    for precision, kind in (("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)):
        write_quantized(folder / f"{precision}.onnx", tmp_path / "int8.onnx", activations)
        assert assert_precision(tmp_path / "int8.onnx", "int8") == {"int8": 13, precision: 6, "fp32": 2}
        stored = {t.name: t.data_type for t in onnx.load(tmp_path / "int8.onnx").graph.initializer}
        assert {stored[f"{name}.scale"] for name in ENCODER} == {kind}


@pytest.mark.parametrize("change", ["zero point", "uint8", "per tensor", "half done"])
def test_what_tensorrt_would_not_read_is_refused(folder, tmp_path, change):
    model = onnx.load(folder / "int8.onnx")
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    product = "layers.1.output"
    if change == "zero point":
        stored[f"{product}.zero"].CopyFrom(numpy_helper.from_array(np.array(3, np.int8), f"{product}.zero"))
    elif change == "uint8":
        stored[f"{product}.zero"].CopyFrom(numpy_helper.from_array(np.array(0, np.uint8), f"{product}.zero"))
    elif change == "per tensor":
        for part, values in (("scale", np.float32(0.1)), ("zero", np.int8(0))):
            name = f"{product}.weight_{part}"
            stored[name].CopyFrom(numpy_helper.from_array(np.array(values), name))
    else:
        product_node = next(n for n in model.graph.node if n.output[0] == f"{product}.product")
        quantizing = next(n for n in model.graph.node if n.output[0] == f"{product}.quantized")
        product_node.input[0] = quantizing.input[0]
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(PrecisionError, match=r"product 'layers\.1\.output'"):
        assert_precision(tmp_path / "wrong.onnx", "int8")


def test_excluded_products_stay_in_floating_point(folder, reference, tmp_path):
    excluded = {"layers.0.output", "last_layer.query"}
    done = quantize_static(folder / "fp32.onnx", tmp_path / "int8.onnx", batches(), excluded)
    assert done == [name for name in ENCODER if name not in excluded] == weight_products_in_int8(tmp_path / "int8.onnx")
    assert weight_products(folder / "fp32.onnx") == ENCODER
    with pytest.raises(ValueError, match="no such product: pooler"):
        quantize_static(folder / "fp32.onnx", tmp_path / "int8.onnx", batches(), {"pooler"})


def test_products_without_biases(tmp_path):
    """A bias of zeros is not exported."""
    export_rows(bert_without_biases(), LIMIT, tmp_path / "fp32.onnx")
    expected = logits(tmp_path / "fp32.onnx", "fp32")
    quantize_static(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", batches())
    assert 0 < error(logits(tmp_path / "int8.onnx", "int8"), expected) < 0.2
    quantize_dynamic(tmp_path / "fp32.onnx", tmp_path / "dynamic.onnx")
    assert 0 < error(logits(tmp_path / "dynamic.onnx", "int8_dynamic", "onnxruntime"), expected) < 0.2


def weight_products_in_int8(path: Path) -> list[str]:
    return [product.name for product in products(path) if product.precision == "int8"]


# The search.


def test_sensitivity_finds_the_product_that_was_spoilt(folder, reference, tmp_path):
    activations = calibrate(folder / "fp32.onnx", batches())
    spoilt = activations["layers.1.attention_output"]
    activations["layers.1.attention_output"] = spoilt._replace(largest=spoilt.largest * 100)
    scratch = tmp_path / "scratch.onnx"
    effects = sensitivity(folder / "fp32.onnx", activations, lambda path: logits(path, "int8"), reference, scratch)
    assert effects[0].product == "layers.1.attention_output"
    assert effects[0].error < 0.7 * effects[1].error
    assert sorted(effect.product for effect in effects) == sorted(ENCODER)
    assert not scratch.exists()


EFFECTS = [Effect(name, float(n), 0.9) for n, name in enumerate(reversed(ENCODER))]


def search(folder, out, passes_at: int, max_excluded: int):
    def judge(path: Path) -> Verdict:
        left = len(ENCODER) - len(weight_products_in_int8(path))
        return Verdict(left >= passes_at, f"{left} left")

    source = folder / "fp32.onnx"
    return quantize_to_gate(source, out, calibrate(source, batches()), judge, lambda: EFFECTS, max_excluded)


def test_the_search_stops_at_the_first_graph_that_passes(folder, tmp_path):
    outcome = search(folder, tmp_path / "int8.onnx", passes_at=2, max_excluded=4)
    assert outcome.passed
    assert outcome.excluded == ("last_layer.output", "last_layer.intermediate")
    assert len(outcome.attempts) == 3
    assert outcome.products == weight_products_in_int8(tmp_path / "int8.onnx")
    assert not set(outcome.excluded) & set(outcome.products)


def test_sensitivity_is_not_measured_when_all_products_pass(folder, tmp_path):
    outcome = search(folder, tmp_path / "int8.onnx", passes_at=0, max_excluded=4)
    assert (outcome.passed, outcome.excluded, outcome.effects) == (True, (), [])


def test_the_search_gives_up_and_says_with_which_figures(folder, tmp_path):
    outcome = search(folder, tmp_path / "int8.onnx", passes_at=9, max_excluded=1)
    assert not outcome.passed
    assert outcome.describe() == (
        "int8 misses its gates (nothing left out: 0 left; last_layer.output left out: 1 left)"
    )


# The engines.


def test_precisions_of_the_engines(folder):
    assert available_precisions("onnxruntime", folder / "fp32.onnx") == ["fp32"]
    assert available_precisions("openvino", folder / "fp32.onnx")[0] == "fp32"
    assert quantized_precisions("onnxruntime") == ["int8", "int8_dynamic"]
    assert quantized_precisions("openvino") == ["int8"]
    with pytest.raises(EngineError, match="not int8_dynamic; use the engine onnxruntime"):
        ENGINES["openvino"](folder / "int8_dynamic.onnx", "int8_dynamic", 1)


def test_several_files_are_measured_in_one_run(folder):
    precisions = ("fp32", "int8", "int8_dynamic")
    artefacts = {precision: Artefact(folder / f"{precision}.onnx", precision) for precision in precisions}
    speeds = texts_per_second("onnxruntime", artefacts, ids(), 16)
    assert list(speeds) == list(artefacts)
    assert all(speed > 0 for speed in speeds.values())


def test_positions_stay_exact_in_a_large_packed_batch_under_bf16(tmp_path):
    """An engine that computes in bf16 must not count tokens in it: that ends at 256."""
    rows = ids(60)
    export_packed(small_bert(), LIMIT, tmp_path / "bf16.onnx", "bf16")
    engine = ENGINES["openvino"](tmp_path / "bf16.onnx", "fp32", 2)
    one_by_one = np.concatenate([engine.infer(packed([row])) for row in rows])
    # bf16 where this CPU has it.
    together = ENGINES["openvino"](tmp_path / "bf16.onnx", "int8", 2).infer(packed(rows))
    assert sum(map(len, rows)) > 1000
    assert error(together, one_by_one) < 0.08
