"""The best label of each text in a raw answer of Triton, with little decoding, and whether it is right.

A load generator that shares its CPU with the server cannot make typed answers of everything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from millibert_ensemble.contract import LABEL

Wanted = Sequence[frozenset[bytes]]
"""For each text of a request the labels that are right, in UTF-8."""

# Triton's BYTES: each value behind its length.
_LENGTH_BYTES = 4
_JSON_LENGTH = "Inference-Header-Content-Length"


def are_right(labels: Sequence[bytes], wanted: Wanted) -> bool:
    """Whether each text has one of the labels that are right for it."""
    return len(labels) == len(wanted) and all(label in right for label, right in zip(labels, wanted, strict=True))


def best_labels_grpc(answer: bytes) -> list[bytes]:
    """Of a ModelInferResponse; none where it has no labels."""
    from tritonclient.grpc import service_pb2

    response = service_pb2.ModelInferResponse.FromString(answer)
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=False):
        if output.name == LABEL.name:
            return _first_of_each(raw, *output.shape)
    return []


def best_labels_http(body: bytes, headers: Mapping[str, str]) -> list[bytes]:
    """Of the body of an HTTP answer whose tensors are binary; none where it has no labels."""
    if _JSON_LENGTH not in headers:
        return []
    start = int(headers[_JSON_LENGTH])
    for output in json.loads(body[:start])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        if output["name"] == LABEL.name:
            return _first_of_each(body[start : start + size], *output["shape"])
        start += size
    return []


def _first_of_each(raw: bytes, rows: int, columns: int) -> list[bytes]:
    found, at = [], 0
    for number in range(rows * columns):
        end = at + _LENGTH_BYTES + int.from_bytes(raw[at : at + _LENGTH_BYTES], "little")
        if number % columns == 0:
            found.append(raw[at + _LENGTH_BYTES : end])
        at = end
    return found
