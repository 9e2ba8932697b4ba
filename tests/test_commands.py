from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from millibert import Classification, Failure, Prediction, ServerFault, UsageError, evaluate_command
from millibert._labelled_texts import LabelledText, read_labelled_texts, read_texts
from millibert._metrics import (
    accuracy,
    exact_match,
    known,
    labels_never_answered,
    macro_f1,
    micro_f1,
    multi_label_macro_f1,
    top_k_accuracy,
)

if TYPE_CHECKING:
    from tests.conftest import RunningServer

NOWHERE = ("--url", "grpc://127.0.0.1:1", "--model", "echo")
TEXTS = [("hello you", "greeting"), ("hello again, you", "greeting"), ("sleep 0", "nap"), ("who", "greeting")]


COMMAND = [sys.executable, "-m", "millibert.cli"]


def millibert(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=60)


def csv_file(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("text", "label")) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


# Wrong usage, and what needs no server


def test_help_has_examples() -> None:
    shown = millibert("evaluate", "--help")
    assert shown.returncode == 0
    assert b"examples:\n  millibert evaluate --url grpc://127.0.0.1:8001" in shown.stdout


@pytest.mark.parametrize("url", ["grpc://127.0.0.1:1", "http://127.0.0.1:1"])
def test_no_server(url: str, tmp_path: Path) -> None:
    data = csv_file(tmp_path / "data.csv", TEXTS)
    done = millibert("evaluate", "--data", str(data), "--url", url, "--model", "m")
    assert done.returncode == 1
    assert done.stdout == b""
    assert re.fullmatch(
        f"millibert evaluate: cannot reach the server: Connection refused "
        rf"\(model 'm' at {url}, request \S+, 4 attempts\); `millibert status` .*\n",
        done.stderr.decode(),
    )


# Data files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", '\ufefftext,n,label\r\nä,1,x\r\n"b, ""c""\nd",2,y\r\n'),
        ("a.jsonl", '{"text": "ä", "label": "x"}\n\n{"label": "y", "text": "b, \\"c\\"\\nd", "n": 2}'),
    ],
)
def test_data(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert read_labelled_texts(path, "text", "label") == [
        LabelledText("ä", ("x",)),
        LabelledText('b, "c"\nd', ("y",)),
    ]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"text,category\na,x\n", "a.csv:2: no column 'label'; it has 'text', 'category'"),
        ("a.csv", b"text,label\na,x\nb,\n", "a.csv:3: empty 'label'"),
        ("a.csv", b"text,label\na\n", "a.csv:2: no value in column 'label'"),
        ("a.csv", b"text,label\na, b,x\n", "a.csv:2: more cells than the header"),
        ("a.csv", b'text,label\n"a,x\n', "a.csv:2: not valid CSV: unexpected end"),
        ("a.csv", b"text,label\na,x\n\xe4,y\n", "a.csv:3: not UTF-8"),
        ("a.csv", b"", "a.csv:1: no header"),
        ("a.csv", b"text,label\n", "no labelled texts"),
        ("a.jsonl", b"{}\n", "a.jsonl:1: no column 'text'; it has none"),
        ("a.jsonl", b'\n{"text": 1, "label": "x"}\n', "a.jsonl:2: int, not text, in column 'text'"),
        ("a.jsonl", b"{oops\n", "a.jsonl:1: not valid JSON"),
        ("a.jsonl", b"[]\n", "a.jsonl:1: a JSON object is expected, not list"),
        ("a.txt", b"", "cannot read .txt; use .csv, .tsv, .json, .jsonl"),
    ],
)
def test_data_refused(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_labelled_texts(path, "text", "label")
    message = str(caught.value)
    assert message.startswith(str(path))
    assert reason in message


def test_data_of_several_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a", "intents": ["x", "y", "x"]}, {"text": "b"}, {"text": "c", "intents": "x | z"}]')
    assert [row.labels for row in read_labelled_texts(path, "text", "intents", "|")] == [("x", "y"), (), ("x", "z")]
    with pytest.raises(UsageError, match=r"a\.json: no record has a column 'intent'"):
        read_labelled_texts(path, "text", "intent", "|")
    path.write_text('[{"text": "a", "intents": 0}]')
    with pytest.raises(UsageError, match=r"a\.json:1: column 'intents' holds 0, not labels"):
        read_labelled_texts(path, "text", "intents", "|")


def test_texts_out_of_scope_need_no_label(tmp_path: Path) -> None:
    path = csv_file(tmp_path / "a.csv", [("a", ""), ("b", "x")])
    assert read_texts(path, "text") == [LabelledText("a", ()), LabelledText("b", ())]
    with pytest.raises(UsageError, match=r"a\.csv:2: no column 'query'"):
        read_texts(path, "query")


def test_data_that_is_not_there(tmp_path: Path) -> None:
    done = millibert("evaluate", *NOWHERE, "--data", str(tmp_path / "absent.csv"))
    assert done.returncode != 0
    assert b"absent.csv: cannot be read: No such file or directory" in done.stderr


def test_metrics() -> None:
    def pair(label: str, *answered: str) -> tuple[LabelledText, Classification]:
        predictions = tuple(Prediction(each, 0, 0.5) for each in answered)
        return LabelledText("", (label,)), Classification("", predictions, truncated=False)

    pairs = [pair("a", "a", "b"), pair("a", "b", "a"), pair("b", "b", "a"), pair("c", "b", "a")]
    assert accuracy(pairs) == 0.5
    assert top_k_accuracy(pairs) == 0.75
    assert macro_f1(pairs) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert labels_never_answered(pairs) == ["c"]


def test_metrics_of_several_labels() -> None:
    def pair(labels: str, accepted: str, others: str = "") -> tuple[LabelledText, Classification]:
        predictions = [
            *(Prediction(each, 0, 0.9) for each in accepted),
            *(Prediction(e, 0, 0.1, False) for e in others),
        ]
        return LabelledText("", tuple(labels)), Classification("", tuple(predictions), truncated=False)

    pairs = [pair("ab", "ab", "c"), pair("a", "c", "ab"), pair("", "", "abc")]
    assert micro_f1(pairs) == pytest.approx(2 * 2 / (3 + 3))
    assert multi_label_macro_f1(pairs) == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert exact_match(pairs) == pytest.approx(2 / 3)
    assert known(pairs) == pytest.approx(2 / 3)


# The command with a client that answers by itself


class FakeClient:
    """Knows three labels: a text's letters are the labels it accepts, one that holds `!` fails."""

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def labels(self) -> tuple[str, ...]:
        return ("a", "b", "c")

    def classify(self, text: str, top_k: int | None = None) -> Classification:
        return self._answer(text, top_k or 3)

    def classify_many(self, texts: list[str], top_k: int | None, **_: object) -> Iterator[Classification | Failure]:
        for text in texts:
            if "!" in text:
                yield Failure(text, ServerFault("boom", endpoint="grpc://nowhere", model="m"))
            else:
                yield self._answer(text, top_k or 3)

    def _answer(self, text: str, top_k: int) -> Classification:
        ranked = sorted(self.labels(), key=lambda label: label not in text)
        found = [Prediction(label, 0, 0.9 if label in text else 0.1, label in text) for label in ranked]
        return Classification(text, tuple(found[:top_k]), truncated=False)


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setattr(evaluate_command, "open_client", lambda _: FakeClient())

    def _evaluate(rows: list[dict[str, Any]], *arguments: str) -> tuple[int, str, str]:
        data = tmp_path / "data.json"
        data.write_text(json.dumps(rows))
        parser = argparse.ArgumentParser()
        evaluate_command.configure(parser)
        status = evaluate_command.run(parser.parse_args([*NOWHERE, "--data", str(data), *arguments]))
        return status, *capsys.readouterr()

    return _evaluate


SETS = [{"text": "a b", "label": ["a", "b"]}, {"text": "c", "label": "a|c"}, {"text": "-", "label": []}]


def test_evaluate_measures_the_accepted_labels(evaluate: Any, tmp_path: Path) -> None:
    written = tmp_path / "predictions.jsonl"
    status, shown, _ = evaluate(SETS, "--multi-label", "--json", "--predictions", str(written))
    assert status == 0
    figures = json.loads(shown)
    assert figures["micro_f1"] == pytest.approx(2 * 3 / (3 + 4))
    assert figures["macro_f1"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert figures["exact_match"] == pytest.approx(2 / 3)
    assert "out_of_scope_refused" not in figures
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert [(line["label"], line["accepted"]) for line in lines] == [
        (["a", "b"], ["a", "b"]),
        (["a", "c"], ["c"]),
        ([], []),
    ]


def test_evaluate_measures_several_files_together(evaluate: Any, tmp_path: Path) -> None:
    more = tmp_path / "more.csv"
    more.write_text("text,label\nb,b\nc,a\n")
    rows = [{"text": "a", "label": "a"}]
    figures = json.loads(evaluate(rows, str(more), "--data", str(more), "--json")[1])
    assert (figures["n"], figures["accuracy"]) == (5, pytest.approx(3 / 5))


@pytest.mark.parametrize("several", [[], ["--multi-label"]])
def test_evaluate_counts_what_is_kept_out(evaluate: Any, tmp_path: Path, several: list[str]) -> None:
    outside = tmp_path / "outside.csv"
    outside.write_text("text\n-\n-\nc\n!\n")
    arguments = [*several, "--out-of-scope", str(outside)]
    status, shown, errors = evaluate([{"text": "a", "label": "a"}], *arguments, "--json")
    assert status == 1
    assert "error: 1 of 5 texts got no answer" in errors
    figures = json.loads(shown)
    assert figures["out_of_scope_refused"] == pytest.approx(2 / 3)
    assert (figures["out_of_scope_n"], figures["out_of_scope_errors"], figures["n"]) == (4, 1, 1)
    shown = evaluate([{"text": "a", "label": "a"}], *arguments)[1]
    assert 'out of scope    0.6667 of 3 answered texts: "don\'t know"\n' in shown


@pytest.mark.parametrize(("several", "agreement"), [([], 1.0), (["--multi-label"], 0.5)])
def test_evaluate_compares_labels_or_sets_of_them(
    evaluate: Any, monkeypatch: pytest.MonkeyPatch, several: list[str], agreement: float
) -> None:
    checkpoint_labels = pytest.importorskip("millibert_build.checkpoint_labels")
    monkeypatch.setattr(checkpoint_labels, "label_sets", lambda _, texts: [frozenset(text[0]) for text in texts])
    rows = [{"text": "a b", "label": "a"}, {"text": "c", "label": "c"}]
    _, shown, _ = evaluate(rows, *several, "--checkpoint", "folder", "--json")
    assert json.loads(shown)["agreement"] == agreement


# Against a real Triton


@pytest.fixture(params=["grpc", "http"])
def service(request: pytest.FixtureRequest, server: RunningServer) -> list[str]:
    url = server.grpc_url if request.param == "grpc" else server.http_url
    return ["--url", url, "--model", "echo"]


@pytest.mark.e2e
def test_evaluate(service: list[str], tmp_path: Path) -> None:
    data = csv_file(tmp_path / "data.csv", TEXTS * 5, ("query", "intent"))
    predictions = tmp_path / "predictions.jsonl"
    columns = ["--text-column", "query", "--label-column", "intent"]
    done = millibert("evaluate", *service, "--data", str(data), *columns, "--json", "--predictions", str(predictions))
    assert (done.returncode, done.stderr) == (0, b"")
    figures = json.loads(done.stdout)
    assert figures.pop("seconds") > 0
    assert figures.pop("macro_f1") == pytest.approx((0.8 + 1 + 0) / 3)
    assert figures == {
        "accuracy": 0.75,
        "top_k_accuracy": 1.0,
        "top_k": 3,
        "known": 1.0,
        "n": 20,
        "errors": 0,
        "truncated": 0,
        "model": "echo",
        "url": service[1],
    }
    written = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert [(line["text"], line["label"]) for line in written] == TEXTS * 5
    assert [line["predicted"] for line in written[:4]] == ["greeting", "greeting", "nap", "other"]


@pytest.mark.e2e
def test_evaluate_with_failures(service: list[str], tmp_path: Path) -> None:
    data = csv_file(tmp_path / "data.csv", [*TEXTS, ("crash", "nap"), ("what", "unheard")])
    done = millibert("evaluate", *service, "--data", str(data))
    assert done.returncode == 1
    assert b"accuracy        0.6000\n" in done.stdout
    assert b"6, 1 without an answer, 0 truncated\n" in done.stdout
    errors = done.stderr.decode()
    assert "1 of 6 texts got no answer:" in errors
    assert "RuntimeError: boom" in errors
    assert "warning: labels of the data that the model never answered, does it know them? unheard" in errors


@pytest.mark.e2e
def test_evaluate_without_any_answer(service: list[str], tmp_path: Path) -> None:
    data = csv_file(tmp_path / "data.csv", TEXTS)
    done = millibert("evaluate", *service, "--data", str(data), "--batch-size", "9")
    assert done.returncode == 0  # four texts fit
    data = csv_file(tmp_path / "data.csv", [("crash", "nap")])
    done = millibert("evaluate", *service, "--data", str(data))
    assert done.returncode == 1
    assert done.stdout == b""
    assert b"RuntimeError: boom" in done.stderr
