"""The readers of records: what they make of a file, what they refuse, and how little they keep of it."""

from __future__ import annotations

import csv
import io
import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from millibert import UsageError
from millibert._records import READERS, Record, lines_of, read_records, text_of

MEGABYTE = 1 << 20
LARGE_FILE_BYTES = 30 * MEGABYTE
TEXT = "grüße " * 150


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], Path]:
    def _write(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return _write


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", '\ufefftext,n\r\nä,1\r\n"b, ""c""\nd",2\r\n'),
        ("a.CSV", 'text,n\nä,1\n"b, ""c""\nd",2'),
        ("a.tsv", 'text\tn\nä\t1\n"b, ""c""\nd"\t2\n'),
        ("a.jsonl", '\ufeff{"text": "ä", "n": "1"}\r\n{"text": "b, \\"c\\"\\nd", "n": "2"}\n'),
        ("a.json", '\ufeff[{"text": "ä", "n": "1"},\n{"text": "b, \\"c\\"\\nd", "n": "2"}]'),
    ],
)
def test_every_form_holds_the_same(write: Callable[[str, bytes], Path], name: str, content: str) -> None:
    found = list(read_records(write(name, content.encode())))
    assert [record.fields for record in found] == [{"text": "ä", "n": "1"}, {"text": 'b, "c"\nd', "n": "2"}]
    assert found[1].line - found[0].line == 1


def test_lines_of_records(write: Callable[[str, bytes], Path]) -> None:
    path = write("a.csv", b'text\n"one\ntwo\r\nthree"\nfour\n')
    assert [(record.line, record.fields["text"]) for record in read_records(path)] == [
        (2, "one\ntwo\r\nthree"),
        (5, "four"),
    ]
    path = write("a.jsonl", '\n \n{"text": "a\u2028b\x85c"}\n\n{"text": "d"}'.encode())
    assert [(record.line, record.fields["text"]) for record in read_records(path)] == [(3, "a\u2028b\x85c"), (5, "d")]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"", "a.csv:1: no header"),
        ("a.csv", b"text,n\na,b,c\n", "a.csv:2: more cells than the header has; a ',' inside a text needs quotes"),
        ("a.tsv", b"text\tn\na\tb\tc\n", "a.tsv:2: more cells than the header has; a '\\t' inside"),
        ("a.csv", b'text\nfine\n"open\n\n', "a.csv:3: not valid CSV: unexpected end of data"),
        ("a.csv", b'text\n"a"b\n', "a.csv:2: not valid CSV: ',' expected after '\"'"),
        ("a.csv", b"text\n" + b"x" * 200_000, "a.csv:2: not valid CSV: field larger than field limit"),
        ("a.csv", b"text\nfine\ncaf\xe9\n", "a.csv:3: not UTF-8 (byte 0xe9); convert the file first"),
        ("a.csv", b"\xef\xbb\xbft\xe9xt\na\n", "a.csv:1: not UTF-8 (byte 0xe9)"),
        ("a.csv", b"text\nfine\n\xc3", "a.csv:3: not UTF-8 (byte 0xc3)"),
        ("a.csv", "text\nfine\n".encode("utf-16"), "a.csv:1: not UTF-8 (byte 0xff)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \xff}\n', "a.jsonl:2: not UTF-8 (byte 0xff)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\n', "a.jsonl:2: not valid JSON: Unterminated string"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "a.jsonl:2: a JSON object is expected, not list"),
        ("a.json", b'\xef\xbb\xbf[\n{"text": "caf\xe9"}]', "a.json:2: not UTF-8 (byte 0xe9)"),
        ("a.json", b'{"text": "a"}', "a.json:1: a JSON array of objects is expected"),
        ("a.json", b'[{"text": "a"},\n7]', "a.json:2: a JSON object is expected, not int"),
        ("a.txt", b"", "a.txt: cannot read .txt; use .csv, .tsv, .json, .jsonl"),
        ("a", b"", "a: cannot read a file without suffix; use .csv"),
    ],
)
def test_errors_name_file_line_and_reason(
    write: Callable[[str, bytes], Path], name: str, content: bytes, reason: str
) -> None:
    path = write(name, content)
    with pytest.raises(UsageError) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(f"{path.parent}/{reason}")


@pytest.mark.parametrize("suffix", READERS)
def test_what_cannot_be_opened(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"folder{suffix}").mkdir()
    for name, reason in (("absent", "No such file or directory"), ("folder", "Is a directory")):
        with pytest.raises(UsageError, match=rf"{name}\{suffix}: cannot be read: {reason}"):
            list(read_records(tmp_path / f"{name}{suffix}"))


def test_text_of_a_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    record = Record(3, {"text": "a", "none": None, "number": 1})
    assert text_of(path, record, "text") == "a"
    for column, reason in (
        ("other", "no column 'other'; it has 'text', 'none', 'number'"),
        ("none", "no value in column 'none'"),
        ("number", "int, not text, in column 'number'"),
    ):
        with pytest.raises(UsageError, match=rf"a\.jsonl:3: {reason}"):
            text_of(path, record, column)


def test_what_comes_before_a_fault_is_read(write: Callable[[str, bytes], Path]) -> None:
    for name, content in (("a.csv", b"text\na\n\xff\n"), ("a.jsonl", b'{"text": "a"}\n{\n')):
        records = read_records(write(name, content))
        assert next(records).fields == {"text": "a"}
        with pytest.raises(UsageError):
            next(records)


def test_csv_is_cut_into_lines_as_the_csv_module_wants_it(write: Callable[[str, bytes], Path]) -> None:
    generator = random.Random(0)
    for _ in range(2_000):
        content = "ab\n" + "".join(generator.choices('x,"\r\n', k=generator.randrange(12)))
        expected: object
        try:
            expected = list(csv.DictReader(io.StringIO(content, newline=""), strict=True))
        except csv.Error:
            expected = UsageError
        if isinstance(expected, list) and any(None in fields for fields in expected):
            expected = UsageError
        assert outcome(read_records(write("a.csv", content.encode()))) == expected, repr(content)


def outcome(records: Iterator[Record]) -> object:
    try:
        return [record.fields for record in records]
    except UsageError:
        return UsageError


LINES = {
    ".csv": ("text,n\n", f'"{TEXT}\n{TEXT}",1\n'),
    ".tsv": ("text\tn\r\n", f"{TEXT}\t1\r\n"),
    ".jsonl": ("", json.dumps({"text": TEXT, "n": 1}) + "\n"),
}


@pytest.mark.parametrize("suffix", LINES)
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    header, line = LINES[suffix]
    count = LARGE_FILE_BYTES // len(line.encode())
    path = tmp_path / f"large{suffix}"
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(header)
        file.writelines(line for _ in range(count))
    assert peak_bytes(lambda: sum(1 for _ in read_records(path))) < MEGABYTE
    assert sum(1 for _ in read_records(path)) == count


def test_memory_of_lines(write: Callable[[str, bytes], Path]) -> None:
    path = write("large.txt", f"{TEXT}\n".encode() * (LARGE_FILE_BYTES // len(TEXT.encode())))
    assert peak_bytes(lambda: sum(1 for _ in lines_of(path))) < MEGABYTE


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
