"""Several labels a text, from NLU++'s folds to a served answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import millibert

NLUPP = Path(__file__).parents[2] / "shared" / "data" / "nlupp" / "banking"
pytestmark = pytest.mark.skipif(not NLUPP.is_dir(), reason="NLU++ is not on this machine")
FOLDS = ["--train", str(NLUPP / "fold[0-5].json"), "--test", str(NLUPP / "fold1[6-9].json")]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "millibert.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.e2e
def test_served_labels_are_those_measured_in_process(tmp_path, triton):
    repository = tmp_path / "repository"
    settings = ["--epochs", "4", "--precision", "fp32"]
    for key in ("data.copies=drop", "max_tokens=48", "training.batch_size=8"):
        settings += ["--set", key]
    what = ["--name", "banking", "--problem", "multi_label", *FOLDS, "--label-column", "intents", *settings]
    done = run("build", *what, "--out", str(repository), "--work", str(tmp_path / "work"))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((repository / "release.json").read_text())
    test = manifest["metrics"]["test"]
    assert (manifest["problem"], test["score_name"]) == ("multi_label", "micro-F1")
    assert len(set(manifest["thresholds"].values())) > 5  # each label its own
    assert test["engine_score"] > 0.3  # all 48 labels for every text: 0.07
    data = []
    for fold in sorted(NLUPP.glob("fold1[6-9].json")):
        data += json.loads(fold.read_text())
    (tmp_path / "test.json").write_text(json.dumps(data))
    with triton(repository) as server:
        columns = ["--data", str(tmp_path / "test.json"), "--label-column", "intents", "--multi-label", "--json"]
        measured = run("evaluate", "--url", server.grpc_url, "--model", "banking", *columns)
        assert measured.returncode == 0, measured.stderr
        figures = json.loads(measured.stdout)
        assert figures["micro_f1"] == pytest.approx(test["engine_score"], abs=1e-9)
        assert figures["macro_f1"] == pytest.approx(test["engine_macro_f1"], abs=1e-9)
        with millibert.connect(server.http_url, "banking") as client:
            labels = client.labels()
            assert list(labels) == manifest["labels"]
            (answer,) = client.classify([data[0]["text"]], top_k=len(labels))
    # Sigmoid: the probabilities of all labels need not add up to 1, and each is held to its own threshold.
    assert sum(each.score for each in answer.predictions) != pytest.approx(1, abs=0.01)
    for each in answer.predictions:
        assert each.accepted == (np.float32(each.score) >= np.float32(manifest["thresholds"][each.label])), each
