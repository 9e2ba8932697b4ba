"""The benchmark under load, on a real Triton; perf_analyzer's part where it is installed, else by its table."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tests.conftest import CUSTOMER_SERVICE

from load import __main__ as bench
from load.ceiling import measure_ceiling
from load.generator import Load, measure
from millibert import MillibertError
from millibert import _perf_analyzer as perf_analyzer
from millibert._labelled_texts import read_labelled_texts

TEST = CUSTOMER_SERVICE / "test.csv"


def test_the_table_of_perf_analyzer_is_read(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(
        "Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,p50 latency,p90 latency,"
        "p95 latency,p99 latency\n8,1234.5,20,300,40,6400,7000,7300,9100\n"
    )
    assert perf_analyzer.read_table(path, 32, 8) == (32, 8, 1234.5, 6.4, 9.1)


def test_perf_analyzer_is_called_and_believed(tmp_path, monkeypatch):
    program = tmp_path / "perf_analyzer"
    header = "Concurrency,Inferences/Second,p50 latency,p99 latency"
    script = ["#!/bin/sh", '[ "$1" = --version ] && exit 0', f'echo "$@" > {tmp_path}/arguments']
    script += ['for each; do file="$each"; done', f"printf '{header}\\n4,100,2000,3000\\n' > \"$file\""]
    program.write_text("\n".join(script))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert perf_analyzer.is_here()
    found = perf_analyzer.measure("http://127.0.0.1:8000", "support", tmp_path / "texts.json", 8, 4, 700)
    assert found == (8, 4, 100.0, 2.0, 3.0)
    arguments = (tmp_path / "arguments").read_text()
    for part in ("-m support", "-i http", "-u 127.0.0.1:8000", "-b 8", "--concurrency-range 4", "-interval 700"):
        assert part in arguments
    program.write_text("#!/bin/sh\necho Failed to obtain stable measurement >&2\nexit 2\n")
    assert perf_analyzer.measure("grpc://127.0.0.1", "support", tmp_path / "texts.json", 1, 1) is None
    program.write_text("#!/bin/sh\necho no such model >&2\nexit 1\n")
    with pytest.raises(MillibertError, match="no such model"):
        perf_analyzer.measure("grpc://127.0.0.1", "support", tmp_path / "texts.json", 1, 1)


def test_the_engine_alone_gives_the_labels_of_the_texts_in_their_order(release):
    rows = read_labelled_texts(TEST, "text", "label")
    ceiling = measure_ceiling(release.repository, [row.text for row in rows], rounds=1)
    labels = json.loads((release.repository / "release.json").read_text())["labels"]
    right = np.mean([labels[index] == row.label for index, row in zip(ceiling.best_labels, rows, strict=True)])
    tested = json.loads((release.repository / "release.json").read_text())["metrics"]["test"]
    assert right == pytest.approx(tested["engine_score"], abs=0.01)
    assert ceiling.precision == "fp32"
    assert ceiling.texts_per_second > 0
    assert ceiling.batch_1_ms > 0


@pytest.mark.e2e
def test_a_run_measures_engine_and_service_on_the_same_texts(release, monkeypatch, capsys):
    monkeypatch.setattr(perf_analyzer, "is_here", lambda: False)
    options = ["--concurrency", "1", "4", "--texts", "1", "8", "--seconds", "1", "--rounds", "1", "--json"]
    assert bench.main(["--repository", str(release.repository), "--data", str(TEST), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["load"] == "own client"
    assert report["same_label"] == 1
    assert report["served_accuracy"] == report["engine_accuracy"]
    assert [(case["texts"], case["concurrency"]) for case in report["cases"]] == [(1, 1), (1, 4), (8, 1), (8, 4)]
    for case in report["cases"]:
        assert 0 < case["p50_ms"] <= case["p99_ms"]
        assert case["of_ceiling"] == pytest.approx(case["texts_per_second"] / report["engine"]["texts_per_second"])
    lines = bench.table(report).splitlines()
    assert len(lines) == 4 + len(report["cases"])


@pytest.mark.e2e
def test_a_failing_request_ends_the_run(triton, release):
    with triton(release.repository) as server, pytest.raises(MillibertError, match="a request failed"):
        measure(Load(server.grpc_url, "nobody", ["a text"], 1, 2, 0.5))


def test_http_without_perf_analyzer_is_refused(release, monkeypatch, capsys):
    monkeypatch.setattr(perf_analyzer, "is_here", lambda: False)
    options = ["--repository", str(release.repository), "--data", str(TEST), "--transport", "http"]
    assert bench.main(options) == 1
    assert "--transport http needs perf_analyzer" in capsys.readouterr().err


def test_wrong_data_is_told(release, tmp_path, capsys):
    assert bench.main(["--repository", str(release.repository), "--data", str(tmp_path / "none.csv")]) == 1
    assert "none.csv" in capsys.readouterr().err
