"""Requests of any lengths to packed inputs, and logits back to the requests; without Triton.

An engine that has seen a shape before is faster, so sizes are rounded up: a text alone to one of a few lengths, for
which the engine has forms of their own, batches to multiples. What is added belongs to no text. Figures: docs/log.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Inputs = dict[str, npt.NDArray[np.generic]]

# Lengths of a text alone.
ALONE = (16, 32, 64)
# Of a batch: tokens in all, and the longest text.
_TOKENS, _LONGEST = 16, 8


def check(input_ids: Ids, max_tokens: int) -> None:
    """Raise ValueError for a request [B, L] that would spoil the batch it is merged into."""
    texts, longest = input_ids.shape
    if texts == 0 or longest == 0:
        raise ValueError(f"input_ids is empty: shape {list(input_ids.shape)}")
    if longest > max_tokens:
        raise ValueError(f"input_ids has {longest} tokens a text; this model reads at most {max_tokens}")


def pack(requests: Sequence[Ids]) -> Inputs:
    """Requests [B, L], rows padded with id 0, to the four inputs of the packed graph, padding left out."""
    return pack_rows(rows_of(requests))


def rows_of(requests: Sequence[Ids]) -> list[Ids]:
    """The ids [L] of each text of the requests, in order, padding left out."""
    return [row for request in requests for row in _rows(request)]


def pack_rows(rows: Sequence[Ids]) -> Inputs:
    """The four inputs of the packed graph for these texts."""
    lengths = np.fromiter(map(len, rows), np.int32, len(rows))
    tokens, longest = _sizes(lengths)
    input_ids = np.zeros(tokens, np.int32)
    np.concatenate(rows, out=input_ids[: lengths.sum()])
    return {
        "input_ids": input_ids,
        "lengths": lengths,
        "max_length": np.zeros(longest, np.float32),
        "span": np.zeros(1, np.int32),
    }


def alone(max_tokens: int) -> list[Inputs]:
    """Inputs of every shape that a text alone can have, up to the longest for which there is a form of its own."""
    lengths = [length for shorter, length in zip((0, *ALONE), ALONE, strict=False) if shorter < max_tokens]
    return [pack_rows([np.ones(length, np.int32)]) for length in lengths]


def _sizes(lengths: Ids) -> tuple[int, int]:
    """Tokens and longest text, rounded up."""
    tokens, longest = int(lengths.sum()), int(lengths.max())
    if len(lengths) == 1:
        for length in ALONE:
            if tokens <= length:
                return length, length
    return -(-tokens // _TOKENS) * _TOKENS, -(-longest // _LONGEST) * _LONGEST


def unpack(logits: npt.NDArray[np.float32], requests: Sequence[Ids]) -> list[npt.NDArray[np.float32]]:
    """Logits of all texts, in order, to each request's own rows."""
    ends = np.cumsum([len(request) for request in requests])
    return np.split(logits, ends[:-1])


def _rows(request: Ids) -> list[Ids]:
    """The rows up to their last id that is not 0, and at least one id of each."""
    if len(request) == 1:
        return [request[0]]
    used = request[:, ::-1] != 0
    lengths = np.where(used.any(axis=1), request.shape[1] - used.argmax(axis=1), 1)
    return [row[:length] for row, length in zip(request, lengths, strict=True)]
