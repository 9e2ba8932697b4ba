"""Which texts share a row and which rows an execution, and that logits come back in order; no engine."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from millibert_ensemble.models.bert.inference import LAYOUTS, in_rows, infer, padded
from millibert_ensemble.models.bert.rows import (
    NARROW,
    SHARED,
    Execution,
    Shape,
    arrange,
    capacity,
    divide,
    finish,
    shapes,
    widths,
)

STREAMS = (1, 2, 4, 16)
MAX_TOKENS = 128


def batches(streams: int):
    """Lengths of batches of 1 to 64 texts: long and short ones, mostly short ones, and nothing but the shortest."""
    generator = np.random.default_rng(streams)
    for texts in range(1, 65):
        yield generator.integers(1, MAX_TOKENS + 1, texts).tolist()
        yield np.minimum(generator.geometric(0.06, texts), MAX_TOKENS).tolist()
        yield [2] * texts


def divided(lengths, streams: int) -> list[tuple[Shape, list[list[int]]]]:
    """The lengths of the texts in each row of each execution."""
    return [
        (shape, [[lengths[index] for index in row] for row in rows]) for shape, rows in divide(list(lengths), streams)
    ]


def costs(executions) -> list[int]:
    return [shape.cost for shape, _ in executions]


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
    assert finish(parts, streams) == expected


# The shapes.


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (1, [16, 32, 48, 64]),
        (64, [16, 32, 48, 64]),
        (65, [16, 32, 48, 64, 96]),
        (128, [16, 32, 48, 64, 96, 128]),
        (512, [16, 32, 48, 64, 96, 128, 192, 256, 384, 512]),
        (513, [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768]),
    ],
)
def test_rows_are_as_wide_as_the_longest_text_needs(max_tokens, expected):
    assert widths(max_tokens) == expected


def test_shapes_are_few_and_none_is_large():
    found = shapes(512)
    assert len(found) == len(set(found)) <= 20
    assert {shape.width for shape in found} == set(widths(512))
    assert all(shape.rows * shape.width <= 512 for shape in found)
    assert {shape.rows for shape in found if shape.width in NARROW} == {1}


def test_the_cost_of_a_shape_grows_with_its_rows_and_more_than_evenly_with_their_width():
    assert Shape(2, 64).cost < Shape(1, 64).cost * 2  # one execution for two
    assert Shape(1, 512).cost > Shape(8, 64).cost  # the same tokens, but attention is wider


# Any batch.


@pytest.mark.parametrize("streams", STREAMS)
def test_every_text_has_its_place_in_a_shape_that_the_engine_knows(streams):
    known = set(shapes(MAX_TOKENS))
    for lengths in batches(streams):
        executions = divide(lengths, streams)
        assert sorted(index for each in executions for row in each.rows for index in row) == list(range(len(lengths)))
        for shape, rows in executions:
            assert shape in known
            assert len(rows) == shape.rows
            for row in rows:
                assert 0 < len(row) <= capacity(shape.width)
                assert sum(lengths[index] for index in row) <= shape.width


@pytest.mark.parametrize("streams", STREAMS)
def test_executions_come_most_expensive_first(streams):
    several = 0
    for lengths in batches(streams):
        estimated = costs(divided(lengths, streams))
        assert all(earlier >= later for earlier, later in pairwise(estimated))
        several += len(set(estimated)) > 1
    assert several > 60  # there was something to sort


@pytest.mark.parametrize("streams", STREAMS)
def test_the_streams_end_at_about_the_same_time(streams):
    for lengths in batches(streams):
        estimated = costs(divided(lengths, streams))
        # Nobody waits for longer than one execution of the widest row takes.
        assert finish(estimated, streams) <= sum(estimated) / streams + Shape(1, MAX_TOKENS).cost


def test_little_room_is_left_over():
    generator = np.random.default_rng(0)
    for _ in range(20):
        lengths = np.minimum(4 + generator.geometric(0.1, 64), 64).tolist()
        computed = sum(shape.rows * shape.width for shape, _ in divided(lengths, 2))
        assert sum(lengths) > 0.9 * computed


# Batches that say what it is for.


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize(
    ("length", "width"), [(1, 16), (16, 16), (17, 32), (33, 48), (49, 64), (65, 96), (96, 96), (97, 128)]
)
def test_a_text_alone_has_the_narrowest_row_that_holds_it(length, width, streams):
    assert divided([length], streams) == [(Shape(1, width), [[length]])]


@pytest.mark.parametrize("lengths", [(12, 9), (20, 9, 31), (100, 110), (100, 128, 90, 95)])
def test_a_few_texts_on_two_streams_are_shared_out(lengths):
    executions = divided(lengths, 2)
    assert len(executions) > 1
    assert finish(costs(executions), 2) < finish(costs(executions), 1)


def test_a_few_short_texts_on_one_stream_share_a_row():
    assert divided([9, 8, 7, 6], 1) == [(Shape(1, 32), [[9, 8, 7, 6]])]


def test_long_texts_leave_little_room_over_either():
    generator = np.random.default_rng(0)
    for _ in range(20):
        lengths = generator.integers(max(SHARED) + 1, MAX_TOKENS + 1, 64).tolist()
        computed = sum(shape.rows * shape.width for shape, _ in divided(lengths, 2))
        assert sum(lengths) > 0.8 * computed


def test_room_beside_a_long_text_goes_to_short_ones():
    assert divided([100, 20, 8], 1) == [(Shape(1, 128), [[100, 20, 8]])]


def test_few_long_texts_do_not_widen_the_rows_of_many_short_ones():
    executions = divided([10] * 60 + [120] * 4, 2)
    assert sum(shape.rows for shape, _ in executions if shape.width == 128) == 4
    assert sum(shape.rows for shape, _ in executions if shape.width == 64) == 10  # six texts in each


def test_a_large_batch_is_in_a_few_large_executions():
    assert [shape for shape, _ in divided([16] * 64, 2)] == [Shape(8, 64)] * 2


# The inputs of an execution.


def test_inputs_tell_each_token_its_text_and_its_position():
    texts = [np.array([2, 7, 8, 3], np.int32), np.array([2, 3], np.int32), np.array([2, 0, 3], np.int32)]
    (execution,) = divide([4, 2, 3], 1)
    assert execution == (Shape(1, 32), [[0, 2, 1]])
    inputs = arrange(texts, execution)
    assert {name: values.dtype.name for name, values in inputs.items()} == dict.fromkeys(inputs, "int32")
    left = [0] * (32 - 9)
    assert inputs["input_ids"].tolist() == [[2, 7, 8, 3, 2, 0, 3, 2, 3, *left]]
    assert inputs["position"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, *left]]
    assert inputs["text"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2, *[-1] * len(left)]]
    assert inputs["first"].tolist() == [0, 4, 7, 0, 0]  # room for five texts


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65, 128])
def test_a_text_alone_is_laid_out_like_any_other(length):
    text = np.arange(1, length + 1, dtype=np.int32)
    ((shape, _),) = divide([length], 2)
    alone = arrange([text], Execution(shape, [[0]]))
    other = arrange([np.ones(3, np.int32), text], Execution(shape, [[1]]))
    assert alone.keys() == other.keys()
    for name, values in alone.items():
        np.testing.assert_array_equal(values, other[name], strict=True)


@pytest.mark.parametrize("streams", STREAMS)
def test_inputs_have_the_shape_of_their_execution_and_nothing_else(streams):
    for lengths in batches(streams):
        texts = [np.full(length, index + 1, np.int32) for index, length in enumerate(lengths)]
        for execution in divide(lengths, streams):
            inputs = arrange(texts, execution)
            assert {inputs[name].shape for name in ("input_ids", "position", "text")} == {tuple(execution.shape)}
            assert inputs["first"].shape == (execution.shape.rows * capacity(execution.shape.width),)
            used = inputs["text"] >= 0
            assert not inputs["input_ids"][~used].any()
            indices = np.array([index for row in execution.rows for index in row])
            np.testing.assert_array_equal(inputs["input_ids"][used], indices[inputs["text"][used]] + 1)
            starts = inputs["first"][: len(indices)]
            np.testing.assert_array_equal(inputs["input_ids"].reshape(-1)[starts], indices + 1)
            assert not inputs["position"].reshape(-1)[starts].any()


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
        return [np.array([self.logits(row) for row in self._texts(inputs)], np.float32) for inputs in parts]

    @staticmethod
    def logits(row) -> list[int]:
        return [len(row), int(row.sum()), int(row @ np.arange(1, len(row) + 1))]

    def _texts(self, inputs):
        if "text" not in inputs:
            return inputs["input_ids"]
        owners = inputs["text"].reshape(-1)[inputs["first"]]
        return [inputs["input_ids"][inputs["text"] == owner] for owner in owners]


def engine(streams: int):
    return Echo(streams)


REQUESTS = {
    "rows": [*requests_of(10, 118, 9), *requests_of(12, 100, rows=2), *requests_of(*range(3, 23))],
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


def test_padding_inside_a_request_is_left_out():
    (request,) = requests_of(12, rows=2)
    request[1, 5:] = 0
    (part,) = in_rows([request], 1)
    assert (np.asarray(part.inputs["text"], np.int32) >= 0).sum() == 12 + 5


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
