"""Settings are tried on a real server, kept, and published only when they are better."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
from tests.conftest import CUSTOMER_SERVICE

from load import tune_serving
from load.serving_settings import Settings, alternatives, engine_model, read_settings, write_variant
from load.slo import parse_slo
from millibert import MillibertError
from millibert_ensemble.machine import Machine
from millibert_ensemble.preflight import preflight

SLO = parse_slo("p50<20s,refused<50%")


def test_settings_are_read_and_written(release, tmp_path):
    own = read_settings(release.repository, cpus=2)
    assert (own.instances, own.threads, own.queue_delay_us) == (1, 2, 0)
    assert own.batch >= 16
    wanted = Settings(2, 1, 64, 500)
    write_variant(release.repository, wanted, tmp_path / "variant", cpus=4)
    assert read_settings(tmp_path / "variant", cpus=4) == wanted
    assert read_settings(tmp_path / "variant", cpus=8) == wanted
    assert read_settings(release.repository, cpus=2) == own


def test_threads_that_are_a_share_of_the_cpus_stay_that(release, tmp_path):
    write_variant(release.repository, Settings(2, 2, 64, 0), tmp_path / "variant", cpus=4)
    assert read_settings(tmp_path / "variant", cpus=4).threads == 2
    assert read_settings(tmp_path / "variant", cpus=16).threads == 8
    assert read_settings(tmp_path / "variant", cpus=1).threads == 1


def test_alternatives_differ_in_one_respect_and_fit_the_machine():
    own = Settings(1, 4, 32, 0)
    found = set(alternatives(own, cpus=4, least_batch=16)) - {own}
    assert found
    for each in found:
        assert each.instances * each.threads <= 4
        assert each.batch >= 16
        differing = {name for name in Settings._fields if getattr(each, name) != getattr(own, name)}
        assert len(differing - {"threads"}) <= 1


@pytest.fixture
def args(release, tmp_path):
    parser = argparse.ArgumentParser()
    tune_serving.configure(parser)
    given = ["--repository", str(release.repository), "--out", str(tmp_path / "tuned"), "--slo", "p50<20s,refused<50%"]
    given += ["--seconds", "0.5", "--repeats", "2", "--work", str(tmp_path / "work"), "--json"]
    return parser.parse_args([*given, "--texts", str(CUSTOMER_SERVICE / "test.csv")])


class Trials(tune_serving._Trials):
    """A machine on which two instances answer twice as many, as the test says."""

    better = True

    def rate(self, settings: Settings) -> float | None:
        found = 100.0 * settings.instances - settings.queue_delay_us
        self.done.append({"settings": settings._asdict(), "rate": found})
        return found

    def compare(self, own: Settings, best: Settings) -> dict:
        return {"rate": 200.0, "own_p99_ms": [9.0, 9.1], "best_p99_ms": [5.0, 5.1], "better": self.better}


def test_the_best_is_published_as_a_sound_release_with_its_evidence(args, monkeypatch, capsys):
    monkeypatch.setattr(tune_serving, "_Trials", Trials)
    assert tune_serving.run(args) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"]["instances"] == 2
    assert read_settings(args.out, cpus=2).instances == 2
    manifest = json.loads((args.out / "release.json").read_text())
    assert manifest["serving"]["evidence"]["slo"] == ["p50<20000ms", "refused<50%"]
    assert preflight(args.out, Machine(gpus=(), tensorrt=None)).answer == "usable"


def test_what_is_no_better_than_the_noise_is_not_published(args, monkeypatch, capsys):
    monkeypatch.setattr(tune_serving, "_Trials", Trials)
    monkeypatch.setattr(Trials, "better", False)
    assert tune_serving.run(args) == 0
    assert json.loads(capsys.readouterr().out)["published"] is None
    assert not args.out.exists()


def test_where_no_settings_keep_the_slo_that_is_said(args, monkeypatch):
    monkeypatch.setattr(tune_serving, "_Trials", Trials)
    monkeypatch.setattr(Trials, "rate", lambda self, settings: None)
    with pytest.raises(MillibertError, match="no settings keep"):
        tune_serving.run(args)


def test_a_trial_on_a_real_server_is_measured_once_and_kept(args, triton, release):
    manifest = json.loads((release.repository / "release.json").read_text())
    own = read_settings(release.repository, cpus=2)
    first = tune_serving._Trials(args, manifest)
    rate = first.rate(own)
    assert rate is not None
    # A run that was killed while it wrote leaves half a line.
    with (args.work / "trials.jsonl").open("a") as file:
        file.write('{"question"')
    again = tune_serving._Trials(args, manifest)
    assert again.rate(own) == rate
    assert len(again.done) == 1
    args.slo = parse_slo("p50<10s")
    assert tune_serving._Trials(args, manifest).done == []


def test_without_a_release_it_says_so(tmp_path):
    command = [sys.executable, "-m", "millibert.cli", "tune-serving", "--repository", str(tmp_path), "--slo", "p99<1s"]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is no release" in done.stderr


def test_the_engine_of_a_fused_release_is_its_only_model(tmp_path):
    (tmp_path / "support").mkdir()
    (tmp_path / "support" / "config.pbtxt").write_text("")
    assert engine_model(tmp_path) == "support"
