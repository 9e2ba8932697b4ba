"""`millibert classify`: what it takes, and how it answers."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import select
import subprocess
import termios
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from tests.classifying import (
    COMMAND,
    NOWHERE,
    ONE_BY_ONE,
    SECONDS,
    SLOW,
    classify,
    documents,
    partial_of,
    service_of,
    text_file,
    texts_in,
    wait_for_lines,
)
from tests.conftest import CLIENT_REPOSITORY, RunningServer

from millibert import Classification, Failure, InvalidRequest, Prediction
from millibert._answer_layouts import as_document, as_table

# What needs no server


def test_help_has_examples_and_exit_statuses() -> None:
    shown = classify("--help")
    assert shown.returncode == 0
    assert b"examples:\n  millibert classify --url grpc://127.0.0.1:8001" in shown.stdout
    assert b"The exit status is 0 when all texts were answered; 1 when" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m", "a"], "--url"),
        (
            ["--url", "ftp://host", "--model", "m", "a"],
            "expected grpc://host:8001, http://host:8000, grpcs://host:443 or https://host:443",
        ),
        (["--url", "host:8001", "--model", "m", "a"], "the scheme is missing"),
        ([*NOWHERE, "--top", "0", "a"], "expected an integer of at least 1, not 0"),
        ([*NOWHERE, "--top", "x", "a"], "invalid integer value: 'x'"),
        ([*NOWHERE, "--timeout", "-1", "a"], "expected a number above 0, not -1"),
        ([*NOWHERE, "--threshold", "1.5", "a"], "expected a number from 0 to 1, not 1.5"),
        ([*NOWHERE, "--threshold", "nan", "a"], "expected a number from 0 to 1, not nan"),
        ([*NOWHERE, "--patience", "0", "a"], "expected a number above 0, not 0"),
        ([*NOWHERE, "--batch-size", "0", "a"], "expected an integer of at least 1, not 0"),
        ([*NOWHERE, "--ca", "ca.pem", "a"], "is without TLS"),
        ([*NOWHERE, "--json", "--jsonl", "a"], "not allowed with argument --json"),
        ([*NOWHERE, "--json", "--output", "o.jsonl", "a"], "leave --json out"),
        ([*NOWHERE, "--output", "o.csv", "a"], "o.csv: JSON Lines are written; give a name that ends in .jsonl"),
        ([*NOWHERE, "--output", "absent/o.jsonl", "a"], "absent/o.jsonl.partial: cannot be written: No such file"),
        ([*NOWHERE, "--restart", "a"], "--restart is about the file of --output"),
        ([*NOWHERE, "--force", "a"], "--force is about the file of --output"),
        ([*NOWHERE, "--input", "i.csv", "a"], "give texts as arguments or --input, not both"),
        ([*NOWHERE, "--input", "absent.csv"], "absent.csv: cannot be read: No such file or directory"),
        ([*NOWHERE, "--input", "a.xls"], "cannot read .xls; use .csv, .tsv, .json, .jsonl, .txt"),
        ([*NOWHERE], "no text: the standard input holds none"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=60, input=b"", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == b""
    assert message in done.stderr.decode()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"message\nhello\n", "a.csv:2: no column 'text'; it has 'message'"),
        ("a.csv", b"text\nfine\n\xff\n", "a.csv:3: not UTF-8 (byte 0xff); convert the file first"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": null}\n', "a.jsonl:2: no value in column 'text'"),
        ("a.json", b"[]", "a.json: no texts"),
        ("a.txt", b"\n \n", "a.txt: no texts"),
        ("a.txt", b"fine\n\xff\n", "a.txt:2: not UTF-8"),
    ],
)
def test_files_are_checked_before_the_work_begins(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    done = classify(*NOWHERE, "--input", str(path), "--output", str(tmp_path / "o.jsonl"))
    assert (done.returncode, done.stdout) == (2, b"")
    assert message in done.stderr.decode()
    assert os.listdir(tmp_path) == [name]


def test_no_text_on_a_terminal() -> None:
    main, terminal = pty.openpty()
    try:
        done = subprocess.run([*COMMAND, *NOWHERE], capture_output=True, timeout=60, stdin=terminal)
    finally:
        os.close(main)
        os.close(terminal)
    assert done.returncode == 2
    assert b"no text: give texts as arguments, in a file as --input, or one a line on the standard" in done.stderr


def test_standard_input_that_cannot_be_read(tmp_path: Path) -> None:
    with (tmp_path / "written").open("wb") as only_for_writing:
        done = subprocess.run([*COMMAND, *NOWHERE], capture_output=True, timeout=60, stdin=only_for_writing)
    assert done.returncode == 2
    assert done.stderr == b"millibert classify: standard input: cannot be read: Bad file descriptor\n"
    closed = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *COMMAND, *NOWHERE], capture_output=True, timeout=60)
    assert closed.returncode == 2
    assert b"no text: give texts as arguments" in closed.stderr


@pytest.mark.parametrize("url", ["grpc://127.0.0.1:1", "http://127.0.0.1:1"])
@pytest.mark.parametrize("options", [["a"], ["--json", "a", "b"], ["--batch-size", "1", "a"]])
def test_no_server(url: str, options: list[str], tmp_path: Path) -> None:
    for more in ([], ["--output", str(tmp_path / "o.jsonl")] if "--json" not in options else []):
        begun = time.monotonic()
        done = classify(*options, *more, "--url", url, "--model", "m")
        assert time.monotonic() - begun < 10  # not the patience
        assert done.returncode == 1
        assert done.stdout == b""
        assert re.fullmatch(
            "millibert classify: cannot reach the server: Connection refused "
            rf"\(model 'm' at {url}, request \S+, 4 attempts\); `millibert status` .*\n",
            done.stderr.decode(),
        )
        assert os.listdir(tmp_path) == []


def test_layouts() -> None:
    predictions = (Prediction("nap", 1, 0.75), Prediction("greeting", 0, float.fromhex("0x1.99999ap-4"), False))
    answer = Classification("two\nlines " + "x" * 200, predictions, truncated=True)
    text, first, second, note = as_table(answer).splitlines()
    assert text == "two lines " + "x" * 89 + "…"
    assert (first, second) == ("  nap       0.750  ✓", "  greeting  0.100")
    assert note.startswith("  note: longer than the model reads")
    assert as_document(answer) == {
        "text": answer.text,
        "truncated": True,
        "known": True,
        "predictions": [
            {"label": "nap", "id": 1, "score": 0.75, "accepted": True},
            {"label": "greeting", "id": 0, "score": 0.1, "accepted": False},
        ],
    }
    unsure = Classification("?", predictions[1:], truncated=False)
    assert as_table(unsure).splitlines()[-1].startswith("  note: don't know")
    failure = Failure("a\ud800b", InvalidRequest("too odd", endpoint="grpc://a", model="m"))
    assert as_table(failure) == "a b\n  error: InvalidRequest: too odd"
    assert as_document(failure) == {"text": "a\ud800b", "error": {"type": "InvalidRequest", "reason": "too odd"}}


# Against a real Triton


@pytest.fixture(params=["grpc", "http"])
def service(request: pytest.FixtureRequest, server: RunningServer) -> list[str]:
    return service_of(server, request.param)


@pytest.mark.e2e
def test_arguments(service: list[str]) -> None:
    done = classify(*service, "--top", "2", "hello you", "größe")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == (
        "hello you\n  greeting  0.800  ✓\n  nap       0.100\ngröße\n  other     0.800  ✓\n  greeting  0.100\n"
    )


@pytest.mark.e2e
def test_lines_of_standard_input(service: list[str]) -> None:
    lines = [f"hello {number}" for number in range(20)]  # the model takes 8 texts a request
    done = classify(*service, "--json", stdin=b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    assert (done.returncode, done.stderr) == (0, b"")
    answers = json.loads(done.stdout)
    assert [answer["text"] for answer in answers] == lines
    assert answers[0] == {
        "text": "hello 0",
        "truncated": False,
        "known": True,
        "predictions": [
            {"label": "greeting", "id": 0, "score": 0.8, "accepted": True},
            {"label": "nap", "id": 1, "score": 0.1, "accepted": False},
            {"label": "other", "id": 2, "score": 0.06, "accepted": False},
        ],
    }
    assert documents(classify(*service, "--jsonl", stdin="\n".join(lines).encode()).stdout) == answers


@pytest.mark.e2e
def test_threshold(service: list[str]) -> None:
    done = classify(*service, "--jsonl", "--threshold", "0.05", "hello")
    assert [each["accepted"] for each in documents(done.stdout)[0]["predictions"]] == [True, True, True]
    done = classify(*service, "--threshold", "1", "hello")
    assert done.stdout.decode().splitlines()[-1] == "  note: don't know; no label reaches its threshold"


@pytest.mark.e2e
def test_refused_by_the_server(service: list[str]) -> None:
    done = classify(*service, "--json", "--top", "9", "a")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"top_k must be 1 to 4, not 9" in done.stderr


@pytest.mark.e2e
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "txt"])
def test_input_files(service: list[str], tmp_path: Path, suffix: str) -> None:
    texts = ["hello a, b", "größe"] if suffix == "txt" else ["hello a, b", "two\nlines", "", "größe"]
    path = tmp_path / f"input.{suffix}"
    with path.open("w", encoding="utf-8", newline="") as file:
        if suffix in ("csv", "tsv"):
            rows = [["n", "message"], *([str(number), text] for number, text in enumerate(texts))]
            csv.writer(file, delimiter={"csv": ",", "tsv": "\t"}[suffix]).writerows(rows)
        elif suffix == "json":
            json.dump([{"message": text} for text in texts], file)
        else:
            file.writelines((json.dumps({"message": text}) if suffix == "jsonl" else text) + "\n" for text in texts)
    done = classify(*service, "--input", str(path), "--text-column", "message", "--jsonl")
    assert (done.returncode, done.stderr) == (0, b"")
    assert [document["text"] for document in documents(done.stdout)] == texts
    done = classify(*service, "--input", str(path), "--text-column", "message")
    assert done.stdout.decode().startswith("hello a, b\n  greeting  0.800  ✓\n")


@pytest.mark.e2e
def test_many_texts_keep_their_order(service: list[str], tmp_path: Path) -> None:
    texts = [f"{'hello' if number % 3 else 'who'} {number}" for number in range(2_000)]
    source, output = text_file(tmp_path / "texts.txt", texts), tmp_path / "answers.jsonl"
    done = classify(*service, "--input", str(source), "--output", str(output))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    answers = documents(output.read_bytes())
    assert [answer["text"] for answer in answers] == texts
    expected = ["greeting" if text.startswith("hello") else "other" for text in texts]
    assert [answer["predictions"][0]["label"] for answer in answers] == expected
    assert not partial_of(output).exists()
    piped = classify(*service, "--jsonl", stdin=source.read_bytes())
    assert piped.stdout == output.read_bytes()


@pytest.mark.e2e
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_answers_come_while_the_input_is_being_written(server: RunningServer, protocol: str) -> None:
    command = [*COMMAND, *service_of(server, protocol), "--jsonl"]
    # Without a buffer of its own, or select() would not know of what waits there.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for lines in (b"hello 1\n", b"\nhello 2\n\n", b"hello 3\nhello 4\n", b"hello 5"):
            process.stdin.write(lines)
            for text in filter(None, lines.decode().split("\n")):
                if text == "hello 5":
                    process.stdin.close()  # a last line needs no end
                assert select.select([process.stdout], [], [], SECONDS)[0]
                assert json.loads(process.stdout.readline())["text"] == text
        assert process.wait(SECONDS) == 0


@pytest.mark.e2e
def test_standard_input_that_is_not_utf8(service: list[str]) -> None:
    good = [f"hello {number}" for number in range(20)]
    done = classify(*service, "--jsonl", stdin="\n".join(good).encode() + b"\nnot \xff\nhello\n")
    assert done.returncode == 2
    assert [document["text"] for document in documents(done.stdout)] == good
    assert done.stderr == (b"millibert classify: standard input:21: not UTF-8 (byte 0xff); convert the file first\n")


@pytest.mark.e2e
def test_a_text_that_fails_among_good_ones(service: list[str], tmp_path: Path) -> None:
    texts = [f"hello {number}" for number in range(30)]
    texts[13] = "crash"
    source, output = text_file(tmp_path / "texts.txt", texts), tmp_path / "answers.jsonl"
    done = classify(*service, "--input", str(source), "--output", str(output))
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"error: 1 of 30 texts could not be classified\n"
    answers = documents(output.read_bytes())
    assert [answer["text"] for answer in answers] == texts
    assert answers[13]["error"]["type"] == "ServerFault"
    assert "boom" in answers[13]["error"]["reason"]
    assert [index for index, answer in enumerate(answers) if "predictions" not in answer] == [13]
    done = classify(*service, "hello", "crash")
    assert done.returncode == 1
    assert b"crash\n  error: ServerFault: " in done.stdout
    assert done.stderr == b"error: 1 of 2 texts could not be classified\n"


@pytest.mark.e2e
def test_a_text_that_is_no_text_is_its_own_error(service: list[str], tmp_path: Path) -> None:
    source, output = tmp_path / "texts.jsonl", tmp_path / "answers.jsonl"
    source.write_text('{"text": "hello"}\n{"text": "\\ud800"}\n')
    done = classify(*service, "--input", str(source), "--output", str(output))
    assert done.returncode == 1
    good, bad = documents(output.read_bytes())
    assert "predictions" in good
    assert (bad["text"], bad["error"]["type"]) == ("\ud800", "InvalidRequest")
    assert "lone surrogate" in bad["error"]["reason"]


@pytest.mark.e2e
def test_a_busy_server_ends_the_run_when_patience_does(service: list[str], tmp_path: Path) -> None:
    texts = [*(f"hello {number}" for number in range(16)), "busy", "hello"]
    source, output = text_file(tmp_path / "texts.txt", texts), tmp_path / "answers.jsonl"
    arguments = [*service, "--input", str(source), "--patience", "0.5"]
    done = classify(*arguments, "--output", str(output))
    assert done.returncode == 1
    note, error = done.stderr.decode().splitlines()
    assert note == f"16 texts are in {output}.partial; run this again to go on"
    assert error.startswith("millibert classify: ")
    assert re.search(r"the queue is full \(model 'echo' at \S+, request \S+\); send less, or try again later$", error)
    assert texts_in(partial_of(output)) == texts[:16]
    assert not output.exists()
    done = classify(*arguments, "--json")
    assert (done.returncode, done.stdout) == (1, b"")


@pytest.mark.e2e
def test_a_server_that_goes_away_and_comes_back(
    triton: Callable[..., AbstractContextManager[RunningServer]], tmp_path: Path
) -> None:
    source, output = text_file(tmp_path / "texts.txt", SLOW), tmp_path / "answers.jsonl"
    arguments = ["--input", str(source), "--output", str(output), "--patience", "1", *ONE_BY_ONE]
    with triton(CLIENT_REPOSITORY) as running:
        command = [*COMMAND, *service_of(running), *arguments]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            wait_for_lines(partial_of(output), 3)
            running.tritonserver().kill()
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    note, error = errors.decode().splitlines()
    assert note.endswith(f" texts are in {output}.partial; run this again to go on")
    assert error.startswith("millibert classify: ")
    answered = texts_in(partial_of(output))
    assert answered == SLOW[: len(answered)]
    with triton(CLIENT_REPOSITORY) as running:
        done = classify(*service_of(running), *arguments)
    assert done.returncode == 0, done.stderr
    assert texts_in(output) == SLOW


@pytest.mark.e2e
@pytest.mark.parametrize("options", [["--output", "answers.jsonl"], ["--jsonl"]])
def test_progress_on_a_terminal(server: RunningServer, tmp_path: Path, options: list[str]) -> None:
    source = text_file(tmp_path / "texts.txt", ["hello"] * 20)
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    command = [*COMMAND, *service_of(server), "--input", str(source), *options]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, timeout=60, cwd=tmp_path)
        shown = os.read(main, 100_000)
    finally:
        os.close(main)
        os.close(terminal)
    assert done.returncode == 0
    assert b"classifying" in shown
    assert b"20/20" in shown


@pytest.mark.e2e
def test_a_reader_that_has_gone(service: list[str], tmp_path: Path) -> None:
    source = text_file(tmp_path / "texts.txt", ["hello"] * 2_000)
    command = [*COMMAND, *service, "--input", str(source), "--jsonl"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
