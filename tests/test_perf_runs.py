"""perf_analyzer as a load: what it is asked, what its export says, and a real run where it is installed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.conftest import CLIENT_REPOSITORY

from load import perf_command
from load.perf_analyzer import Expected, PerfLoad, behind, read_export, run, write_data
from load.results import Outcome, Run
from millibert import MillibertError
from millibert import _perf_analyzer as found
from millibert._errors import UsageError

if TYPE_CHECKING:
    from tests.conftest import Release, RunningServer

TEXTS = ("hello you", "größe?", "sleep 0")
LABELS = ("greeting", "nap", "other", "größe")
EXPECTED = Expected(LABELS, TEXTS, (frozenset({"greeting"}), frozenset({"other"}), frozenset({"nap"})))

# Of perf_analyzer 2.51.0, two texts a request, on `client_repository`; most requests are left out.
EXPORT = r"""{"experiments":[{"experiment":{"mode":"concurrency","value":2},"requests":[
{"timestamp":1795602909953922343,"request_inputs":{"TEXT":"hello you"},"response_timestamps":[1795602909955068492],
"response_outputs":[{"SCORE":[0.800000011920929,0.10000000149011612,0.05999999865889549,0.800000011920929,
0.10000000149011612,0.05999999865889549],"TRUNCATED":[false,false],"LABEL_ID":[0,1,2,2,0,1],"LABEL":
"greeting\u0003\u0000\u0000\u0000nap\u0005\u0000\u0000\u0000other\u0005\u0000\u0000\u0000other\b\u0000\u0000\u0000greeting\u0003\u0000\u0000\u0000nap",
"ACCEPTED":[true,false,false,true,false,false]}]},
{"timestamp":1795602909955073560,"request_inputs":{"TEXT":"größe?"},"response_timestamps":[1795602909955772348],
"response_outputs":[{"SCORE":[0.800000011920929,0.10000000149011612,0.05999999865889549,0.800000011920929,
0.10000000149011612,0.05999999865889549],"TRUNCATED":[false,false],"LABEL_ID":[2,0,1,1,0,2],"LABEL":
"other\b\u0000\u0000\u0000greeting\u0003\u0000\u0000\u0000nap\u0003\u0000\u0000\u0000nap\b\u0000\u0000\u0000greeting\u0005\u0000\u0000\u0000other",
"ACCEPTED":[true,false,false,true,false,false]}]},
{"timestamp":1795602910677000000,"request_inputs":{"TEXT":"sleep 0"},"response_timestamps":[],"response_outputs":[]}
],"window_boundaries":[1795602909953863020,1795602910195591415,1795602910437336835,1795602910679361843]}],
"version":"2.51.0","service_kind":"triton","endpoint":""}"""


@pytest.fixture
def export(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    path.write_text(EXPORT, encoding="utf-8")
    return path


def test_an_export_is_read_request_by_request(export: Path) -> None:
    answers, reasons = read_export(export, EXPECTED)
    assert answers.due == pytest.approx([59.323e-6, 1.21054e-3, 0.72313698], abs=1e-8)
    assert answers.latency == pytest.approx([1.146149e-3, 0.698788e-3, 2.361843e-3], abs=1e-8)
    assert list(answers.outcome) == [Outcome.ANSWERED, Outcome.ANSWERED, Outcome.FAILED]
    assert reasons == {"failed: no answer": 1}


def test_each_text_of_a_request_is_checked(export: Path) -> None:
    other = EXPECTED._replace(right=(frozenset({"greeting"}), frozenset({"other"}), frozenset({"größe"})))
    answers, reasons = read_export(export, other)
    # "sleep 0" is the second text of the second request.
    assert list(answers.outcome) == [Outcome.ANSWERED, Outcome.WRONG, Outcome.FAILED]
    assert reasons["wrong: not größe"] == 1
    unchecked, _ = read_export(export)
    assert list(unchecked.outcome[:2]) == [Outcome.ANSWERED] * 2


def test_labels_that_are_no_utf8_in_between_do_not_matter(export: Path) -> None:
    # The length of a label of 200 bytes is written as that byte.
    export.write_bytes(export.read_bytes().replace(b"\\u0005\\u0000", b"\xc8\\u0000"))
    assert list(read_export(export, EXPECTED)[0].outcome[:2]) == [Outcome.ANSWERED] * 2


def test_what_the_export_lacks_is_told(export: Path) -> None:
    with pytest.raises(MillibertError, match="names a text that was not sent"):
        read_export(export, EXPECTED._replace(texts=("a", "b", "c")))
    export.write_text('{"experiments": []}')
    with pytest.raises(MillibertError, match="fewer than 3 requests; measure for longer"):
        read_export(export)


@pytest.fixture
def program(tmp_path: Path, export: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A perf_analyzer that writes down its arguments and exports what is recorded."""
    folder = tmp_path / "bin"
    folder.mkdir()
    path = folder / "perf_analyzer"
    script = ["#!/bin/sh", f'echo "$@" > {tmp_path}/arguments', 'for each; do file="$each"; done']
    path.write_text("\n".join([*script, f'cp {export} "$file"']))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return path


def test_a_closed_loop_is_asked_for_and_believed(program: Path, tmp_path: Path) -> None:
    load = PerfLoad("http://127.0.0.1:8000", "echo", tmp_path / "data.json", 6.0, 2, concurrency=2, shared_memory=True)
    result = run(load)
    assert (result.tool, result.texts_per_request, result.counts.sent) == ("perf_analyzer", 2, 2)
    assert result.arrival.under_way == 2
    assert result.texts_per_second == pytest.approx(2 * result.requests_per_second)
    assert Run.model_validate_json(result.model_dump_json()) == result
    given = (tmp_path / "arguments").read_text()
    for part in ("-m echo -i http -u 127.0.0.1:8000 -b 2", "--measurement-interval 2000", "--shared-memory system"):
        assert part in given
    assert "--concurrency-range 2" in given
    assert "--async" not in given


def test_a_rate_is_asked_for_and_what_was_sent_late_is_told(program: Path, tmp_path: Path) -> None:
    result = run(PerfLoad("grpc://127.0.0.1", "echo", tmp_path / "data.json", 3.0, rate=500.0, poisson=True))
    given = (tmp_path / "arguments").read_text()
    assert (
        "--request-count 1500 --async --max-threads 16 --request-rate-range 500.0 --request-distribution poisson"
        in given
    )
    assert behind(result) == "perf_analyzer sent 3 of 500 requests/s: its latencies hide what was late"
    # Two in 0.7 s are as many as that.
    slow = result.model_copy(update={"arrival": result.arrival.model_copy(update={"rate": 2.8})})
    assert behind(slow) is None


def test_a_busy_server_and_other_failures_are_told_apart(program: Path, tmp_path: Path) -> None:
    load = PerfLoad("grpc://127.0.0.1", "echo", tmp_path / "data.json", 1.0, concurrency=64)
    said = "echo Thread [0] had error: in ensemble \\'echo\\', busy: no engine free in time; exit 99"
    program.write_text(f"#!/bin/sh\n{said}\n")
    with pytest.raises(found.Refused, match="64 requests under way: the server was busy, and perf_analyzer stops"):
        run(load)
    program.write_text("#!/bin/sh\necho error: failed to get model metadata; echo Request concurrency: 64; exit 1\n")
    with pytest.raises(MillibertError, match=r"perf_analyzer failed: error: failed to get model metadata$"):
        run(load)


def test_what_is_no_load_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ({}, {"concurrency": 1, "rate": 1.0}):
        with pytest.raises(UsageError, match=r"concurrency .* or a rate"):
            PerfLoad("grpc://127.0.0.1", "echo", tmp_path, 1.0, **given)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="without TLS"):
        PerfLoad("https://127.0.0.1", "echo", tmp_path, 1.0, concurrency=1)
    monkeypatch.setattr("load.perf_analyzer.find", lambda: None)
    with pytest.raises(UsageError, match="install_perf_analyzer"):
        run(PerfLoad("grpc://127.0.0.1", "echo", tmp_path, 1.0, concurrency=1))


@pytest.fixture(scope="module")
def release_server(
    triton: Callable[..., AbstractContextManager[RunningServer]], release: Release
) -> Iterator[RunningServer]:
    with triton(release.repository) as running:
        yield running


@pytest.mark.e2e
@pytest.mark.parametrize("url", ["grpc_url", "http_url"])
def test_stages_get_what_the_stages_before_them_say(release_server: RunningServer, url: str, tmp_path: Path) -> None:
    path, address = tmp_path / "data.json", getattr(release_server, url)
    texts = ["where is my parcel", "I was charged twice for one pair of boots"]

    def data(stage: str | None, texts_per_request: int = 1) -> list[dict[str, Any]]:
        assert write_data(path, address, stage, texts, texts_per_request) == 2
        return list(json.loads(path.read_text())["data"])

    assert data(None) == data("tokenizer") == [{"TEXT": [text]} for text in texts]
    ids = [row["input_ids"]["content"] for row in data("bert")]
    assert len(ids[0]) < len(ids[1])
    assert all(0 not in each for each in ids)
    short, long = data("bert", 2)
    assert short["input_ids"]["content"] == ids[0] + [0] * (len(ids[1]) - len(ids[0]))
    assert long["input_ids"]["shape"] == [len(ids[1])]
    deadline, number = short["admission"]["content"]
    assert deadline > 2**60
    assert number == 0
    logits = [np.array(row["logits"]["content"]) for row in data("postprocess")]
    assert [len(each) for each in logits] == [10, 10]
    assert logits[0].argmax() != logits[1].argmax()


@pytest.mark.e2e
def test_a_service_without_stages_is_told(
    triton: Callable[..., AbstractContextManager[RunningServer]], tmp_path: Path
) -> None:
    with triton(CLIENT_REPOSITORY) as server, pytest.raises(MillibertError, match="cannot make the inputs of bert"):
        write_data(tmp_path / "data.json", server.grpc_url, "bert", ["hello"])


@pytest.mark.e2e
@pytest.mark.skipif(not found.is_here(), reason="perf_analyzer is not installed")
def test_the_command_measures_a_real_service(
    release_server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs.json"
    given = ["--url", release_server.grpc_url, "--model", "support", "--texts", "synthetic:fixed:words=9,count=50"]
    given += ["--concurrency", "2", "--rate", "50", "--spacing", "poisson", "--texts-per-request", "1", "4"]
    parser = argparse.ArgumentParser()
    perf_command.configure(parser)
    assert perf_command.run(parser.parse_args([*given, "--seconds", "0.9", "--out", str(out)])) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    runs = [Run.model_validate(each) for each in json.loads(out.read_text())]
    assert [(each.texts_per_request, each.arrival.kind) for each in runs] == [
        (1, "closed"),
        (1, "open"),
        (4, "closed"),
        (4, "open"),
    ]
    assert all(each.counts.answered == each.counts.sent > 0 for each in runs)
    stage = [*given[:6], "--stage", "bert", "--concurrency", "2", "--texts-per-request", "4", "--seconds", "0.9"]
    assert perf_command.run(parser.parse_args([*stage, "--json"])) == 0
    (only,) = json.loads(capsys.readouterr().out)
    assert only["model"] == "bert"
