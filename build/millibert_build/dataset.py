"""Labelled text from files or a hub to checked splits.

Every error names the file, the line and the reason. Sources: `.csv`, `.tsv`, `.json`, `.jsonl` and `.parquet` files,
file names with wildcards, folders that hold one file per split (`train.csv`, `test.csv`), `hub:owner/name` (the
Parquet form in which the Hugging Face hub offers every public data set), and lists of all these.
"""

from __future__ import annotations

import glob
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from millibert._errors import UsageError
from millibert._records import READERS, Record, read_records, require_column
from millibert_build.scenario import Data, Problem, Sources

SHOWN_PROBLEMS = 5
SUFFIXES = (*READERS, ".parquet")


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled text and where it came from. Single-label: one label; multi-label: any number, also none."""

    text: str
    labels: tuple[str, ...]
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
    problem: Problem = "single_label"
    out_of_scope: tuple[str, ...] = ()

    def sha256(self) -> str:
        """Hash of all texts and labels, split by split: the same data give the same hash."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            for example in split:
                digest.update(json.dumps([example.text, example.labels]).encode())
            digest.update(b"\x00")
        return digest.hexdigest()


def target_matrix(examples: Sequence[Example], labels: Sequence[str]) -> npt.NDArray[np.float32]:
    """Multi-hot [texts, labels]: 1 where a label fits a text."""
    number = {label: index for index, label in enumerate(labels)}
    matrix = np.zeros((len(examples), len(labels)), np.float32)
    for row, example in zip(matrix, examples, strict=True):
        row[[number[label] for label in example.labels]] = 1
    return matrix


def load_splits(data: Data, labels: Sequence[str] | None, problem: Problem = "single_label") -> Splits:
    """Read, check and split. `labels` fixes the label list and its order; None takes the training data's."""

    def load(sources: Sources, split: str) -> tuple[Example, ...]:
        return load_examples(sources, split, data, problem)

    train, test = load(data.train, "train"), load(data.test, "test")
    validation = load(data.validation, "validation") if data.validation is not None else ()
    found = sorted({label for example in train for label in example.labels})
    known = tuple(labels) if labels is not None else tuple(found)
    if len(known) < 2 or (problem == "single_label" and len(found) < 2):
        only = repr(found[0]) if found else "and that without a name"
        raise UsageError(f"{_named(data.train)}: only one class, {only}; a classifier needs at least two")
    for split in (train, validation, test):
        _refuse(_unknown_labels(split, known))
    warnings: tuple[str, ...] = ()
    if data.copies == "drop":
        train, validation, warnings = _without_copies(train, validation, test)
    _refuse(_copies_across({"train": train, "validation": validation, "test": test}))
    train, more = _without_variants(train, (*validation, *test))
    warnings += more
    if data.validation is None:
        train, validation = stratified(train, data.validation_share, data.seed)
        # Of a text that is there twice one copy may have been held out. Without it no label loses its last text.
        validation, more = _left_out(validation, train, "validation texts", "the training data repeat them")
        warnings += more
        if not validation:
            raise UsageError(f"{_named(data.train)}: too few different texts to hold any out; set validation in [data]")
    outside = load_texts(data.out_of_scope, data.text_column) if data.out_of_scope is not None else ()
    return Splits(train, validation, test, known, warnings, problem, tuple(outside))


def load_examples(sources: Sources, split: str, data: Data, problem: Problem) -> tuple[Example, ...]:
    """Read all sources of a split; raises `UsageError` with the first few problems, each with file and line."""
    examples: list[Example] = []
    problems: list[str] = []
    for path in _files(sources, split):
        records = labelled = 0
        for record in _records(path, data.label_column):
            require_column(path, record, data.text_column)
            records, labelled = records + 1, labelled + (data.label_column in record.fields)
            if problem == "single_label":
                require_column(path, record, data.label_column)
            try:
                examples.append(_example(path, record, data, problem))
            except UsageError as error:
                problems.append(str(error))
        if records and not labelled:
            raise UsageError(f"{path}: no record has a column {data.label_column!r}")
    _refuse(problems)
    if not examples:
        raise UsageError(f"{_named(sources)}: no examples")
    return tuple(examples)


def load_texts(sources: Sources, text_column: str) -> list[str]:
    """The texts of files, labels or not; empty ones are errors as everywhere."""
    columns = Data(train="", test="", text_column=text_column, label_column=text_column)
    return [example.text for example in load_examples(sources, "test", columns, "single_label")]


def stratified(examples: Sequence[Example], share: float, seed: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Hold out `share` of each label (at least one text if it has two, never its last one): (kept, held out).

    With several labels a text: iterative stratification (Sechidis et al., "On the Stratification of Multi-Label
    Data", 2011). The rarest label is dealt with first, and each of its texts counts for all its other labels too.
    Texts without a label are a group of their own.
    """
    waiting: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        for label in example.labels or ("",):
            waiting[label].append(index)
    wanted = {label: _held_out(len(indices), share) for label, indices in waiting.items()}
    remaining = {label: len(indices) for label, indices in waiting.items()}
    chosen: set[int] = set()
    decided: set[int] = set()
    generator = random.Random(seed)  # noqa: S311 - a split, not a secret
    for label in sorted(waiting, key=lambda name: (len(waiting[name]), name)):
        free = [index for index in waiting[label] if index not in decided]
        missing = max(0, wanted[label] - sum(index in chosen for index in waiting[label]))
        for index in (*generator.sample(free, min(len(free), missing)), *free):
            of_text = examples[index].labels or ("",)
            # A text with two rare labels could be the last one of the other.
            if missing and index not in chosen and all(remaining[name] > 1 for name in of_text):
                chosen.add(index)
                missing -= 1
                remaining.update({name: remaining[name] - 1 for name in of_text})
        decided.update(free)
    kept = tuple(example for index, example in enumerate(examples) if index not in chosen)
    return kept, tuple(examples[index] for index in sorted(chosen))


def _held_out(count: int, share: float) -> int:
    return min(max(1, round(share * count)), count - 1)


def _example(path: Path, record: Record, data: Data, problem: Problem) -> Example:
    place = f"{path}:{record.line}"
    text = _filled(place, data.text_column, record.fields[data.text_column])
    value = record.fields.get(data.label_column)
    if problem == "single_label":
        return Example(text, (_filled(place, data.label_column, value).strip(),), str(path), record.line)
    return Example(text, _label_set(place, value, data), str(path), record.line)


def _filled(place: str, column: str, value: object) -> str:
    if value is None:
        raise UsageError(f"{place}: no value in column {column!r}")
    if not isinstance(value, str):
        raise UsageError(f"{place}: column {column!r} holds {type(value).__name__}, not text")
    if not value.strip():
        raise UsageError(f"{place}: empty {column!r}")
    return value


def _label_set(place: str, value: object, data: Data) -> tuple[str, ...]:
    """The labels of one field: a list, or text with separators; nothing at all is no label."""
    if value is None:
        return ()
    parts = value.split(data.label_separator) if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise UsageError(f"{place}: column {data.label_column!r} holds {value!r}, not labels (a list, or text)")
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))  # annotators repeat themselves


def _unknown_labels(examples: Iterable[Example], known: Sequence[str]) -> list[str]:
    allowed = set(known)
    return [
        f"{example.place}: unknown label {label!r} (not among the {len(known)} known labels)"
        for example in examples
        for label in example.labels
        if label not in allowed
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
                    'remove it from one of them, or set copies = "drop" in [data]'
                )
    return problems


def _without_copies(
    train: tuple[Example, ...], validation: tuple[Example, ...], test: Sequence[Example]
) -> tuple[tuple[Example, ...], tuple[Example, ...], tuple[str, ...]]:
    """Leave out of training what is held out, and of validation what is in the test data: the test stays whole."""
    cleaned, of_validation = _left_out(validation, test, "validation texts", "the test data have them too")
    kept, of_train = _left_out(train, (*validation, *test), "training texts", "the held-out data have them too")
    for split, before, after in (("validation", validation, cleaned), ("training", train, kept)):
        if before and not after:
            raise UsageError(f"{before[0].file}: nothing is left of the {split} data: all of it is held-out data too")
    return kept, cleaned, (*of_train, *of_validation)


def _left_out(
    examples: tuple[Example, ...], measured: Sequence[Example], what: str, why: str
) -> tuple[tuple[Example, ...], tuple[str, ...]]:
    """Those whose text, to the letter, is not a measured one, and a warning that counts the others."""
    held = {example.text for example in measured}
    kept = tuple(example for example in examples if example.text not in held)
    count = len(examples) - len(kept)
    return kept, (f"{count} {what} left out: {why}",) if count else ()


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


def _files(sources: Sources, split: str) -> list[Path]:
    return [path for source in ([sources] if isinstance(sources, str) else sources) for path in _found(source, split)]


def _found(source: str, split: str) -> list[Path]:
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
    files = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(source))]
    if not files:
        raise UsageError(f"{path}: no such file or folder")
    for file in files:
        if file.suffix not in SUFFIXES:
            raise UsageError(f"{file}: cannot read {file.suffix or 'a file without suffix'}; use {', '.join(SUFFIXES)}")
    return files


def _named(sources: Sources) -> str:
    return sources if isinstance(sources, str) else ", ".join(sources)


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
