"""The pure functions beside each model.py: tokens, packing, ranking, CPU limits, warm-up."""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from millibert_ensemble.models.bert import warmup
from millibert_ensemble.models.bert.engines import ENGINES, EngineError
from millibert_ensemble.models.bert.packing import EXECUTION_CELLS, check, cut, divide, pack, unpack
from millibert_ensemble.models.bert.threads import cpu_limit
from millibert_ensemble.models.postprocess.ranking import best, requested_top_k, sigmoid, softmax
from millibert_ensemble.models.tokenizer.tokenization import decode, load, tokenize

LIMIT = 6


@pytest.fixture
def tokenizer_file(tmp_path):
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.enable_truncation(LIMIT)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def bytes_tensor(*values: bytes) -> np.ndarray:
    return np.array([[value] for value in values], dtype=object)


def test_each_request_is_padded_to_its_own_longest_text(tokenizer_file):
    short, long = tokenize(load(tokenizer_file), [["a"], ["a b c", "", "b"]])
    assert short.input_ids.tolist() == [[2, 4, 3]]
    assert long.input_ids.tolist() == [[2, 4, 5, 6, 3], [2, 3, 0, 0, 0], [2, 5, 3, 0, 0]]
    assert short.input_ids.dtype == long.input_ids.dtype == np.int32


def test_the_span_carries_the_longest_length(tokenizer_file):
    one, three = tokenize(load(tokenizer_file), [["a"], ["a b c", "", "b"]])
    assert one.span.shape == (1, 3)
    assert three.span.shape == (3, 2)  # 3 * 2 >= 5
    assert three.span.dtype == np.int32
    assert not three.span.any()


def test_truncation_is_told_text_by_text(tokenizer_file):
    (tokens,) = tokenize(load(tokenizer_file), [["a b c a", "a b c a b", "a " * 5000]])
    assert tokens.truncated.tolist() == [[False], [True], [True]]
    assert tokens.truncated.dtype == np.bool_
    assert tokens.input_ids.shape == (3, LIMIT)
    assert tokens.input_ids[2].tolist() == [2, 4, 4, 4, 4, 3]


def test_a_tokenizer_without_truncation_is_refused(tokenizer_file):
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.save(str(tokenizer_file))
    with pytest.raises(ValueError, match="sets no truncation"):
        load(tokenizer_file)


def test_texts_are_decoded_in_order_and_bad_ones_are_named():
    assert decode(bytes_tensor(b"a", "ä你".encode())) == ["a", "ä你"]
    with pytest.raises(ValueError, match=r"TEXT\[1\] is not UTF-8: .* at byte 2"):
        decode(bytes_tensor(b"fine", b"no\xff"))


def test_packing_leaves_out_padding_and_keeps_order():
    requests = [
        np.array([[2, 9, 3]], np.int32),
        np.array([[2, 3, 0, 0], [2, 0, 8, 3], [0, 0, 0, 0]], np.int32),
    ]
    packed = pack(requests)
    assert packed["lengths"].tolist() == [3, 2, 4, 1]
    assert packed["input_ids"].tolist() == [2, 9, 3, 2, 3, 2, 0, 8, 3, 0]
    assert packed["max_length"].shape == (4,)
    assert {name: array.dtype for name, array in packed.items()} == {
        "input_ids": np.int32,
        "lengths": np.int32,
        "max_length": np.float32,
        "span": np.int32,
    }


def test_logits_go_back_to_their_requests():
    requests = [np.ones((1, 3), np.int32), np.ones((2, 5), np.int32), np.ones((1, 2), np.int32)]
    logits = np.arange(8, dtype=np.float32).reshape(4, 2)
    assert [rows.tolist() for rows in unpack(logits, requests)] == [
        [[0, 1]],
        [[2, 3], [4, 5]],
        [[6, 7]],
    ]


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 0), "is empty"), ((0, 3), "is empty"), ((2, 9), "9 tokens a text; .* at most 8")],
)
def test_a_request_that_would_spoil_its_batch_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        check(np.ones(shape, np.int32), 8)


def test_warmup_covers_every_size_and_the_largest_batch():
    seen = list(warmup.batches(max_texts=48, max_tokens=128))
    assert {len(batch) for batch in seen if len(batch[0]) == 1} == {1, 2, 4, 8, 16, 32, 48}
    assert seen[-1][0].shape == (48, 128)
    assert all(row.shape[1] <= 128 for batch in seen for row in batch)


def test_softmax_and_sigmoid_are_probabilities_and_stable():
    logits = np.array([[1000.0, 0.0, -1000.0], [1.0, 2.0, 3.0]], np.float32)
    assert softmax(logits).sum(axis=1) == pytest.approx([1, 1])
    assert softmax(logits)[1] == pytest.approx([0.09003, 0.24473, 0.66524], abs=1e-5)
    assert sigmoid(logits)[0].tolist() == [1.0, 0.5, 0.0]
    assert sigmoid(logits)[1] == pytest.approx([0.73106, 0.88080, 0.95257], abs=1e-5)


def test_the_best_labels_come_first_and_ties_by_id():
    ranking = best(np.array([[0.1, 0.4, 0.1, 0.4]], np.float32), 3)
    assert ranking.ids.tolist() == [[1, 3, 0]]
    assert ranking.scores.tolist() == [pytest.approx([0.4, 0.4, 0.1])]
    assert ranking.ids.dtype == np.int32


@pytest.mark.parametrize(("parameters", "expected"), [("", 3), ("{}", 3), ('{"top_k": 5}', 5), ('{"x": 1}', 3)])
def test_top_k_comes_from_the_request_or_the_default(parameters, expected):
    assert requested_top_k(parameters, 3, 5) == expected


@pytest.mark.parametrize("value", [0, -1, 6, 2.0, "3", True, None])
def test_a_wrong_top_k_is_refused(value):
    with pytest.raises(ValueError, match="top_k must be an integer from 1 to 5"):
        requested_top_k(json.dumps({"top_k": value}), 3, 5)


@pytest.fixture
def postprocess(monkeypatch, tmp_path):
    """The postprocessor on plain arrays: what it answers to one request with these logits."""

    class Tensor(SimpleNamespace):
        def __init__(self, name, array):
            super().__init__(name=name, array=array)

    triton = SimpleNamespace(
        Tensor=Tensor,
        InferenceResponse=lambda tensors=(), error=None: error or {each.name: each.array for each in tensors},
        get_input_tensor_by_name=lambda request, _: SimpleNamespace(as_numpy=lambda: request.logits),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    name = "millibert_ensemble.models.postprocess.model"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)

    def _postprocess(problem, thresholds, logits, top_k):
        (tmp_path / "1").mkdir(exist_ok=True)
        (tmp_path / "1" / "labels.json").write_text(json.dumps([f"label {i}" for i in range(len(thresholds))]))
        (tmp_path / "1" / "thresholds.json").write_text(json.dumps(thresholds))
        values = {"problem": problem, "temperature": "2.0", "top_k": str(top_k)}
        parameters = {name: {"string_value": value} for name, value in values.items()}
        model = module.TritonPythonModel()
        model.initialize(
            {
                "model_config": json.dumps({"parameters": parameters}),
                "model_repository": str(tmp_path),
                "model_version": "1",
            }
        )
        request = SimpleNamespace(logits=np.array(logits, np.float32), parameters=lambda: "")
        return model.execute([request])[0]

    return _postprocess


def test_each_label_is_held_against_its_own_threshold(postprocess):
    # Halved by the temperature: 1, 0 and -1, so 0.731, 0.5 and 0.269; not in the order of their ids.
    answer = postprocess("multi_label", [0.6, 0.2, 0.7], [[0, -2, 2]], top_k=3)
    assert answer["LABEL_ID"].tolist() == [[2, 0, 1]]
    assert answer["SCORE"].tolist() == [pytest.approx([0.731, 0.5, 0.269], abs=1e-3)]
    assert answer["ACCEPTED"].tolist() == [[True, False, True]]
    assert answer["ACCEPTED"].dtype == np.bool_


def test_a_score_that_equals_its_threshold_is_accepted(postprocess):
    assert postprocess("multi_label", [0.5, 0.5], [[0, 0]], top_k=2)["ACCEPTED"].tolist() == [[True, True]]


def test_a_best_label_below_the_threshold_means_dont_know(postprocess):
    answer = postprocess("single_label", [0.8] * 3, [[9, 0, 0], [1, 0, 0]], top_k=2)
    assert answer["LABEL_ID"][:, 0].tolist() == [0, 0]
    assert answer["ACCEPTED"].tolist() == [[True, False], [False, False]]


def cgroup(tmp_path, lines: str, **files: str):
    (tmp_path / "self").write_text(lines)
    for name, content in files.items():
        path = tmp_path / "fs" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return cpu_limit(tmp_path / "fs", tmp_path / "self")


@pytest.fixture
def many_cpus(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(32)))


@pytest.mark.usefixtures("many_cpus")
def test_the_cgroup_limits_threads(tmp_path):
    assert cgroup(tmp_path, "0::/\n", cpu_dot_max="max 100000\n") == 32
    assert cgroup(tmp_path, "0::/\n", cpu_dot_max="400000 100000\n") == 4
    assert cgroup(tmp_path, "0::/\n", cpu_dot_max="250000 100000\n") == 2
    assert cgroup(tmp_path, "0::/\n", cpu_dot_max="50000 100000\n") == 1


@pytest.mark.usefixtures("many_cpus")
def test_a_limit_above_in_the_hierarchy_counts(tmp_path):
    files = {"a__cpu_dot_max": "300000 100000", "a__b__cpu_dot_max": "max 100000"}
    assert cgroup(tmp_path, "0::/a/b\n", **files) == 3


@pytest.mark.usefixtures("many_cpus")
def test_cgroup_v1(tmp_path):
    files = {"cpu__pod__cpu.cfs_quota_us": "600000", "cpu__pod__cpu.cfs_period_us": "100000"}
    assert cgroup(tmp_path, "4:cpu,cpuacct:/pod\n3:memory:/pod\n", **files) == 6
    assert cgroup(tmp_path, "4:cpu,cpuacct:/pod\n", **{**files, "cpu__pod__cpu.cfs_quota_us": "-1"}) == 32


def test_without_cgroups_the_affinity_counts(tmp_path):
    import os

    assert cpu_limit(tmp_path, tmp_path / "absent") == len(os.sched_getaffinity(0))


def test_onnxruntime_refuses_bf16(tmp_path):
    with pytest.raises(EngineError, match="fp32 on a CPU, not bf16; use the engine openvino"):
        ENGINES["onnxruntime"](tmp_path / "model.onnx", "bf16", 1)


# Dividing a batch.


def requests_of(*lengths, rows=1):
    generator = np.random.default_rng(0)
    return [generator.integers(1, 99, (rows, length)).astype(np.int32) for length in lengths]


def test_texts_of_like_lengths_stay_together():
    ((texts, inputs),) = divide(requests_of(9, 12, 10, 11))
    assert texts.tolist() == [0, 1, 2, 3]
    assert inputs["lengths"].tolist() == [9, 12, 10, 11]


def test_few_long_texts_are_cut_off_from_many_short_ones():
    parts = cut(np.array([10] * 30 + [120] * 3 + [11] * 20))
    assert [sorted(part.tolist()) for part in parts] == [[*range(30), *range(33, 53)], [30, 31, 32]]


@pytest.mark.parametrize("seed", range(5))
def test_a_division_is_the_best_there_is(seed):
    lengths = np.random.default_rng(seed).integers(2, 129, 9)
    ordered = np.sort(lengths)

    def cost(parts):
        return sum(len(part) * max(part) + EXECUTION_CELLS for part in parts)

    def ways(rest):
        if not len(rest):
            yield []
        for end in range(1, len(rest) + 1):
            yield from ([rest[:end], *others] for others in ways(rest[end:]))

    found = [lengths[part] for part in cut(lengths)]
    assert sorted(np.concatenate(found)) == ordered.tolist()
    assert cost(found) == min(cost(way) for way in ways(ordered))


def test_every_text_of_every_request_is_in_one_part_with_its_own_ids():
    requests = [*requests_of(10, 118, 9), *requests_of(12, 100, rows=2), *requests_of(*[11] * 20)]
    requests[3][1, 5:] = 0  # padding inside a request is left out
    whole = pack(requests)
    lengths = whole["lengths"].astype(int)
    starts = np.cumsum(lengths) - lengths
    seen = []
    parts = divide(requests)
    assert len(parts) > 1
    for texts, inputs in parts:
        ends = np.cumsum(inputs["lengths"])
        assert inputs["max_length"].size == inputs["lengths"].max()
        for text, end, length in zip(texts, ends, inputs["lengths"], strict=True):
            expected = whole["input_ids"][starts[text] : starts[text] + lengths[text]]
            np.testing.assert_array_equal(inputs["input_ids"][end - length : end], expected)
            seen.append(int(text))
    assert sorted(seen) == list(range(len(lengths)))
