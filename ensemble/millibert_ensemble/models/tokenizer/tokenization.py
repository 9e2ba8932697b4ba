"""Text to token ids, without Triton."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer


class Tokens(NamedTuple):
    """One request's rows."""

    input_ids: npt.NDArray[np.int32]  # [B, L], padded with 0 to the longest row, or to the bucket it fits into
    span: npt.NDArray[np.int32]  # [B, ceil(L / B)] zeros; [B, 1] with buckets
    truncated: npt.NDArray[np.bool_]  # [B, 1]


def load(path: Path) -> Tokenizer:
    """A `tokenizer.json` that truncates to the model's limit and does not pad."""
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.truncation is None:
        raise ValueError(f"{path} sets no truncation: a long text would pass the model's limit")
    tokenizer.no_padding()
    return tokenizer


def decode(texts: npt.NDArray[np.object_]) -> list[str]:
    """UTF-8 bytes [B, 1] to strings; raises ValueError that says which text is not UTF-8."""
    decoded = []
    for index, text in enumerate(texts.reshape(-1)):
        try:
            decoded.append(text.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"TEXT[{index}] is not UTF-8: {error.reason} at byte {error.start}") from error
    return decoded


def requested_timeout(parameters: str, longest_us: int) -> int:
    """Microseconds a request may wait: `queue_timeout_ms` of its parameters (JSON) where that is less than the limit.

    Raises ValueError for what is no positive number.
    """
    if not parameters or "queue_timeout_ms" not in (given := json.loads(parameters)):
        return longest_us
    value = given["queue_timeout_ms"]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"queue_timeout_ms must be a positive number of milliseconds, not {value!r}")
    return min(longest_us, int(1000 * value))


def tokenize(tokenizer: Tokenizer, requests: Sequence[Sequence[str]], buckets: Sequence[int] = ()) -> list[Tokens]:
    """All texts of all requests in one call of the tokenizer; one `Tokens` per request.

    With buckets, lengths in ascending order, rows are padded to the first that holds them: Triton merges requests of
    equal shape only.
    """
    encodings = iter(tokenizer.encode_batch_fast([text for texts in requests for text in texts]))
    return [_tokens([next(encodings) for _ in texts], buckets) for texts in requests]


def _tokens(encodings: list, buckets: Sequence[int]) -> Tokens:  # type: ignore[type-arg] # Encoding has no stubs
    rows = [encoding.ids for encoding in encodings]
    longest = max(map(len, rows))
    width = next((bucket for bucket in buckets if bucket >= longest), longest)
    input_ids = np.array([ids + [0] * (width - len(ids)) for ids in rows], np.int32)
    truncated = np.array([[bool(encoding.overflowing)] for encoding in encodings])
    span = 1 if buckets else -(-longest // len(rows))
    return Tokens(input_ids, np.zeros((len(rows), span), np.int32), truncated)
