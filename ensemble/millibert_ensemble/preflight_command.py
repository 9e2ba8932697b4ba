"""Say whether this machine can serve a model repository, before a server tries to; for people and initContainers.

examples:
  millibert preflight --repository model_repository
  millibert preflight --repository /models --json

Checks the repository (files against their hashes, configs, tensors along the ensemble, labels) and, where the release
has a TensorRT graph, its plan against this machine's TensorRT and GPUs.

exit status: 0 usable, 1 the repository is broken, 2 wrong usage, 3 the plan must be built again (the command is
printed; the CPU engine works meanwhile), 4 no plan can run here, the CPU engine can
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from millibert_ensemble.machine import Machine, this_machine
from millibert_ensemble.preflight import STATUS, Verdict, preflight


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `millibert preflight`."""
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")


def run(args: argparse.Namespace) -> int:
    """Judge and print; returns the exit status."""
    verdict = preflight(args.repository, this_machine())
    print(json.dumps(verdict.as_json(), ensure_ascii=False) if args.json else describe(verdict))
    return STATUS[verdict.answer]


def describe(verdict: Verdict) -> str:
    """The verdict for people."""
    running = {"tensorrt": ": the TensorRT plan", "cpu": ": the CPU engine", None: ""}[verdict.engine]
    lines = [
        f"{verdict.answer}{running if verdict.answer != 'broken' else ''}",
        f"machine: {_machine(verdict.machine)}",
    ]
    lines += [f"- {reason}" for reason in verdict.reasons]
    lines += [f"note: {remark}" for remark in verdict.remarks]
    if verdict.command:
        lines.append(f"build the plan on this machine: {verdict.command}")
    if verdict.options:
        lines.append(f"serve it with: tritonserver {' '.join(verdict.options)} … (`millibert serve` does)")
    return "\n".join(lines)


def _machine(machine: Machine) -> str:
    gpus = ", ".join(f"{gpu.name} (compute capability {gpu.compute_capability})" for gpu in machine.gpus)
    return f"{gpus or 'no GPU'}, {f'TensorRT {machine.tensorrt}' if machine.tensorrt else 'no TensorRT'}"
