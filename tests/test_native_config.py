"""Triton's configs for a plan, on a real Triton: accepted but for the backend that this machine lacks."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from tests.conftest import CUSTOMER_SERVICE, rewrite
from tests.plan_on_cpu import NAMED, put_in_the_plans_place
from tritonclient.grpc import model_config_pb2

import millibert
from millibert._errors import Unavailable
from millibert_build.repository import check_config, load_config
from millibert_build.tensorrt.native_config import batch_sizes, fill_native_config
from millibert_build.tensorrt.profiles import accepts, profiles_of
from millibert_build.tensorrt.target import Target, load_target
from millibert_ensemble.repository_check import parse_config
from millibert_ensemble.server import TritonServer


def native(layout, **changes):
    settings = {"precision": "fp16", "layout": layout, "max_texts": 12, "max_tokens": 48, "typical_tokens": 11}
    target = Target(**{**settings, "labels": 7, "sparse": False, "onnx_sha256": "", **changes})
    return fill_native_config(load_config("bert", f"configs/{layout}.pbtxt"), target), target


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_it_keeps_the_contract(layout):
    made, _ = native(layout)
    check_config(made.config, "plan")
    assert list(made.config.output[0].dims) == [7]
    assert made.config.max_batch_size == 12
    assert made.config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU


def test_ragged_inputs_and_what_triton_derives_from_them():
    config = native("packed")[0].config
    assert {tensor.name: tensor.allow_ragged_batch for tensor in config.input} == {"input_ids": True, "span": True}
    kind = model_config_pb2.BatchInput.Kind.Name
    derived = {b.target_name[0]: (kind(b.kind), list(b.source_input), b.data_type) for b in config.batch_input}
    assert derived == {
        "lengths": ("BATCH_ITEM_SHAPE_FLATTEN", ["input_ids"], model_config_pb2.TYPE_INT32),
        "max_length": ("BATCH_MAX_ELEMENT_COUNT_AS_SHAPE", ["span"], model_config_pb2.TYPE_FP32),
    }
    assert list(config.instance_group[0].profile) == ["0", "1", "2"]


def test_every_batch_of_every_bucket_has_one_cuda_graph():
    made, target = native("padded")
    specs = made.config.optimization.cuda.graph_spec
    assert made.config.optimization.cuda.graphs
    for bucket in target.buckets:
        of_bucket = [spec for spec in specs if list(spec.input["input_ids"].dim) == [bucket]]
        covered = [n for s in of_bucket for n in range(s.graph_lower_bound.batch_size, s.batch_size + 1)]
        assert sorted(covered) == list(range(1, 13))
        assert all(s.graph_lower_bound.input["input_ids"].dim == s.input["input_ids"].dim for s in of_bucket)
    assert list(made.config.instance_group[0].profile) == ["0", "1", "2"]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_warm_up_touches_every_profile_with_files_of_the_right_size(layout):
    made, target = native(layout)
    touched = set()
    for request in made.config.model_warmup:
        ids, span = request.inputs["input_ids"], request.inputs["span"]
        content = np.frombuffer(made.warmup[ids.input_data_file], np.int32)
        assert content.shape == (request.batch_size * ids.dims[0],)
        assert content.all()  # no padding
        tokens, texts = ids.dims[0], request.batch_size
        shapes: dict[str, tuple[int, ...]] = {"input_ids": (texts, tokens), "span": (texts, span.dims[0])}
        if layout == "packed":
            assert span.dims[0] == -(-tokens // texts)
            longest = texts * span.dims[0]
            shapes = {"input_ids": (texts * tokens,), "lengths": (texts,)}
            shapes |= {"max_length": (longest,), "span": (longest,)}
        touched |= {number for number, profile in enumerate(profiles_of(target)) if accepts(profile, shapes)}
    assert touched == set(range(len(profiles_of(target))))


def test_batch_sizes_end_with_the_limit():
    assert [batch_sizes(most) for most in (1, 2, 12, 16)] == [[1], [1, 2], [1, 2, 4, 8, 12], [1, 2, 4, 8, 16]]


def test_the_scenarios_queues_are_in_every_config(release, tmp_path):
    out = tmp_path / "repository"
    options = ["--set", "serving.max_queue_delay_microseconds=700"]
    options += ["--set", "serving.queue_timeout_microseconds=300000", "--set", "serving.cache_texts=50"]
    options += ["--set", "serving.cpu_fallback=false", "--set", "serving.tokenizers=3"]
    done = release.build(out, None, "--precision", "fp32", "--tensorrt", "bf16", *options)
    assert done.returncode == 0, done.stderr
    for config in [*out.glob("*/config.pbtxt"), *out.glob("*/configs/*.pbtxt")]:
        parsed = parse_config(config)
        batching = parsed.dynamic_batching
        if parsed.platform != "ensemble":
            assert batching.max_queue_delay_microseconds == 700
            # A limit of Triton's would let its batcher sleep while requests wait (docs/performance.md).
            assert not batching.HasField("default_queue_policy")
    assert parse_config(out / "tokenizer" / "config.pbtxt").parameters["queue_timeout_us"].string_value == "300000"
    assert parse_config(out / "bert" / "config.pbtxt").parameters["cache_texts"].string_value == "50"
    # The CPU engine needs the CPUs itself; a plan does not.
    for model, behind_a_plan in (("tokenizer", 3), ("postprocess", 2)):
        configs = [parse_config(out / model / file) for file in ("config.pbtxt", "configs/tensorrt.pbtxt")]
        assert [config.instance_group[0].count for config in configs] == [1, behind_a_plan]
    manifest = json.loads((out / "release.json").read_text())
    section = manifest["tensorrt"]
    assert manifest["cpu_fallback"] is False
    assert (section["precision"], section["layout"]) == ("bf16", "packed")
    assert section["test"]["agreement"] >= 0.99
    stage = json.loads((release.work / "report.json").read_text())["stages"][-1]
    assert (stage["name"], stage["passed"]) == ("TensorRT graph: bf16, packed", True)


def test_a_graph_that_misses_its_gates_publishes_nothing(release, tmp_path):
    out = tmp_path / "repository"
    strict = ["--set", "gates.min_agreement_int8=1.0", "--set", "quantization.max_excluded=0"]
    few = ["--set", "quantization.calibration_texts=1"]
    done = release.build(out, None, "--precision", "fp32", "--tensorrt", "int8", *strict, *few)
    assert done.returncode == 1
    assert "the TensorRT graph (int8, packed)" in done.stderr
    assert not json.loads((release.work / "report.json").read_text())["stages"][-1]["passed"]
    assert not out.exists()


@pytest.mark.e2e
def test_triton_accepts_it_up_to_the_missing_backend(repository, capfd):
    with pytest.raises(Unavailable), TritonServer(repository, options=[NAMED]):
        pass
    log = capfd.readouterr().err
    assert (
        "unable to find backend library for backend 'tensorrt', try specifying runtime on the model configuration"
        in log
    )
    # Nothing else is wrong: the other models load, and the ensemble waits for this one only.
    assert log.count("failed to load") <= 2, log
    assert "Invalid argument: ensemble 'support' depends on 'bert' which has no loaded version" in log


@pytest.mark.e2e
def test_all_but_the_backend_works_on_a_real_triton(repository, release):
    """The native config with the CPU engine in the plan's place: tokenizer, ragged merging, warm-up, postprocessor."""
    target = load_target(repository)
    put_in_the_plans_place(repository)
    texts = [row.split(",")[0] for row in (CUSTOMER_SERVICE / "test.csv").read_text().splitlines()[1:41]]
    with TritonServer(repository, options=[NAMED]) as server, millibert.connect(server.grpc_url, "support") as client:
        together = [answer for n in range(0, 40, 16) for answer in client.classify(texts[n : n + 16])]
        alone = [client.classify(text) for text in texts]
    with TritonServer(repository) as server, millibert.connect(server.grpc_url, "support") as client:
        usual = [client.classify(text) for text in texts]
    for answers in (together, alone):
        assert [answer.label for answer in answers] == [answer.label for answer in usual]
        np.testing.assert_allclose([a.score for a in answers], [a.score for a in usual], atol=1e-3)
    assert target.layout in ("packed", "padded")


def test_hard_links_are_not_written_through(repository, tensorrt_release):
    rewrite(repository / "release.json", "{}")
    assert json.loads((tensorrt_release / "release.json").read_text())["name"] == "support"
    assert os.stat(repository / "bert" / "1" / "model.onnx").st_nlink > 1
