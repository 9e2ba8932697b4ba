"""The pure functions beside each model.py: tokens, texts, ranking, CPU limits, warm-up; no engine."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from millibert_ensemble.models.bert import warmup
from millibert_ensemble.models.bert.texts import check, texts_of, unpack
from millibert_ensemble.models.bert.threads import cpu_limit
from millibert_ensemble.models.postprocess.ranking import Ranker, best, requested_top_k, sigmoid, softmax, tensors
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


def test_texts_are_read_without_padding_and_in_order():
    requests = [
        np.array([[2, 9, 3]], np.int32),
        np.array([[2, 3, 0, 0], [2, 0, 8, 3], [0, 0, 0, 0]], np.int32),
    ]
    assert [text.tolist() for text in texts_of(requests)] == [[2, 9, 3], [2, 3], [2, 0, 8, 3], [0]]


def test_a_text_alone_may_be_padded_too():
    assert [text.tolist() for text in texts_of([np.array([[2, 0, 7, 0, 0]], np.int32)])] == [[2, 0, 7]]
    assert [text.tolist() for text in texts_of([np.array([[0, 0]], np.int32)])] == [[0]]


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


def test_the_warm_up_of_padded_requests_covers_every_bucket_and_the_largest_batch():
    seen = [request.shape for request in warmup.rectangles(max_texts=48, max_tokens=100)]
    assert set(seen) == {(texts, tokens) for texts in (1, 2, 4, 8, 16, 32, 48) for tokens in (16, 32, 64, 100)}


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


@dataclass
class TritonError:
    message: str
    code: str

    INVALID_ARG: ClassVar[str] = "invalid argument"
    INTERNAL: ClassVar[str] = "internal"


class Tensor(NamedTuple):
    name: str
    array: np.ndarray


class Family:
    """A family of counters; each keeps its count in `refused`, by reason."""

    COUNTER = "counter"
    refused: ClassVar[Counter[str]] = Counter()

    def __init__(self, name, description, kind):
        assert (name, kind) == ("millibert_refused_requests_total", self.COUNTER)

    def Metric(self, labels):  # noqa: N802 - Triton's name
        assert labels["model"] == "postprocess"
        return SimpleNamespace(increment=lambda value: self.refused.update({labels["reason"]: value}))


@pytest.fixture
def postprocess(monkeypatch, tmp_path):
    """The postprocessor on plain arrays: what it answers to one request with these logits."""
    Family.refused.clear()
    triton = SimpleNamespace(
        MetricFamily=Family,
        Tensor=Tensor,
        TritonError=TritonError,
        InferenceResponse=lambda tensors=(), error=None: error or {each.name: each.array for each in tensors},
        get_input_tensor_by_name=lambda request, _: SimpleNamespace(as_numpy=lambda: request.logits),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    name = "millibert_ensemble.models.postprocess.model"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)

    def _postprocess(problem, thresholds, *logits, top_k, parameters=()):
        folder = write_labels(tmp_path / "1", [f"label {i}" for i in range(len(thresholds))], thresholds)
        values = {"problem": problem, "temperature": "2.0", "top_k": str(top_k)}
        config = {
            "input": [{"name": "logits"}],
            "max_batch_size": 64,
            "parameters": {name: {"string_value": value} for name, value in values.items()},
        }
        model = module.TritonPythonModel()
        names = {"model_name": "postprocess", "model_instance_name": "postprocess_0_0"}
        repository = {"model_repository": str(tmp_path), "model_version": folder.name}
        model.initialize({"model_config": json.dumps(config), **names, **repository})
        requests = [
            SimpleNamespace(logits=np.array(rows, np.float32), parameters=lambda given=given: given)
            for rows, given in zip(logits, parameters or [""] * len(logits), strict=True)
        ]
        return model.execute(requests)

    return _postprocess


def write_labels(folder: Path, labels: list[str], thresholds: list[float]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "labels.json").write_text(json.dumps(labels, ensure_ascii=False), encoding="utf-8")
    (folder / "thresholds.json").write_text(json.dumps(thresholds))
    return folder


def test_each_label_is_held_against_its_own_threshold(postprocess):
    # Halved by the temperature: 1, 0 and -1, so 0.731, 0.5 and 0.269; not in the order of their ids.
    (answer,) = postprocess("multi_label", [0.6, 0.2, 0.7], [[0, -2, 2]], top_k=3)
    assert answer["LABEL_ID"].tolist() == [[2, 0, 1]]
    assert answer["SCORE"].tolist() == [pytest.approx([0.731, 0.5, 0.269], abs=1e-3)]
    assert answer["ACCEPTED"].tolist() == [[True, False, True]]
    assert answer["ACCEPTED"].dtype == np.bool_


def test_a_score_that_equals_its_threshold_is_accepted(postprocess):
    (answer,) = postprocess("multi_label", [0.5, 0.5], [[0, 0]], top_k=2)
    assert answer["ACCEPTED"].tolist() == [[True, True]]


def test_a_best_label_below_the_threshold_means_dont_know(postprocess):
    (answer,) = postprocess("single_label", [0.8] * 3, [[9, 0, 0], [1, 0, 0]], top_k=2)
    assert answer["LABEL_ID"][:, 0].tolist() == [0, 0]
    assert answer["ACCEPTED"].tolist() == [[True, False], [False, False]]


def test_what_is_wrong_with_a_request_is_told_to_that_one_only(postprocess):
    answers = postprocess(
        "single_label",
        [0.5] * 3,
        *([[9, 0, 0]], [[0, 9, 0]], [[0, float("nan"), 0], [0, 9, 0]], [[0, 0, 9], [9, 0, 0]]),
        top_k=1,
        parameters=["", '{"top_k": 4}', "", '{"top_k": 2}'],
    )
    assert answers[0]["LABEL_ID"].tolist() == [[0]]
    assert answers[1] == TritonError("top_k must be an integer from 1 to 3, not 4", TritonError.INVALID_ARG)
    assert answers[2] == TritonError("the engine returned NaN for this request", TritonError.INTERNAL)
    assert answers[3]["LABEL_ID"].tolist() == [[2, 0], [0, 1]]
    assert answers[3]["LABEL"].tolist() == [[b"label 2", b"label 0"], [b"label 0", b"label 1"]]
    assert Family.refused == {"invalid": 1}


def test_requests_that_are_all_wrong_are_all_told_so(postprocess):
    answers = postprocess("single_label", [0.5], [[1]], [[1]], top_k=1, parameters=['{"top_k": 0}'] * 2)
    assert [answer.code for answer in answers] == [TritonError.INVALID_ARG] * 2
    assert Family.refused == {"invalid": 2}


LABELS = ["größe", "b", "c", "d", "你"]
THRESHOLDS = [0.5, 0.1, 0.2, 0.9, 0.0]


@pytest.fixture(params=["single_label", "multi_label"])
def ranker(request, tmp_path):
    folder = write_labels(tmp_path / "1", LABELS, THRESHOLDS)
    return Ranker(folder, {"problem": request.param, "temperature": "1.5", "top_k": "3"})


def logits_of(texts: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, (texts, len(LABELS))).astype(np.float32)


def test_labels_and_thresholds_come_from_the_folder(ranker):
    (answer,) = ranker.answers(np.array([[5, 4, 3, 2, 1]], np.float32), [1], [5])
    assert [label.decode() for label in answer.labels[0]] == LABELS
    assert answer.accepted[0].tolist() == [score >= t for score, t in zip(answer.scores[0], THRESHOLDS, strict=True)]
    assert {*answer.accepted[0].tolist()} == {True, False}
    assert (ranker.requested_top_k(""), ranker.requested_top_k('{"top_k": 5}')) == (3, 5)
    with pytest.raises(ValueError, match="from 1 to 5, not 6"):
        ranker.requested_top_k('{"top_k": 6}')


def test_requests_are_ranked_together_as_each_would_be_alone(ranker):
    logits, texts, top_k = logits_of(7), [1, 3, 1, 2], [2, 5, 1, 3]
    together = list(ranker.answers(logits, texts, top_k))
    assert [answer.ids.shape for answer in together] == [*zip(texts, top_k, strict=True)]
    ends = np.cumsum(texts)
    for answer, rows, k in zip(together, np.split(logits, ends[:-1]), top_k, strict=True):
        (by_itself,) = ranker.answers(rows, [len(rows)], [k])
        for values, expected in zip(answer, by_itself, strict=True):
            np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(answer.ids, np.argsort(-rows, axis=1)[:, :k])


@pytest.mark.parametrize("spoilt", range(7))
def test_a_row_of_nan_spoils_its_own_request_only(ranker, spoilt):
    logits, texts, top_k = logits_of(7), [1, 3, 1, 2], [2, 5, 1, 3]
    expected = list(ranker.answers(logits, texts, top_k))
    broken = logits.copy()
    broken[spoilt] = np.nan
    answers = list(ranker.answers(broken, texts, top_k))
    assert [answer is None for answer in answers] == [number == [0, 1, 1, 1, 2, 3, 3][spoilt] for number in range(4)]
    for answer, whole in zip(answers, expected, strict=True):
        if answer is not None:
            np.testing.assert_array_equal(answer.scores, whole.scores)


def test_tensors_are_contiguous(ranker):
    first, second = ranker.answers(logits_of(4), [2, 2], [5, 2])
    assert not second.ids.flags.c_contiguous  # there is something to do
    made = tensors(second, SimpleNamespace(Tensor=Tensor))
    assert [tensor.name for tensor in made] == ["LABEL", "SCORE", "LABEL_ID", "ACCEPTED"]
    assert all(tensor.array.flags.c_contiguous for tensor in [*made, *tensors(first, SimpleNamespace(Tensor=Tensor))])


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
