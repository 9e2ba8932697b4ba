"""Which texts share an execution, and that logits come back in the order of the texts; no engine."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from millibert_ensemble.models.bert.dividing import ALONE_CELLS, EXECUTION_CELLS, TOKEN_CELLS, divide, finish
from millibert_ensemble.models.bert.inference import LAYOUTS, infer, packed, padded
from millibert_ensemble.models.bert.packing import ALONE, pack

STREAMS = (1, 2, 4, 16)


def cost(lengths) -> int:
    """What one execution is estimated to take, written down a second time."""
    grid = len(lengths) * max(lengths)
    execution = ALONE_CELLS if len(lengths) == 1 and max(lengths) <= max(ALONE) else EXECUTION_CELLS
    return int(grid + TOKEN_CELLS * sum(lengths) + execution)


def costs(parts) -> np.ndarray:
    return np.array([cost(lengths) for lengths in parts], np.int64)


def divided(lengths, streams: int) -> list[list[int]]:
    """The lengths of each part."""
    whole = np.array(lengths, np.int64)
    return [whole[part].tolist() for part in divide(whole, streams)]


def batches(streams: int):
    """Lengths of batches of 1 to 64 texts: long and short ones, and mostly short ones."""
    generator = np.random.default_rng(streams)
    for texts in range(1, 65):
        yield generator.integers(1, 129, texts)
        yield np.minimum(generator.geometric(0.06, texts), 128)


# When the streams are done.


@pytest.mark.parametrize(
    ("parts", "streams", "expected"),
    [
        ([5], 1, 5),
        ([5], 4, 5),
        ([5, 3, 4], 1, 12),
        ([5, 3, 4], 3, 5),
        ([5, 3, 4], 2, 7),  # 5 | 4 + 3
        ([7, 5, 4, 3, 2], 2, 11),  # 7 + 3 | 5 + 4 + 2
        ([3, 3, 2, 2, 2], 2, 7),  # 3 + 2 + 2 | 3 + 2: the streams cannot know that 3 + 3 | 2 + 2 + 2 were better
        ([2, 3, 2, 3, 2], 2, 7),  # the order in which they are given makes no difference
        ([9, 1, 1, 1, 1, 1, 1, 1, 1], 2, 9),
        ([4, 4, 4, 4, 4, 4, 4], 3, 12),
    ],
)
def test_the_streams_take_the_most_expensive_part_left(parts, streams, expected):
    assert finish(np.array(parts, np.int64), streams) == expected


# Any batch.


@pytest.mark.parametrize("streams", STREAMS)
def test_every_text_is_in_exactly_one_part(streams):
    for lengths in batches(streams):
        parts = divide(lengths, streams)
        assert all(len(part) for part in parts)
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))


@pytest.mark.parametrize("streams", STREAMS)
def test_texts_of_one_part_are_neighbours_in_the_order_of_lengths(streams):
    for lengths in batches(streams):
        parts = sorted((min(part), max(part)) for part in divided(lengths, streams))
        assert all(longest <= shortest for (_, longest), (shortest, _) in pairwise(parts))


@pytest.mark.parametrize("streams", STREAMS)
def test_parts_come_most_expensive_first(streams):
    several = 0
    for lengths in batches(streams):
        estimated = costs(divided(lengths, streams))
        assert (np.diff(estimated) <= 0).all()
        several += len({*estimated.tolist()}) > 1
    assert several > 60  # there was something to sort


@pytest.mark.parametrize("streams", STREAMS)
def test_a_division_is_never_slower_than_one_part_or_a_part_each(streams):
    faster = 0
    for lengths in batches(streams):
        seconds = finish(costs(divided(lengths, streams)), streams)
        assert seconds <= cost(lengths)
        faster += seconds < cost(lengths)
        if len(lengths) <= 16:
            assert seconds <= finish(costs([[length] for length in lengths]), streams)
    assert faster > 100


# Batches that say what it is for.


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("length", [1, 20, 128])
def test_one_text_is_one_part(length, streams):
    assert divided([length], streams) == [[length]]


@pytest.mark.parametrize("lengths", [(12, 9), (20, 9, 31), (100, 110), (100, 128, 90, 95)])
def test_a_few_texts_on_two_streams_are_split(lengths):
    parts = divided(lengths, 2)
    assert len(parts) > 1
    assert finish(costs(parts), 2) < cost(lengths)


def test_long_texts_on_one_stream_share_an_execution():
    assert divided([100, 101, 99], 1) == [[99, 100, 101]]


def test_equal_texts_are_shared_evenly():
    assert divided([100] * 64, 16) == [[100] * 4] * 16


@pytest.mark.parametrize("streams", [1, 2])
def test_few_long_texts_do_not_widen_the_grid_of_many_short_ones(streams):
    lengths = [10] * 30 + [120] * 4 + [11] * 30
    grids = [len(part) * max(part) for part in divided(lengths, streams)]
    assert sum(grids) < 0.4 * len(lengths) * max(lengths)


def test_texts_of_one_length_keep_their_order():
    (part,) = divide(np.full(32, 120), 1)
    assert part.tolist() == list(range(32))


# From requests to executions, and back.


def requests_of(*lengths: int, rows: int = 1) -> list[np.ndarray]:
    generator = np.random.default_rng(sum(lengths))
    return [generator.integers(1, 99, (rows, length)).astype(np.int32) for length in lengths]


class Echo:
    """An engine whose logits tell of which ids a text is: their number, their sum, and the sum weighed by position."""

    def __init__(self, streams: int) -> None:
        self.streams = streams
        self.executions = 0

    def infer_all(self, parts):
        self.executions += len(parts)
        return [np.array([self.logits(row) for row in self._rows(inputs)], np.float32) for inputs in parts]

    @staticmethod
    def logits(row) -> list[int]:
        return [len(row), int(row.sum()), int(row @ np.arange(1, len(row) + 1))]

    def _rows(self, inputs):
        if "lengths" not in inputs:
            return inputs["input_ids"]
        ends = np.cumsum(inputs["lengths"])
        return np.split(inputs["input_ids"], ends)[:-1]


def engine(streams: int):
    return Echo(streams)


REQUESTS = {
    "packed": [*requests_of(10, 118, 9), *requests_of(12, 100, rows=2), *requests_of(*range(3, 23))],
    "padded": [*requests_of(24), *requests_of(24, rows=3), *requests_of(24, rows=9)],
}


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_come_back_in_the_order_of_the_texts(layout, streams):
    requests = REQUESTS[layout]
    echo = engine(streams)
    logits = infer(echo, LAYOUTS[layout](requests, streams))
    assert logits.dtype == np.float32
    assert logits.tolist() == [Echo.logits(row) for request in requests for row in request]
    assert echo.executions > 1 or (layout, streams) == ("padded", 1)


def test_every_text_of_every_request_is_in_one_part_with_its_own_ids():
    requests = [*requests_of(10, 118, 9), *requests_of(12, 100, rows=2), *requests_of(*[11] * 20)]
    requests[3][1, 5:] = 0  # padding inside a request is left out
    whole = pack(requests)
    lengths = whole["lengths"].astype(int)
    starts = np.cumsum(lengths) - lengths
    seen = []
    parts = packed(requests, 2)
    assert len(parts) > 1
    for texts, inputs in parts:
        assert inputs["lengths"].tolist() == lengths[texts].tolist()
        assert inputs["max_length"].size >= lengths[texts].max()
        own = [whole["input_ids"][starts[text] : starts[text] + lengths[text]] for text in texts]
        np.testing.assert_array_equal(inputs["input_ids"][: lengths[texts].sum()], np.concatenate(own))
        assert not inputs["input_ids"][lengths[texts].sum() :].any()
        seen.extend(texts.tolist())
    assert sorted(seen) == list(range(len(lengths)))


@pytest.mark.parametrize(
    ("texts", "streams", "shares"), [(1, 4, [1]), (3, 4, [1, 1, 1]), (7, 2, [4, 3]), (8, 1, [8]), (10, 4, [3, 3, 2, 2])]
)
def test_padded_rows_are_shared_evenly_padding_and_all(texts, streams, shares):
    (request,) = requests_of(6, rows=texts)
    request[-1, 2:] = 0
    parts = padded([request[:1], *([request[1:]] if texts > 1 else [])], streams)
    assert [len(part.texts) for part in parts] == shares
    assert [part.inputs["span"].shape for part in parts] == [(share, 1) for share in shares]
    np.testing.assert_array_equal(np.concatenate([part.inputs["input_ids"] for part in parts]), request)
    assert np.concatenate([part.texts for part in parts]).tolist() == list(range(texts))
