"""What a release says of its TensorRT graph (`tensorrt` in release.json): all that building its plan needs to know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from millibert._errors import UsageError

Layout = Literal["packed", "padded"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
LAYOUTS: tuple[Layout, ...] = ("packed", "padded")
PRECISIONS: tuple[Precision, ...] = ("fp16", "bf16", "int8", "fp32")
SECTION = "tensorrt"
_SMALLEST_BUCKET = 16


@dataclass(frozen=True)
class Target:
    """The graph's precision and layout, and the traffic to build a plan for."""

    precision: Precision
    layout: Layout
    max_texts: int
    max_tokens: int
    typical_tokens: int
    """Tokens of a usual text: the mean of the validation texts."""
    labels: int
    sparse: bool
    """Whether the weights are 2:4."""
    onnx_sha256: str

    @property
    def buckets(self) -> tuple[int, ...]:
        """Lengths that the padded layout rounds up to."""
        return buckets_of(self.max_tokens)

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


def buckets_of(max_tokens: int) -> tuple[int, ...]:
    """Powers of two below the limit, and the limit."""
    powers = (_SMALLEST_BUCKET << shift for shift in range(max_tokens.bit_length()))
    return (*(power for power in powers if power < max_tokens), max_tokens)


def load_target(repository: Path) -> Target:
    """Read it from a release; raises `UsageError` where there is none."""
    path = repository / "release.json"
    try:
        manifest: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: not a release's manifest: {reason}; give what `millibert build` made") from error
    if SECTION not in manifest:
        raise UsageError(
            f"{repository}: this release has no TensorRT graph; build it with `millibert build … --tensorrt fp16`"
        )
    try:
        return Target(**{name: manifest[SECTION][name] for name in Target.__dataclass_fields__})
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path}: its section {SECTION!r} lacks {error}; build the release again") from error
