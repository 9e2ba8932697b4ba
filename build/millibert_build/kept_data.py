"""The texts of a build, kept beside its checkpoint so that a later one can continue from the very same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from millibert._errors import UsageError
from millibert_build.dataset import Example, Splits

_FILE = "data.json"


def save_data(splits: Splits, work: Path) -> None:
    """Write all splits to the work folder, aside and then renamed."""
    parts = {name: [_fields(e) for e in getattr(splits, name)] for name in ("train", "validation", "test")}
    document = {"sha256": splits.sha256(), "labels": splits.labels, "problem": splits.problem, **parts}
    aside = work / f"{_FILE}.new"
    aside.write_text(json.dumps({**document, "out_of_scope": splits.out_of_scope}, ensure_ascii=False), "utf-8")
    aside.replace(work / _FILE)


def _fields(example: Example) -> list[Any]:
    return [example.text, list(example.labels), example.file, example.line]


def load_data(work: Path, sha256: str) -> Splits:
    """The splits that `save_data` wrote; raises `UsageError` where they are gone or have another hash."""
    path = work / _FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot read the data of the release: {error}") from error
    train, validation, test = (
        tuple(Example(text, tuple(labels), file, line) for text, labels, file, line in document[name])
        for name in ("train", "validation", "test")
    )
    splits = Splits(
        train,
        validation,
        test,
        labels=tuple(document["labels"]),
        problem=document["problem"],
        out_of_scope=tuple(document["out_of_scope"]),
    )
    if splits.sha256() != sha256:
        raise UsageError(f"{path}: its texts are not those of the release (their hash differs)")
    return splits
