"""`millibert engine` against a double of TensorRT 11: up to the edge that only a GPU can cross."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from tests.conftest import rewrite
from tests.tensorrt_double import install, read_plan

from millibert import UsageError, cli
from millibert_build.tensorrt import release_plan
from millibert_build.tensorrt.plan import Recipe
from millibert_build.tensorrt.release_plan import build_stored_plan
from millibert_build.tensorrt.target import load_target
from millibert_ensemble import plan_store
from millibert_ensemble.hashing import file_sha256
from millibert_ensemble.machine import Gpu, Machine
from millibert_ensemble.plan_manifest import load_plan_manifest
from millibert_ensemble.preflight import preflight

H100 = Gpu("NVIDIA H100", "9.0", 80 << 30, "580.1")


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(release_plan, "gpus", lambda: (H100,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tensorrt(monkeypatch):
    return install(monkeypatch)


@pytest.fixture
def bert(repository):
    return repository / "bert" / "1"


def engine(repository, *options):
    return cli.main(["engine", "--repository", str(repository), *options])


def test_a_plan_and_its_manifest_appear(repository, bert, tensorrt, capsys):
    assert engine(repository, "--json") == 0
    manifest = json.loads(capsys.readouterr().out)
    header, graph = read_plan((bert / "model.plan").read_bytes())
    assert graph == (bert / "tensorrt.onnx").read_bytes()
    assert header["typed"]
    assert header["flags"] == []  # TF32, on by default, is off
    assert header["workspace"] == 4 << 30
    written = load_plan_manifest(bert / "plan.json")
    assert json.loads(json.dumps(written.as_json())) == manifest
    assert written.plan_sha256 == file_sha256(bert / "model.plan")
    assert written.onnx_sha256 == file_sha256(bert / "tensorrt.onnx")
    assert (written.tensorrt, written.gpu, written.labels) == ("11.4.1", H100, 10)
    assert len(written.profiles) == len(header["profiles"]) == 3
    assert (bert / "model.plan").stat().st_mode & 0o044  # another user may serve it


def test_options_reach_tensorrt(repository, bert, tensorrt):
    options = ["--optimization-level=5", "--workspace-mib=64", "--version-compatible", "--tf32"]
    assert engine(repository, *options, "--hardware-compatibility=ampere_plus") == 0
    header, _ = read_plan((bert / "model.plan").read_bytes())
    assert header["flags"] == ["TF32", "VERSION_COMPATIBLE"]
    assert (header["workspace"], header["level"], header["hardware"]) == (64 << 20, 5, "AMPERE_PLUS")
    manifest = load_plan_manifest(bert / "plan.json")
    assert (manifest.hardware_compatibility, manifest.version_compatible, manifest.tf32) == ("ampere_plus", True, True)


def test_into_a_store_the_release_stays_as_it_is(repository, bert, tensorrt, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in repository.rglob("*")}
    store = tmp_path / "new" / "plans"
    assert engine(repository, f"--plans={store}", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert {path: path.stat().st_mtime_ns for path in repository.rglob("*")} == before
    (key,) = plan_store.keys(store)
    assert key.startswith("nvidia-h100-sm90-trt11.4.1-")
    assert plan_store.holds(store, key)
    assert (document["folder"], document["built"]) == (str(store / key), True)
    header, graph = read_plan((store / key / "model.plan").read_bytes())
    assert graph == (bert / "tensorrt.onnx").read_bytes()
    # Kept there, as a Job's own home is not.
    assert [path.name for path in (store / ".timing").iterdir()] == ["tensorrt-11.4.1.2-nvidia-h100.timing"]
    assert len(header["profiles"]) == len(document["profiles"])


def test_what_it_puts_into_a_store_is_what_preflight_looks_for(repository, tensorrt, tmp_path):
    store = tmp_path / "plans"
    assert engine(repository, f"--plans={store}") == 0
    (key,) = plan_store.keys(store)
    verdict = preflight(repository, Machine("11.4.1", (H100,)), store)
    assert (verdict.answer, verdict.plan_folder, verdict.remarks) == ("usable", store / key, ())


def test_a_plan_that_is_in_the_store_is_not_built_again(repository, tensorrt, tmp_path, capsys):
    store = tmp_path / "plans"
    assert engine(repository, f"--plans={store}") == 0
    assert f"millibert preflight --repository {repository} --plans {store}" in capsys.readouterr().out
    before = plan_store.state(store)
    tensorrt.builds = False  # it would fail
    assert engine(repository, f"--plans={store}") == 0
    assert "there already, for NVIDIA H100, TensorRT 11.4.1" in capsys.readouterr().out
    assert engine(repository, f"--plans={store}", "--json") == 0
    assert json.loads(capsys.readouterr().out)["built"] is False
    assert plan_store.state(store) == before


def test_a_damaged_plan_of_the_store_is_built_again(repository, tensorrt, tmp_path):
    store = tmp_path / "plans"
    assert engine(repository, f"--plans={store}") == 0
    (key,) = plan_store.keys(store)
    (store / key / "model.plan").write_bytes(b"half")
    assert engine(repository, f"--plans={store}") == 0
    assert plan_store.holds(store, key)


def test_another_tensorrt_gpu_or_recipe_has_a_key_of_its_own(repository, monkeypatch, tmp_path):
    store = tmp_path / "plans"
    for version, gpu, options in (
        ("11.4.1.2", H100, ()),
        ("11.5.0.1", H100, ()),
        ("11.4.1.2", dataclasses.replace(H100, name="NVIDIA L4", compute_capability="8.9"), ()),
        ("11.4.1.2", H100, ("--optimization-level=5",)),
    ):
        install(monkeypatch, version)
        monkeypatch.setattr(release_plan, "gpus", lambda gpu=gpu: (gpu,))
        assert engine(repository, f"--plans={store}", *options) == 0
    starts = [key.rpartition("-")[0] for key in plan_store.keys(store)]
    assert starts == [
        *["nvidia-h100-sm90-trt11.4.1"] * 2,
        "nvidia-h100-sm90-trt11.5.0",
        "nvidia-l4-sm89-trt11.4.1",
    ]


def test_a_failed_build_leaves_the_store_as_it_was(repository, tensorrt, tmp_path, capsys):
    store = tmp_path / "plans"
    assert engine(repository, f"--plans={store}") == 0
    before = plan_store.state(store)
    tensorrt.builds = False
    assert engine(repository, f"--plans={store}", "--tf32") == 1
    assert "TensorRT built no plan" in capsys.readouterr().err
    assert plan_store.state(store) == before
    assert [path.name for path in store.iterdir() if path.name.startswith(".")] == [plan_store.TIMING]


def test_a_store_that_cannot_be_written_to_is_noticed_before_the_build(repository, tensorrt, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UsageError, match="cannot be written to"):
        build_stored_plan(repository, load_target(repository), Recipe(), tmp_path / "plans")
    assert tensorrt.caches == []


def test_2_4_weights_ask_for_sparse_kernels(repository, bert, tensorrt):
    release = json.loads((repository / "release.json").read_text())
    release["tensorrt"]["sparse"] = True
    rewrite(repository / "release.json", json.dumps(release))
    assert engine(repository) == 0
    assert read_plan((bert / "model.plan").read_bytes())[0]["flags"] == ["SPARSE_WEIGHTS"]


def test_the_timing_cache_is_kept_and_used_again(repository, tensorrt, tmp_path):
    cache = tmp_path / "kept" / "timing"
    assert engine(repository, f"--timing-cache={cache}") == 0
    assert engine(repository, f"--timing-cache={cache}") == 0
    assert tensorrt.caches == [b"", b"+tactics"]
    cache.write_bytes(tensorrt.stale_cache)  # of another TensorRT
    assert engine(repository, f"--timing-cache={cache}") == 0
    assert tensorrt.caches[-1] == b""


def test_a_timing_cache_that_cannot_be_kept_does_not_undo_the_plan(repository, bert, tensorrt, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert engine(repository, f"--timing-cache={tmp_path}/file/timing") == 0
    assert "warning: the timing cache cannot be kept" in capsys.readouterr().err
    assert (bert / "model.plan").is_file()


def test_tensorrt_10_is_told_to_be_strongly_typed(repository, bert, monkeypatch):
    install(monkeypatch, "10.9.0.34")
    assert engine(repository) == 0
    assert read_plan((bert / "model.plan").read_bytes())[0]["typed"]


def test_an_older_tensorrt_is_refused(repository, monkeypatch, capsys):
    install(monkeypatch, "10.8.0.1")
    assert engine(repository) == 1
    assert "TensorRT 10.8.0.1 is too old: 10.9" in capsys.readouterr().err


def test_every_parser_error_is_listed_with_its_node(repository, bert, tensorrt, capsys):
    tensorrt.parser_errors = [("CumSum", "node_cumsum", 7, "no INT32"), ("Clip", "node_clip", 9, "no INT32 either")]
    assert engine(repository) == 1
    error = capsys.readouterr().err
    assert "CumSum 'node_cumsum' (node 7): no INT32" in error
    assert "Clip 'node_clip' (node 9): no INT32 either" in error
    assert not (bert / "model.plan").exists()


def test_no_plan_is_a_failure_and_the_older_plan_stays(repository, bert, tensorrt, capsys):
    assert engine(repository) == 0
    before = {path.name: path.read_bytes() for path in bert.iterdir() if path.name in ("model.plan", "plan.json")}
    tensorrt.builds, tensorrt.says = False, ["out of memory on tactic 12"]
    assert engine(repository, "--tf32") == 1
    error = capsys.readouterr().err
    assert "TensorRT built no plan" in error
    assert "out of memory on tactic 12" in error
    assert {name: (bert / name).read_bytes() for name in before} == before
    assert not [path for path in bert.iterdir() if path.name.startswith(".")]


def test_a_plan_that_cannot_be_loaded_is_not_published(repository, bert, tensorrt, capsys):
    tensorrt.loads = False
    assert engine(repository) == 1
    assert "cannot load the plan that it built" in capsys.readouterr().err
    assert not (bert / "model.plan").exists()


def test_a_plan_with_another_head_is_not_published(repository, bert, tensorrt, capsys):
    tensorrt.labels = 9
    assert engine(repository) == 1
    assert "its logits have the shape [-1, 9]; the release has 10 labels" in capsys.readouterr().err
    assert not (bert / "model.plan").exists()


def test_a_graph_of_another_precision_is_refused_before_anything_is_built(repository, bert, tensorrt, capsys):
    release = json.loads((repository / "release.json").read_text())
    rewrite(bert / "tensorrt.onnx", (bert / "model.onnx").read_bytes())  # fp32
    release["tensorrt"]["onnx_sha256"] = file_sha256(bert / "tensorrt.onnx")
    rewrite(repository / "release.json", json.dumps(release))
    assert engine(repository) == 1
    assert "is computed in fp32, not in fp16" in capsys.readouterr().err
    assert not (bert / "model.plan").exists()


def test_a_damaged_graph_is_refused(repository, bert, tensorrt, capsys):
    rewrite(bert / "tensorrt.onnx", (bert / "tensorrt.onnx").read_bytes()[:-1000])
    assert engine(repository) == 1
    assert "damaged, or half copied" in capsys.readouterr().err


def test_a_dry_run_needs_neither_tensorrt_nor_a_gpu(repository, bert, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(release_plan, "gpus", lambda: ())
    assert engine(repository, "--dry-run") == 0
    assert "profile 2 (min/opt/max)" in capsys.readouterr().out
    assert not (bert / "model.plan").exists()


def test_without_tensorrt_or_a_gpu_it_says_what_to_do(repository, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert engine(repository) == 1
    assert "'tensorrt' cannot be imported here" in capsys.readouterr().err
    install(monkeypatch)
    monkeypatch.setattr(release_plan, "gpus", lambda: ())
    assert engine(repository) == 1
    assert "build the plan on a GPU node" in capsys.readouterr().err


def test_a_release_without_a_graph_says_how_to_make_one(release, capsys):
    assert engine(release.repository) == 1
    assert "millibert build … --tensorrt fp16" in capsys.readouterr().err


def test_neither_torch_nor_transformers_is_needed(repository):
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'pydantic', 'onnxruntime', 'openvino'):\n"
        "    sys.modules[name] = None\n"
        "from millibert import cli\n"
        f"raise SystemExit(cli.main(['engine', '--repository', {str(repository)!r}, '--dry-run']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_double_has_nothing_that_tensorrt_11_removed(tensorrt):
    import tensorrt as trt

    for name in ("FP16", "INT8", "BF16", "FP8", "OBEY_PRECISION_CONSTRAINTS"):
        assert not hasattr(trt.BuilderFlag, name)
    with pytest.raises(AttributeError):
        trt.Builder(None).create_builder_config().int8_calibrator = None
    assert not hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH")
