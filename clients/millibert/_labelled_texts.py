"""Labelled texts to measure a service with."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from millibert._errors import UsageError
from millibert._records import Record, read_records, require_column


class LabelledText(NamedTuple):
    """One text and the label that people gave it."""

    text: str
    label: str


def read_labelled_texts(path: Path, text_column: str, label_column: str) -> list[LabelledText]:
    """Read a CSV, TSV or JSON Lines file; raises `UsageError` that names file, line and reason."""
    rows = [
        LabelledText(_text(path, record, text_column), _label(path, record, label_column))
        for record in read_records(path)
    ]
    if not rows:
        raise UsageError(f"{path}: no labelled texts")
    return rows


def _text(path: Path, record: Record, column: str) -> str:
    require_column(path, record, column)
    value = record.fields[column]
    if not isinstance(value, str):
        found = "no value" if value is None else f"{type(value).__name__}, not text,"
        raise UsageError(f"{path}:{record.line}: {found} in column {column!r}")
    return value


def _label(path: Path, record: Record, column: str) -> str:
    label = _text(path, record, column)
    if not label:
        raise UsageError(f"{path}:{record.line}: empty {column!r}")
    return label
