"""Labelled text from files or a hub to checked splits.

Every error names the file, the line and the reason. Sources: `.csv`, `.tsv`, `.jsonl` and `.parquet` files, a
folder that holds one of these per split (`train.csv`, `test.csv`), and `hub:owner/name` (the Parquet form in
which the Hugging Face hub offers every public data set).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from millibert._errors import UsageError
from millibert._records import READERS, Record, read_records, require_column
from millibert_build.scenario import Data

SHOWN_PROBLEMS = 5
SUFFIXES = (*READERS, ".parquet")


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled text and where it came from."""

    text: str
    label: str
    file: str
    line: int

    @property
    def place(self) -> str:
        """`file:line`."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Splits:
    """The data of a build. `labels` in the order of their ids."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def sha256(self) -> str:
        """Hash of all texts and labels, split by split: the same data give the same hash."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            for example in split:
                digest.update(json.dumps([example.text, example.label]).encode())
            digest.update(b"\x00")
        return digest.hexdigest()


def load_splits(data: Data, labels: Sequence[str] | None, seed: int) -> Splits:
    """Read, check and split. `labels` fixes the label list and its order; None takes the training data's."""
    train = load_examples(data.train, "train", data.text_column, data.label_column)
    test = load_examples(data.test, "test", data.text_column, data.label_column)
    known = tuple(labels) if labels is not None else tuple(sorted({example.label for example in train}))
    if len({example.label for example in train}) < 2:
        raise UsageError(f"{data.train}: only one class, {train[0].label!r}; a classifier needs at least two")
    if data.validation is not None:
        validation = load_examples(data.validation, "validation", data.text_column, data.label_column)
    else:
        validation = ()
    for split in (train, validation, test):
        _refuse(_unknown_labels(split, known))
    _refuse(_copies_across({"train": train, "validation": validation, "test": test}))
    train, warnings = _without_variants(train, (*validation, *test))
    if not validation:
        train, validation = stratified(train, data.validation_share, seed)
    return Splits(train, validation, test, known, warnings)


def load_examples(source: str, split: str, text_column: str, label_column: str) -> tuple[Example, ...]:
    """Read one source; raises `UsageError` with the first few problems, each with file and line."""
    examples: list[Example] = []
    problems: list[str] = []
    for path in _files(source, split):
        for record in _records(path, label_column):
            require_column(path, record, text_column)
            require_column(path, record, label_column)
            try:
                examples.append(_example(path, record, text_column, label_column))
            except UsageError as error:
                problems.append(str(error))
    _refuse(problems)
    if not examples:
        raise UsageError(f"{source}: no examples")
    return tuple(examples)


def load_texts(source: str, text_column: str) -> list[str]:
    """The texts of one file, labels or not; empty ones are errors as everywhere."""
    return [example.text for example in load_examples(source, "test", text_column, text_column)]


def stratified(examples: Sequence[Example], share: float, seed: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Hold out `share` of each label (at least one text, never the last one): (kept, held out)."""
    by_label: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        by_label[example.label].append(index)
    chosen: set[int] = set()
    generator = random.Random(seed)  # noqa: S311 - a split, not a secret
    for label in sorted(by_label):
        indices = by_label[label]
        count = min(max(1, round(share * len(indices))), len(indices) - 1)
        chosen.update(generator.sample(indices, count))
    kept = tuple(example for index, example in enumerate(examples) if index not in chosen)
    return kept, tuple(examples[index] for index in sorted(chosen))


def _example(path: Path, record: Record, text_column: str, label_column: str) -> Example:
    place = f"{path}:{record.line}"
    text, label = record.fields[text_column], record.fields[label_column]
    for column, value in ((text_column, text), (label_column, label)):
        if value is None:
            raise UsageError(f"{place}: no value in column {column!r}")
        if not isinstance(value, str):
            raise UsageError(f"{place}: column {column!r} holds {type(value).__name__}, not text")
        if not value.strip():
            raise UsageError(f"{place}: empty {column!r}")
    assert isinstance(text, str)
    assert isinstance(label, str)
    return Example(text, label.strip(), str(path), record.line)


def _unknown_labels(examples: Iterable[Example], known: Sequence[str]) -> list[str]:
    allowed = set(known)
    return [
        f"{example.place}: unknown label {example.label!r} (not among the {len(known)} known labels)"
        for example in examples
        if example.label not in allowed
    ]


def _copies_across(splits: dict[str, Sequence[Example]]) -> list[str]:
    """The same text, to the letter, in two splits: what is measured would have been learnt by heart."""
    seen: dict[str, tuple[str, Example]] = {}
    problems = []
    for split, examples in splits.items():
        for example in examples:
            first_split, first = seen.setdefault(example.text, (split, example))
            if first_split != split:
                problems.append(
                    f"{example.place}: the same text is in the {first_split} data ({first.place}); "
                    "remove it from one of them"
                )
    return problems


def _without_variants(
    train: tuple[Example, ...], measured: Sequence[Example]
) -> tuple[tuple[Example, ...], tuple[str, ...]]:
    """Drop training texts that equal a measured one but for letter case and white space, with a warning."""
    held = {_folded(example.text): example for example in measured}
    dropped = [example for example in train if _folded(example.text) in held]
    if not dropped:
        return train, ()
    pairs = ", ".join(f"{e.place} ~ {held[_folded(e.text)].place}" for e in dropped[:SHOWN_PROBLEMS])
    more = f" and {len(dropped) - SHOWN_PROBLEMS} more" if len(dropped) > SHOWN_PROBLEMS else ""
    warning = (
        f"{len(dropped)} training texts left out: equal to held-out ones but for case and white space ({pairs}{more})"
    )
    return tuple(example for example in train if _folded(example.text) not in held), (warning,)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        lines = [*problems[:SHOWN_PROBLEMS], *([f"… and {more} more such problems"] if more > 0 else [])]
        raise UsageError("\n  ".join(lines))


# ---- sources -------------------------------------------------------------------------------------------------


def _files(source: str, split: str) -> list[Path]:
    if source.startswith("hub:"):
        from millibert_build.hub import download_split

        return download_split(source.removeprefix("hub:"), split)
    path = Path(source)
    if path.is_dir():
        found = [path / f"{split}{suffix}" for suffix in SUFFIXES if (path / f"{split}{suffix}").is_file()]
        if len(found) != 1:
            names = ", ".join(f"{split}{suffix}" for suffix in SUFFIXES)
            raise UsageError(f"{path}: expected exactly one of {names}, found {len(found)}")
        return found
    if not path.is_file():
        raise UsageError(f"{path}: no such file or folder")
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; use {', '.join(SUFFIXES)}")
    return [path]


def _records(path: Path, label_column: str) -> Iterator[Record]:
    return _read_parquet(path, label_column) if path.suffix == ".parquet" else read_records(path)


def _read_parquet(path: Path, label_column: str) -> Iterator[Record]:
    try:
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise UsageError(f"{path}: Parquet needs the extra 'parquet': pip install 'millibert[parquet]'") from error
    table = pq.read_table(path)
    names = _class_names(table.schema.metadata or {}, label_column)
    for number, fields in enumerate(table.to_pylist(), start=1):
        label = fields.get(label_column)
        if names is not None and isinstance(label, int):
            fields[label_column] = names[label]
        yield Record(number, fields)


def _class_names(metadata: dict[bytes, bytes], column: str) -> list[str] | None:
    """The label names that the hub's Parquet files keep in their schema for integer class labels."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(column, {}).get("names")
    return list(names) if names else None
