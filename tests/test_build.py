"""`millibert build`: what a release holds, and what a failed build leaves alone."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import onnx
import pytest
from google.protobuf import text_format
from tests.conftest import CUSTOMER_SERVICE, SCENARIO
from tritonclient.grpc import model_config_pb2

from millibert import UsageError, cli
from millibert_build.publish import replacing
from millibert_build.report import read_report
from millibert_build.repository import check_config, load_config
from millibert_build.retune import open_release
from millibert_build.tensorrt.native_config import fill_postprocess_config
from millibert_ensemble import contract


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# The release.


def test_the_manifest_lists_every_file_with_its_hash(release):
    manifest = json.loads((release.repository / "release.json").read_text())
    # A server that another test has started on it leaves Python's caches.
    files = {name: data for name, data in contents(release.repository).items() if "__pycache__" not in name}
    del files["release.json"]
    assert manifest["files"] == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert manifest["engine"]["onnx_sha256"] == manifest["files"]["bert/1/model.onnx"]


def test_the_manifest_says_what_was_built_and_how_good_it_is(release):
    manifest = json.loads((release.repository / "release.json").read_text())
    assert manifest["name"] == "support"
    assert len(manifest["labels"]) == 10
    assert manifest["data"]["texts"] == {"train": 670, "validation": 80, "test": 250}
    assert manifest["base"]["sha256"] == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert manifest["engine"]["kind"] == "openvino"
    assert manifest["engine"]["precision"] == "fp32"
    test = manifest["metrics"]["test"]
    assert test["texts"] == 250
    # Two epochs teach something: ten labels by chance are 0.1.
    assert 0.2 < test["engine_score"] <= 1
    assert test["agreement"] >= 0.99
    assert test["temperature"] != 1
    assert test["calibration_error"] < test["calibration_error_before"]
    assert [epoch["number"] for epoch in manifest["training"]["curve"]] == [1, 2]


def test_the_report_says_what_the_manifest_says(release, tmp_path):
    options = ["--precision", "int8", "--set", "gates.min_agreement_int8=0.5", "--set", "gates.max_accuracy_loss=1"]
    done = release.build(tmp_path / "out", None, *options, "--json")
    assert done.returncode == 0, done.stderr
    manifest, report = json.loads(done.stdout), json.loads((release.work / "report.json").read_text())
    assert report["verdict"]["published"]
    assert report["labels"] == manifest["labels"]
    assert report["data"]["texts"] == manifest["data"]["texts"]
    fp32, int8 = report["stages"]
    assert (fp32["name"], int8["name"], int8["chosen"]) == ("fp32", "int8", True)
    assert fp32["test"]["score"] == manifest["metrics"]["variants"]["fp32"]["engine_score"]
    assert int8["test"]["score"] == manifest["metrics"]["test"]["engine_score"]
    assert int8["test"]["agreement"] == manifest["metrics"]["test"]["agreement"]
    assert int8["size_bytes"] < 0.7 * fp32["size_bytes"]  # embeddings stay in fp32
    assert sum(row[i] for i, row in enumerate(report["confusion"])) / 250 == pytest.approx(int8["test"]["score"])
    assert report["calibration"]["error_after"] == manifest["metrics"]["test"]["calibration_error"]
    (phase,) = report["phases"]
    assert phase["epochs"] == manifest["training"]["curve"]
    assert report["lineage"][-1]["id"] == manifest["checkpoint"]["fingerprint"][:12]


def test_configs_follow_the_contract_and_the_scenario(release):
    configs = {}
    for path in release.repository.glob("*/config.pbtxt"):
        config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        configs[config.name] = config
        assert config.name == path.parent.name
        # The CPU engine merges more texts than a request may hold.
        assert config.max_batch_size == (32 if config.name == "bert" else 16)
        assert (path.parent / "1").is_dir()
    assert set(configs) == {"support", *contract.COMPOSING_MODELS}
    assert configs["bert"].parameters["max_tokens"].string_value == "64"
    ragged = {tensor.name: tensor.allow_ragged_batch for tensor in configs["bert"].input}
    assert ragged == {"input_ids": True, "admission": False}
    steps = [step.model_name for step in configs["support"].ensemble_scheduling.step]
    assert steps == list(contract.COMPOSING_MODELS)


@pytest.mark.parametrize(
    ("ensemble", "bert", "unused"),
    [
        ("config.pbtxt", "config.pbtxt", {"span"}),
        ("configs/tensorrt.pbtxt", "configs/packed.pbtxt", set()),
        ("configs/tensorrt.pbtxt", "configs/padded.pbtxt", set()),
    ],
)
def test_the_ensemble_connects_every_tensor(ensemble, bert, unused):
    produced = {tensor.name for tensor in contract.REQUEST_TENSORS}
    left = set()
    for step in load_config("classify", ensemble).ensemble_scheduling.step:
        config = load_config(step.model_name, bert if step.model_name == "bert" else "config.pbtxt")
        if step.model_name == "postprocess" and bert != "config.pbtxt":
            fill_postprocess_config(config, 1)
        assert set(step.input_map) == {tensor.name for tensor in config.input}
        left |= {tensor.name for tensor in config.output} - set(step.output_map)
        assert set(step.input_map.values()) <= produced
        produced |= set(step.output_map.values())
    assert {tensor.name for tensor in contract.RESPONSE_TENSORS} <= produced
    # What only the other kind of engine reads.
    assert left == unused


def test_a_config_that_leaves_the_contract_is_refused():
    config = load_config("tokenizer")
    config.output[0].data_type = model_config_pb2.DataType.TYPE_INT64
    with pytest.raises(UsageError, match=r"tokenizer: its outputs are .*TYPE_INT64.*the contract says"):
        check_config(config, "tokenizer")


def test_models_import_nothing_of_ours_but_their_siblings(release):
    for path in release.repository.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) millibert", path.read_text(), re.MULTILINE), path


def test_the_exported_graph_holds_the_fine_tuned_head(release):
    graph = onnx.load(release.repository / "bert" / "1" / "model.onnx").graph
    assert graph.output[0].type.tensor_type.shape.dim[1].dim_value == 10


# Building again.


def test_the_same_inputs_do_not_train_again(release, tmp_path):
    done = release.build(tmp_path / "again", None, "--engine", "onnxruntime", "--precision", "fp32", "--json")
    assert done.returncode == 0, done.stderr
    assert "the checkpoint of the last build is used again" in done.stderr
    manifest = json.loads(done.stdout)
    assert (manifest["engine"]["kind"], manifest["engine"]["precision"]) == ("onnxruntime", "fp32")
    first = json.loads((release.repository / "release.json").read_text())
    assert manifest["engine"]["onnx_sha256"] == first["engine"]["onnx_sha256"]


def test_a_missed_gate_leaves_the_served_repository_as_it_was(release, tmp_path):
    strict = tmp_path / "strict.toml"
    strict.write_text(SCENARIO.format(data=CUSTOMER_SERVICE, min_accuracy=1.0))
    before = contents(release.repository)
    done = release.build(release.repository, strict, "--precision", "fp32")
    assert done.returncode == 1
    assert "fp32 misses gates on 250 test texts: accuracy 0." in done.stderr
    assert "< min_accuracy 1.0" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(release.repository) == before
    assert f"Report: {release.work / 'report.html'}" in done.stderr
    report = read_report(release.work / "report.json")
    assert not report.verdict.published
    assert report.verdict.reasons[0] in done.stderr
    assert [p.name for p in release.repository.parent.iterdir() if ".new" in p.name] == []


def test_a_pruned_release_is_smaller_and_can_be_continued(release, tmp_path):
    settings = ["pruning.heads=0.25", "pruning.neurons=0.5", "pruning.recovery_epochs=1", "gates.max_pruning_loss=1"]
    options = [part for key in (*settings, "gates.min_pruning_agreement=0") for part in ("--set", key)]
    done = release.build(tmp_path / "small", None, "--precision", "fp32", "--json", *options)
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    removed = manifest["removed"]
    assert removed["parameters_after"] < 0.85 * removed["parameters_before"]
    sizes = [(out / "bert" / "1" / "model.onnx").stat().st_size for out in (tmp_path / "small", release.repository)]
    assert sizes[0] < 0.85 * sizes[1]
    assert manifest["metrics"]["pruning"]["texts"] == 250
    origin = open_release(tmp_path / "small", release.work)
    assert (origin.checkpoint.name, origin.scenario.pruning.heads) == ("checkpoint", 0.25)


# Publishing.


def test_a_failure_while_writing_keeps_the_old_release(tmp_path):
    out = tmp_path / "repository"
    with replacing(out) as staging:
        (staging / "release.json").write_text("one")
    with pytest.raises(IsADirectoryError), replacing(out) as staging:  # noqa: PT012
        (staging / "release.json").write_text("two")
        staging.read_bytes()
    assert contents(out) == {"release.json": b"one"}
    assert [p.name for p in tmp_path.iterdir()] == ["repository"]


def test_a_new_release_replaces_the_old_one_whole_and_keeps_the_readme(tmp_path):
    out = tmp_path / "repository"
    out.mkdir()
    (out / "README.md").write_text("read me")
    with replacing(out) as staging:
        (staging / "release.json").write_text("one")
        (staging / "old").write_text("old")
    with replacing(out) as staging:
        (staging / "release.json").write_text("two")
    assert contents(out) == {"README.md": b"read me", "release.json": b"two"}


def test_a_folder_of_somebody_elses_is_not_replaced(tmp_path):
    (tmp_path / "photo.jpg").write_text("dear")
    with pytest.raises(UsageError, match=r"holds photo\.jpg and no release\.json"), replacing(tmp_path):
        pass
    assert contents(tmp_path) == {"photo.jpg": b"dear"}


# The command line.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "x"], "also --train, --test"),
        (["--name", "a b", "--train", "t.csv", "--test", "u.csv"], "name: String should match pattern"),
        (["--name", "x", "--train", "no.csv", "--test", "no.csv"], "no.csv: no such file or folder"),
        (["--scenario", "no.toml"], "cannot read the scenario no.toml"),
    ],
)
def test_wrong_input_is_one_clear_error(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["build", "--out", "out", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nowhere", "no base checkpoint 'nowhere': give a folder"),
        (".", "not a checkpoint, it has no config.json"),
    ],
)
def test_a_base_that_is_not_there(base, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ["--train", str(CUSTOMER_SERVICE / "train.csv"), "--test", str(CUSTOMER_SERVICE / "test.csv")]
    assert cli.main(["build", "--out", "out", "--name", "x", *data, "--base", base]) == 1
    assert message in capsys.readouterr().err
