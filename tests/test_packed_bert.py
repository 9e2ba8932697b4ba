"""The packed graph against the Hugging Face model, in ONNX Runtime, and what it guards against."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from millibert import UsageError
from millibert_build.bert_graph import check_architecture
from millibert_build.export import MAX_IR, OPSET, PACKED_INPUTS, export_packed, export_padded

LIMIT = 48
VOCABULARY = 500
TOLERANCE = 1e-4


def small_bert(**changes):
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=160,
        max_position_embeddings=64,
        num_labels=7,
        # Weights of this size make logits of several units, so that 1e-4 is a real demand.
        initializer_range=0.3,
        **changes,
    )
    return BertForSequenceClassification(BertConfig(**settings)).eval()


@pytest.fixture(scope="module")
def model():
    return small_bert()


@pytest.fixture(scope="module")
def packed_path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "packed.onnx"
    export_packed(model, LIMIT, path)
    return path


@pytest.fixture(scope="module")
def packed(packed_path):
    session = onnxruntime.InferenceSession(packed_path)

    def run(rows, lengths=None, longest=None, span=1):
        lengths = [len(row) for row in rows] if lengths is None else lengths
        inputs = {
            "input_ids": np.concatenate(rows).astype(np.int32),
            "lengths": np.array(lengths, np.int32),
            # Only its size means anything; NaN shows that no value is read.
            "max_length": np.full(longest or max(lengths), np.nan, np.float32),
            "span": np.zeros(span, np.int32),
        }
        return session.run(None, inputs)[0]

    return run


def texts(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(1, VOCABULARY, length) for length in lengths]


def reference(model, rows) -> np.ndarray:
    """Each text by itself through the Hugging Face model."""
    with torch.inference_mode():
        return np.concatenate([model(input_ids=torch.tensor(row)[None]).logits.numpy() for row in rows])


@pytest.mark.parametrize("length", [1, 2, 3, 17, LIMIT - 1, LIMIT])
def test_single_texts_of_every_length(model, packed, length):
    rows = texts(length)
    np.testing.assert_allclose(packed(rows), reference(model, rows), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("count", [2, 3, 8, 31, 64])
def test_mixed_batches(model, packed, count):
    lengths = np.random.default_rng(count).integers(1, LIMIT + 1, count)
    rows = texts(*lengths, seed=count)
    expected = reference(model, rows)
    np.testing.assert_allclose(packed(rows), expected, atol=TOLERANCE, rtol=0)
    assert np.abs(expected).max() > 1  # the tolerance means something


def test_the_order_of_texts_is_kept(packed):
    rows = texts(5, 30, 1, 12)
    np.testing.assert_allclose(packed(rows[::-1]), packed(rows)[::-1], atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_other_activations(activation, tmp_path):
    model = small_bert(hidden_act=activation)
    export_packed(model, LIMIT, tmp_path / "model.onnx")
    rows = texts(9, 4)
    inputs = {
        "input_ids": np.concatenate(rows).astype(np.int32),
        "lengths": np.array([9, 4], np.int32),
        "max_length": np.zeros(9, np.float32),
        "span": np.zeros(1, np.int32),
    }
    logits = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, inputs)[0]
    np.testing.assert_allclose(logits, reference(model, rows), atol=TOLERANCE, rtol=0)


def test_the_padded_twin_agrees(model, tmp_path):
    export_padded(model, LIMIT, tmp_path / "padded.onnx")
    rows = texts(3, LIMIT, 20, 1)
    ids = np.zeros((4, LIMIT), np.int32)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    logits = onnxruntime.InferenceSession(tmp_path / "padded.onnx").run(
        None, {"input_ids": ids, "span": np.zeros((4, 1), np.int32)}
    )[0]
    np.testing.assert_allclose(logits, reference(model, rows), atol=TOLERANCE, rtol=0)


def prune_unevenly(model) -> None:
    """Take heads and feed-forward neurons away, from each layer another number."""
    for number, layer in enumerate(model.bert.encoder.layer):
        attention, size = layer.attention.self, layer.attention.self.attention_head_size
        kept = torch.arange((3 - number) * size)
        for linear in (attention.query, attention.key, attention.value):
            cut(linear, kept, 0)
        cut(layer.attention.output.dense, kept, 1)
        attention.all_head_size = len(kept)
        neurons = torch.arange(0, 150 - 40 * number)
        cut(layer.intermediate.dense, neurons, 0)
        cut(layer.output.dense, neurons, 1)


def cut(linear: torch.nn.Linear, kept: torch.Tensor, dim: int) -> None:
    linear.weight = torch.nn.Parameter(linear.weight.index_select(dim, kept).detach())
    if dim == 0:
        linear.bias = torch.nn.Parameter(linear.bias[kept].detach())
    linear.out_features, linear.in_features = linear.weight.shape


def test_layers_may_differ_in_heads_and_neurons(tmp_path):
    model = small_bert()
    prune_unevenly(model)
    export_packed(model, LIMIT, tmp_path / "model.onnx")
    rows = texts(9, 4, 30)
    inputs = {
        "input_ids": np.concatenate(rows).astype(np.int32),
        "lengths": np.array([9, 4, 30], np.int32),
        "max_length": np.zeros(30, np.float32),
        "span": np.zeros(1, np.int32),
    }
    logits = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, inputs)[0]
    np.testing.assert_allclose(logits, reference(model, rows), atol=TOLERANCE, rtol=0)


# What was seen to arrive from Triton's ragged batching.


def test_rows_padded_with_zeros_are_read_to_their_last_id(model, packed):
    rows = texts(4, 9)
    padded = [np.pad(row, (0, 9 - len(row))) for row in rows]
    np.testing.assert_allclose(packed(padded), reference(model, rows), atol=TOLERANCE, rtol=0)


def test_an_id_of_zero_inside_a_text_counts(model, packed):
    (row,) = texts(8)
    row[3] = 0
    np.testing.assert_allclose(packed([row]), reference(model, [row]), atol=TOLERANCE, rtol=0)


def test_a_longest_length_rounded_up_changes_nothing(packed):
    rows = texts(5, 11, 2)
    np.testing.assert_allclose(packed(rows, longest=LIMIT + 2, span=17), packed(rows), atol=1e-5)


def test_ids_outside_the_vocabulary_spoil_their_own_text_only(packed):
    rows = texts(6, 7, 8)
    expected = packed(rows)
    rows[1][2], rows[1][3] = 10**6, -5
    logits = packed(rows)
    np.testing.assert_allclose(logits[[0, 2]], expected[[0, 2]], atol=1e-5)
    assert np.isfinite(logits).all()


def test_a_text_over_the_limit_spoils_itself_only(packed):
    rows = texts(6, LIMIT + 30, 8)
    expected = packed([rows[0], rows[2]])
    logits = packed(rows)
    np.testing.assert_allclose(logits[[0, 2]], expected, atol=1e-5)
    assert np.isfinite(logits).all()


def test_rows_from_the_first_empty_text_on_are_nan(packed):
    rows = texts(6, 7, 8)
    logits = packed(rows, lengths=[6, 0, 15])
    np.testing.assert_allclose(logits[0], packed(rows[:1])[0], atol=1e-5)
    assert np.isnan(logits[1:]).all()


# The file itself.


def test_the_graph_is_plain_onnx_with_int32_inputs(packed_path):
    graph = onnx.load(packed_path)
    assert graph.ir_version <= MAX_IR
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", OPSET)]
    assert {node.domain for node in graph.graph.node} == {""}
    assert not graph.functions
    types = {i.name: (i.type.tensor_type.elem_type, len(i.type.tensor_type.shape.dim)) for i in graph.graph.input}
    assert types == {
        "input_ids": (onnx.TensorProto.INT32, 1),
        "lengths": (onnx.TensorProto.INT32, 1),
        "max_length": (onnx.TensorProto.FLOAT, 1),
        "span": (onnx.TensorProto.INT32, 1),
    }
    assert tuple(types) == PACKED_INPUTS
    dims = [i.type.tensor_type.shape.dim[0].dim_param for i in graph.graph.input]
    assert len(set(dims)) == 4
    assert all(dims)


def test_attention_is_one_softmax_a_layer_without_infinities(packed_path):
    graph = onnx.load(packed_path).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["Softmax"] == 3
    assert kinds["LayerNormalization"] == 7
    for initializer in graph.initializer:
        values = onnx.numpy_helper.to_array(initializer)
        if values.dtype.kind == "f" and values.size > 1:
            assert np.isfinite(values).all(), initializer.name


# What is refused.


def test_other_architectures_are_refused_by_name():
    config: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}
    with pytest.raises(UsageError, match="RobertaForSequenceClassification"):
        check_architecture(RobertaForSequenceClassification(RobertaConfig(**config)), 8)
    with pytest.raises(UsageError, match="BertForTokenClassification"):
        check_architecture(BertForTokenClassification(BertConfig(**config)), 8)


def test_relative_positions_are_refused(model):
    changed = small_bert()
    changed.config.position_embedding_type = "relative_key"
    with pytest.raises(UsageError, match="'relative_key'"):
        check_architecture(changed, 8)


def test_a_limit_over_the_checkpoints_positions_is_refused(model):
    with pytest.raises(UsageError, match="65 is more than the 64 positions"):
        check_architecture(model, 65)
