"""Requests to texts, and logits back to the requests; without Triton."""

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


def texts_of(requests: Sequence[Ids]) -> list[Ids]:
    """The ids [L] of each text of the requests [B, L], in order, padding with id 0 left out."""
    return [text for request in requests for text in _texts(request)]


def unpack(logits: npt.NDArray[np.float32], requests: Sequence[Ids]) -> list[npt.NDArray[np.float32]]:
    """Logits of all texts, in order, to each request's own rows."""
    ends = np.cumsum([len(request) for request in requests])
    return np.split(logits, ends[:-1])


def _texts(request: Ids) -> list[Ids]:
    """The rows up to their last id that is not 0, and at least one id of each."""
    if len(request) == 1 and request[0, -1] != 0:
        return [request[0]]  # as nearly all are
    used = request[:, ::-1] != 0
    lengths = np.where(used.any(axis=1), request.shape[1] - used.argmax(axis=1), 1)
    return [row[:length] for row, length in zip(request, lengths, strict=True)]
