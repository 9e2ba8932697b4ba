r"""Build, check and measure a release's TensorRT plan on a GPU node, with one command.

examples:
  millibert verify-gpu --repository model_repository --data test.csv --label-column category
  millibert verify-gpu --repository model_repository --data test.csv --rebuild --json > verification.json

Prints a line for each check:
  graph      whole, and in operators that TensorRT documents
  machine    the GPU and the TensorRT that are here
  plan       built here, or built before and fitting
  parity     the plan's logits against its graph's on the CPU, within the precision's tolerance
  accuracy   labels and accuracy on all texts
  speed      a batch of 128-token texts, beside NVIDIA's published figures for BERT-base
  service    the same labels through Triton
  load       perf_analyzer, over texts per request and concurrency

What cannot be checked for lack of a GPU or a tool is skipped, with the reason; the rest goes on. Needs
millibert[engine], TensorRT's Python package, a tritonserver with its TensorRT backend, and perf_analyzer for the last.

exit status: 0 all passed, 1 a check failed, 2 wrong usage, 3 nothing failed and something was skipped
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from millibert._errors import UsageError
from millibert._labelled_texts import read_labelled_texts
from millibert_build.tensorrt.serving_checks import check_load, check_service
from millibert_build.tensorrt.verification import (
    Bench,
    Check,
    Line,
    as_json,
    check_accuracy,
    check_graph,
    check_machine,
    check_parity,
    check_plan,
    check_speed,
    verify,
)
from millibert_ensemble.machine import this_machine

CHECKS: tuple[tuple[str, Check], ...] = (
    ("graph", check_graph),
    ("machine", check_machine),
    ("plan", check_plan),
    ("parity", check_parity),
    ("accuracy", check_accuracy),
    ("speed", check_speed),
    ("service", check_service),
    ("load", check_load),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `millibert verify-gpu`."""
    parser.add_argument("--repository", type=Path, required=True, metavar="DIR", help="from `build --tensorrt …`")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help="labelled test texts")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--label-column", default="label", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--multi-label", action="store_true", help="a text has any number of labels")
    parser.add_argument("--label-separator", default="|", metavar="TEXT", help="default: %(default)s")
    parser.add_argument("--rebuild", action="store_true", help="build the plan even if there is one that fits")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of lines")


def run(args: argparse.Namespace) -> int:
    """Check and print; returns the exit status."""
    if not args.repository.is_dir():
        raise UsageError(f"no model repository at {args.repository}: no such folder")
    separator = args.label_separator if args.multi_label else None
    files = (read_labelled_texts(file, args.text_column, args.label_column, separator) for file in args.data)
    rows = list(itertools.chain.from_iterable(files))
    lines = verify(Bench(args.repository, rows, this_machine(), args.rebuild), CHECKS)
    status = _status(lines)
    if args.json:
        print(json.dumps({"exit_status": status, "checks": as_json(lines)}))
    else:
        for line in lines:
            print(f"{line.outcome}  {line.check:<9} {line.detail}")
    return status


def _status(lines: Sequence[Line]) -> int:
    outcomes = {line.outcome for line in lines}
    return 1 if "FAIL" in outcomes else 3 if "SKIP" in outcomes else 0
