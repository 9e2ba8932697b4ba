"""Triton's JSON documents, alike over both protocols, to what a client answers.

gRPC leaves zeros and empty values out and writes large numbers as strings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from millibert._codec import CodecError
from millibert._statistics import Counters
from millibert._types import ModelState, ServerInfo
from millibert_ensemble.contract import LABELS_PARAMETER, MAX_TEXTS_PARAMETER

# What reading a document of another structure raises.
WRONG_DOCUMENT = (KeyError, TypeError, ValueError, AttributeError)


class Config(NamedTuple):
    """What a client wants to know of a model's configuration."""

    max_batch_size: int
    labels: tuple[str, ...]
    steps: tuple[str, ...]
    """Of an ensemble: its models, in the order of their steps."""


def read_config(document: Any) -> Config:
    """Read a model's configuration; raises `CodecError`."""
    try:
        parameters = document.get("parameters", {})
        labels = parameters.get(LABELS_PARAMETER, {}).get("string_value") or "[]"
        max_texts = parameters.get(MAX_TEXTS_PARAMETER, {}).get("string_value") or document.get("max_batch_size", 0)
        steps = document.get("ensemble_scheduling", {}).get("step", [])
        return Config(
            # Triton writes 0 for a model without a batch dimension: one text a request is all it could take.
            max_batch_size=max(1, int(max_texts)),
            labels=tuple(map(str, json.loads(labels))),
            steps=tuple(dict.fromkeys(str(step["model_name"]) for step in steps)),
        )
    except WRONG_DOCUMENT as error:
        raise CodecError(f"not a model configuration: {error!r}") from error


def read_statistics(document: Any) -> dict[str, Counters]:
    """Read the counters of all models, all versions of a model together; raises `CodecError`."""
    found: dict[str, Counters] = {}
    try:
        for model in document.get("model_stats", []):
            name = str(model["name"])
            found[name] = found.get(name, Counters()) + _counters(model)
    except WRONG_DOCUMENT as error:
        raise CodecError(f"not Triton's statistics: {error!r}") from error
    return found


def _counters(model: Mapping[str, Any]) -> Counters:
    stats = model.get("inference_stats", {})

    def value(part: str, of: str) -> int:
        return int(stats.get(part, {}).get(of, 0))

    return Counters(
        requests=value("success", "count"),
        failures=value("fail", "count"),
        texts=int(model.get("inference_count", 0)),
        executions=int(model.get("execution_count", 0)),
        total_ns=value("success", "ns"),
        queue_ns=value("queue", "ns"),
        input_ns=value("compute_input", "ns"),
        compute_ns=value("compute_infer", "ns"),
        output_ns=value("compute_output", "ns"),
    )


def read_models(document: Any) -> tuple[ModelState, ...]:
    """Read the repository's index; raises `CodecError`."""
    try:
        entries = document.get("models", []) if isinstance(document, dict) else document
        return tuple(
            ModelState(*(str(entry.get(key, "")) for key in ("name", "version", "state", "reason")))
            for entry in entries
        )
    except WRONG_DOCUMENT as error:
        raise CodecError(f"not a list of models: {error!r}") from error


def read_server(document: Any) -> ServerInfo:
    """Read a server's metadata; raises `CodecError`."""
    try:
        return ServerInfo(str(document["name"]), str(document["version"]), tuple(document.get("extensions", ())))
    except WRONG_DOCUMENT as error:
        raise CodecError(f"not a server's metadata: {error!r}") from error
