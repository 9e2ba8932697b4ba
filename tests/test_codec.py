"""What is sent and what comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import millibert
from millibert._codec import CodecError, batch_limit_in, check_threshold, decode, encode, error_class, plain_reason

TENSORS: dict[str, Any] = {
    "LABEL": np.array([[b"a", "ö".encode()], [b"b", b"a"]], dtype=object),
    "SCORE": np.array([[0.75, 0.25], [0.5, 0.5]], np.float32),
    "LABEL_ID": np.array([[0, 2], [1, 0]], np.int32),
    "ACCEPTED": np.array([[True, False], [False, False]]),
    "TRUNCATED": np.array([[False], [True]]),
}
# 0.9 in FP32 is a little more than 0.9, 0.1 a little less than their sum needs.
NINE_TENTHS = TENSORS | {"SCORE": np.array([[0.9, 0.1]] * 2, np.float32)}


def test_encode() -> None:
    request = encode(["a", "größe", ""], np.int64(2))  # type: ignore[arg-type]
    assert request.texts == ("a", "größe", "")
    assert request.tensor.tolist() == [[b"a"], ["größe".encode()], [b""]]
    assert request.parameters == {"top_k": 2}
    assert encode(["a"], None).parameters == {}


@pytest.mark.parametrize(
    ("texts", "top_k", "reason"),
    [
        ([], None, "no text to classify"),
        (b"bytes", None, "not bytes"),
        ({"a"}, None, "not set"),
        (7, None, "not int"),
        (["a", None], None, "text 1 is not a str but NoneType"),
        (["a", b"b"], None, "text 1 is not a str but bytes"),
        (
            ["a", "b\ud800"],
            None,
            r"text 1 cannot be written as UTF-8: lone surrogate '\\ud800' at position 1",
        ),
        (["a"], 0, "top_k must be an integer of at least 1, not 0"),
        (["a"], True, "not True"),
        (["a"], 2.0, "not 2.0"),
        (["a"], 2**40, "top_k"),
    ],
)
def test_encode_refuses(texts: Any, top_k: Any, reason: str) -> None:
    with pytest.raises(CodecError, match=reason):
        encode(texts, top_k)


def test_decode() -> None:
    first, second = decode(["x", "y"], TENSORS)
    assert first.predictions == (millibert.Prediction("a", 0, 0.75), millibert.Prediction("ö", 2, 0.25, False))
    assert (first.text, first.best, first.label, first.score) == ("x", first.predictions[0], "a", 0.75)
    assert (first.truncated, second.truncated) == (False, True)
    assert str(first) == "a 0.750, ö 0.250"
    assert str(second) == "b 0.500, a 0.500 (don't know, text truncated)"
    assert (first.known, first.accepted, second.known, second.accepted) == (True, ("a",), False, ())


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"SCORE": None}, "SCORE is missing"),
        ({"LABEL": np.array([[b"a"]], dtype=object)}, r"LABEL has the shape \[1, 1\] for 2 texts"),
        ({"LABEL": np.empty((2, 0), dtype=object)}, r"LABEL has the shape \[2, 0\]"),
        ({"LABEL_ID": np.zeros((2, 1), np.int32)}, r"LABEL_ID has the shape \[2, 1\], expected \[2, 2\]"),
        ({"TRUNCATED": np.zeros(2, bool)}, r"TRUNCATED has the shape \[2\], expected \[2, 1\]"),
        ({"LABEL": np.array([[b"\xff", b"a"]] * 2, dtype=object)}, "not UTF-8"),
        ({"LABEL": np.ones((2, 2))}, "expected text"),
    ],
)
def test_decode_refuses(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(CodecError, match=reason):
        decode(["x", "y"], {**TENSORS, **changed})


@pytest.mark.parametrize(
    ("statuses", "reason", "kind"),
    [
        ("INVALID_ARGUMENT 400 413 403 PERMISSION_DENIED", "", millibert.InvalidRequest),
        ("NOT_FOUND 404", "", millibert.NotFound),
        ("UNAVAILABLE 503 502 CANCELLED", "", millibert.Unavailable),
        ("RESOURCE_EXHAUSTED 429", "", millibert.Busy),
        ("UNAVAILABLE 503", "in ensemble 'x', busy: no engine free in time", millibert.Busy),
        ("UNAVAILABLE 503", "Exceeds maximum queue size", millibert.Busy),
        ("UNAVAILABLE 503", "Request timeout expired", millibert.Busy),
        ("NOT_FOUND 404 400", "Request for unknown model: 'm' has no available versions", millibert.Unavailable),
        ("INTERNAL 500", "Stub process 'bert_0_0' is not healthy.", millibert.Unavailable),
        ("DEADLINE_EXCEEDED 504 408", "", millibert.Timeout),
        ("INTERNAL 500 UNKNOWN DATA_LOSS 301", "", millibert.ServerFault),
        ("RESOURCE_EXHAUSTED", "Received message larger than max (5 vs. 4)", millibert.InvalidRequest),
        ("UNAVAILABLE", "This protocol is restricted, expecting header 'x'", millibert.InvalidRequest),
    ],
)
def test_error_of_a_status(statuses: str, reason: str, kind: type[Exception]) -> None:
    assert {error_class(status, reason) for status in statuses.split()} == {kind}


def test_plain_reason() -> None:
    assert plain_reason("[request id: <id_unknown>] too many") == "too many"
    assert plain_reason("[request id: ab-1] too many") == "too many"
    assert plain_reason("RuntimeError: boom\n\nAt:\n  model.py(3): execute\n") == "RuntimeError: boom"


def test_batch_limit_in_a_refusal() -> None:
    assert batch_limit_in("inference request batch-size must be <= 64 for 'x'") == 64
    assert batch_limit_in("something else") is None


def test_a_threshold_takes_the_place_of_the_builds() -> None:
    first, second = decode(["x", "y"], TENSORS, 0.5)
    assert (first.accepted, second.accepted) == (("a",), ("b", "a"))
    assert [answer.known for answer in decode(["x", "y"], TENSORS, 0.76)] == [False, False]
    assert decode(["x"], {name: array[:1] for name, array in NINE_TENTHS.items()}, 0.9)[0].accepted == ("a",)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, True, "0.5", float("nan")])
def test_threshold_refused(threshold: Any) -> None:
    with pytest.raises(CodecError, match="threshold must be a number from 0 to 1"):
        check_threshold(threshold)
