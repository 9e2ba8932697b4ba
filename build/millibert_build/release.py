"""The manifest of a release: what it was made from, with what, and what it measured."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millibert_build.dataset import Splits
from millibert_build.hub import Base, file_sha256
from millibert_build.scenario import Scenario
from millibert_build.train import Epoch

if TYPE_CHECKING:
    from millibert_build.variants import Variant  # which imports this file through the stages

FORMAT = 1
_PACKAGES = ("millibert", "torch", "transformers", "tokenizers", "onnx", "onnxruntime", "openvino", "numpy")


def describe(scenario: Scenario, base: Base, splits: Splits, curve: Sequence[Epoch]) -> dict[str, Any]:
    """All that is known before an engine is chosen."""
    texts = {name: len(getattr(splits, name)) for name in ("train", "validation", "test")}
    return {
        "format": FORMAT,
        "name": scenario.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "problem": scenario.problem,
        "labels": list(splits.labels),
        "max_tokens": scenario.max_tokens,
        "max_texts": scenario.max_texts,
        "top_k": scenario.top_k,
        "data": {"sha256": splits.sha256(), "texts": texts},
        "base": {"name": base.name, "revision": base.revision, "sha256": base.sha256},
        "training": {**scenario.training.model_dump(), "curve": [asdict(epoch) for epoch in curve]},
        "machine": {"architecture": platform.machine(), "cpu": cpu_name()},
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def describe_engine(kind: str, chosen: Variant, variants: Sequence[Variant]) -> dict[str, Any]:
    """The engine, and the variants that it was chosen from, as measured on validation texts."""
    return {
        "kind": kind,
        "precision": chosen.precision,
        "layout": "packed",
        "onnx_sha256": file_sha256(chosen.onnx),
        "measured": [
            {
                "precision": variant.precision,
                "texts_per_second": variant.texts_per_second,
                "agreement": variant.validation.agreement,
                "score": variant.validation.engine_score,
                "bytes": variant.onnx.stat().st_size,
                "refused": variant.refusal,
                "note": variant.note,
            }
            for variant in variants
        ],
    }


def portable(scenario: Scenario) -> dict[str, Any]:
    """What a build that continues from this one needs; where the data lay is no one else's business."""
    columns = scenario.data.model_dump(include={"text_column", "label_column", "label_separator"})
    document = scenario.model_dump(mode="json", exclude={"data", "base", "distillation"})
    return {**document, "base": "release", "data": {"train": "release", "test": "release", **columns}}


def cpu_name() -> str:
    """The CPU's own name for itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def as_json(document: Mapping[str, Any]) -> str:
    """Indented, readable JSON with a final line end."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
