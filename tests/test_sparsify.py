"""2:4 sparsity: the pattern, along the right axis, and that it stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import BertConfig, BertForSequenceClassification

from millibert import UsageError
from millibert_build.export import export_packed
from millibert_build.sparsify import apply_masks, check_sparsity, is_2_4, two_four_mask, two_four_masks


def small_bert(neurons: int = 64):
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": neurons,
        "max_position_embeddings": 32,
        "num_labels": 5,
    }
    return BertForSequenceClassification(BertConfig(**settings)).eval()


@pytest.fixture
def model():
    return small_bert()


@pytest.fixture
def sparse(model):
    apply_masks(model, two_four_masks(model))
    return model


def test_the_two_largest_of_each_four_inputs_stay():
    weight = torch.tensor([[1.0, -5, 3, 2, 0, 0, 0.5, -0.1], [4, 4, 4, 4, -1, 0, 0, 0]])
    expected = [[0, 1, 1, 0, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1, 0, 0]]
    assert two_four_mask(weight).int().tolist() == expected


def test_every_group_keeps_its_two_largest():
    weight = torch.randn(12, 32)
    mask = two_four_mask(weight)
    groups, kept = weight.abs().reshape(-1, 4), mask.reshape(-1, 4)
    assert (kept.sum(1) == 2).all()
    assert (groups.masked_fill(~kept, torch.inf).amin(1) >= groups.masked_fill(kept, 0).amax(1)).all()
    assert is_2_4(weight * mask)
    assert not is_2_4(weight)


def test_the_axis_matters():
    weight = torch.randn(8, 8)
    sparse = weight * two_four_mask(weight)
    assert is_2_4(sparse, axis=1)
    assert is_2_4(sparse.T.numpy(), axis=0)
    assert not is_2_4(sparse, axis=0)
    assert not is_2_4(torch.zeros(4, 6))


def test_all_matrices_of_the_encoder_and_nothing_else(model):
    masks = two_four_masks(model)
    assert len(masks) == 2 * 6
    assert all(name.startswith("bert.encoder.layer.") and name.endswith(".weight") for name in masks)
    before = {name: value.clone() for name, value in model.named_parameters()}
    apply_masks(model, masks)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == set(masks)
    assert all(check_sparsity(model).values())


def test_a_dense_model_is_not_sparse(model):
    assert set(check_sparsity(model).values()) == {False}


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_zeros_stay_zero_through_recovery(model, optimizer):
    masks = two_four_masks(model)
    apply_masks(model, masks)
    start = {name: model.get_parameter(name).clone() for name in masks}
    steps = optimizer(model.parameters(), lr=0.01)
    ids = torch.randint(1, 100, (8, 10))
    for _ in range(4):
        logits = model(input_ids=ids).logits
        torch.nn.functional.cross_entropy(logits, torch.arange(8) % 5).backward()
        steps.step()
        steps.zero_grad()
        apply_masks(model, masks)
    assert all(check_sparsity(model).values())
    for name, mask in masks.items():
        now = model.get_parameter(name)
        assert not now[~mask].any()
        assert not torch.equal(now[mask], start[name][mask])  # what is left learns


def test_inputs_that_do_not_come_in_fours_are_refused():
    with pytest.raises(UsageError, match=r"layer\.0\.output\.dense has 30 inputs"):
        two_four_masks(small_bert(neurons=30))


# ---- in the exported graph -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_exported_graph_is_sparse_along_the_contraction_axis(sparse, tmp_path, precision):
    export_packed(sparse, 32, tmp_path / "packed.onnx", precision)
    found = check_sparsity(tmp_path / "packed.onnx")
    # Query, key and value are one product, but for the last layer's query; head and attention are not counted.
    assert len(found) == 2 * 4 + 1
    assert all(found.values()), found


def test_the_exported_graph_of_a_dense_model_is_not(model, tmp_path):
    export_packed(model, 32, tmp_path / "packed.onnx")
    assert set(check_sparsity(tmp_path / "packed.onnx").values()) == {False}


def one_product(path, values, kind="MatMul", quantised=False, transposed=False, **attributes):
    """A graph of one product x @ W, W as stored."""
    weight = numpy_helper.from_array(values, "layer.weight")
    nodes, initializers, operand = [], [weight], "layer.weight"
    if quantised:
        initializers += [
            numpy_helper.from_array(np.ones(values.shape[1], np.float32), "scale"),
            numpy_helper.from_array(np.zeros(values.shape[1], np.int8), "zero"),
        ]
        nodes.append(helper.make_node("DequantizeLinear", ["layer.weight", "scale", "zero"], ["dense"], axis=1))
        operand = "dense"
    if transposed:
        nodes.append(helper.make_node("Transpose", [operand], ["turned"], perm=[1, 0]))
        operand = "turned"
    nodes.append(helper.make_node(kind, ["x", operand], ["y"], **attributes))
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in ("x", "y")]
    onnx.save(helper.make_model(helper.make_graph(nodes, "one", tensors[:1], tensors[1:], initializers)), path)
    return path


def test_each_way_to_store_a_weight(tmp_path):
    weight = torch.randn(8, 16)
    stored = (weight * two_four_mask(weight)).numpy()  # [out, in]
    path = tmp_path / "one.onnx"
    assert check_sparsity(one_product(path, stored.T.copy())) == {"layer": True}
    assert check_sparsity(one_product(path, stored)) == {"layer": False}
    assert check_sparsity(one_product(path, stored, "Gemm", transB=1)) == {"layer": True}
    assert check_sparsity(one_product(path, stored.T.copy(), "Gemm")) == {"layer": True}
    assert check_sparsity(one_product(path, stored, transposed=True)) == {"layer": True}
    assert check_sparsity(one_product(path, stored.T.copy(), transposed=True)) == {"layer": False}
    integers = (stored.T * 40).round().clip(-127, 127).astype(np.int8)
    assert check_sparsity(one_product(path, integers, quantised=True)) == {"layer": True}


def test_a_graph_without_weights_is_no_proof(tmp_path):
    path = one_product(tmp_path / "one.onnx", np.zeros((4, 4), np.float32))
    model = onnx.load(path)
    del model.graph.initializer[:]
    onnx.save(model, path)
    with pytest.raises(ValueError, match="no product of the graph has weights"):
        check_sparsity(path)
