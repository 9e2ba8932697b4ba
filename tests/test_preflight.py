"""`millibert preflight`: each kind of mismatch and damage has its own message and exit status."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from tests.conftest import rewrite

from load import released
from millibert import UsageError, cli
from millibert_ensemble import engine_choice, preflight_command, processes
from millibert_ensemble.engine_choice import engine_options
from millibert_ensemble.machine import Gpu, Machine
from millibert_ensemble.plan_manifest import PlanManifest, load_plan_manifest
from millibert_ensemble.preflight import STATUS, preflight
from millibert_ensemble.processes import Stub

H100, A100, T4 = (
    Gpu("NVIDIA H100", "9.0", 80 << 30, "580.1"),
    Gpu("NVIDIA A100", "8.0", 40 << 30, "580.1"),
    Gpu("Tesla T4", "7.5", 16 << 30, "580.1"),
)
H200 = Gpu("NVIDIA H200", "9.0", 141 << 30, "580.1")
HERE = Machine("11.4.1", (H100,))
PLAN = b"a plan"


def plan_of(repository, **changes):
    """The manifest that `millibert engine` would write for a plan of this release."""
    target = json.loads((repository / "release.json").read_text())["tensorrt"]
    size = {"min": (1,), "opt": (2,), "max": (3,)}
    manifest = PlanManifest(
        created="2026-11-24T00:00:00+00:00",
        onnx_sha256=target["onnx_sha256"],
        plan_sha256=hashlib.sha256(PLAN).hexdigest(),
        precision=target["precision"],
        layout=target["layout"],
        tensorrt="11.4.1",
        gpu=H100,
        hardware_compatibility="none",
        version_compatible=False,
        sparse=False,
        tf32=False,
        optimization_level=3,
        workspace_bytes=1,
        labels=10,
        max_texts=target["max_texts"],
        max_tokens=target["max_tokens"],
        typical_tokens=target["typical_tokens"],
        profiles=({"input_ids": size},) * 3,
        seconds=60.0,
    )
    return dataclasses.replace(manifest, **changes)


def write_plan(repository, **changes):
    """A plan beside the release's graph."""
    bert = repository / "bert" / "1"
    changed = plan_of(repository, **changes)
    (bert / "model.plan").write_bytes(PLAN)
    (bert / "plan.json").write_text(json.dumps(changed.as_json()))
    return changed


@pytest.fixture
def planned(repository):
    write_plan(repository)
    return repository


def test_a_plan_of_this_machine_is_usable(planned):
    verdict = preflight(planned, HERE)
    assert (verdict.answer, verdict.engine, verdict.reasons) == ("usable", "tensorrt", ())
    assert verdict.options == ["--model-config-name=tensorrt"]


def test_a_plan_manifest_survives_the_round_trip(planned):
    written = write_plan(planned)
    assert load_plan_manifest(planned / "bert" / "1" / "plan.json") == written


MISFITS: dict[str, tuple[dict[str, Any], Machine, str | None]] = {
    "another patch": ({}, Machine("11.4.2", (H100,)), "built with TensorRT 11.4.1; this machine has 11.4.2"),
    "a newer one, compatible": ({"version_compatible": True}, Machine("11.5.0", (H100,)), None),
    "an older one, compatible": ({"version_compatible": True}, Machine("11.3.0", (H100,)), "this machine has 11.3.0"),
    "10 in 11": ({"version_compatible": True, "tensorrt": "10.9.0"}, HERE, None),
    "10 in 11, not compatible": ({"tensorrt": "10.9.0"}, HERE, "built with TensorRT 10.9.0"),
    "8 in 11": ({"version_compatible": True, "tensorrt": "8.6.1"}, HERE, "built with TensorRT 8.6.1"),
    "another capability": (
        {},
        Machine("11.4.1", (A100,)),
        "capability 9.0 (NVIDIA H100); this machine's NVIDIA A100 has 8.0",
    ),
    "one of two GPUs": ({}, Machine("11.4.1", (H100, A100)), "this machine's NVIDIA A100 has 8.0"),
    "ampere and newer": ({"hardware_compatibility": "ampere_plus"}, Machine("11.4.1", (A100,)), None),
    "older than ampere": ({"hardware_compatibility": "ampere_plus"}, Machine("11.4.1", (T4,)), "Tesla T4 has 7.5"),
    "same capability": ({"hardware_compatibility": "same_compute_capability"}, Machine("11.4.1", (H200,)), None),
    "another model": ({}, Machine("11.4.1", (H200,)), None),
    "another graph": ({"onnx_sha256": "0"}, HERE, "built from another graph than tensorrt.onnx"),
    "another plan": ({"plan_sha256": "0"}, HERE, "model.plan is not the file that plan.json describes"),
    "another precision": ({"precision": "bf16"}, HERE, "the plan is bf16"),
    "another head": ({"labels": 9}, HERE, "the plan has 9 labels; the release has 10"),
    "fewer texts": ({"max_texts": 8}, HERE, "the plan takes 8 texts of 64 tokens; the release says 16 of 64"),
    "longer texts": ({"max_tokens": 512}, HERE, "the plan takes 16 texts of 512 tokens; the release says 16 of 64"),
    "fewer profiles": ({"profiles": ()}, HERE, "the plan has 0 profiles; the release's config asks for number 0"),
    "other texts": ({"typical_tokens": 99}, HERE, None),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_plan_that_does_not_fit_must_be_rebuilt(repository, case):
    changes, here, reason = MISFITS[case]
    write_plan(repository, **changes)
    verdict = preflight(repository, here)
    if reason is None:
        assert (verdict.answer, verdict.engine) == ("usable", "tensorrt"), verdict.reasons
    else:
        assert (verdict.answer, verdict.engine) == ("rebuild", "cpu")
        assert reason in " ".join(verdict.reasons)
        assert verdict.command == f"millibert engine --repository {repository}"


def test_another_gpu_of_the_same_capability_is_worth_a_remark(planned):
    assert any("tuned on NVIDIA H100" in remark for remark in preflight(planned, Machine("11.4.1", (H200,))).remarks)


def test_a_plan_tuned_for_other_texts_is_worth_a_remark(repository):
    write_plan(repository, typical_tokens=99)
    assert any("tuned for texts of 99 tokens" in remark for remark in preflight(repository, HERE).remarks)


def test_no_plan_and_an_unreadable_manifest_must_be_rebuilt(repository):
    assert preflight(repository, HERE).reasons == ("there is no plan yet (bert/1/model.plan)",)
    write_plan(repository)
    (repository / "bert" / "1" / "plan.json").write_text("{}")
    verdict = preflight(repository, HERE)
    assert verdict.answer == "rebuild"
    assert "plan.json: not a plan's manifest" in verdict.reasons[0]


def test_a_version_compatible_plan_needs_an_option_of_triton(repository):
    write_plan(repository, version_compatible=True)
    assert "--backend-config=tensorrt,version-compatible=true" in preflight(repository, HERE).options


@pytest.mark.parametrize(
    ("here", "reason"),
    [(Machine("11.4.1", ()), "no NVIDIA GPU here"), (Machine(None, (H100,)), "no TensorRT library")],
)
def test_without_gpu_or_library_it_falls_back(planned, here, reason):
    verdict = preflight(planned, here)
    assert (verdict.answer, verdict.engine, verdict.options) == ("fall back", "cpu", [])
    assert reason in verdict.reasons[0]


def test_a_release_without_a_graph_is_usable_on_the_cpu(release):
    verdict = preflight(release.repository, HERE)
    assert (verdict.answer, verdict.engine) == ("usable", "cpu")
    assert "millibert build --tensorrt fp16" in verdict.remarks[-1]


def test_a_release_that_says_too_little_of_its_graph_is_broken(repository):
    change_release(repository, lambda release: release["tensorrt"].pop("max_texts"))
    verdict = preflight(repository, HERE)
    assert (verdict.answer, verdict.engine) == ("broken", None)
    assert "its section 'tensorrt' lacks 'max_texts'" in verdict.reasons[0]


def change_release(repository, change):
    release = json.loads((repository / "release.json").read_text())
    change(release)
    rewrite(repository / "release.json", json.dumps(release))


def without_fallback(repository):
    change_release(repository, lambda release: release.update(cpu_fallback=False))
    return repository


def test_a_release_says_whether_the_cpu_engine_may_serve_in_the_plans_place(repository):
    assert json.loads((repository / "release.json").read_text())["cpu_fallback"] is True
    change_release(repository, lambda release: release.pop("cpu_fallback"))  # as releases were before
    assert preflight(repository, HERE).engine == "cpu"


@pytest.mark.parametrize(
    ("here", "answer"), [(HERE, "rebuild"), (Machine("11.4.1", ()), "fall back")], ids=["gpu", "no gpu"]
)
def test_where_it_may_not_no_engine_runs(repository, monkeypatch, capsys, here, answer):
    without_fallback(repository)
    verdict = preflight(repository, here)
    assert (verdict.answer, verdict.engine) == (answer, None)
    assert "serving.cpu_fallback = false" in verdict.reasons[-1]
    monkeypatch.setattr(preflight_command, "this_machine", lambda: here)
    assert cli.main(["preflight", "--repository", str(repository)]) == STATUS[answer]
    assert capsys.readouterr().out.startswith(f"{answer}: no engine")
    monkeypatch.setattr(engine_choice, "this_machine", lambda: here)
    with pytest.raises(UsageError, match=rf"{answer}: .*serving\.cpu_fallback = false"):
        engine_options(repository, "auto", print)
    assert engine_options(repository, "cpu", print) == []  # asked for by name


def test_where_it_may_not_a_plan_that_fits_is_served(planned):
    assert preflight(without_fallback(planned), HERE).engine == "tensorrt"


def test_a_release_without_a_graph_has_nothing_to_fall_back_from(release, tmp_path):
    repository = shutil.copytree(release.repository, tmp_path / "repository", copy_function=os.link)
    assert preflight(without_fallback(repository), HERE).engine == "cpu"


def change_config(repository, name, before, after):
    path = repository / name
    text = path.read_text()
    assert before in text
    rewrite(path, text.replace(before, after, 1))


def _last_key_renamed(path, key):
    before, found, after = path.read_text().rpartition(f'key: "{key}"')
    assert found
    return f'{before}key: "another"{after}'


DAMAGE = {
    "no manifest": (lambda r: (r / "release.json").unlink(), "release.json: not a release's manifest: No such file"),
    "half a manifest": (
        lambda r: rewrite(r / "release.json", '{"name": "x"'),
        "release.json: not a release's manifest",
    ),
    "a missing file": (lambda r: (r / "tokenizer/1/tokenizer.json").unlink(), "tokenizer/1/tokenizer.json: missing"),
    "a changed file": (
        lambda r: rewrite(r / "bert/1/model.onnx", b"x"),
        "bert/1/model.onnx: changed since it was built",
    ),
    "other labels": (lambda r: rewrite(r / "postprocess/1/labels.json", '["a"]'), "labels.json: not the labels of"),
    "labels in a config": (
        lambda r: change_config(r, "support/config.pbtxt", "track_order", "track"),
        "support/config.pbtxt: not the labels of release.json",
    ),
    "an unknown field": (
        lambda r: change_config(r, "bert/config.pbtxt", "max_batch_size", "max_batch_sise"),
        "bert/config.pbtxt: not a Triton model configuration",
    ),
    "no config": (lambda r: (r / "bert/config.pbtxt").unlink(), "bert/config.pbtxt: missing"),
    "another name": (
        lambda r: change_config(r, "bert/config.pbtxt", 'name: "bert"', 'name: "bart"'),
        "names the model 'bart'; its folder is 'bert'",
    ),
    "another type": (
        lambda r: change_config(r, "postprocess/config.pbtxt", "TYPE_FP32", "TYPE_FP16"),
        "logits: bert makes TYPE_FP32, postprocess takes TYPE_FP16",
    ),
    "another shape": (
        lambda r: change_config(r, "support/config.pbtxt", "dims: 1\n", "dims: 2\n"),
        "TEXT: support makes the shape [2], tokenizer takes [1]",
    ),
    "another head": (
        lambda r: change_config(r, "bert/config.pbtxt", "dims: 10", "dims: 11"),
        "bert: makes logits of shape [11]; the release has 10 labels",
    ),
    "another head of the plan": (
        lambda r: change_config(r, "bert/configs/tensorrt.pbtxt", "dims: 10", "dims: 11"),
        "bert: makes logits of shape [11]; the release has 10 labels",
    ),
    "an unknown step": (
        lambda r: change_config(r, "support/config.pbtxt", 'model_name: "postprocess"', 'model_name: "preprocess"'),
        "its step 'preprocess' is no model of this repository",
    ),
    "an output that is not there": (
        lambda r: change_config(r, "support/config.pbtxt", 'key: "logits"', 'key: "logit"'),
        "bert: has no output 'logit', which support takes from it",
    ),
    "an input that nothing feeds": (
        lambda r: rewrite(r / "support/config.pbtxt", _last_key_renamed(r / "support/config.pbtxt", "logits")),
        "postprocess: nothing feeds its input 'logits'",
    ),
    "another batch limit": (
        lambda r: change_config(r, "tokenizer/config.pbtxt", "max_batch_size: 16", "max_batch_size: 8"),
        "passes them to what takes fewer",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_breaks_the_repository(planned, case, capsys):
    damage, message = DAMAGE[case]
    damage(planned)
    assert cli.main(["preflight", "--repository", str(planned)]) == 1
    output = capsys.readouterr().out
    assert output.startswith("broken\n")
    assert message in output


def test_an_operators_change_of_a_config_is_a_remark(planned):
    change_config(planned, "tokenizer/config.pbtxt", "count: 1", "count: 2")
    verdict = preflight(planned, HERE)
    assert verdict.answer == "usable"
    assert "tokenizer/config.pbtxt: changed since it was built" in verdict.remarks


@pytest.mark.parametrize(
    ("here", "status"), [(HERE, 0), (Machine("10.9.0", (H100,)), 3), (Machine("11.4.1", ()), 4)], ids=str
)
def test_exit_status_text_and_json(planned, monkeypatch, capsys, here, status):
    monkeypatch.setattr(preflight_command, "this_machine", lambda: here)
    assert cli.main(["preflight", "--repository", str(planned), "--json"]) == status
    document = json.loads(capsys.readouterr().out)
    assert document["exit_status"] == status
    assert document["machine"]["tensorrt"] == here.tensorrt
    assert document["plan"]["labels"] == 10
    assert cli.main(["preflight", "--repository", str(planned)]) == status
    text = capsys.readouterr().out
    assert text.startswith(document["answer"])
    assert all(reason in text for reason in document["reasons"])


def test_a_missing_repository_is_wrong_input(tmp_path, capsys):
    assert cli.main(["preflight", "--repository", str(tmp_path / "none")]) == 1
    assert "no model repository at" in capsys.readouterr().err


def test_it_runs_without_any_extra(planned):
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'pydantic', 'onnx', 'openvino', 'tokenizers', 'psutil'):\n"
        "    sys.modules[name] = None\n"
        "from millibert import cli\n"
        f"raise SystemExit(cli.main(['preflight', '--repository', {str(planned)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode in (3, 4), done.stdout + done.stderr


def test_serve_takes_the_engine_that_fits(planned, monkeypatch):
    monkeypatch.setattr(engine_choice, "this_machine", lambda: HERE)
    said: list[str] = []

    def options(repository, wanted):
        return engine_options(repository, wanted, said.append)

    assert options(planned, "auto") == options(planned, "tensorrt") == ["--model-config-name=tensorrt"]
    assert said[0].startswith("usable: the TensorRT plan")
    assert options(planned, "cpu") == []
    monkeypatch.setattr(engine_choice, "this_machine", lambda: Machine("10.9.0", (H100,)))
    assert options(planned, "auto") == []


def test_benchmarks_measure_the_engine_that_serve_takes(planned, monkeypatch, capsys):
    monkeypatch.setattr(engine_choice, "this_machine", lambda: HERE)
    parser = argparse.ArgumentParser()
    released.add_release(parser)
    engine_choice.add_engine(parser)
    given = ["--repository", str(planned), "--data", "unused"]
    server = released.serve(parser.parse_args(given))
    assert (released.served_by(server), server.options) == ("tensorrt", ["--model-config-name=tensorrt"])
    assert capsys.readouterr().err.startswith("usable: the TensorRT plan")
    server = released.serve(parser.parse_args([*given, "--engine", "cpu"]))
    assert (released.served_by(server), server.options) == ("cpu", [])


def test_memory_is_that_of_all_instances_of_a_model(monkeypatch):
    here = os.getpid()
    monkeypatch.setattr(processes, "stubs", lambda _: [Stub(here, name) for name in ("tokenizer", "tokenizer", "bert")])
    server: Any = SimpleNamespace(pid=here)
    found = released.memory_mib(server)
    assert found["tokenizer"] == pytest.approx(2 * found["bert"], rel=0.05)
    assert found["tritonserver"] == pytest.approx(found["bert"], rel=0.05)


def test_serve_says_why_it_cannot_take_the_plan(planned, monkeypatch, capsys):
    monkeypatch.setattr(engine_choice, "this_machine", lambda: Machine(None, ()))
    command = ["serve", "--repository", str(planned), "--engine", "tensorrt", "--grpc-port=0", "--http-port=0"]
    assert cli.main(command) == 1
    assert "fall back: no NVIDIA GPU here" in capsys.readouterr().err
