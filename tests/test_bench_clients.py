"""The benchmark of the clients, on a real server; perf_analyzer's part by its table, since it is on few machines."""

from __future__ import annotations

import json
import shutil

import pytest
from tests.conftest import CUSTOMER_SERVICE

from load import bench_clients

TEST = CUSTOMER_SERVICE / "test.csv"


@pytest.mark.e2e
def test_both_parts(release, tmp_path, monkeypatch, capsys):
    program = tmp_path / "perf_analyzer"
    table = "Concurrency,Inferences/Second,p50 latency,p99 latency\\n2,100,2000,3000\\n"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit 0\nfor each; do f="$each"; done\nprintf \'{table}\' > "$f"'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    small = ["--calls", "20", "--texts", "64", "--rounds", "1", "--batch-size", "8", "--concurrency", "2"]
    # A copy: Python leaves its byte code in what is served, and other tests compare the release's files.
    repository = shutil.copytree(release.repository, tmp_path / "repository")
    assert bench_clients.main(["--repository", str(repository), "--data", str(TEST), *small, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["overhead"]) == {"grpc", "http", "grpc-aio", "http-aio"}
    for each in found["overhead"].values():
        assert each["ours"] > 0
        assert each["difference"] == pytest.approx(each["ours"] - each["by_hand"])
    rates = found["many"]["texts_per_second"]
    assert rates["perf_analyzer"] == 100
    assert found["many"]["ratio"] == {name: rates[name] / 100 for name in ("threads", "asyncio")}
    shown = bench_clients.table(found)
    assert "grpc-aio" in shown
    assert f"classify_many by threads: {rates['threads'] / 100:.3f} of perf_analyzer" in shown
