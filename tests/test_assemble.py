"""`millibert preflight --plans --out`: the plan of a store that fits best, and a repository of links for Triton."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from tests.conftest import rewrite
from tests.test_preflight import A100, H200, HERE, PLAN, plan_of, without_fallback, write_plan

import millibert
from millibert import UsageError, cli
from millibert_ensemble import engine_choice, plan_store, preflight_command
from millibert_ensemble.assemble import assemble
from millibert_ensemble.machine import Machine
from millibert_ensemble.preflight import preflight


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "plans"
    folder.mkdir()
    return folder


@pytest.fixture
def machine(monkeypatch):
    def put(here):
        monkeypatch.setattr(preflight_command, "this_machine", lambda: here)
        monkeypatch.setattr(engine_choice, "this_machine", lambda: here)

    put(HERE)
    return put


def add(store, repository, **changes):
    """Publish a plan for this release."""
    return plan_store.publish(store, plan_of(repository, **changes), PLAN)


def options(repository):
    """What `millibert serve` would tell tritonserver."""
    return engine_choice.engine_options(repository, "auto", lambda _: None)


def command(repository, store, *options):
    return cli.main(["preflight", "--repository", str(repository), "--plans", str(store), *map(str, options)])


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def test_a_plan_of_the_store_is_usable(repository, store):
    folder = add(store, repository)
    verdict = preflight(repository, HERE, store)
    assert (verdict.answer, verdict.engine, verdict.plan_folder) == ("usable", "tensorrt", folder)
    assert verdict.options == ["--model-config-name=tensorrt"]


# From the best to the worst, for an H200: the one before is taken while it is there.
ORDER: list[dict[str, Any]] = [
    {"gpu": H200},
    {"gpu": H200, "optimization_level": 2},
    {"gpu": H200, "version_compatible": True},
    {"gpu": H200, "hardware_compatibility": "same_compute_capability"},
    {"gpu": H200, "typical_tokens": 1, "tf32": True},
    {},
    {"gpu": A100, "hardware_compatibility": "ampere_plus"},
]


def test_the_plan_that_suits_the_machine_best_is_taken(repository, store):
    folders = [add(store, repository, **changes) for changes in reversed(ORDER)][::-1]
    assert len(set(folders)) == len(ORDER)
    here = Machine("11.4.1", (H200,))
    while folders:
        assert preflight(repository, here, store).plan_folder == folders[0]
        shutil.rmtree(folders.pop(0))
    assert preflight(repository, here, store).answer == "rebuild"


def test_why_no_plan_fits_is_told_plan_by_plan(repository, store, capsys, machine):
    assert command(repository, store) == 3
    assert f"- {store} has no plan of this release's graph\n" in capsys.readouterr().out
    add(store, repository, onnx_sha256="0")
    assert command(repository, store) == 3
    assert "has no plan of this release's graph (it has 1 of other graphs)\n" in capsys.readouterr().out
    older = add(store, repository, tensorrt="11.4.0").name
    other = add(store, repository, gpu=A100).name
    damaged = add(store, repository)
    (damaged / "model.plan").write_bytes(b"half")
    unread = add(store, repository, tf32=True)
    (unread / "plan.json").write_text("{}")
    assert command(repository, store) == 3
    output = capsys.readouterr().out
    assert f"- {older}: the plan was built with TensorRT 11.4.0; this machine has 11.4.1" in output
    assert f"- {other}: the plan was built for compute capability 8.0 (NVIDIA A100); this machine's" in output
    assert f"- {damaged.name}: model.plan is not the file that plan.json describes" in output
    assert f"- {unread}/plan.json: not a plan's manifest" in output
    assert "other graphs" not in output
    assert f"millibert engine --repository {repository} --plans {store}\n" in output


def test_the_releases_own_plan_is_one_more(repository, store):
    write_plan(repository)
    bert = repository / "bert" / "1"
    assert preflight(repository, HERE, store).plan_folder == bert
    stored = add(store, repository, optimization_level=5)
    assert preflight(repository, HERE, store).plan_folder == stored
    rewrite(bert / "model.plan", b"half")
    shutil.rmtree(stored)
    assert preflight(repository, HERE, store).reasons[0].startswith("bert/1/model.plan: model.plan is not the file")


def test_a_repository_of_links_is_made(repository, store, tmp_path, capsys, machine):
    plan = add(store, repository)
    out = tmp_path / "served" / "current"
    assert command(repository, store, "--out", out) == 0
    output = capsys.readouterr().out
    assert output.startswith("usable: the TensorRT plan")
    assert f"made {out}; serve it with: millibert serve --repository {out}" in output
    assert files(out) == sorted([*files(repository), "bert/1/model.plan", "bert/1/plan.json"])
    assert (out / "support" / "1").is_dir()  # an ensemble's version, which is empty
    for path in out.rglob("*"):
        assert path.is_symlink() != path.is_dir()
        assert path.is_dir() or path.readlink().is_absolute()
    assert (out / "bert" / "1" / "model.plan").resolve() == plan / "model.plan"
    verdict = preflight(out, HERE)
    assert (verdict.answer, verdict.engine, verdict.remarks) == ("usable", "tensorrt", ())
    assert options(out) == ["--model-config-name=tensorrt"]


def test_links_lead_to_the_files_themselves(repository, store, tmp_path, machine, monkeypatch):
    (tmp_path / "link").symlink_to(repository, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    assert command("link", store, "--out", "out") == 0
    assert (tmp_path / "out" / "release.json").readlink() == repository.resolve() / "release.json"


def test_the_cpu_engine_serves_where_the_release_lets_it(repository, store, tmp_path, capsys, machine):
    out = tmp_path / "out"
    write_plan(repository, tensorrt="10.9.0")  # which does not fit, and must not come along
    assert command(repository, store, "--out", out, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["answer"], document["engine"]) == ("rebuild", "cpu")
    assert (document["exit_status"], document["repository"]) == (0, str(out))
    assert files(out) == sorted(set(files(repository)) - {"bert/1/model.plan", "bert/1/plan.json"})
    assert options(out) == []
    machine(Machine(None, ()))
    assert command(repository, store, "--out", out) == 0
    assert capsys.readouterr().out.startswith("fall back: the CPU engine")


@pytest.mark.parametrize(("here", "status"), [(HERE, 3), (Machine(None, ()), 4)], ids=["gpu", "no gpu"])
def test_where_it_does_not_no_repository_is_made(repository, store, tmp_path, capsys, machine, here, status):
    machine(here)
    without_fallback(repository)
    out = tmp_path / "out"
    assert command(repository, store, "--out", out, "--json") == status
    document = json.loads(capsys.readouterr().out)
    assert (document["exit_status"], document["engine"], document["repository"]) == (status, None, None)
    assert not out.exists()


def test_of_a_broken_release_no_repository_is_made(repository, store, tmp_path, capsys, machine):
    (repository / "bert" / "1" / "model.onnx").unlink()
    assert command(repository, store, "--out", tmp_path / "out") == 1
    assert capsys.readouterr().out.startswith("broken\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plans", "repository"]


def test_an_older_one_is_replaced_in_one_step(repository, store, tmp_path, machine):
    out = tmp_path / "out"
    assert command(repository, store, "--out", out) == 0
    assert not (out / "bert" / "1" / "model.plan").exists()
    add(store, repository)
    assert command(repository, store, "--out", out) == 0
    assert (out / "bert" / "1" / "model.plan").read_bytes() == PLAN
    without_fallback(repository)
    shutil.rmtree(store)
    store.mkdir()
    assert command(repository, store, "--out", out) == 3
    assert (out / "bert" / "1" / "plan.json").is_symlink()  # the older one stays
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plans", "repository"]


def test_nothing_else_is_replaced(repository, store, tmp_path, capsys, machine):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(foreign)
    for out, reason in (
        (repository, "in the release itself"),
        (repository / "bert" / "served", "in the release itself"),
        (repository.parent, "holds something that"),
        (foreign, "holds something that"),
        (tmp_path / "file", "not a folder"),
        (tmp_path / "link", "not a folder"),
    ):
        assert command(repository, store, "--out", out) == 1
        assert reason in capsys.readouterr().err
    assert files(foreign) == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert command(repository, store, "--out", tmp_path / "empty") == 0


def test_a_release_without_a_graph_is_assembled_too(release, store, tmp_path, machine):
    assert command(release.repository, store, "--out", tmp_path / "out") == 0
    assert files(tmp_path / "out") == files(release.repository)


def test_a_lost_plan_is_named_and_the_release_served_without_it(repository, store, tmp_path, machine):
    plan = add(store, repository)
    out = tmp_path / "out"
    assert command(repository, store, "--out", out) == 0
    shutil.rmtree(plan)
    verdict = preflight(out, HERE)
    assert (verdict.answer, verdict.engine) == ("rebuild", "cpu")
    assert verdict.reasons == (f"bert/1/model.plan is a link to {plan / 'model.plan'}, which is not there",)


def test_a_moved_release_is_named(repository, store, tmp_path, capsys, machine):
    out = tmp_path / "out"
    assert command(repository, store, "--out", out) == 0
    repository.rename(tmp_path / "moved")
    lost = f"is a link to {repository}/bert/1/"
    assert cli.main(["preflight", "--repository", str(out)]) == 1
    assert lost in capsys.readouterr().out
    for engine in ("auto", "cpu"):
        assert cli.main(["serve", "--repository", str(out), "--engine", engine, "--http-port=0"]) == 1
        error = capsys.readouterr().err
        assert lost in error
        assert "the release was moved or is not mounted" in error


def test_a_missing_store_and_waiting_without_one_are_wrong_input(repository, tmp_path, capsys, machine):
    assert command(repository, tmp_path / "none") == 1
    assert "no plan store at" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main(["preflight", "--repository", str(repository), "--wait", "60"])
    assert ended.value.code == 2
    assert "give --plans" in capsys.readouterr().err


def test_a_build_that_is_under_way_is_waited_for(repository, store, tmp_path, monkeypatch, capsys, machine):
    wanted = plan_of(repository)
    steps = [
        lambda: None,
        lambda: add(store, repository, tensorrt="11.0.0"),  # an older one's
        lambda: add(store, repository, gpu=H200),  # another pool's, which runs here too
        lambda: add(store, repository),
    ]

    def sleep(seconds):
        steps.pop(0)()

    monkeypatch.setattr(time, "sleep", sleep)
    assert command(repository, store, "--wait", 600, "--out", tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("usable: the TensorRT plan")
    assert f"waiting up to 600 s for a plan of this GPU in {store}" in captured.err
    assert steps == []
    assert plan_store.key_of(wanted) in plan_store.keys(store)


def test_waiting_ends_and_is_only_for_a_plan_that_can_come(repository, store, monkeypatch, capsys, machine):
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "monotonic", lambda: float(100 * len(slept)))
    assert command(repository, store, "--wait", 250) == 3
    assert len(slept) == 3
    for here in (Machine(None, ()), Machine("11.4.1", ())):
        machine(here)
        assert command(repository, store, "--wait", 250) == 4
    machine(HERE)
    # Of another GPU, but meant for others too; then its own.
    for changes in ({"gpu": H200, "hardware_compatibility": "same_compute_capability"}, {}):
        add(store, repository, **changes)
        assert command(repository, store, "--wait", 250) == 0
    assert len(slept) == 3
    assert capsys.readouterr().err.count("waiting up to") == 1


def test_after_waiting_in_vain_a_plan_of_another_gpu_is_taken(repository, store, monkeypatch, capsys, machine):
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "monotonic", lambda: float(100 * len(slept)))
    add(store, repository, gpu=H200)
    assert command(repository, store, "--wait", 250) == 0
    assert len(slept) == 3
    assert "the plan was tuned on NVIDIA H200; on NVIDIA H100 it runs" in capsys.readouterr().out


WAITING = """
import sys
from millibert import cli
from millibert_ensemble import preflight_command
from millibert_ensemble.machine import Gpu, Machine

preflight_command.this_machine = lambda: Machine("11.4.1", (Gpu("NVIDIA H100", "9.0", 80 << 30, "580.1"),))
raise SystemExit(cli.main(["preflight", "--wait", "600", *sys.argv[1:]]))
"""


def test_waiting_ends_at_sigterm(repository, store):
    options = ["--repository", str(repository), "--plans", str(store)]
    with subprocess.Popen([sys.executable, "-c", WAITING, *options], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "waiting up to 600 s" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        # By its own handler, without which the first process of a container would not end.
        assert process.wait(60) == 128 + signal.SIGTERM


def test_links_in_a_release_are_followed(tmp_path):
    release = tmp_path / "release"
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "labels.json").write_text("[]")
    (release / "postprocess").mkdir(parents=True)
    (release / "release.json").write_text("{}")
    (release / "postprocess" / "1").symlink_to(tmp_path / "shared", target_is_directory=True)
    assemble(release, None, tmp_path / "out")
    assert (tmp_path / "out" / "postprocess" / "1").readlink() == tmp_path / "shared"
    with pytest.raises(UsageError, match="in the release itself"):
        assemble(release, None, release / "out")


@pytest.mark.e2e
def test_triton_serves_links(release, tmp_path, triton):
    """The CPU engine, from a repository that has no file of its own, answers what the release itself answers."""
    out = tmp_path / "served"
    assert cli.main(["preflight", "--repository", str(release.repository), "--out", str(out)]) == 0
    assert all(path.is_dir() or path.is_symlink() for path in out.rglob("*"))
    texts = ["where is my parcel?", "I was charged twice"]
    answers = []
    for repository in (release.repository, out):
        with triton(repository) as server, millibert.connect(server.grpc_url, server.models[0]) as client:
            answers.append([(answer.label, answer.score) for answer in client.classify(texts)])
    assert answers[0] == answers[1]
