"""The graphs that plans are built from: readable for TensorRT, in a form it fuses, right under ragged batching."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.test_packed_bert import LIMIT, VOCABULARY, small_bert

from millibert_build.bert_graph import MASKED
from millibert_build.export import export_packed, export_padded
from millibert_build.layouts import packed
from millibert_build.quantize import calibrate, write_quantized
from millibert_build.tensorrt.profiles import accepts, nearest, profiles_of
from millibert_build.tensorrt.readable import GraphError, check_readable, documented_operators
from millibert_build.tensorrt.run_graph import run_graph
from millibert_build.tensorrt.target import LAYOUTS, PRECISIONS, Target
from millibert_ensemble.models.tokenizer.tokenization import _tokens

EXPORTS = {"packed": export_packed, "padded": export_padded}
GRAPHS = [(layout, precision) for layout in LAYOUTS for precision in PRECISIONS]
TEXTS = 12


def target_of(layout="packed", precision="fp16", texts=16):
    return Target(precision, layout, texts, LIMIT, 11, 7, False, "")


@pytest.fixture(scope="module")
def texts():
    generator = np.random.default_rng(3)
    return [generator.integers(1, VOCABULARY, length).tolist() for length in generator.integers(2, LIMIT + 1, 40)]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory, texts):
    """A path for each layout and precision."""
    folder = tmp_path_factory.mktemp("graphs")
    model = small_bert()
    paths = {}
    for layout, export in EXPORTS.items():
        for precision in ("fp32", "fp16", "bf16"):
            paths[layout, precision] = folder / f"{layout}_{precision}.onnx"
            export(model, LIMIT, paths[layout, precision], precision)
    activations = calibrate(paths["packed", "fp32"], [packed([row]) for row in texts])
    for layout in EXPORTS:
        paths[layout, "int8"] = folder / f"{layout}_int8.onnx"
        write_quantized(paths[layout, "fp16"], paths[layout, "int8"], activations)
    return paths


@pytest.mark.parametrize(("layout", "precision"), GRAPHS)
def test_tensorrt_can_be_expected_to_read_it(graphs, layout, precision):
    check_readable(graphs[layout, precision], precision, layout)


@pytest.mark.parametrize(("layout", "precision"), GRAPHS)
def test_it_computes_what_fp32_computes(graphs, texts, layout, precision):
    reference = run_graph(graphs["packed", "fp32"], "fp32", "packed", texts, 1)
    logits = run_graph(graphs[layout, precision], precision, layout, texts, TEXTS)
    error = np.sqrt(np.square(logits - reference).mean() / np.square(reference).mean())
    # This model's weights are random and large, which magnifies what a trained one hardly shows.
    assert error < {"fp32": 1e-5, "fp16": 5e-3, "bf16": 5e-2, "int8": 0.2}[precision]


@pytest.mark.parametrize(("layout", "precision"), GRAPHS)
def test_attention_has_the_form_that_engines_fuse(graphs, layout, precision):
    """Products around a softmax, a finite mask added, no scaling between, no guard against NaN behind."""
    graph = onnx.load(graphs[layout, precision]).graph
    makers = {output: node for node in graph.node for output in node.output}
    readers = {name: [node for node in graph.node if name in node.input] for node in graph.node for name in node.output}
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    assert len(softmaxes) == 3
    masks = set()
    for softmax in softmaxes:
        add = makers[softmax.input[0]]
        assert add.op_type == "Add"
        scores = _through_casts(makers[add.input[0]], makers)
        assert scores.op_type == "MatMul"
        masks.add(add.input[1])
        for operand in scores.input:
            assert makers[operand].op_type in ("Transpose", "Gather", "Squeeze")  # a view of Q and K, scaled before
        (behind,) = readers[softmax.output[0]]
        if behind.op_type == "Cast":
            (behind,) = readers[behind.output[0]]
        assert behind.op_type == "MatMul"
    assert len(masks) == 1  # one for all layers
    values = [numpy_helper.to_array(tensor) for tensor in graph.initializer]
    values += [numpy_helper.to_array(a.t) for node in graph.node for a in node.attribute if a.name == "value"]
    assert any(value.size == 1 and value.dtype == np.float32 and value.item() == MASKED for value in values)
    assert not {node.op_type for node in graph.node} & {"IsNaN", "IsInf", "Div", "Sqrt"}


def _through_casts(node, makers):
    return makers[node.input[0]] if node.op_type == "Cast" else node


class Request:
    """What the tokenizer hands on for one request."""

    def __init__(self, rows, buckets=()):
        encodings = [type("Encoding", (), {"ids": row, "overflowing": []})() for row in rows]
        tokens = _tokens(encodings, buckets)
        self.rows, self.input_ids, self.span = rows, tokens.input_ids, tokens.span


def ragged(requests):
    """What Triton's ragged batching hands to a native backend, from its documentation ("Ragged Batching").

    Ragged inputs are laid end to end; BATCH_ITEM_SHAPE_FLATTEN gives the length of each row, padding included;
    BATCH_MAX_ELEMENT_COUNT_AS_SHAPE gives a tensor of as many elements as the largest request has, values undefined.
    """
    return {
        "input_ids": np.concatenate([request.input_ids.ravel() for request in requests]),
        "lengths": np.concatenate([np.full(len(r.input_ids), r.input_ids.shape[1], np.int32) for r in requests]),
        "max_length": np.full(max(request.span.size for request in requests), np.nan, np.float32),
        "span": np.concatenate([request.span.ravel() for request in requests]),
    }


def random_requests(generator, texts, most):
    rows = [texts[index] for index in generator.integers(0, len(texts), generator.integers(1, most + 1))]
    requests = []
    while rows:
        count = min(len(rows), int(generator.integers(1, 6)))
        requests.append(Request(rows[:count]))
        rows = rows[count:]
    return requests


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_ragged_batches_of_any_requests_give_the_logits_of_single_texts(graphs, texts, precision):
    path = graphs["packed", precision]
    alone = dict(zip(map(tuple, texts), run_graph(path, precision, "packed", texts, 1), strict=True))
    session = onnxruntime.InferenceSession(path)
    generator = np.random.default_rng(5)
    tolerance = 1e-4 if precision == "fp32" else 0.02
    for _ in range(40):
        requests = random_requests(generator, texts, 16)
        logits = session.run(None, ragged(requests))[0]
        expected = np.stack([alone[tuple(row)] for request in requests for row in request.rows])
        np.testing.assert_allclose(logits, expected, atol=tolerance, rtol=0)


def test_every_batch_that_triton_can_make_fits_a_profile(texts):
    target = target_of()
    profiles = profiles_of(target)
    generator = np.random.default_rng(6)
    extremes = [[Request([[1, 2]])], [Request([[1] * LIMIT])], [Request([[1] * LIMIT])] * 16]
    extremes += [
        [Request([[1] * LIMIT] * 16)],
        [Request([[1, 2]] * 16)],
        [Request([[1, 2]])] * 16,  # many texts of few tokens: the profile of a single text is nearest
        [Request([[1] * LIMIT] * 15), Request([[1, 2]])],
    ]
    for requests in (*extremes, *(random_requests(generator, texts, 16) for _ in range(200))):
        shapes = {name: values.shape for name, values in ragged(requests).items()}
        assert accepts(profiles[nearest(profiles, shapes)], shapes)


def test_profiles_are_taken_by_what_they_are_for():
    profiles = profiles_of(target_of())
    for texts, number in ((1, 0), (7, 1), (16, 2)):
        shapes = {
            "input_ids": [11 * texts],
            "lengths": [texts],
            "max_length": [11 * min(texts, 2)],
            "span": [11 * texts],
        }
        assert nearest(profiles, shapes) == number
    too_many = {"input_ids": [16 * LIMIT + 1], "lengths": [17], "max_length": [1], "span": [17]}
    with pytest.raises(ValueError, match="no profile of the plan accepts"):
        nearest(profiles, too_many)


def test_padded_requests_fit_the_profile_of_their_bucket(texts):
    target = target_of("padded")
    assert target.buckets == (16, 32, LIMIT)
    profiles = profiles_of(target)
    for row in texts:
        request = Request([row], target.buckets)
        shapes = {"input_ids": request.input_ids.shape, "span": request.span.shape}
        assert request.input_ids.shape[1] == profiles[nearest(profiles, shapes)]["input_ids"].opt[1]


@pytest.mark.parametrize("texts", [1, 3, 8])
def test_small_limits_have_fewer_profiles(texts):
    profiles = profiles_of(target_of(texts=texts))
    assert len(profiles) == len({1, texts})
    assert all(
        low <= likely <= high for p in profiles for s in p.values() for low, likely, high in zip(*s, strict=True)
    )


def test_buckets_of_a_limit_that_is_a_power_of_two():
    assert Target("fp16", "padded", 8, 64, 9, 2, False, "").buckets == (16, 32, 64)
    assert Target("fp16", "padded", 8, 8, 9, 2, False, "").buckets == (8,)


CHANGES = {
    "an undocumented operator": ("Einsum ", "not a documented operator"),
    "an undocumented type": ("Clip", "Clip 'added' of INT32: documented for FP32, FP16, BF16"),
    "int64 inputs": ("int64", "input 'span' is INT64, not INT32"),
    "a missing input": ("input", "its inputs are"),
    "a newer opset": ("opset", "opset 21; at most 20"),
    "a newer format": ("ir", "IR 11; at most 10"),
    "another domain": ("domain", "operators of the domain 'com.microsoft'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_tensorrt_would_stumble_over_is_named(graphs, tmp_path, change):
    kind, message = CHANGES[change]
    model = onnx.load(graphs["packed", "fp16"])
    graph = model.graph
    if kind == "Clip":
        graph.node.append(helper.make_node("Clip", ["span"], ["clipped"], name="added"))
    elif kind == "Einsum ":
        graph.node.append(helper.make_node("Det", ["max_length"], ["result"], name="added"))
    elif kind == "int64":
        graph.input[3].type.tensor_type.elem_type = TensorProto.INT64
    elif kind == "input":
        del graph.input[3]
    elif kind == "opset":
        model.opset_import[0].version = 21
    elif kind == "ir":
        model.ir_version = 11
    else:
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(GraphError, match="would not read this graph") as caught:
        check_readable(tmp_path / "changed.onnx", "fp16", "packed")
    assert message in str(caught.value)


def test_a_file_that_is_no_graph_is_named(tmp_path, graphs):
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(GraphError, match=r"broken\.onnx"):
        check_readable(tmp_path / "broken.onnx", "fp16", "packed")
    shutil.copyfile(graphs["padded", "fp16"], tmp_path / "padded.onnx")
    with pytest.raises(GraphError, match="those of the packed layout"):
        check_readable(tmp_path / "padded.onnx", "fp16", "packed")


def test_the_list_of_operators_says_where_it_is_from():
    operators = documented_operators()
    assert operators["CumSum"] == ["FP32", "FP16", "BF16"]
    assert "DynamicQuantizeLinear" not in operators
