"""Which of its engines a release is served with on this machine, and what tritonserver must be told for it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from millibert._errors import UsageError
from millibert_ensemble import contract
from millibert_ensemble.assemble import lost_link
from millibert_ensemble.machine import this_machine
from millibert_ensemble.preflight import preflight
from millibert_ensemble.preflight_command import describe
from millibert_ensemble.repository_check import CONFIG_NAME


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add `--engine`."""
    parser.add_argument(
        "--engine",
        choices=("auto", "cpu", "tensorrt"),
        default="auto",
        help="auto: the TensorRT plan where the release has one that fits this machine, else the CPU engine",
    )


def engine_options(repository: Path, wanted: str, report: Callable[[str], None]) -> list[str]:
    """The options of tritonserver that serve the wanted engine; what there is to say of a plan is reported.

    Raises `UsageError` where that engine cannot be served.
    """
    if repository.is_dir() and (lost := lost_link(repository)):
        raise UsageError(f"{repository}: {lost}")
    has_graph = (repository / contract.BERT / "configs" / f"{CONFIG_NAME}.pbtxt").is_file()
    if wanted == "cpu" or (wanted == "auto" and not has_graph):
        return []
    verdict = preflight(repository, this_machine())
    if verdict.engine is None or (wanted == "tensorrt" and verdict.engine != "tensorrt"):
        reasons = "; ".join(verdict.reasons or verdict.remarks)
        advice = f"; build the plan here: {verdict.command}" if verdict.command else ""
        raise UsageError(f"{repository}: {verdict.answer}: {reasons}{advice}")
    for line in describe(verdict).splitlines():
        report(line)
    return verdict.options
