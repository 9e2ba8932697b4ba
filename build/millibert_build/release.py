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
from millibert_build.hub import Base
from millibert_build.scenario import Scenario
from millibert_build.tensorrt.target import SECTION
from millibert_ensemble.hashing import file_sha256

if TYPE_CHECKING:
    # They import this file through the stages.
    from millibert_build.findings import Findings
    from millibert_build.variants import Variant
    from millibert_build.workshop import Workshop

FORMAT = 1
_PACKAGES = ("millibert", "torch", "transformers", "tokenizers", "onnx", "onnxruntime", "openvino", "numpy")


def manifest_of(findings: Findings, chosen: Variant) -> dict[str, Any]:
    """The manifest of a release, but for the hashes of its files."""
    source, shop = findings.source, chosen.shop
    fine_tuned = findings.shops[0].trained
    return {
        **describe(source.scenario, source.base, source.splits, findings.created),
        "training": {**source.scenario.training.model_dump(), "curve": [asdict(epoch) for epoch in shop.trained.curve]},
        "scenario": portable(source.remembered or shop.scenario),
        "checkpoint": {"fingerprint": fine_tuned.record["fingerprint"]},
        "removed": shop.trained.record.get("removed"),
        "lineage": list(source.lineage),
        "engine": describe_engine(findings.engine, chosen, findings.variants),
        **({SECTION: findings.tensorrt.as_json()} if findings.tensorrt else {}),
        "thresholds": dict(zip(source.splits.labels, shop.calibration.thresholds, strict=True)),
        "metrics": {
            "test": findings.tested[chosen].comparison._asdict(),
            "abstention": findings.abstention(),
            "pruning": None if shop.before is None else _pruning_loss(findings, shop),
            "variants": {variant.name: found.comparison._asdict() for variant, found in findings.tested.items()},
            **findings.judged,
        },
    }


def describe(scenario: Scenario, base: Base, splits: Splits, created: str) -> dict[str, Any]:
    """What a release is made from and with."""
    texts = {name: len(getattr(splits, name)) for name in ("train", "validation", "test")}
    return {
        "format": FORMAT,
        "name": scenario.name,
        "created": created,
        "problem": scenario.problem,
        "labels": list(splits.labels),
        "max_tokens": scenario.max_tokens,
        "max_texts": scenario.max_texts,
        "top_k": scenario.top_k,
        "cpu_fallback": scenario.serving.cpu_fallback,
        "data": {"sha256": splits.sha256(), "texts": texts},
        "base": {"name": base.name, "revision": base.revision, "sha256": base.sha256},
        "machine": {"architecture": platform.machine(), "cpu": cpu_name()},
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def describe_engine(kind: str, chosen: Variant, variants: Sequence[Variant]) -> dict[str, Any]:
    """The engine, and the variants that it was chosen from, as measured on validation texts."""
    return {
        "kind": kind,
        "precision": chosen.precision,
        "layout": "rows",
        "onnx_sha256": file_sha256(chosen.onnx),
        "measured": [
            {
                "removed": variant.shop.removed,
                "precision": variant.precision,
                "texts_per_second": variant.texts_per_second,
                "agreement": variant.validation.agreement,
                "score": variant.validation.engine_score,
                "bytes": variant.onnx.stat().st_size,
                "contends": variant.contends,
                "refused": variant.refusal,
                "note": variant.note,
            }
            for variant in variants
        ],
    }


def now() -> str:
    """The time, as manifests write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _pruning_loss(findings: Findings, shop: Workshop) -> dict[str, Any]:
    assert shop.before is not None
    return shop.pruning_loss(findings.test[shop], findings.test[shop.before])._asdict()


def portable(scenario: Scenario) -> dict[str, Any]:
    """What a build that continues from this one needs; where the data lay is no one else's business."""
    columns = scenario.data.model_dump(include={"text_column", "label_column", "label_separator", "seed"})
    document = scenario.model_dump(mode="json", exclude={"data", "base", "distillation"})
    return {**document, "base": "release", "data": {"train": "release", "test": "release", **columns}}


def cpu_name() -> str:
    """The CPU's own name for itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def as_json(document: Mapping[str, Any]) -> str:
    """Indented, readable JSON with a final line end."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
