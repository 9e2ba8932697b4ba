"""Records from CSV, TSV, JSON and JSON Lines files in UTF-8, each with its line; errors name file and line."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from millibert._errors import UsageError


class Record(NamedTuple):
    """One record and the line, from 1, on which it begins."""

    line: int
    fields: dict[str, object]


def read_records(path: Path) -> Iterator[Record]:
    """Read a file by its suffix, one of `READERS`, all but `.json` in constant memory.

    Raises `UsageError`; for what is wrong inside the file, when the reading gets there.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; use {', '.join(READERS)}")
    return reader(path)


def require_column(path: Path, record: Record, column: str) -> None:
    """Raise `UsageError` that lists the columns there are, unless `column` is one of them."""
    if column not in record.fields:
        present = ", ".join(map(repr, record.fields))
        raise UsageError(f"{path}:{record.line}: no column {column!r}; it has {present or 'none'}")


def text_of(path: Path, record: Record, column: str) -> str:
    """The text in a column; raises `UsageError` where the record has none there."""
    require_column(path, record, column)
    value = record.fields[column]
    if not isinstance(value, str):
        found = "no value" if value is None else f"{type(value).__name__}, not text,"
        raise UsageError(f"{path}:{record.line}: {found} in column {column!r}")
    return value


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a file, each with its end; raises `UsageError`."""
    try:
        with path.open("rb") as file:
            yield from decoded(file, str(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


def decoded(lines: Iterable[bytes], name: str) -> Iterator[str]:
    """Lines of UTF-8 as text, without a byte order mark; raises `UsageError` that names the line of `name`."""
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(name, number, error) from error
        yield text


def _not_utf8(name: str, line: int, error: UnicodeDecodeError) -> UsageError:
    # The position is one in the error's own object, which lacks a byte order mark.
    byte = error.object[error.start]
    return UsageError(f"{name}:{line}: not UTF-8 (byte 0x{byte:02x}); convert the file first")


def _csv(path: Path, delimiter: str = ",") -> Iterator[Record]:
    lines = itertools.chain.from_iterable(map(_cut_at_returns, lines_of(path)))
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    line = 1
    try:
        if not reader.fieldnames:
            raise UsageError(f"{path}:1: no header")
        line = reader.line_num + 1
        for fields in reader:
            if None in fields:
                raise UsageError(
                    f"{path}:{line}: more cells than the header has; a {delimiter!r} inside a text needs quotes "
                    "around the text"
                )
            yield Record(line, dict(fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(f"{path}:{line}: not valid CSV: {error}") from error


def _cut_at_returns(line: str) -> Iterable[str]:
    r"""A line, cut where "\r" alone ends lines too: the csv module wants its lines so."""
    return io.StringIO(line, newline="") if "\r" in line.removesuffix("\r\n") else (line,)


def _tsv(path: Path) -> Iterator[Record]:
    return _csv(path, "\t")


def _jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line.removesuffix("\n"))
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}:{number}: not valid JSON: {error.msg}") from error
        if not isinstance(fields, dict):
            raise UsageError(f"{path}:{number}: a JSON object is expected, not {type(fields).__name__}")
        yield Record(number, fields)


def _json(path: Path) -> Iterator[Record]:
    """An array of objects, read one by one so that each has its line."""
    content = _content(path)
    decoder, position = json.JSONDecoder(), _skip(content, 0)
    if content[position : position + 1] != "[":
        raise UsageError(f"{path}:1: a JSON array of objects is expected; for one object a line use .jsonl")
    start = position = _skip(content, position + 1)
    line = content.count("\n", 0, start) + 1
    while content[position : position + 1] != "]":
        # Counted on from the entry before: from the top each time a large file would take quadratic time.
        line, start = line + content.count("\n", start, position), position
        try:
            fields, position = decoder.raw_decode(content, position)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
        if not isinstance(fields, dict):
            raise UsageError(f"{path}:{line}: a JSON object is expected, not {type(fields).__name__}")
        yield Record(line, fields)
        position = _skip(content, position)
        if content[position : position + 1] == ",":
            position = _skip(content, position + 1)
            if content[position : position + 1] == "]":
                raise _wrong_json(path, content, position, "no entry after the last ','")
        elif content[position : position + 1] != "]":
            raise _wrong_json(path, content, position, "expected ',' or ']'")
    rest = _skip(content, position + 1)
    if rest < len(content):
        raise _wrong_json(path, content, rest, "more behind the array; one file holds one array")


def _content(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), error.object.count(b"\n", 0, error.start) + 1, error) from error


def _wrong_json(path: Path, content: str, position: int, reason: str) -> UsageError:
    line = content.count("\n", 0, position) + 1
    return UsageError(f"{path}:{line}: not valid JSON: {reason}")


def _skip(content: str, position: int) -> int:
    """The next position that is not white space."""
    while content[position : position + 1].isspace():
        position += 1
    return position


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".json": _json,
    ".jsonl": _jsonl,
}
