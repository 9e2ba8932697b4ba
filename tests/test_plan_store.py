"""A store of plans: keys that say what a plan depends on, folders that appear whole, builders side by side."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from millibert import UsageError
from millibert_ensemble import plan_store, staging
from millibert_ensemble.machine import Gpu
from millibert_ensemble.plan_manifest import PlanManifest, load_plan_manifest
from millibert_ensemble.plan_store import damage, holds, key_of, keys, publish, state, sweep

H100 = Gpu("NVIDIA H100 80GB HBM3", "9.0", 80 << 30, "580.1")
PLAN = b"a plan"
SIZE = {"min": (1,), "opt": (2,), "max": (3,)}
MANIFEST = PlanManifest(
    created="2026-11-24T00:00:00+00:00",
    onnx_sha256="0f",
    plan_sha256=hashlib.sha256(PLAN).hexdigest(),
    precision="fp16",
    layout="packed",
    tensorrt="11.4.1",
    gpu=H100,
    hardware_compatibility="none",
    version_compatible=False,
    sparse=False,
    tf32=False,
    optimization_level=3,
    workspace_bytes=1,
    labels=10,
    max_texts=16,
    max_tokens=64,
    typical_tokens=9,
    profiles=({"input_ids": SIZE, "span": SIZE},),
    seconds=60.0,
)
KEY = key_of(MANIFEST)


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "plans"
    folder.mkdir()
    return folder


def hidden(store):
    return [path.name for path in store.iterdir() if path.name.startswith(".")]


def test_a_key_can_be_read():
    assert KEY.startswith("nvidia-h100-80gb-hbm3-sm90-trt11.4.1-")
    assert len(KEY.rpartition("-")[2]) == 16


def test_a_key_names_all_that_a_plan_depends_on_and_nothing_that_only_the_build_tells():
    other = {**SIZE, "max": (4,)}
    apart: dict[str, Any] = {
        "onnx_sha256": "10",
        "tensorrt": "11.4.2",
        "gpu": Gpu("NVIDIA H200", "9.0", 80 << 30, "580.1"),
        "hardware_compatibility": "ampere_plus",
        "version_compatible": True,
        "sparse": True,
        "tf32": True,
        "optimization_level": 5,
        "workspace_bytes": 2,
        "profiles": ({"input_ids": SIZE, "span": other},),
    }
    found = [key_of(dataclasses.replace(MANIFEST, **{name: value})) for name, value in apart.items()]
    assert len({KEY, *found}) == 1 + len(apart)
    alike: dict[str, Any] = {"created": "", "plan_sha256": "", "seconds": 0.0}
    assert key_of(dataclasses.replace(MANIFEST, **alike)) == KEY
    # The same machine with another driver, and the inputs in another order.
    assert key_of(dataclasses.replace(MANIFEST, gpu=dataclasses.replace(H100, driver="590.1"))) == KEY
    assert key_of(dataclasses.replace(MANIFEST, profiles=({"span": SIZE, "input_ids": SIZE},))) == KEY


def test_a_published_plan_is_there_whole_and_for_other_users(store):
    before = os.umask(0o077)
    try:
        folder = publish(store, MANIFEST, PLAN)
    finally:
        os.umask(before)
    assert folder == store / KEY
    assert keys(store) == [KEY]
    assert holds(store, KEY)
    assert load_plan_manifest(folder / "plan.json") == MANIFEST
    assert (folder / "model.plan").read_bytes() == PLAN
    assert folder.stat().st_mode & 0o777 == 0o755
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())
    assert hidden(store) == []


def test_nothing_half_written_is_ever_under_a_key(store, monkeypatch):
    seen = []
    write = staging.write

    def look(path, content):
        write(path, content)
        seen.append((keys(store), holds(store, KEY)))

    monkeypatch.setattr(staging, "write", look)
    publish(store, MANIFEST, PLAN)
    assert seen == [([], False)] * 2


def test_a_failed_write_leaves_nothing(store, monkeypatch):
    def full(path, content):
        path.write_bytes(content[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(staging, "write", full)
    with pytest.raises(OSError, match="No space left"):
        publish(store, MANIFEST, PLAN)
    assert list(store.iterdir()) == []


def test_the_plan_of_a_faster_builder_stays(store):
    first = publish(store, MANIFEST, PLAN).stat().st_ino
    slower = dataclasses.replace(MANIFEST, plan_sha256=hashlib.sha256(b"another").hexdigest(), seconds=90.0)
    assert publish(store, slower, b"another").stat().st_ino == first
    assert (store / KEY / "model.plan").read_bytes() == PLAN
    assert hidden(store) == []


def test_of_many_builders_at_once_one_publishes_and_none_fails(store):
    builders = 8
    together = threading.Barrier(builders)
    failures = []

    def build(number):
        plan = b"plan %d" % number
        mine = dataclasses.replace(MANIFEST, plan_sha256=hashlib.sha256(plan).hexdigest())
        together.wait()
        try:
            publish(store, mine, plan)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=build, args=(number,)) for number in range(builders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert keys(store) == [KEY]
    assert holds(store, KEY)
    assert hidden(store) == []


DAMAGE = {
    "no manifest": (lambda folder: (folder / "plan.json").unlink(), "plan.json: not a plan's manifest"),
    "no plan": (lambda folder: (folder / "model.plan").unlink(), "there is no model.plan"),
    "half a plan": (lambda folder: (folder / "model.plan").write_bytes(PLAN[:2]), "damaged, or half copied"),
    "of another key": (
        lambda folder: (folder / "plan.json").write_text(json.dumps({**MANIFEST.as_json(), "tf32": True})),
        "describes another plan, nvidia-h100-80gb-hbm3-sm90-trt11.4.1-",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("swappable", [True, False])
def test_damage_is_named_and_replaced(store, case, swappable, monkeypatch):
    harm, message = DAMAGE[case]
    harm(publish(store, MANIFEST, PLAN))
    before = state(store)
    found = damage(store, KEY)
    assert found is not None
    assert message in found
    if not swappable:  # NFS, for one
        monkeypatch.setattr(staging, "exchange", staging._exchange_in_steps)
    publish(store, MANIFEST, PLAN)
    assert damage(store, KEY) is None
    assert state(store) != before  # who waits for a plan notices
    assert hidden(store) == []


WRITER = """
import sys
from pathlib import Path
from millibert_ensemble import staging

with staging.staged(Path(sys.argv[1]), "plan") as folder:
    (folder / "model.plan").write_bytes(b"half a p")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_builder_left_is_swept_and_a_living_ones_is_not(store):
    command = [sys.executable, "-c", WRITER, str(store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        publish(store, MANIFEST, PLAN)
        left = hidden(store)
        assert sorted(name.rpartition(".")[2] for name in left) == ["lock", "new"]
        writer.kill()
    assert hidden(store) == left
    sweep(store)
    assert hidden(store) == []
    assert holds(store, KEY)


def test_where_the_file_system_has_no_locks_plans_are_published_and_nothing_is_swept(store, monkeypatch):
    (store / ".plan.0123.lock").touch()
    (store / ".plan.0123.new").mkdir()

    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    publish(store, MANIFEST, PLAN)
    assert holds(store, KEY)
    assert sorted(hidden(store)) == [".plan.0123.lock", ".plan.0123.new"]


def test_a_sweep_that_comes_between_making_and_locking_is_noticed(store, monkeypatch):
    flock = fcntl.flock
    made: list[Path] = []

    def swept(descriptor, operation):
        flock(descriptor, operation)
        if not made:  # the first time, as if a sweep had been faster
            (lock,) = store.glob(".plan.*.lock")
            lock.unlink()
            made.append(lock)

    monkeypatch.setattr(fcntl, "flock", swept)
    with staging.staged(store, "plan") as folder:
        assert folder.with_suffix(".lock").is_file()
        assert folder.with_suffix(".lock") not in made
    assert hidden(store) == []


def test_a_swap_in_steps_that_fails_brings_the_old_folder_back(tmp_path):
    (tmp_path / "place").mkdir()
    with pytest.raises(FileNotFoundError):
        staging._exchange_in_steps(tmp_path / ".place.1.new", tmp_path / "place")
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_files_and_hidden_folders_are_no_plans_and_no_store_is_an_error(store, tmp_path):
    (store / "README").touch()
    (store / plan_store.TIMING).mkdir()
    assert keys(store) == []
    with pytest.raises(UsageError, match="no plan store at"):
        keys(tmp_path / "nowhere")
