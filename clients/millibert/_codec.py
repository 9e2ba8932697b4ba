"""Texts to tensors, tensors to classifications, statuses to errors: once for all protocols.

Knows nothing of endpoints: what is wrong is a `CodecError`, and the client that knows where it was going
turns it into an error of `millibert._errors`.
"""

from __future__ import annotations

import operator
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from tritonclient.utils import InferenceServerException

from millibert._errors import Busy, InvalidRequest, NotFound, ServerFault, ServiceError, Timeout, Unavailable
from millibert._types import Classification, Prediction
from millibert_ensemble.contract import (
    ACCEPTED,
    LABEL,
    LABEL_ID,
    RESPONSE_TENSORS,
    SCORE,
    TOP_K_PARAMETER,
    TRUNCATED,
    Tensor,
)

Array: TypeAlias = npt.NDArray[Any]
Outputs: TypeAlias = Mapping[str, Array | None]
"""The response's tensors by name; None for one that is missing."""
MAX_TOP_K = 2**31 - 1


class CodecError(ValueError):
    """What was to be sent, or what came back, does not follow the contract."""


class Request(NamedTuple):
    """One request, ready for a transport."""

    texts: tuple[str, ...]
    tensor: Array
    """`TEXT`: UTF-8 bytes objects, shape [B, 1]."""
    parameters: dict[str, int]

    def part(self, start: int, end: int) -> Request:
        """The same for some of the texts."""
        return Request(self.texts[start:end], self.tensor[start:end], self.parameters)


def encode(texts: Sequence[str], top_k: int | None) -> Request:
    """Check what the caller gave and lay it out; raises `CodecError` naming what is wrong and where."""
    if isinstance(texts, (bytes, bytearray)) or not isinstance(texts, Sequence):
        raise CodecError(f"expected a str or a list or tuple of str, not {type(texts).__name__}")
    if not texts:
        raise CodecError("there is no text to classify: the list is empty")
    tensor = np.empty((len(texts), 1), dtype=np.object_)
    for index, text in enumerate(texts):
        tensor[index, 0] = check_text(text, index)
    parameters = {} if top_k is None else {TOP_K_PARAMETER: _checked_top_k(top_k)}
    return Request(tuple(texts), tensor, parameters)


def check_text(text: object, index: int) -> bytes:
    """A text as UTF-8; raises `CodecError` that names its index."""
    if not isinstance(text, str):
        raise CodecError(f"text {index} is not a str but {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!r} at position {error.start}"
        raise CodecError(f"text {index} cannot be written as UTF-8: lone surrogate {found}") from error


def _checked_top_k(top_k: int) -> int:
    try:
        # index() takes NumPy's integers too; a bool is an int that nobody means.
        number = None if isinstance(top_k, bool) else operator.index(top_k)
    except TypeError:
        number = None
    if number is None or not 1 <= number <= MAX_TOP_K:
        raise CodecError(f"top_k must be an integer of at least 1, not {top_k!r}")
    return number


def read_outputs(parse: Callable[[], Any]) -> Outputs:
    """Take the contract's tensors out of the `InferResult` that `parse` makes, of either protocol.

    Raises `CodecError` where something else than an inference response came back.
    """
    try:
        result = parse()
        return {tensor.name: result.as_numpy(tensor.name) for tensor in RESPONSE_TENSORS}
    except CodecError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, struct.error, InferenceServerException) as error:
        # tritonclient takes the structure of a response for granted.
        raise CodecError(f"not an inference response ({type(error).__name__}: {error})") from error


def check_threshold(threshold: float | None) -> float | None:
    """A score from 0 to 1, or None; raises `CodecError`."""
    if threshold is None:
        return None
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise CodecError(f"threshold must be a number from 0 to 1, not {threshold!r}")
    return float(threshold)


def decode(texts: Sequence[str], outputs: Outputs, threshold: float | None = None) -> tuple[Classification, ...]:
    """Read a response: one classification per text, in order.

    `outputs` holds arrays of the shape [B, K], of `TRUNCATED` [B, 1]. A `threshold` takes the place of those that
    the build chose. Raises `CodecError` when the outputs do not follow the contract.
    """
    labels = _output(LABEL, outputs)
    shape = labels.shape
    if len(shape) != 2 or shape[0] != len(texts) or shape[1] < 1:
        raise CodecError(f"{LABEL.name} has the shape {list(shape)} for {len(texts)} texts")
    scores = _output(SCORE, outputs, shape)
    ids = _output(LABEL_ID, outputs, shape)
    accepted = _output(ACCEPTED, outputs, shape)
    if threshold is not None:
        # Scores are FP32: a score that reads 0.9 reaches a threshold of 0.9.
        accepted = scores >= np.float32(threshold)
    truncated = _output(TRUNCATED, outputs, (shape[0], 1))
    return tuple(
        Classification(text, _predictions(labels[row], ids[row], scores[row], accepted[row]), bool(truncated[row, 0]))
        for row, text in enumerate(texts)
    )


def _output(tensor: Tensor, outputs: Outputs, shape: tuple[int, ...] | None = None) -> Array:
    array = outputs.get(tensor.name)
    if array is None:
        raise CodecError(f"the output {tensor.name} is missing")
    if shape is not None and array.shape != shape:
        raise CodecError(f"{tensor.name} has the shape {list(array.shape)}, expected {list(shape)}")
    return array


def _predictions(labels: Array, ids: Array, scores: Array, accepted: Array) -> tuple[Prediction, ...]:
    return tuple(
        Prediction(_decoded(label), int(number), float(score), bool(holds))
        for label, number, score, holds in zip(labels, ids, scores, accepted, strict=True)
    )


def _decoded(label: object) -> str:
    # An answer in JSON brings str where the binary one brings bytes.
    if isinstance(label, str):
        return label
    if not isinstance(label, bytes):
        raise CodecError(f"{LABEL.name} holds {type(label).__name__}, expected text")
    try:
        return label.decode()
    except UnicodeDecodeError as error:
        raise CodecError(f"{LABEL.name} holds {label!r}, which is not UTF-8") from error


# gRPC's names and HTTP's numbers for the same things, as Triton and the proxies before it use them.
_ERROR_OF_STATUS: dict[str, type[ServiceError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "OUT_OF_RANGE": InvalidRequest,
    "FAILED_PRECONDITION": InvalidRequest,
    "UNIMPLEMENTED": InvalidRequest,
    "UNAUTHENTICATED": InvalidRequest,
    "PERMISSION_DENIED": InvalidRequest,
    "NOT_FOUND": NotFound,
    "404": NotFound,
    "CANCELLED": Unavailable,
    "UNAVAILABLE": Unavailable,
    "RESOURCE_EXHAUSTED": Busy,
    "429": Busy,
    "502": Unavailable,
    "503": Unavailable,
    "DEADLINE_EXCEEDED": Timeout,
    "408": Timeout,
    "504": Timeout,
}
# What a status says too broadly, by a part of its text. No retry gets past the first two; of Triton's UNAVAILABLE the
# next are queues that are full or were too slow (ours, `default_queue_policy`'s); and a model whose process has died
# fails every request until its server is started again; one that is stopping has unloaded its models.
_ERROR_OF_TEXT: dict[str, type[ServiceError]] = {
    "message larger than max": InvalidRequest,
    "protocol is restricted": InvalidRequest,
    "busy: ": Busy,
    "queue is full": Busy,
    "maximum queue size": Busy,
    "Request timeout expired": Busy,
    "is not healthy": Unavailable,
    "has no available versions": Unavailable,
}
_REQUEST_ID = re.compile(r"\[request id: [^]]*\] ")
_BATCH_LIMIT = re.compile(r"batch-size must be <= (\d+)")


def error_class(status: str, reason: str) -> type[ServiceError]:
    """Find the error for a gRPC status name (`NOT_FOUND`) or an HTTP status (`404`) and its text."""
    for fragment, kind in _ERROR_OF_TEXT.items():
        if fragment in reason:
            return kind
    if known := _ERROR_OF_STATUS.get(status):
        return known
    return InvalidRequest if status.startswith("4") else ServerFault


def plain_reason(message: str) -> str:
    """Cut off what tells a caller nothing: the request id before, a trace of the server's code after."""
    reason = _REQUEST_ID.sub("", message, count=1).partition("\n\nAt:")[0]
    return " ".join(reason.split())


def region_is_unknown(reason: str) -> bool:
    """Whether a server has refused a request because it knows nothing of its shared memory, after a restart perhaps."""
    return "shared memory region" in reason


def batch_limit_in(reason: str) -> int | None:
    """How many texts a request may hold, where that is what a server has refused a request for."""
    found = _BATCH_LIMIT.search(reason)
    return int(found[1]) if found else None
