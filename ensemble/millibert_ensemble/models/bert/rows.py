"""Which texts share a row, and which rows an execution; without Triton.

Texts of a batch are put end to end into rows, so that hardly any room is left over. An execution is some rows of one
width, in one of a few shapes: an engine that knows them beforehand is a quarter faster, and never has to make kernels
while it serves. All streams are to be busy to the end. Figures are in docs/log.md.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .texts import Ids

Inputs = dict[str, npt.NDArray[np.int32]]


class Shape(NamedTuple):
    """Of an execution, in tokens: rows of a width."""

    rows: int
    width: int

    @property
    def cost(self) -> int:
        """What an execution takes, in units of a token: attention's share grows with the width."""
        return _EXECUTION_TOKENS + self.rows * _row_cost(self.width)


class Execution(NamedTuple):
    """Texts, by their index, in each of its rows."""

    shape: Shape
    rows: list[list[int]]


# The rows that texts share, whichever the streams are done with first; longer texts have a wider one. Narrow ones are
# for a few short texts.
SHARED = (64, 48)
NARROW = (16, 32)
# Rows of an execution, as long as it has no more than so many tokens: any number of rows is a sum of few of these.
_ROWS, _WIDE_ROWS = (8, 5, 3, 2, 1), (3, 1)
_MOST_TOKENS = 512
# Room for one text in so many tokens of a row.
_SHORTEST = 6
# What an execution costs on top of its tokens, and the width at which attention costs as much as all the rest.
_EXECUTION_TOKENS = 30
_EVEN_WIDTH = 1000


def widths(max_tokens: int) -> list[int]:
    """Of rows for texts of up to so many tokens, narrow to wide."""
    # 96, 128, 192, 256, …: a text with a row to itself fills more than two thirds of it.
    wider = (width << power for power in count(1) for width in reversed(SHARED))
    found = [*NARROW, *reversed(SHARED)]
    while found[-1] < max_tokens:
        found.append(next(wider))
    return found


def shapes(max_tokens: int) -> list[Shape]:
    """All that an execution can have."""
    return [Shape(rows, width) for width in widths(max_tokens) for rows in _sizes(width)]


def capacity(width: int) -> int:
    """How many texts a row can hold, however short they are."""
    return width // _SHORTEST


def divide(lengths: Sequence[int], streams: int) -> list[Execution]:
    """Share out the texts of a batch, the most expensive execution first: streams take them in this order."""
    if len(lengths) == 1:
        return [Execution(Shape(1, _width_of(lengths[0])), [[0]])]
    choices = [*SHARED, *NARROW] if sum(lengths) <= streams * max(SHARED) else SHARED
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    divisions = [_divide(lengths, order, width, streams) for width in choices]
    return min(divisions, key=lambda division: finish([each.shape.cost for each in division], streams))


def finish(costs: Sequence[int], streams: int) -> int:
    """When the last of the streams ends, if each takes the most expensive execution left."""
    busy_until = [0] * streams
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(busy_until, busy_until[0] + cost)
    return max(busy_until)


def arrange(texts: Sequence[Ids], execution: Execution) -> Inputs:
    """The inputs of the graph of rows; `first` has room for as many texts as the shape can hold."""
    rows, width = execution.shape
    if execution.rows == [[0]]:
        return _arrange_alone(texts[0], width)
    indices = [index for row in execution.rows for index in row]
    lengths = np.fromiter((len(texts[index]) for index in indices), np.int64, len(indices))
    row = np.repeat(np.arange(len(execution.rows)), [len(each) for each in execution.rows])
    ends = np.cumsum(lengths)
    before = ends - lengths  # tokens in front of each text, if all stood end to end
    in_rows = np.bincount(row, lengths, len(execution.rows)).astype(np.int64)
    starts = row * width + before - (np.cumsum(in_rows) - in_rows)[row]
    position = np.arange(ends[-1]) - np.repeat(before, lengths)
    token = np.repeat(starts, lengths) + position
    grid = np.zeros((3, rows * width), np.int32)
    grid[2] = -1
    grid[0, token] = np.concatenate([texts[index] for index in indices])
    grid[1, token] = position
    grid[2, token] = np.repeat(np.arange(len(indices)), lengths)
    first = np.zeros(rows * capacity(width), np.int32)
    first[: len(starts)] = starts
    input_ids, positions, text = grid.reshape(3, rows, width)
    return {"input_ids": input_ids, "position": positions, "text": text, "first": first}


def _arrange_alone(text: Ids, width: int) -> Inputs:
    """What `arrange` makes of a single text, in a fraction of the time: somebody is waiting for it."""
    grid = np.zeros((3, 1, width), np.int32)
    input_ids, positions, texts = grid
    input_ids[0, : len(text)] = text
    positions[0, : len(text)] = np.arange(len(text))
    texts[0, len(text) :] = -1
    first = np.zeros(capacity(width), np.int32)
    return {"input_ids": input_ids, "position": positions, "text": texts, "first": first}


@lru_cache
def _width_of(length: int) -> int:
    """The narrowest row that holds a text."""
    return next(width for width in widths(length) if width >= length)


def _divide(lengths: Sequence[int], order: Sequence[int], narrowest: int, streams: int) -> list[Execution]:
    """Executions of rows that are as narrow as their longest text allows, down to a width."""
    found = []
    busy = [(0, stream) for stream in range(streams)]
    for width, rows in _rows(lengths, order, narrowest):
        counts: Counter[int] = Counter()
        for _ in rows:
            until, stream = busy[0]
            heapq.heapreplace(busy, (until + _row_cost(width), stream))
            counts[stream] += 1
        remaining = iter(rows)
        for share in counts.values():
            for size in _decompose(share, width):
                found.append(Execution(Shape(size, width), list(islice(remaining, size))))
    return sorted(found, key=lambda each: -each.shape.cost)


def _rows(lengths: Sequence[int], order: Sequence[int], narrowest: int) -> Iterator[tuple[int, list[list[int]]]]:
    """Rows of each width, wide to narrow; room beside long texts goes to the longest of the others that fit."""
    left = list(order)
    wide_to_narrow = [width for width in reversed(widths(lengths[order[0]])) if width >= narrowest]
    for width, narrower in zip(wide_to_narrow, [*wide_to_narrow[1:], 0], strict=True):
        rows, left = _fit(lengths, left, width, own=sum(lengths[index] > narrower for index in left))
        if rows:
            yield width, rows


def _fit(lengths: Sequence[int], order: Sequence[int], width: int, own: int) -> tuple[list[list[int]], list[int]]:
    """Best fit, long to short: the first `own` texts open rows where they need to; the others left over come back."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(width + 1)]
    rooms = 0  # bit n: a row has room for n tokens
    left = []
    for rank, index in enumerate(order):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        elif rank < own:
            row, room = len(rows), width
            rows.append([])
        else:
            left.append(index)
            continue
        rows[row].append(index)
        if len(rows[row]) < capacity(width):
            by_room[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows, left


def _sizes(width: int) -> list[int]:
    """How many rows of a width an execution may have, large to small."""
    if width in NARROW:
        return [1]
    return [rows for rows in (_ROWS if width in SHARED else _WIDE_ROWS) if rows * width <= _MOST_TOKENS] or [1]


def _decompose(rows: int, width: int) -> Iterator[int]:
    """Rows of each execution that together make so many, few and large."""
    for size in _sizes(width):
        while rows >= size:
            yield size
            rows -= size


def _row_cost(width: int) -> int:
    return width + width * width // _EVEN_WIDTH
