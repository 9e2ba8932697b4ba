"""Requests of any lengths to one packed batch, and its answers back to the requests; without Triton.

Shapes are not rounded up to multiples: OpenVINO ran the exact shapes at least as fast (see docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]

# What an execution costs beside its texts, in cells of attention's grid (see docs/log.md).
EXECUTION_CELLS = 400


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


def divide(requests: Sequence[Ids]) -> list[tuple[Indices, dict[str, npt.NDArray[np.generic]]]]:
    """All texts of the requests as one or several executions: which texts each holds, and its inputs.

    Attention runs on a grid as wide as the longest text, so a few long texts make it large for all. Sorted by length
    and cut where that saves more of the grid than another execution costs, the same texts take less time.
    """
    whole = pack(requests)
    lengths = whole["lengths"].astype(np.int64)
    parts = cut(lengths)
    if len(parts) == 1:
        return [(np.arange(len(lengths)), whole)]
    starts = np.cumsum(lengths) - lengths
    flat = whole["input_ids"]
    rows = [flat[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    return [(part, pack([rows[index][None, :] for index in part])) for part in parts]


def cut(lengths: npt.NDArray[np.int64]) -> list[Indices]:
    """Indices of the texts of each execution, sorted by length; the division with the least cells and executions.

    By dynamic programming over the sorted lengths: of all ways to cut, the least sum of texts * longest text +
    `EXECUTION_CELLS` for each part.
    """
    order = np.argsort(lengths, kind="stable")
    count = len(order)
    least = np.zeros(count + 1)
    start = np.zeros(count + 1, np.int64)
    for end in range(1, count + 1):
        costs = least[:end] + np.arange(end, 0, -1) * lengths[order[end - 1]]
        start[end] = costs.argmin()
        least[end] = costs[start[end]] + EXECUTION_CELLS
    parts = []
    end = count
    while end:
        parts.append(order[start[end] : end])
        end = int(start[end])
    return parts[::-1]


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
