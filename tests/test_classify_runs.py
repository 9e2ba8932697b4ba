"""Runs of `millibert classify` that were interrupted go on, and no answer is lost or written over."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.classifying import (
    COMMAND,
    NOWHERE,
    ONE_BY_ONE,
    SECONDS,
    SLOW,
    classify,
    partial_of,
    service_of,
    text_file,
    texts_in,
    wait_for_lines,
)

from millibert import UsageError
from millibert._output_file import OutputFile

if TYPE_CHECKING:
    from tests.conftest import RunningServer


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    with OutputFile(path, restart=False, force=False) as first:
        first.write({"text": "a"})
        with pytest.raises(UsageError, match=r"o\.jsonl\.partial: another run is writing it; wait for its end"):
            OutputFile(path, restart=True, force=False)
        first.write({"text": "b"})
        first.complete()
    assert texts_in(path) == ["a", "b"]


@pytest.fixture
def interrupted(server: RunningServer, tmp_path: Path) -> tuple[list[str], Path]:
    """A run that was killed in the middle: its arguments, and the output that it has begun."""
    source, output = text_file(tmp_path / "texts.txt", SLOW), tmp_path / "answers.jsonl"
    arguments = [*service_of(server), "--input", str(source), "--output", str(output)]
    with subprocess.Popen([*COMMAND, *arguments, *ONE_BY_ONE]) as process:
        wait_for_lines(partial_of(output), 5)
        process.kill()
    assert not output.exists()
    return arguments, output


@pytest.mark.e2e
def test_a_killed_run_goes_on(interrupted: tuple[list[str], Path]) -> None:
    arguments, output = interrupted
    partial = partial_of(output)
    # One that ends with its run may have written half a line.
    begun = partial.read_bytes().rpartition(b"\n")[0] + b"\n"
    partial.write_bytes(begun + b'{"text": "sleep 0.2')
    done = classify(*arguments)
    assert done.returncode == 0
    assert done.stderr.decode() == f"going on after {len(begun.splitlines())} texts in {partial}\n"
    assert output.read_bytes().startswith(begun)
    assert texts_in(output) == SLOW
    assert not partial.exists()


@pytest.mark.e2e
def test_a_run_that_lacks_only_the_name_needs_no_server(interrupted: tuple[list[str], Path]) -> None:
    arguments, output = interrupted
    lines = [json.dumps({"text": text, **({"error": {}} if number == 7 else {})}) for number, text in enumerate(SLOW)]
    text_file(partial_of(output), lines)
    done = classify(*arguments, *NOWHERE)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[1:] == [f"error: 1 of {len(SLOW)} texts could not be classified"]
    assert texts_in(output) == SLOW


@pytest.mark.e2e
@pytest.mark.parametrize("change", ["another text", "fewer texts", "not JSON", "no object"])
def test_another_input_is_refused(interrupted: tuple[list[str], Path], change: str) -> None:
    arguments, output = interrupted
    source, partial = Path(arguments[arguments.index("--input") + 1]), partial_of(output)
    if change == "another text":
        text_file(source, [SLOW[0], "hello", *SLOW[2:]])
        place = ":2: is not the answer to the text at this place of the input"
    elif change == "fewer texts":
        text_file(source, SLOW[:3])
        place = ":4: is not the answer"
    else:
        text_file(partial, ["oops" if change == "not JSON" else "[]"])
        place = ":1: is not JSON" if change == "not JSON" else ":1: is no JSON object"
    before = partial.read_bytes()
    done = classify(*arguments)
    assert done.returncode == 2
    message = done.stderr.decode()
    assert message.startswith(f"millibert classify: {partial}{place}")
    assert "belongs to another input: give that one, or --restart to begin anew" in message
    assert partial.read_bytes() == before


@pytest.mark.e2e
def test_restart_begins_anew(interrupted: tuple[list[str], Path]) -> None:
    arguments, output = interrupted
    source = text_file(Path(arguments[arguments.index("--input") + 1]), ["hello 1", "hello 2"])
    done = classify(*arguments, "--restart")
    assert (done.returncode, done.stderr) == (0, b"")
    assert texts_in(output) == source.read_text().splitlines()


@pytest.mark.e2e
def test_standard_input_can_be_gone_on_with_too(server: RunningServer, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    text_file(partial_of(output), [json.dumps({"text": "hello 1"})])
    done = classify(*service_of(server), "--output", str(output), stdin=b"hello 1\nhello 2\n")
    assert done.returncode == 0
    assert texts_in(output) == ["hello 1", "hello 2"]


@pytest.mark.e2e
def test_a_file_that_is_there_is_replaced_only_by_force(server: RunningServer, tmp_path: Path) -> None:
    output = text_file(tmp_path / "answers.jsonl", ["dear"])
    arguments = [*service_of(server), "--output", str(output)]
    done = classify(*arguments, "hello")
    assert done.returncode == 2
    assert done.stderr.decode() == (
        f"millibert classify: {output}: exists already; give another name, or --force to replace it\n"
    )
    assert output.read_text() == "dear\n"
    done = classify(*arguments, "--input", str(output), "--force")
    assert done.returncode == 2
    assert b"--output would replace the file of --input" in done.stderr
    assert classify(*arguments, "--force", "hello").returncode == 0
    assert texts_in(output) == ["hello"]


@pytest.mark.e2e
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_ctrl_c(server: RunningServer, tmp_path: Path, protocol: str) -> None:
    source, output = text_file(tmp_path / "texts.txt", SLOW), tmp_path / "answers.jsonl"
    arguments = [*service_of(server, protocol), "--input", str(source), "--output", str(output)]
    with subprocess.Popen([*COMMAND, *arguments, *ONE_BY_ONE], stderr=subprocess.PIPE) as process:
        wait_for_lines(partial_of(output), 3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    answered = texts_in(partial_of(output))
    assert answered == SLOW[: len(answered)]
    assert errors.decode() == f"{len(answered)} texts are in {output}.partial; run this again to go on\n"
    assert not output.exists()


@pytest.mark.e2e
def test_a_full_disk(server: RunningServer, tmp_path: Path) -> None:
    source, output = text_file(tmp_path / "texts.txt", ["hello"] * 200), tmp_path / "answers.jsonl"
    arguments = [*service_of(server), "--input", str(source), "--output", str(output)]
    limited = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert limited.returncode == 2
    note, error = limited.stderr.decode().splitlines()
    assert note.endswith("run this again to go on")
    assert error == f"millibert classify: {output}.partial: cannot be written: File too large"
    assert classify(*arguments).returncode == 0
    assert texts_in(output) == ["hello"] * 200
