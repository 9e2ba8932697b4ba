"""`plan.json`, beside a TensorRT plan: what it was built from, with and for; and whether that fits a machine.

A plan is bound to the TensorRT version and the compute capability it was built with, unless it was built to be
compatible (NVIDIA, "TensorRT: Engine Compatibility" and "Support Matrix", 11.4).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from millibert._errors import UsageError
from millibert_ensemble.machine import Gpu, Machine

FORMAT = 2
PLAN = "model.plan"
PLAN_MANIFEST = "plan.json"
TENSORRT_ONNX = "tensorrt.onnx"

HardwareCompatibility = Literal["none", "same_compute_capability", "ampere_plus"]
_AMPERE = (8, 0)
# Version-compatible plans cross one major version: those of 10 run in 11.
_OLDER_MAJOR = {11: 10}

# A profile: smallest, most likely and largest shape of each input.
Profile = Mapping[str, Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True)
class PlanManifest:
    """What `millibert engine` wrote down about a plan."""

    created: str
    onnx_sha256: str
    plan_sha256: str
    precision: str
    layout: str
    tensorrt: str
    gpu: Gpu
    hardware_compatibility: HardwareCompatibility
    version_compatible: bool
    sparse: bool
    tf32: bool
    optimization_level: int
    workspace_bytes: int
    labels: int
    max_texts: int
    max_tokens: int
    typical_tokens: int
    profiles: tuple[Profile, ...]
    seconds: float
    format: int = FORMAT

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)

    def misfits(self, machine: Machine) -> Iterator[str]:
        """Why the plan does not run on a machine with TensorRT and GPUs; nothing where it does."""
        if machine.tensorrt is not None and not self._runs_in(machine.tensorrt):
            yield f"the plan was built with TensorRT {self.tensorrt}; this machine has {machine.tensorrt}"
        for gpu in machine.gpus:
            if not self._runs_on(gpu):
                yield (
                    f"the plan was built for compute capability {self.gpu.compute_capability} ({self.gpu.name}); "
                    f"this machine's {gpu.name} has {gpu.compute_capability}"
                )

    def remarks(self, machine: Machine) -> Iterator[str]:
        """What does not keep the plan from running, and is worth knowing."""
        for name in sorted({gpu.name for gpu in machine.gpus} - {self.gpu.name}):
            yield f"the plan was tuned on {self.gpu.name}; on {name} it runs, and one built there may be faster"

    def _runs_in(self, version: str) -> bool:
        built, here = _numbers(self.tensorrt), _numbers(version)
        if not self.version_compatible:
            return built[:3] == here[:3]
        return (built[0] == here[0] and built <= here) or _OLDER_MAJOR.get(here[0]) == built[0]

    def _runs_on(self, gpu: Gpu) -> bool:
        built, here = _numbers(self.gpu.compute_capability), _numbers(gpu.compute_capability)
        if self.hardware_compatibility == "ampere_plus":
            return built >= _AMPERE and here >= _AMPERE
        return built == here


def load_plan_manifest(path: Path) -> PlanManifest:
    """Read `plan.json`; raises `UsageError` that says what is wrong with it."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise UsageError(f"{path}: format {document['format']} is not {FORMAT}; build the plan again")
        known = {field.name for field in fields(PlanManifest)}
        profiles = tuple(
            {name: {kind: tuple(shape) for kind, shape in shapes.items()} for name, shapes in profile.items()}
            for profile in document["profiles"]
        )
        given = {name: value for name, value in document.items() if name in known}
        return PlanManifest(**{**given, "gpu": Gpu(**document["gpu"]), "profiles": profiles})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not a plan's manifest: {error!r}; build the plan again") from error


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
