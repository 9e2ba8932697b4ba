"""The CPU engines on a small real graph, what a model of Triton makes of them, and the count of their work."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.test_packed_bert import LIMIT, TOLERANCE, reference, small_bert, texts

from millibert_build.export import export_packed, export_padded
from millibert_ensemble.models.bert.engines import ENGINES, EngineError, OpenVino, _Requests, fastest, median_seconds
from millibert_ensemble.models.bert.host import Host
from millibert_ensemble.models.bert.inference import infer, packed, padded
from millibert_ensemble.models.bert.packing import alone, pack_rows
from millibert_ensemble.models.bert.work import KINDS, METRIC, Ledger, work_of


@pytest.fixture(scope="module")
def model():
    return small_bert()


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory) -> dict[str, Path]:
    """A folder with the `model.onnx` of each layout, of the same weights."""
    folders: dict[str, Path] = {layout: tmp_path_factory.mktemp(layout) for layout in ("packed", "padded")}
    export_packed(model, LIMIT, folders["packed"] / "model.onnx")
    export_padded(model, LIMIT, folders["padded"] / "model.onnx")
    return folders


def requests_of(*lengths: int) -> list[np.ndarray]:
    return [row[None, :].astype(np.int32) for row in texts(*lengths)]


def assert_agrees(logits, expected) -> None:
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


# Engines.


@pytest.mark.parametrize("kind", ENGINES)
def test_logits_of_divided_parts_are_those_text_by_text_also_with_forms_for_some_shapes(model, folders, kind):
    engine = ENGINES[kind](folders["packed"] / "model.onnx", "fp32", 2)
    assert engine.streams == 2
    batch, singles = requests_of(5, 40, 1, LIMIT, 17, 9, 33, 12, 16, 25), requests_of(1, 7, 16, 17, 32, 33, LIMIT)
    parts = packed(batch, engine.streams)
    assert len(parts) > engine.streams
    expected = reference(model, [request[0] for request in batch])
    expected_alone = reference(model, [request[0] for request in singles])
    assert np.abs(expected).max() > 1  # the tolerance means something

    for _ in ("in any shape", "in forms of their own"):
        assert_agrees(infer(engine, parts), expected)
        assert_agrees([engine.infer(pack_rows([request[0]]))[0] for request in singles], expected_alone)
        assert_agrees(engine.infer_all([pack_rows([batch[1][0], batch[0][0]])])[0], expected[[1, 0]])
        engine.specialise(alone(LIMIT))


@pytest.mark.parametrize("kind", ENGINES)
def test_outputs_are_kept_while_the_engine_goes_on(folders, kind):
    engine = ENGINES[kind](folders["packed"] / "model.onnx", "fp32", 2)
    parts = [pack_rows([row]) for row in texts(5, 20, 9)]
    first = engine.infer_all(parts)
    kept = [logits.copy() for logits in first]
    engine.infer_all(parts[::-1])
    engine.infer(parts[1])
    for logits, before in zip(first, kept, strict=True):
        np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("kind", ENGINES)
def test_the_padded_graph_gives_the_same_logits(model, folders, kind):
    engine = ENGINES[kind](folders["padded"] / "model.onnx", "fp32", 2)
    rows = texts(3, 16, 9, 1, 12)
    ids = np.array([np.pad(row, (0, 16 - len(row))) for row in rows], np.int32)
    assert_agrees(infer(engine, padded([ids[:2], ids[2:]], 2)), reference(model, rows))


def test_onnxruntime_refuses_bf16(tmp_path):
    with pytest.raises(EngineError, match="fp32 on a CPU, not bf16; use the engine openvino"):
        ENGINES["onnxruntime"](tmp_path / "model.onnx", "bf16", 1)


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [
        ({1: 10.0}, 1),
        ({1: 10.0, 2: 9.0}, 1),  # faster, but not clearly
        ({1: 10.0, 2: 5.0}, 2),
        ({1: 10.0, 2: 9.0, 4: 8.0}, 4),  # clearly faster than one
        ({1: 10.0, 2: 6.0, 4: 5.5}, 2),  # not clearly faster than two
        ({1: 10.0, 2: 6.0, 4: 12.0, 8: 3.0}, 8),
        ({1: 10.0, 2: 12.0, 3: 5.0}, 3),
        ({1: 10.0, 2: 9.9, 4: 9.9, 6: 9.9}, 1),
    ],
)
def test_more_threads_must_be_clearly_faster(milliseconds, expected):
    asked = []

    def latency(threads):
        asked.append(threads)
        return milliseconds[threads] / 1000

    assert fastest(max(milliseconds), latency) == expected
    assert asked == [*milliseconds]


def test_a_latency_is_taken_after_a_warm_up(monkeypatch):
    clock = [0.0]
    durations = iter([100.0] * 40 + [3.0] * 20 + [1.0] * 20)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def run() -> None:
        clock[0] += next(durations)

    assert median_seconds(run) == 2.0
    assert next(durations, None) is None


# As Triton's models hold them.


class Metrics:
    """Triton's module as far as `Host` knows it, and what was counted."""

    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()
        self.names: list[str] = []
        self.log: list[str] = []

    def pb_utils(self):
        def family(name, description, kind):
            assert description
            assert kind == "counter"
            self.names.append(name)
            return SimpleNamespace(Metric=metric)

        def metric(labels):
            return SimpleNamespace(increment=lambda value: self.counted.update({labels["kind"]: value}))

        family.COUNTER = "counter"  # type: ignore[attr-defined]
        return SimpleNamespace(MetricFamily=family, Logger=SimpleNamespace(log_info=self.log.append))


def parameters(engine: str, layout: str) -> dict[str, str]:
    return {"engine": engine, "precision": "fp32", "layout": layout, "max_tokens": str(LIMIT)}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_host_answers_in_order_and_counts_what_it_was_asked(model, folders, engine):
    metrics = Metrics()
    host = Host(folders["packed"], parameters(engine, "packed"), 4, metrics.pb_utils())
    assert metrics.names == [METRIC]
    assert not metrics.counted  # the warm-up is no traffic
    assert [line.rsplit(",", 1)[0] for line in metrics.log] == [f"{engine} fp32"]

    (request,) = requests_of(5)
    assert_agrees(host.infer([request]), reference(model, request))
    assert metrics.counted == {"text": 5, "computed": 16, "attention": 16}

    # Not padding, one row at a time: a request of two texts, of which one is shorter.
    two = np.array([np.pad(row, (0, 30 - len(row))) for row in texts(30, 11)], np.int32)
    requests = [*requests_of(20), two, *requests_of(LIMIT)]
    rows = [requests[0][0], two[0], two[1, :11], requests[2][0]]
    assert_agrees(host.infer(requests), reference(model, rows))


def test_a_host_of_the_padded_graph(model, folders):
    metrics = Metrics()
    host = Host(folders["padded"], parameters("onnxruntime", "padded"), 4, metrics.pb_utils())
    rows = texts(16, 7, 12)
    ids = np.array([np.pad(row, (0, 16 - len(row))) for row in rows], np.int32)
    assert_agrees(host.infer([ids[:1], ids[1:]]), reference(model, rows))
    assert metrics.counted == {"text": 35, "computed": 48, "attention": 48}


# The count of the work.


def test_work_of_packed_inputs():
    rows = [np.full(9, 7, np.int32), np.full(20, 7, np.int32)]
    # 29 tokens are rounded up to 32; the grid is of 2 texts, as wide as the longest one rounded up to 24.
    assert work_of(pack_rows(rows)) == {"text": 29, "computed": 32, "attention": 48}
    assert work_of(pack_rows(rows[1:])) == {"text": 20, "computed": 32, "attention": 32}


def test_work_of_padded_inputs():
    ids = np.array([[2, 8, 8, 3], [2, 3, 0, 0], [2, 8, 3, 0]], np.int32)
    ((_, inputs),) = padded([ids], 1)
    assert work_of(inputs) == {"text": 9, "computed": 12, "attention": 12}


def test_a_ledger_tells_at_once_and_then_after_its_interval_and_loses_nothing():
    told: list[tuple[str, int]] = []
    ledger = Ledger(lambda kind, tokens: told.append((kind, tokens)), every_seconds=1.0)
    inputs = pack_rows([np.ones(9, np.int32), np.ones(20, np.int32)])

    def news() -> dict[str, int]:
        new = dict(told)
        assert len(new) == len(told)  # each kind is told once
        told.clear()
        return new

    ledger.add([inputs], 100.0)
    assert news() == {"text": 29, "computed": 32, "attention": 48}
    ledger.add([inputs, inputs], 100.3)
    ledger.add([inputs], 100.9)
    assert news() == {}
    ledger.add([inputs], 101.0)
    assert news() == {"text": 4 * 29, "computed": 4 * 32, "attention": 4 * 48}
    # The interval counts from when it told the last time.
    ledger.add([inputs], 101.9)
    assert news() == {}
    ledger.add([], 500.0)
    assert news() == {"text": 29, "computed": 32, "attention": 48}
    ledger.add([], 501.0)
    assert news() == {}


def test_a_ledger_tells_every_kind_that_has_a_metric_and_no_other():
    told: list[str] = []
    Ledger(lambda kind, _: told.append(kind)).add([pack_rows([np.ones(3, np.int32)])], 0.0)
    assert sorted(told) == sorted(KINDS)


class _Counting:
    """A compiled form whose executions note how many there are at once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    def create_infer_request(self) -> _Counting:
        return self

    def infer(self, inputs: Any, share_inputs: bool) -> list[Any]:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.05)
        with self._lock:
            self.now -= 1
        return [np.zeros((1, 1), np.float32)]


def test_kernels_for_new_sizes_are_made_one_at_a_time() -> None:
    engine: Any = object.__new__(OpenVino)
    engine._requests, engine._making = _Requests(), threading.Lock()
    form = _Counting()
    # Equal numbers of tokens in grids of their own: what once gave wrong logits.
    parts = [pack_rows([np.ones(8, np.int32)] * 2), pack_rows([np.ones(4, np.int32)] * 4)]
    start = threading.Barrier(2)

    def run(part: Any) -> int:
        start.wait()
        engine._run(part, form)
        first = form.most
        start.wait()
        engine._run(part, form)
        return first

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, parts)) == [1, 1]
    # Known sizes run side by side.
    assert form.most == 2
