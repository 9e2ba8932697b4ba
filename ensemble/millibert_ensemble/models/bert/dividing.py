"""Which texts of a batch share an execution.

Every stream of the engine is to be busy to the end, and attention runs on a grid as wide as the longest text of an
execution. So texts are sorted by length and cut into parts of about the same number of tokens, as many as are done
first by an estimate of what each part takes.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from .packing import ALONE

Indices = npt.NDArray[np.int64]
Lengths = npt.NDArray[np.int64]

# What an execution and a token cost on one thread, in cells of attention's grid, and what an execution of a text alone
# costs in a form of its own (see docs/log.md).
EXECUTION_CELLS = 320
ALONE_CELLS = 80
TOKEN_CELLS = 5
# More parts a stream than this seldom pay, and more texts than this are better together.
_MOST_A_STREAM = 4
_MOST_ALONE = 16


def divide(lengths: Lengths, streams: int) -> list[Indices]:
    """Indices of the texts of each part, the most expensive part first: streams take the parts in this order."""
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    best = min(_divisions(ordered, streams), key=lambda starts: finish(_costs(ordered, starts), streams))
    costs = _costs(ordered, best)
    parts = np.split(order, best[1:])
    return [parts[number] for number in np.argsort(-costs, kind="stable")]


def finish(costs: npt.NDArray[np.int64], streams: int) -> int:
    """When the last of the streams ends, if each takes the most expensive part left."""
    busy_until = [0] * streams
    for cost in sorted(costs.tolist(), reverse=True):
        heapq.heapreplace(busy_until, busy_until[0] + cost)
    return max(busy_until)


def _divisions(ordered: Lengths, streams: int) -> list[Indices]:
    """Ways to cut: where each part starts, parts of about the same number of tokens."""
    texts = len(ordered)
    counts = sorted({1, *(min(texts, streams * each) for each in range(1, _MOST_A_STREAM + 1))})
    middles = np.cumsum(ordered) - ordered / 2
    total = int(ordered.sum())
    divisions = [_starts((middles * count / total).astype(np.int64)) for count in counts]
    return [*divisions, np.arange(texts)] if texts <= _MOST_ALONE else divisions


def _starts(part: Indices) -> Indices:
    """Where a sorted list of part numbers changes; a part that got no text is left out."""
    return np.flatnonzero(np.diff(part, prepend=-1))


def _costs(ordered: Lengths, starts: Indices) -> npt.NDArray[np.int64]:
    """Cells of each part: of its grid, of its tokens, of the execution."""
    ends = np.append(starts[1:], len(ordered))
    texts, longest = ends - starts, ordered[ends - 1]
    execution = np.where((texts == 1) & (longest <= ALONE[-1]), ALONE_CELLS, EXECUTION_CELLS)
    return np.asarray(texts * longest + TOKEN_CELLS * np.add.reduceat(ordered, starts) + execution)
