"""The CPU engines on a small real graph, and what a model of Triton makes of them."""

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

from millibert_build.export import export_packed, export_padded, export_rows
from millibert_build.layouts import packed
from millibert_ensemble.models.bert import engines
from millibert_ensemble.models.bert import host as host_module
from millibert_ensemble.models.bert.engines import ENGINES, EngineError, OpenVino, _Requests
from millibert_ensemble.models.bert.host import Host
from millibert_ensemble.models.bert.inference import in_rows, infer, padded
from millibert_ensemble.models.bert.rows import shapes
from millibert_ensemble.models.bert.warmup import warm_up_rows
from millibert_ensemble.models.bert.work import METRIC


@pytest.fixture(scope="module")
def model():
    return small_bert()


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory) -> dict[str, Path]:
    """A folder with the `model.onnx` of each layout, of the same weights."""
    folders: dict[str, Path] = {layout: tmp_path_factory.mktemp(layout) for layout in ("rows", "padded", "packed")}
    for export, folder in zip((export_rows, export_padded, export_packed), folders.values(), strict=True):
        export(model, LIMIT, folder / "model.onnx")
    return folders


def requests_of(*lengths: int) -> list[np.ndarray]:
    return [row[None, :].astype(np.int32) for row in texts(*lengths)]


def assert_agrees(logits, expected) -> None:
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


# Engines.


@pytest.fixture(params=["openvino", "openvino, large", "onnxruntime"])
def engine(request, folders, monkeypatch):
    """Each engine on the graph of rows, with two streams; OpenVINO also as it runs a graph that is large."""
    kind, _, large = request.param.partition(", ")
    if large:
        monkeypatch.setattr(engines, "_SMALL_GRAPH", 0)
    return ENGINES[kind](folders["rows"] / "model.onnx", "fp32", 2, few_shapes=True)


def test_logits_of_divided_batches_are_those_text_by_text_also_after_a_warm_up(model, engine):
    assert engine.streams == 2
    batch, singles = requests_of(5, 40, 1, LIMIT, 17, 9, 33, 12, 16, 25), requests_of(1, 7, 16, 17, 32, 33, LIMIT)
    parts = in_rows(batch, engine.streams)
    assert len(parts) >= engine.streams
    expected = reference(model, [request[0] for request in batch])
    expected_alone = reference(model, [request[0] for request in singles])
    assert np.abs(expected).max() > 1  # the tolerance means something

    for _ in ("at once", "warmed up"):
        assert_agrees(infer(engine, parts), expected)
        assert_agrees([infer(engine, in_rows([single], 2))[0] for single in singles], expected_alone)
        warm_up_rows(engine, LIMIT)


def test_outputs_are_kept_while_the_engine_goes_on(engine):
    parts = [in_rows([request], 1)[0].inputs for request in requests_of(5, 20, 9)]
    first = engine.infer_all(parts)
    kept = [logits.copy() for logits in first]
    engine.infer_all(parts[::-1])
    engine.infer(parts[1])
    for logits, before in zip(first, kept, strict=True):
        np.testing.assert_array_equal(logits, before)


class _CountingLock:
    def __init__(self) -> None:
        self.taken = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()
        self.taken += 1

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@pytest.mark.parametrize(
    ("precision", "most_bytes", "most_tokens"),
    [("int8", 2**30, 512), ("fp32", 2**30, 64), ("int8", 0, 0)],
    ids=["int8", "fp32: short executions only", "a large graph: none"],
)
def test_no_traffic_brings_a_shape_that_a_warmed_up_engine_does_not_know(
    folders, monkeypatch, precision, most_bytes, most_tokens
):
    monkeypatch.setattr(engines, "_SMALL_GRAPH", most_bytes)
    engine: Any = ENGINES["openvino"](folders["rows"] / "model.onnx", precision, 2, few_shapes=True)
    engine._making = making = _CountingLock()
    warm_up_rows(engine, LIMIT)
    assert making.taken >= 2 * len(shapes(LIMIT))  # each on both streams
    forms = dict(engine._forms._made)
    of_their_own = [shape for shape in shapes(LIMIT) if shape.rows * shape.width <= most_tokens]
    assert len(forms) == len(of_their_own) + (len(of_their_own) < len(shapes(LIMIT)))
    making.taken = 0
    generator = np.random.default_rng(0)
    for count in [1, 2, 3, 5, 8, 20, 64] * 4:
        infer(engine, in_rows(requests_of(*generator.integers(1, LIMIT + 1, count)), 2))
    assert making.taken == 0
    assert engine._forms._made == forms


def test_no_thread_of_openvino_is_tied_to_a_core(folders):
    engine: Any = ENGINES["openvino"](folders["rows"] / "model.onnx", "fp32", 2, few_shapes=True)
    warm_up_rows(engine, LIMIT)
    compiled = [*engine._forms._made.values()]
    compiled += [form for forms in engine._alone.values() for form in forms._made.values()]
    assert len(compiled) > 1
    assert not any(form.get_property("ENABLE_CPU_PINNING") for form in compiled)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_graph_whose_inputs_have_any_shape(model, folders, kind):
    engine = ENGINES[kind](folders["packed"] / "model.onnx", "fp32", 2)
    for lengths in ((5, 20, 9), (LIMIT,), (3, 3)):
        rows = texts(*lengths)
        assert_agrees(engine.infer(packed([row.tolist() for row in rows])), reference(model, rows))


@pytest.mark.parametrize("kind", ENGINES)
def test_the_padded_graph_gives_the_same_logits(model, folders, kind):
    engine = ENGINES[kind](folders["padded"] / "model.onnx", "fp32", 2)
    rows = texts(3, 16, 9, 1, 12)
    ids = np.array([np.pad(row, (0, 16 - len(row))) for row in rows], np.int32)
    assert_agrees(infer(engine, padded([ids[:2], ids[2:]], 2)), reference(model, rows))


def test_onnxruntime_refuses_bf16(tmp_path):
    with pytest.raises(EngineError, match="fp32 on a CPU, not bf16; use the engine openvino"):
        ENGINES["onnxruntime"](tmp_path / "model.onnx", "bf16", 1)


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


def config(engine: str, layout: str, instances: int = 1, **more: str) -> dict[str, Any]:
    parameters = {"engine": engine, "precision": "fp32", "layout": layout, "max_tokens": str(LIMIT), **more}
    return {
        "max_batch_size": 4,
        "instance_group": [{"count": instances}],
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }


@pytest.mark.parametrize("kind", ENGINES)
def test_a_host_answers_in_order_and_counts_what_it_was_asked(model, folders, kind):
    metrics = Metrics()
    host = Host(folders["rows"], config(kind, "rows"), metrics.pb_utils())
    assert metrics.names == [METRIC]
    assert not metrics.counted  # the warm-up is no traffic
    assert [line.split(", ")[0] for line in metrics.log] == [f"{kind} fp32"]

    (request,) = requests_of(5)
    assert_agrees(host.infer([request]), reference(model, request))
    assert metrics.counted == {"text": 5, "computed": 16}

    # Not padding, one row at a time: a request of two texts, of which one is shorter.
    two = np.array([np.pad(row, (0, 30 - len(row))) for row in texts(30, 11)], np.int32)
    requests = [*requests_of(20), two, *requests_of(LIMIT)]
    rows = [requests[0][0], two[0], two[1, :11], requests[2][0]]
    assert_agrees(host.infer(requests), reference(model, rows))


def test_a_host_of_the_padded_graph(model, folders):
    metrics = Metrics()
    host = Host(folders["padded"], config("onnxruntime", "padded"), metrics.pb_utils())
    rows = texts(16, 7, 12)
    ids = np.array([np.pad(row, (0, 16 - len(row))) for row in rows], np.int32)
    assert_agrees(host.infer([ids[:1], ids[1:]]), reference(model, rows))
    assert metrics.counted == {"text": 35, "computed": 48}


@pytest.mark.parametrize(
    ("cpus", "instances", "more", "threads"),
    [
        (8, 1, {}, 8),
        (8, 2, {}, 4),
        (5, 2, {}, 2),
        (2, 4, {}, 1),
        (8, 2, {"threads": "3"}, 3),
        (8, 2, {"threads": "0"}, 4),
    ],
)
def test_instances_share_the_cpus(folders, monkeypatch, cpus, instances, more, threads):
    monkeypatch.setattr(host_module, "cpu_limit", lambda: cpus)
    metrics = Metrics()
    Host(folders["padded"], config("onnxruntime", "padded", instances, **more), metrics.pb_utils())
    assert metrics.log == [f"onnxruntime fp32, {threads} threads, 1 for an execution alone"]


@pytest.mark.parametrize(("more", "most"), [({}, 8), ({"threads": "3"}, 3)])
@pytest.mark.parametrize("kind", ENGINES)
def test_a_text_alone_may_have_all_cpus_unless_the_config_says_how_many(folders, monkeypatch, kind, more, most):
    monkeypatch.setattr(host_module, "cpu_limit", lambda: 8)
    asked = []

    def two(most, start):
        asked.append(most)
        return 2

    monkeypatch.setattr(engines, "fastest", two)
    metrics = Metrics()
    Host(folders["rows"], config(kind, "rows", 2, **more), metrics.pb_utils())
    assert asked == [most]
    assert metrics.log[0].endswith("2 for an execution alone")


class _Counting:
    """A compiled form whose executions note how many there are at once, and all forms there are."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    def of(self, _: Any) -> _Counting:
        return self

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


def test_kernels_for_new_shapes_are_made_one_at_a_time() -> None:
    engine: Any = object.__new__(OpenVino)
    engine._requests, engine._making = _Requests(), threading.Lock()
    forms = _Counting()
    # Equal numbers of tokens in grids of their own: what once gave wrong logits.
    parts = [packed([[1] * 8] * 2), packed([[1] * 4] * 4)]
    start = threading.Barrier(2)

    def run(part: Any) -> int:
        start.wait()
        engine._run(part, forms)
        first = forms.most
        start.wait()
        engine._run(part, forms)
        return first

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, parts)) == [1, 1]
    # Known shapes run side by side.
    assert forms.most == 2
