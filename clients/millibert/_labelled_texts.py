"""Labelled texts from a file, CSV or JSON Lines, with errors that name the file and the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from millibert._errors import UsageError


class LabelledText(NamedTuple):
    """One text and the label that people gave it."""

    text: str
    label: str


def read_labelled_texts(path: Path, text_column: str, label_column: str) -> list[LabelledText]:
    """Read a `.csv` (with a header) or `.jsonl` file in UTF-8; raises `UsageError` for any other."""
    readers = {".csv": _rows_of_csv, ".jsonl": _rows_of_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{path}: expected a file named {' or '.join('*' + end for end in readers)}")
    rows = [
        LabelledText(_text(path, line, row, text_column), _label(path, line, row, label_column))
        for line, row in reader(path, _decoded(path))
    ]
    if not rows:
        raise UsageError(f"{path}: there are no labelled texts in it")
    return rows


def _decoded(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}: line {line} is not UTF-8: {error.reason}; convert the file first") from error


def _rows_of_csv(path: Path, content: str) -> Iterator[tuple[int, dict[str, object]]]:
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise UsageError(
                    f"{path}: line {reader.line_num} has more cells than the header; "
                    "a comma inside a text needs quotes around it"
                )
            yield reader.line_num, dict(row)
    except csv.Error as error:
        where = f"the row that begins on line {reader.line_num + 1}"
        raise UsageError(f"{path}: {where} is not CSV: {error}") from error


def _rows_of_jsonl(path: Path, content: str) -> Iterator[tuple[int, dict[str, object]]]:
    # Not splitlines(): it also cuts at characters that JSON allows inside a string.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}: line {number} is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}: line {number} is not a JSON object")
        yield number, row


def _text(path: Path, line: int, row: dict[str, object], column: str) -> str:
    if column not in row:
        present = ", ".join(repr(name) for name in row)
        raise UsageError(f"{path}: line {line} has no column {column!r}; there are {present}")
    value = row[column]
    if not isinstance(value, str):
        found = "missing" if value is None else f"not a string: {value!r}"
        raise UsageError(f"{path}: line {line}: {column!r} is {found}")
    return value


def _label(path: Path, line: int, row: dict[str, object], column: str) -> str:
    label = _text(path, line, row, column)
    if not label:
        raise UsageError(f"{path}: line {line}: {column!r} is empty")
    return label
