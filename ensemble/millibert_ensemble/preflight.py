"""Whether a repository is whole and which of its engines this machine can run, before a server starts.

A release may carry two engines, the CPU engine and a TensorRT plan. A plan that does not fit the machine would fail
while Triton loads it, minutes into a rollout; here it is a sentence and an exit status.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from millibert._errors import UsageError
from millibert_ensemble import contract
from millibert_ensemble.hashing import file_sha256
from millibert_ensemble.machine import Machine
from millibert_ensemble.plan_manifest import PLAN, PLAN_MANIFEST, TENSORRT_ONNX, PlanManifest, load_plan_manifest
from millibert_ensemble.repository_check import CONFIG_NAME, Check, check_repository

Answer = Literal["usable", "broken", "rebuild", "fall back"]
STATUS: dict[Answer, int] = {"usable": 0, "broken": 1, "rebuild": 3, "fall back": 4}


@dataclass(frozen=True)
class Verdict:
    """The answer, the engine that runs here now (None: none does), why, and what to do about it."""

    answer: Answer
    engine: Literal["tensorrt", "cpu"] | None
    reasons: tuple[str, ...]
    remarks: tuple[str, ...]
    command: str | None
    machine: Machine
    plan: PlanManifest | None

    @property
    def options(self) -> list[str]:
        """What tritonserver must be told to serve that engine."""
        if self.engine != "tensorrt":
            return []
        options = [f"--model-config-name={CONFIG_NAME}"]
        if self.plan is not None and self.plan.version_compatible:
            options.append("--backend-config=tensorrt,version-compatible=true")
        return options

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "answer": self.answer,
            "exit_status": STATUS[self.answer],
            "engine": self.engine,
            "reasons": list(self.reasons),
            "remarks": list(self.remarks),
            "command": self.command,
            "tritonserver_options": self.options,
            "machine": self.machine.as_json(),
            "plan": self.plan and self.plan.as_json(),
        }


def preflight(repository: Path, machine: Machine) -> Verdict:
    """Judge a repository for a machine; raises `UsageError` where there is no repository."""
    if not repository.is_dir():
        raise UsageError(f"no model repository at {repository}: no such folder; make one with `millibert build`")
    check = check_repository(repository)
    if check.problems:
        return Verdict("broken", None, check.problems, check.remarks, None, machine, None)
    bert = repository / contract.BERT / contract.VERSION
    if "tensorrt" not in check.manifest:
        remark = "built without a TensorRT graph (`millibert build --tensorrt fp16` adds one)"
        return Verdict("usable", "cpu", (), (*check.remarks, remark), None, machine, None)
    plan, reasons = _plan(bert, check)
    if not machine.gpus:
        return _fall_back("no NVIDIA GPU here (nvidia-smi is missing or lists none)", check, machine, plan)
    if plan is not None:
        reasons += plan.misfits(machine)
    if reasons:
        command = f"millibert engine --repository {repository}"
        return Verdict("rebuild", "cpu", tuple(reasons), check.remarks, command, machine, plan)
    assert plan is not None
    if machine.tensorrt is None:
        return _fall_back("a GPU, but no TensorRT library to load the plan with (libnvinfer)", check, machine, plan)
    return Verdict("usable", "tensorrt", (), (*check.remarks, *plan.remarks(machine)), None, machine, plan)


def _fall_back(reason: str, check: Check, machine: Machine, plan: PlanManifest | None) -> Verdict:
    return Verdict("fall back", "cpu", (reason,), check.remarks, None, machine, plan)


def _plan(bert: Path, check: Check) -> tuple[PlanManifest | None, list[str]]:
    """The plan's manifest, and what keeps the plan from being the one of this release."""
    if not (bert / PLAN).is_file():
        return None, [f"there is no plan yet ({contract.BERT}/{contract.VERSION}/{PLAN})"]
    try:
        plan = load_plan_manifest(bert / PLAN_MANIFEST)
    except UsageError as error:
        return None, [str(error)]
    return plan, list(_strange(plan, bert, check))


def _strange(plan: PlanManifest, bert: Path, check: Check) -> Iterator[str]:
    wanted = check.manifest["tensorrt"]
    if plan.onnx_sha256 != file_sha256(bert / TENSORRT_ONNX):
        yield f"the plan was built from another graph than {TENSORRT_ONNX}"
    if plan.plan_sha256 != file_sha256(bert / PLAN):
        yield f"{PLAN} is not the file that {PLAN_MANIFEST} describes: damaged, or half copied"
    if (plan.precision, plan.layout) != (wanted["precision"], wanted["layout"]):
        yield f"the plan is {plan.precision} {plan.layout}; the release says {wanted['precision']} {wanted['layout']}"
    if plan.labels != len(check.manifest["labels"]):
        yield f"the plan has {plan.labels} labels; the release has {len(check.manifest['labels'])}"
