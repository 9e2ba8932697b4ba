"""The GPU benchmark, on a CPU: everything but CUDA's own calls."""

from __future__ import annotations

import json

import pytest
import torch
from tests.conftest import CUSTOMER_SERVICE

from millibert import cli
from millibert_build import bench_gpu


@pytest.fixture
def arguments(release):
    return ["bench-gpu", f"--checkpoint={release.work}/checkpoint", f"--data={CUSTOMER_SERVICE}/test.csv"]


def test_both_layouts_agree_and_are_timed(arguments, capsys):
    options = ["--device", "cpu", "--precision", "bf16", "--batch", "1", "16", "--rounds", "1"]
    assert cli.main([*arguments, *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packed_agreement"] >= 0.99
    assert report["padded_agreement"] >= 0.99
    assert report["max_logit_difference"] < 0.1
    assert [row["batch"] for row in report["results"]] == [1, 16]
    assert all(row[f"{name}_eager_texts_per_second"] > 0 for row in report["results"] for name in ("padded", "packed"))
    assert cli.main([*arguments, *options]) == 0
    assert "padded texts/s" in capsys.readouterr().out


def test_wrong_answers_are_not_timed(arguments, capsys, monkeypatch):
    monkeypatch.setattr(bench_gpu, "MIN_AGREEMENT", 1.1)
    monkeypatch.setattr(bench_gpu, "_measure", lambda *_: pytest.fail("timed"))
    assert cli.main([*arguments, "--device", "cpu"]) == 1
    assert "of 250 texts only" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(arguments, capsys):
    assert cli.main(arguments) == 1
    assert "PyTorch sees no CUDA GPU here" in capsys.readouterr().err
