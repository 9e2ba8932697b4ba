"""Requests of any lengths to one packed batch, and its answers back to the requests; without Triton.

Shapes are not rounded up to multiples: OpenVINO ran the exact shapes at least as fast (see docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]


def check(input_ids: Ids, max_tokens: int) -> None:
    """Raise ValueError for a request [B, L] that would spoil the batch it is merged into."""
    texts, longest = input_ids.shape
    if texts == 0 or longest == 0:
        raise ValueError(f"input_ids is empty: shape {list(input_ids.shape)}")
    if longest > max_tokens:
        raise ValueError(f"input_ids has {longest} tokens a text; this model reads at most {max_tokens}")


def pack(requests: Sequence[Ids]) -> dict[str, npt.NDArray[np.generic]]:
    """Requests [B, L], rows padded with id 0, to the four inputs of the packed graph, padding left out."""
    rows = [_real_lengths(request) for request in requests]
    lengths = np.concatenate(rows)
    input_ids = np.concatenate(
        [
            request[0] if len(request) == 1 else request[np.arange(request.shape[1]) < row[:, None]]
            for request, row in zip(requests, rows, strict=True)
        ]
    )
    return {
        "input_ids": input_ids,
        "lengths": lengths,
        "max_length": np.zeros(lengths.max(), np.float32),
        "span": np.zeros(1, np.int32),
    }


def unpack(logits: npt.NDArray[np.float32], requests: Sequence[Ids]) -> list[npt.NDArray[np.float32]]:
    """Logits of all texts, in order, to each request's own rows."""
    ends = np.cumsum([len(request) for request in requests])
    return np.split(logits, ends[:-1])


def _real_lengths(request: Ids) -> Ids:
    """Tokens of each row: up to its last id that is not 0, at least 1."""
    if len(request) == 1:
        return np.array([request.shape[1]], np.int32)
    used = request[:, ::-1] != 0
    lengths = np.where(used.any(axis=1), request.shape[1] - used.argmax(axis=1), 1)
    return lengths.astype(np.int32)
