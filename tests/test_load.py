"""The benchmarks under load, on a real Triton; perf_analyzer's part by its table, since it is on few machines."""

from __future__ import annotations

import argparse
import json
import subprocess
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from tests.conftest import CUSTOMER_SERVICE

import millibert
from load import __main__ as bench
from load import install_perf_analyzer, overload, report, soak
from load.cases import Case, Run, as_json
from load.ceiling import EngineAlone, Pace, load_tokenizer
from load.generator import Answers, Load, Phase, due_times, measure, send
from load.mixes import make_mix
from load.transports import ANSWERED, triton_requests
from load.twins import write_cached_twin, write_fp32_twin, write_padded_twin
from millibert import MillibertError
from millibert import _perf_analyzer as perf_analyzer
from millibert._errors import UsageError
from millibert._labelled_texts import read_labelled_texts
from millibert._perf_analyzer import Measurement

TEST = CUSTOMER_SERVICE / "test.csv"
TEXTS = [row.text for row in read_labelled_texts(TEST, "text", "label")]


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


def test_perf_analyzer_is_installed_with_the_runtime_it_needs(tmp_path):
    (tmp_path / "bin").mkdir()
    shows = b'#!/bin/sh\nls -l "${LD_LIBRARY_PATH%%:*}"; echo "$@"\n'
    script = install_perf_analyzer.install(tmp_path / "bin", shows)
    assert script == tmp_path / "bin" / "perf_analyzer"
    shown = subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
    assert "libcudart.so.12 -> " in shown
    assert shown.endswith("--version\n")


def test_the_engine_alone_gives_the_labels_of_the_texts_in_their_order(release):
    rows = read_labelled_texts(TEST, "text", "label")
    alone = EngineAlone(release.repository)
    labels = json.loads((release.repository / "release.json").read_text())["labels"]
    right = np.mean([labels[index] == row.label for index, row in zip(alone.best_labels(TEXTS), rows, strict=True)])
    tested = json.loads((release.repository / "release.json").read_text())["metrics"]["test"]
    assert right == pytest.approx(tested["engine_score"], abs=0.01)
    assert alone.precision == "fp32"
    pace = alone.pace_on(TEXTS)()
    assert pace.texts_per_second > 0
    assert pace.batch_1_ms > 0


def test_shares_are_of_what_the_engine_did_just_before():
    # In the second round the machine has half the speed; the third was refused.
    runs = [
        Run(Pace(1000, 1.0), Measurement(1, 1, 500, 2.0, 3.0)),
        Run(Pace(500, 2.0), Measurement(1, 1, 250, 4.0, 6.0)),
        Run(Pace(1000, 1.0), None),
    ]
    found = as_json(Case("release", "data", "grpc", 1, 1), runs)
    assert found["runs"] == 2
    assert found["of_engine"] == 0.5
    assert found["above_engine_ms"] == 1.5
    assert found["texts_per_second"] == 375
    assert "above_engine_ms" not in as_json(Case("release", "data", "grpc", 1, 8), runs)
    assert as_json(Case("release", "data", "grpc", 32, 8), runs[2:])["runs"] == 0


def test_mixes_are_as_long_as_they_say(release):
    tokenizer, limit = load_tokenizer(release.repository)
    assert limit == 64
    short, data, long = (make_mix(name, TEXTS, tokenizer, limit) for name in ("short", "data", "long"))
    assert list(data.texts) == TEXTS
    assert all(len(text.split()) <= 4 for text in short.texts)
    assert short.mean < data.mean < long.mean
    assert long.longest == limit
    assert len(short.texts) == len(long.texts) == len(TEXTS)


def test_an_open_loop_is_due_at_constant_intervals():
    due = due_times([Phase(4, 1), Phase(2, 2)])
    assert due == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5])


def test_a_load_must_say_what_it_is():
    requests = triton_requests("grpc://127.0.0.1:1", "support", ["a"])
    with pytest.raises(UsageError, match=r"closed loop.*open loop"):
        Load(requests)
    with pytest.raises(UsageError, match=r"closed loop.*open loop"):
        Load(requests, concurrency=1, phases=[Phase(1, 1)])
    with pytest.raises(UsageError, match="fewer texts"):
        Load(triton_requests("grpc://127.0.0.1:1", "support", ["a"], per_request=2), concurrency=1)
    with pytest.raises(UsageError, match="more than"):
        Load(requests, phases=[Phase(1e6, 1e6)])


@pytest.fixture(scope="module")
def server(triton, release):
    with triton(release.repository) as running:
        yield running


@pytest.mark.e2e
@pytest.mark.parametrize("transport", ["grpc_url", "http_url"])
def test_requests_over_both_transports_are_answered(server, transport):
    requests = triton_requests(getattr(server, transport), "support", TEXTS, per_request=4)
    found = measure(Load(requests, seconds=1, concurrency=3), 4)
    assert 0 < found.p50_ms <= found.p99_ms
    assert found.texts_per_second > 0
    refused = send(Load(triton_requests(getattr(server, transport), "nobody", TEXTS), phases=[Phase(20, 0.5)]))
    assert len(refused.status) == 10
    assert set(refused.status) <= {"NOT_FOUND", "HTTP 404", "HTTP 400", "INVALID_ARGUMENT", "UNAVAILABLE"}


@pytest.mark.e2e
def test_an_open_loop_sends_what_is_due_and_nothing_else(server):
    found = send(Load(triton_requests(server.grpc_url, "support", TEXTS), phases=[Phase(50, 1), Phase(20, 1)]))
    assert len(found.due) == 70
    assert set(found.status) == {ANSWERED}
    assert len(found.between(0, 1).due) == 50
    assert found.percentile(50) > 0


@pytest.mark.e2e
def test_a_failing_request_ends_a_closed_loop(server):
    with pytest.raises(MillibertError, match=r"requests were not answered: \w+"):
        measure(Load(triton_requests(server.grpc_url, "nobody", ["a text"]), seconds=0.3, concurrency=2), 1)


@pytest.mark.e2e
def test_a_run_measures_engine_and_service_on_the_same_texts(release, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(perf_analyzer, "is_here", lambda: False)
    plot = tmp_path / "plot.svg"
    options = ["--concurrency", "1", "4", "--texts", "1", "8", "--seconds", "1", "--rounds", "1", "--json"]
    options += ["--forms", "fused", "--mixes", "data", "--plot", str(plot)]
    assert bench.main(["--repository", str(release.repository), "--data", str(TEST), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["load"] == "own client"
    assert found["same_label"] == 1
    assert found["served_accuracy"] == found["engine_accuracy"]
    cases = {tuple(case[key] for key in ("form", "transport", "texts", "concurrency")) for case in found["cases"]}
    grid = [(texts, concurrency) for texts in (1, 8) for concurrency in (1, 4)]
    assert cases == {
        (form, transport, *each)
        for form, transport in (("release", "grpc"), ("release", "http"), ("fused", "grpc"))
        for each in grid
    }
    for case in found["cases"]:
        assert 0 < case["p50_ms"] <= case["p99_ms"]
        assert case["of_engine"] > 0
        assert ("above_engine_ms" in case) == (case["texts"] == case["concurrency"] == 1)
    assert found["engine"]["data"]["batch_1_ms"] > 0
    assert len(report.table(found).splitlines()) == 4 + len(found["cases"])
    drawn = ElementTree.parse(plot).getroot()
    kinds = [element.tag.rpartition("}")[2] for element in drawn.iter()]
    assert kinds.count("circle") == len(found["cases"])
    assert kinds.count("polyline") == 6


def test_the_plan_has_the_whole_grid_and_the_comparisons():
    args = argparse.Namespace(
        concurrency=[1, 8, 64, 256], texts=[1, 8, 32], transports=["grpc", "http"], mixes=["data", "long"]
    )
    cases = list(dict.fromkeys(bench.plan(args, ["fused"])))
    assert sum(case[:3] == ("release", "data", "grpc") for case in cases) == 12
    for kind in (("release", "data", "http"), ("release", "long", "grpc"), ("fused", "data", "grpc")):
        assert sorted(case[3:] for case in cases if case[:3] == kind) == [(1, 1), (1, 64), (32, 1), (32, 64)]
    assert len(cases) == 24


def test_wrong_arguments_are_told(release, tmp_path, capsys):
    assert bench.main(["--repository", str(release.repository), "--data", str(tmp_path / "none.csv")]) == 1
    assert "none.csv" in capsys.readouterr().err
    options = ["--repository", str(release.repository), "--data", str(TEST), "--forms", "padded"]
    assert bench.main(options) == 1
    assert "needs --checkpoint" in capsys.readouterr().err


@pytest.mark.e2e
def test_twins_answer_as_the_release_does(release, triton, server, tmp_path):
    write_padded_twin(release.repository, release.work / "checkpoint", TEXTS, tmp_path / "padded")
    write_cached_twin(release.repository, 20, tmp_path / "cached")
    write_fp32_twin(release.repository, release.work / "checkpoint", tmp_path / "fp32")
    with millibert.connect(server.grpc_url, "support") as client:
        expected = [client.classify(text) for text in TEXTS[:30]]
    for name in ("padded", "cached", "fp32"):
        with triton(tmp_path / name) as twin, millibert.connect(twin.grpc_url, "support") as client:
            for _ in range(2):  # the second time some come from the cache
                found = [client.classify(text) for text in TEXTS[:30]]
                assert [answer.label for answer in found] == [answer.label for answer in expected]
                assert [a.score for a in found] == pytest.approx([a.score for a in expected], abs=1e-3)
            both = client.classify([TEXTS[29], TEXTS[0], TEXTS[29]])
            assert [answer.label for answer in both] == [expected[29].label, expected[0].label, expected[29].label]
    with pytest.raises(UsageError, match="not a checkpoint"):
        write_fp32_twin(release.repository, tmp_path, tmp_path / "other")


def answers(*phases: tuple[int, float, str]) -> Answers:
    """Requests a second for each second: count, latency in seconds, status."""
    due = np.concatenate([second + np.arange(count) / count for second, (count, _, _) in enumerate(phases)])
    latency = np.concatenate([np.full(count, latency) for count, latency, _ in phases])
    status = np.concatenate([np.full(count, status) for count, _, status in phases])
    return Answers(due, latency, status)


def held(found) -> list[bool]:
    return [verdict["held"] for verdict in found["verdicts"]]


def test_overload_is_judged_by_what_was_asked_for():
    usual, over = (80, 0.01, ANSWERED), (100, 0.03, ANSWERED)
    good = overload.judge(answers(usual, usual, over, (100, 0.06, "UNAVAILABLE"), usual, usual), 2, 2, 50)
    assert held(good) == [True, True, True, True]
    assert good["over"]["answered"] == 0.5
    assert good["over"]["refused_p50_ms"] == pytest.approx(60)
    assert good["recovery_seconds"] == 0
    slow = overload.judge(answers(usual, usual, (100, 0.05, ANSWERED), (9, 0.9, "UNAVAILABLE"), usual, usual), 2, 2, 50)
    assert held(slow) == [False, True, False, True]
    lost = overload.judge(answers(usual, usual, over, (5, 0.01, "INTERNAL"), over, over, over), 2, 2, 50)
    assert held(lost) == [True, False, True, False]
    assert lost["over"]["failed_otherwise"] == 5
    assert [second["p99_ms"] for second in lost["after"]] == pytest.approx([30] * 2)
    assert "FAIL  every other request" in overload.table({**lost, **OVERHEAD})


def test_as_before_is_a_second_with_no_more_refusals_than_the_worst_one_before():
    def seconds(*refused: int) -> Answers:
        parts = [answers((80, 0.01, ANSWERED)) for _ in refused]
        for one, count in zip(parts, refused, strict=True):
            one.status[:count] = "UNAVAILABLE"
        due = np.concatenate([part.due + second for second, part in enumerate(parts)])
        return Answers(due, np.full(len(due), 0.01), np.concatenate([part.status for part in parts]))

    def recovery(*refused: int) -> Any:
        return overload.judge(seconds(*refused), 4, 1, 50)["recovery_seconds"]

    assert recovery(0, 0, 2, 0, 40, 0, 1, 0) == 0
    assert recovery(0, 0, 2, 0, 40, 80, 3, 2, 0) == 2
    assert recovery(0, 0, 0, 0, 40, 1, 1, 1, 0) is None  # the last second is not whole
    assert recovery(9, 0, 0, 0, 40, 1, 1, 1, 0) is None  # the first one was warming up
    short = overload.judge(answers((80, 0.01, ANSWERED), (40, 0.01, ANSWERED), *[(80, 0.01, ANSWERED)] * 2), 1, 1, 50)
    assert short["recovery_seconds"] == 0  # with no whole second before, one without a refusal


OVERHEAD = {"model": "m", "cpus": 2, "cpu": "x", "load": "l", "capacity": 100.0, "queue_timeout_ms": 50.0}


@pytest.mark.e2e
def test_an_overload_is_refused_and_passes(release, capsys, monkeypatch):
    monkeypatch.setattr(overload, "_CAPACITY_SECONDS", 1.0)
    options = ["--repository", str(release.repository), "--data", str(TEST), "--seconds", "3", "--usual-seconds", "3"]
    overload.main([*options, "--json"])  # whether it holds is the machine's business; that it is measured is ours
    found = json.loads(capsys.readouterr().out)
    assert found["over"]["failed_otherwise"] == 0
    assert 0 < found["over"]["answered"] < 1
    assert found["over"]["requests"] == pytest.approx(3 * 2 * found["capacity"], rel=0.01)
    assert found["usual"]["p99_ms"] > 0
    assert set(found["memory_mib"]["after"]) == {"tritonserver", "tokenizer", "bert", "postprocess"}


def test_memory_is_flat_or_not():
    def looks(*mib):
        return [{"requests": 100 * (i + 1), "memory_mib": {"bert": each}} for i, each in enumerate(mib)]

    # What comes before a tenth of the requests is the warm-up.
    assert soak.judge(looks(50, *[100] * 19, 104), 0.05)["flat"]
    grown = soak.judge(looks(50, 60, 100, *[120] * 20), 0.05)
    assert (grown["flat"], grown["warm_mib"], grown["last_mib"]) == (False, 100, 120)


@pytest.mark.e2e
def test_a_soak_looks_at_every_process(release, capsys, monkeypatch):
    monkeypatch.setattr(soak, "_LOOKS_SECONDS", 0.5)
    options = ["--repository", str(release.repository), "--data", str(TEST), "--requests", "300", "--growth", "5"]
    assert soak.main(options) == 0
    out = capsys.readouterr().out
    for word in ("tritonserver", "tokenizer", "bert", "postprocess", "PASS"):
        assert word in out
