"""Labelled texts to measure a service with."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from millibert._errors import UsageError
from millibert._records import Record, read_records, text_of


class LabelledText(NamedTuple):
    """One text and the labels that people gave it: one, or of a multi-label set any number."""

    text: str
    labels: tuple[str, ...]

    @property
    def label(self) -> str:
        """The one label."""
        return self.labels[0]


def read_labelled_texts(
    path: Path, text_column: str, label_column: str, separator: str | None = None
) -> list[LabelledText]:
    """Read a CSV, TSV, JSON or JSON Lines file; raises `UsageError` that names file, line and reason.

    With a `separator` a text has any number of labels: a list, or one string with separators.
    """
    rows = []
    labelled = False
    for record in read_records(path):
        labelled = labelled or label_column in record.fields
        rows.append(LabelledText(text_of(path, record, text_column), _labels(path, record, label_column, separator)))
    if not rows:
        raise UsageError(f"{path}: no labelled texts")
    if not labelled:
        # One text without labels is an answer; a file without any is a mistyped column.
        raise UsageError(f"{path}: no record has a column {label_column!r}")
    return rows


def read_texts(path: Path, text_column: str) -> list[LabelledText]:
    """The same for texts that none of the labels fits: whatever else the file holds is left alone."""
    rows = [LabelledText(text_of(path, record, text_column), ()) for record in read_records(path)]
    if not rows:
        raise UsageError(f"{path}: no texts")
    return rows


def _labels(path: Path, record: Record, column: str, separator: str | None) -> tuple[str, ...]:
    if separator is None:
        label = text_of(path, record, column)
        if not label:
            raise UsageError(f"{path}:{record.line}: empty {column!r}")
        return (label,)
    value = record.fields.get(column)
    if value is None:
        return ()
    parts = value.split(separator) if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise UsageError(f"{path}:{record.line}: column {column!r} holds {value!r}, not labels (a list, or text)")
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
