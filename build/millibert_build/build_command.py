r"""Build a Triton model repository from labelled text.

examples:
  millibert build --scenario build/scenarios/customer_service.toml --out model_repository
  millibert build --name banking77 --train train.csv --test test.csv --text-column text \
                  --label-column category --base minilm --out banking77_repository
  millibert build --scenario my.toml --out repo --engine onnxruntime --precision fp32 --epochs 3

The repository appears at --out in one step when everything has passed the scenario's gates; after an error
the previous one is untouched. Data: .csv, .tsv, .jsonl or .parquet files, folders of them (train.csv, test.csv),
or hub:owner/name. Base: `minilm`, a checkpoint folder, or a hub id.

exit status: 0 built, 1 failed (the reason is on stderr), 2 wrong usage
"""

from __future__ import annotations

import argparse
import json
import os
import typing
from pathlib import Path
from typing import Any

from millibert._errors import UsageError
from millibert_build import scenario as scenarios


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `millibert build`."""
    source = parser.add_argument_group("what to build: a scenario, or its parts")
    source.add_argument("--scenario", type=Path, metavar="FILE", help="scenario file (.toml)")
    source.add_argument("--name", help="model name that clients call")
    source.add_argument("--train", metavar="DATA", help="training data")
    source.add_argument("--test", metavar="DATA", help="test data, used to measure only")
    source.add_argument("--validation", metavar="DATA", help="default: a tenth of the training data, stratified")
    source.add_argument("--text-column", metavar="NAME", help="default: text")
    source.add_argument("--label-column", metavar="NAME", help="default: label")
    source.add_argument("--base", metavar="CHECKPOINT", help="default: minilm")
    source.add_argument("--epochs", type=int, metavar="N", help="default: 12")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model repository to make")
    parser.add_argument("--engine", choices=typing.get_args(scenarios.Engine), default="openvino")
    parser.add_argument(
        "--precision",
        choices=typing.get_args(scenarios.Precision),
        default="auto",
        help="auto: the fastest on this machine that agrees with fp32 as the gates demand",
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where checkpoints are kept (default: .millibert/NAME)"
    )
    parser.add_argument("--json", action="store_true", help="print the release manifest on stdout")


def run(args: argparse.Namespace) -> int:
    """Build; returns the exit status."""
    scenario = _scenario(args)
    # libgomp's threads spin at barriers by default; on a shared machine that cost up to eight times the time.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Imported late: torch takes seconds to load, and a wrong scenario should not wait for it.
    from millibert_build.pipeline import build

    work = args.work or Path(".millibert") / scenario.name
    release = build(scenario, args.engine, args.precision, args.out, work)
    if args.json:
        print(json.dumps(release, ensure_ascii=False))
    else:
        print(f"built {scenario.name!r} in {args.out}; serve it with: millibert serve --repository {args.out}")
    return 0


def _scenario(args: argparse.Namespace) -> scenarios.Scenario:
    data = _given(args, "train", "test", "validation", "text_column", "label_column")
    training = _given(args, "epochs")
    top = _given(args, "name", "base")
    if args.scenario is None:
        missing = [f"--{name}" for name in ("name", "train", "test") if getattr(args, name) is None]
        if missing:
            raise UsageError(f"give --scenario FILE, or also {', '.join(missing)} (see millibert build --help)")
        return scenarios.make_scenario({**top, "data": data, "training": training}, "command line")
    document = scenarios.load_scenario(args.scenario).model_dump()
    changed = {**document, **top, "data": {**document["data"], **data}}
    changed["training"] = {**document["training"], **training}
    return scenarios.make_scenario(changed, f"{args.scenario} and command line")


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
