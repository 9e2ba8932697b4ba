"""Whether a repository is whole and which of its engines this machine can run, before a server starts.

A release may carry two engines, the CPU engine and a TensorRT plan, or have its plan in a store. A plan that does not
fit the machine would fail while Triton loads it, minutes into a rollout; here it is a sentence and an exit status.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from millibert._errors import UsageError
from millibert_ensemble import plan_choice
from millibert_ensemble.assemble import lost_link
from millibert_ensemble.machine import Machine
from millibert_ensemble.plan_choice import Wanted
from millibert_ensemble.plan_manifest import PlanManifest
from millibert_ensemble.repository_check import CONFIG_NAME, Check, check_repository

Answer = Literal["usable", "broken", "rebuild", "fall back"]
STATUS: dict[Answer, int] = {"usable": 0, "broken": 1, "rebuild": 3, "fall back": 4}


@dataclass(frozen=True)
class Verdict:
    """The answer, the engine that may run here now (None: none may), why, and what to do about it."""

    answer: Answer
    engine: Literal["tensorrt", "cpu"] | None
    reasons: tuple[str, ...]
    remarks: tuple[str, ...]
    command: str | None
    machine: Machine
    plan: PlanManifest | None
    plan_folder: Path | None = None
    """Where the plan is that would be served."""

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
            "plan_folder": self.plan_folder and str(self.plan_folder),
        }


def preflight(repository: Path, machine: Machine, plans: Path | None = None) -> Verdict:
    """Judge a repository for a machine, with the plans of a store; raises `UsageError` where one of them is missing."""
    if not repository.is_dir():
        raise UsageError(f"no model repository at {repository}: no such folder; make one with `millibert build`")
    if lost := lost_link(repository):
        return _broken((lost,), (), machine)
    check = check_repository(repository)
    if check.problems:
        return _broken(check.problems, check.remarks, machine)
    if "tensorrt" not in check.manifest:
        remark = "built without a TensorRT graph (`millibert build --tensorrt fp16` adds one)"
        return Verdict("usable", "cpu", (), (*check.remarks, remark), None, machine, None)
    try:
        wanted = plan_choice.wanted_of(repository, check.manifest)
    except UsageError as error:
        return _broken((str(error),), check.remarks, machine)
    return _judge_plan(repository, plans, check, wanted, machine)


def _judge_plan(repository: Path, plans: Path | None, check: Check, wanted: Wanted, machine: Machine) -> Verdict:
    """What a release that is whole, and has a graph, is served with."""
    if plans is None:
        choice = plan_choice.own(repository, wanted, machine)
    else:
        choice = plan_choice.best(repository, plans, wanted, machine)
    if not machine.gpus:
        reason = "no NVIDIA GPU here (nvidia-smi is missing or lists none)"
        return _without_plan("fall back", (reason,), None, check, machine, choice.plan)
    if choice.plan is None or choice.folder is None:
        command = f"millibert engine --repository {repository}" + (f" --plans {plans}" if plans else "")
        return _without_plan("rebuild", choice.reasons, command, check, machine, choice.plan)
    if machine.tensorrt is None:
        reason = "a GPU, but no TensorRT library to load the plan with (libnvinfer)"
        return _without_plan("fall back", (reason,), None, check, machine, choice.plan)
    remarks = (*check.remarks, *plan_choice.remarks(choice.plan, wanted, machine))
    return Verdict("usable", "tensorrt", (), remarks, None, machine, choice.plan, choice.folder)


def _broken(problems: tuple[str, ...], remarks: tuple[str, ...], machine: Machine) -> Verdict:
    return Verdict("broken", None, problems, remarks, None, machine, None)


def _without_plan(
    answer: Answer,
    reasons: tuple[str, ...],
    command: str | None,
    check: Check,
    machine: Machine,
    plan: PlanManifest | None,
) -> Verdict:
    """The CPU engine serves instead, where the release lets it."""
    # Releases from before there was a choice let it.
    if check.manifest.get("cpu_fallback", True):
        return Verdict(answer, "cpu", reasons, check.remarks, command, machine, plan)
    refused = "the release does not let the CPU engine serve in the plan's place (serving.cpu_fallback = false)"
    return Verdict(answer, None, (*reasons, refused), check.remarks, command, machine, plan)
