"""The graph of rows against the Hugging Face model, in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from tests.test_packed_bert import LIMIT, TOLERANCE, VOCABULARY, prune_unevenly, reference, small_bert, texts

from millibert_build.export import MAX_IR, OPSET, ROWS_INPUTS, export_packed, export_rows
from millibert_build.layouts import without_padding
from millibert_build.precision import products
from millibert_ensemble.models.bert.inference import in_rows, infer
from millibert_ensemble.models.bert.rows import Execution, Shape, arrange


@pytest.fixture(scope="module")
def model():
    return small_bert()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.onnx"
    export_rows(model, LIMIT, path)
    return path


@pytest.fixture(scope="module")
def session(path):
    return onnxruntime.InferenceSession(path)


class InTurn:
    """As the engines run parts, in a plain session."""

    streams = 2

    def __init__(self, session) -> None:
        self._session = session

    def infer_all(self, parts):
        return [self._session.run(None, dict(inputs))[0] for inputs in parts]


def run(session, rows) -> np.ndarray:
    engine: Any = InTurn(session)
    return infer(engine, in_rows([row[None].astype(np.int32) for row in rows], 2))


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, LIMIT - 1, LIMIT])
def test_single_texts_of_every_length(model, session, length):
    rows = texts(length)
    np.testing.assert_allclose(run(session, rows), reference(model, rows), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("count", [2, 3, 8, 31, 64, 200])
def test_mixed_batches(model, session, count):
    lengths = np.random.default_rng(count).integers(1, LIMIT + 1, count)
    rows = texts(*lengths, seed=count)
    expected = reference(model, rows)
    np.testing.assert_allclose(run(session, rows), expected, atol=TOLERANCE, rtol=0)
    assert np.abs(expected).max() > 1  # the tolerance means something


def test_a_text_sees_neither_its_neighbours_nor_what_is_left_over(session):
    first, second, third = texts(20, 25, 12)
    others = texts(20, 25, 12, seed=1)
    execution = Execution(Shape(1, 64), [[0, 1, 2]])

    def logits(rows) -> np.ndarray:
        inputs = arrange([row.astype(np.int32) for row in rows], execution)
        inputs["input_ids"][inputs["text"] < 0] = 7
        return np.asarray(session.run(None, inputs)[0][:3])

    before = logits([first, second, third])
    after = logits([others[0], second, others[2]])
    np.testing.assert_allclose(after[1], before[1], atol=1e-5)
    assert (np.abs(after[[0, 2]] - before[[0, 2]]).max(axis=1) > 0.1).all()


def test_what_would_fail_a_whole_batch_is_replaced(model, session):
    """An id outside the vocabulary; a position past the limit."""
    good, bad = texts(9, 5)
    bad[2], bad[3] = VOCABULARY, -1
    np.testing.assert_allclose(run(session, [good, bad])[0], reference(model, [good])[0], atol=TOLERANCE, rtol=0)
    inputs = arrange([good.astype(np.int32)], Execution(Shape(1, 16), [[0]]))
    inputs["position"][0, 12] = 10_000
    np.testing.assert_allclose(session.run(None, inputs)[0][0], reference(model, [good])[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_other_activations(activation, tmp_path):
    model = small_bert(hidden_act=activation)
    export_rows(model, LIMIT, tmp_path / "model.onnx")
    rows = texts(9, 4)
    logits = run(onnxruntime.InferenceSession(tmp_path / "model.onnx"), rows)
    np.testing.assert_allclose(logits, reference(model, rows), atol=TOLERANCE, rtol=0)


def test_layers_may_differ_in_heads_and_neurons(tmp_path):
    model = small_bert()
    prune_unevenly(model)
    export_rows(model, LIMIT, tmp_path / "model.onnx")
    rows = texts(9, 4, LIMIT)
    logits = run(onnxruntime.InferenceSession(tmp_path / "model.onnx"), rows)
    np.testing.assert_allclose(logits, reference(model, rows), atol=TOLERANCE, rtol=0)


def test_its_inputs_and_its_format(path):
    exported = onnx.load(path)
    assert tuple(node.name for node in exported.graph.input) == ROWS_INPUTS
    assert {node.type.tensor_type.elem_type for node in exported.graph.input} == {onnx.TensorProto.INT32}
    assert exported.ir_version <= MAX_IR
    assert {entry.version for entry in exported.opset_import if not entry.domain} == {OPSET}


def test_products_have_the_names_of_the_packed_graph(model, path, tmp_path):
    """So that scales found on one serve the other."""
    export_packed(model, LIMIT, tmp_path / "packed.onnx")
    assert {product.name for product in products(path)} == {p.name for p in products(tmp_path / "packed.onnx")}


def test_inputs_for_calibration_are_nothing_but_text(model, session):
    rows = texts(5, 9, 5, 5, 12)
    batches = without_padding([row.tolist() for row in rows], 2)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 5), (1, 5), (1, 9), (1, 12)]
    logits = np.concatenate([session.run(None, dict(batch))[0] for batch in batches])
    np.testing.assert_allclose(logits, reference(model, rows)[[0, 2, 3, 1, 4]], atol=TOLERANCE, rtol=0)
