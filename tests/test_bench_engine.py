"""The benchmark of layouts in process."""

from __future__ import annotations

import json

import pytest
from tests.conftest import CUSTOMER_SERVICE

from millibert import cli
from millibert_build import bench_engine


def test_all_layouts_agree_and_are_timed(release, capsys):
    arguments = ["bench-engine", f"--checkpoint={release.work}/checkpoint", f"--data={CUSTOMER_SERVICE}/test.csv"]
    assert cli.main([*arguments, "--engine", "onnxruntime", "--rounds", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    results = {row["precision"]: row for row in report["results"]}
    assert {"fp32", "int8"} <= set(results)
    assert results["fp32"]["max_logit_difference"] < 1e-3
    for row in results.values():
        assert all(row[layout] > 0 for layout in ("padded", "packed", "rows"))
        assert row["rows_to_padded"] == pytest.approx(row["rows"] / row["padded"])  # one round

    printed = bench_engine._table(report).splitlines()
    assert "to packed" in printed[2]
    assert [line.split()[0] for line in printed[3:]] == list(results)
