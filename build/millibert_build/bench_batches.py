"""Batches of real texts, for the benchmarks."""

from __future__ import annotations

from pathlib import Path

from millibert._errors import UsageError
from millibert_build.dataset import load_texts
from millibert_build.tokens import limited, load_tokenizer, token_ids

Ids = list[list[int]]


def read_ids(checkpoint: Path, data: str, text_column: str, max_tokens: int) -> Ids:
    """Token ids of each text, by the checkpoint's own tokenizer, in the order of the file."""
    if not (checkpoint / "config.json").is_file():
        raise UsageError(f"{checkpoint}: not a checkpoint; `millibert build` keeps them in its --work folder")
    tokenizer = limited(load_tokenizer(str(checkpoint)), max_tokens)
    return token_ids(tokenizer, load_texts(data, text_column))


def batches_of(ids: Ids, size: int) -> list[Ids]:
    """Batches of `size` texts; the last one may be smaller."""
    return [ids[start : start + size] for start in range(0, len(ids), size)]
