r"""Build a Triton model repository from labelled text.

examples:
  millibert build --scenario build/scenarios/customer_service.toml --out model_repository
  millibert build --name banking77 --train train.csv --test test.csv --text-column text \
                  --label-column category --base minilm --out banking77_repository
  millibert build --name nlupp --problem multi_label --label-column intents --train 'banking/fold[0-9].json' \
                  --train 'banking/fold1[0-5].json' --test 'banking/fold1[6-9].json' \
                  --set data.copies=drop --out nlupp_repository
  millibert build --scenario my.toml --out repo --set pruning.neurons=0.5 --set training.patience=3 --precision int8
  millibert build --from-release repo --add feedback.jsonl --out repo
  millibert build --scenario my.toml --out repo --tensorrt fp16    # then, on the GPU node: millibert engine

The repository appears at --out in one step when everything has passed the scenario's gates; after an error
the previous one is untouched. A build that was interrupted goes on where it was. Data: .csv, .tsv, .json, .jsonl
or .parquet files, folders of them (train.csv, test.csv), or hub:owner/name. Base: `minilm`, a checkpoint folder, or
a hub id.

--set takes any key of a scenario (see build/millibert_build/scenario.py) and a TOML value; a bare word is a string.

exit status: 0 built, 1 failed (the reason is on stderr), 2 wrong usage
"""

from __future__ import annotations

import argparse
import json
import os
import tomllib
import typing
from pathlib import Path
from typing import Any

from millibert._errors import UsageError
from millibert_build import scenario as scenarios
from millibert_build.tensorrt.target import LAYOUTS, PRECISIONS


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `millibert build`."""
    add_scenario_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model repository to make")
    parser.add_argument(
        "--precision",
        choices=typing.get_args(scenarios.Precision),
        default="auto",
        help="auto: the fastest on this machine that passes the gates on validation",
    )
    again = parser.add_argument_group("continue from a release with new examples")
    again.add_argument("--from-release", type=Path, metavar="DIR", help="a repository built here before")
    again.add_argument("--add", metavar="DATA", help="new labelled texts, in the columns of the release's data")
    parser.add_argument("--json", action="store_true", help="print the release manifest on stdout")


def add_scenario_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what to build, and where and with what."""
    source = parser.add_argument_group("what to build: a scenario, or its parts")
    source.add_argument("--scenario", type=Path, metavar="FILE", help="scenario file (.toml)")
    source.add_argument("--name", help="model name that clients call")
    source.add_argument("--problem", choices=typing.get_args(scenarios.Problem), help="default: single_label")
    source.add_argument("--train", metavar="DATA", action="append", help="training data; may be repeated")
    source.add_argument("--test", metavar="DATA", action="append", help="test data, used to measure only")
    source.add_argument("--validation", metavar="DATA", action="append", help="default: a tenth of the training data")
    source.add_argument("--out-of-scope", metavar="DATA", action="append", help="texts that no label fits")
    source.add_argument("--text-column", metavar="NAME", help="default: text")
    source.add_argument("--label-column", metavar="NAME", help="default: label")
    source.add_argument("--base", metavar="CHECKPOINT", help="default: minilm")
    source.add_argument("--epochs", type=int, metavar="N", help="default: 12")
    source.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="any other key; may be repeated"
    )
    parser.add_argument("--engine", choices=typing.get_args(scenarios.Engine), default="openvino")
    parser.add_argument(
        "--tensorrt",
        choices=PRECISIONS,
        metavar="PRECISION",
        help="also make a TensorRT plan's graph: %(choices)s",
    )
    parser.add_argument(
        "--tensorrt-layout", choices=LAYOUTS, default="packed", help="of that graph (default: %(default)s)"
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where checkpoints are kept (default: .millibert/NAME)"
    )
    parser.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="write training logs there (needs millibert[tensorboard])"
    )


def run(args: argparse.Namespace) -> int:
    """Build; returns the exit status."""
    if (args.from_release is None) != (args.add is None):
        raise UsageError("--from-release and --add belong together")
    scenario = None if args.from_release else scenario_of(args)
    prepare_threads()
    # Imported late: torch takes seconds to load, and a wrong scenario should not wait for it.
    from millibert_build.pipeline import Place, build
    from millibert_build.retune import retune

    work = args.work or work_folder(scenario.name if scenario else name_of(args.from_release))
    place = Place(args.engine, args.precision, args.out, work, args.tensorboard, tensorrt_of(args))
    release = build(scenario, place) if scenario else retune(args.from_release, args.add, place)
    if args.json:
        print(json.dumps(release.manifest, ensure_ascii=False))
    else:
        print(
            f"built {release.manifest['name']!r} in {args.out}; serve it with: millibert serve --repository {args.out}"
        )
        print(f"report: {release.report}")
    return 0


def work_folder(name: str) -> Path:
    """Where the checkpoints of a scenario are kept unless --work says otherwise."""
    return Path(".millibert") / name


def name_of(release: Path) -> str:
    """The name of a release, from its manifest."""
    try:
        return str(json.loads((release / "release.json").read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{release}: no readable release.json; give what `millibert build` made") from error


def tensorrt_of(args: argparse.Namespace) -> Any:
    """Precision and layout of the TensorRT graph; None where none is asked for."""
    return args.tensorrt and (args.tensorrt, args.tensorrt_layout)


def prepare_threads() -> None:
    """To be called before torch is imported."""
    # libgomp's threads spin at barriers by default; on a shared machine that cost up to eight times the time.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def scenario_of(args: argparse.Namespace) -> scenarios.Scenario:
    """The scenario that the arguments describe: a file, changed by what else is given, or the parts alone."""
    data = _given(args, "train", "test", "validation", "out_of_scope", "text_column", "label_column")
    changes: dict[str, Any] = {**_given(args, "name", "problem", "base"), "data": data}
    changes["training"] = _given(args, "epochs")
    for setting in args.set:
        _set(changes, setting)
    if args.scenario is None:
        missing = [f"--{name}" for name in ("name", "train", "test") if getattr(args, name) is None]
        if missing:
            raise UsageError(f"give --scenario FILE, or also {', '.join(missing)} (see millibert build --help)")
        return scenarios.make_scenario(changes, "command line")
    document = scenarios.load_scenario(args.scenario).model_dump()
    return scenarios.make_scenario(_merged(document, changes), f"{args.scenario} and command line")


def _set(changes: dict[str, Any], setting: str) -> None:
    """Put `section.key=value` into nested dictionaries."""
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise UsageError(f"--set {setting}: write KEY=VALUE, for instance training.patience=3")
    *sections, key = path.strip().split(".")
    for section in sections:
        changes = changes.setdefault(section, {})
    changes[key] = toml_value(text)


def toml_value(text: str) -> Any:
    """A TOML value as one writes it on a command line; what is none is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _merged(document: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`document` with the leaves of `changes` put in."""
    merged = dict(document)
    for key, value in changes.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return merged


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
