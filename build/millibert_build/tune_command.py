r"""Try ways to prune, each in every precision, and publish the fastest that passes the gates.

examples:
  millibert tune --scenario build/scenarios/customer_service.toml --out model_repository
  millibert tune --name banking77 --train train.csv --test test.csv --text-column text --label-column category \
                 --try neurons=0.25 --try heads=0.25,neurons=0.4 --try layers=2 --out banking77_repository

The model is fine-tuned once, as `millibert build` does it. Each --try removes something else from it and lets it
recover; nothing removed is always a candidate too, and so is the scenario's own [pruning]. All candidates are timed in
turns, in one process, on the validation texts. What is lost against the fine-tuned checkpoint must pass the scenario's
gates, on validation and then on test texts. The report shows all of them, with the Pareto front of score and speed. A
run that was interrupted goes on where it was.

exit status: 0 published, 1 failed or nothing passed (the reason is on stderr), 2 wrong usage
"""

from __future__ import annotations

import argparse
import json
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millibert._errors import UsageError
from millibert_build import scenario as scenarios
from millibert_build.build_command import (
    add_scenario_arguments,
    prepare_threads,
    scenario_of,
    tensorrt_of,
    toml_value,
    work_folder,
)

if TYPE_CHECKING:
    from millibert_build.pipeline import Release

# Less and more of what costs little for its speed; see docs/log.md for what was measured.
TRIES = ("neurons=0.25", "heads=0.25,neurons=0.4", "layers=1")
_FOLDER = "tune"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `millibert tune`."""
    add_scenario_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model repository to make")
    parser.add_argument(
        "--try",
        dest="tries",
        metavar="KEY=VALUE,…",
        action="append",
        help=f"keys of [pruning]; may be repeated (default: {'; '.join(TRIES)})",
    )
    parser.add_argument(
        "--precision", choices=typing.get_args(scenarios.Precision), default="auto", help="auto: all that this CPU has"
    )
    parser.add_argument("--json", action="store_true", help="print candidates and release manifest on stdout")


def run(args: argparse.Namespace) -> int:
    """Tune; returns the exit status."""
    scenario = scenario_of(args)
    ways = prunings(scenario.pruning, args.tries or TRIES)
    prepare_threads()
    from millibert_build.pipeline import Place, Plan, build_best

    work = args.work or work_folder(scenario.name)
    place = Place(args.engine, args.precision, args.out, work, args.tensorboard, tensorrt_of(args))
    pruned = {work / _FOLDER / _file_name(way): way for way in ways}
    plan = Plan(unpruned=True, pruned=pruned, tensorrt=place.tensorrt is not None)
    unpruned = scenario.model_copy(update={"pruning": scenarios.Pruning()})
    release = build_best(unpruned, place, plan)
    rows = list(_rows(release))
    if args.json:
        print(json.dumps({"candidates": rows, "release": release.manifest}, ensure_ascii=False))
        return 0
    print(_table(rows))
    print(f"built {scenario.name!r} in {args.out}; serve it with: millibert serve --repository {args.out}")
    print(f"report: {release.report}")
    return 0


def prunings(common: scenarios.Pruning, tries: Sequence[str]) -> list[scenarios.Pruning]:
    """What the scenario's own section and each of `tries` remove, all with its recovery settings."""
    recovery = common.model_dump(include={"recovery_epochs", "recovery_learning_rate"})
    found = [common] if common.active else []
    for written in tries:
        settings = dict(_settings(written))
        way = scenarios.checked(scenarios.Pruning, {**recovery, **settings}, f"--try {written}")
        if not way.active:
            raise UsageError(f"--try {written}: removes nothing")
        found.append(way)
    return list(dict.fromkeys(found))


def _settings(written: str) -> Iterator[tuple[str, Any]]:
    for part in written.split(","):
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"--try {written}: write KEY=VALUE, for instance heads=0.25,neurons=0.4")
        yield key.strip(), toml_value(value)


def _file_name(way: scenarios.Pruning) -> str:
    return str(way).replace(" ", "").replace("%", "").replace(":", "of").lstrip("-")


def _rows(release: Release) -> Iterator[dict[str, Any]]:
    """The candidates, the fastest first, as measured on validation texts."""
    from millibert_build.build_report import candidates_of
    from millibert_build.report import pareto_front

    findings = release.findings
    candidates = candidates_of(findings)
    front = pareto_front(candidates)
    fp32 = findings.variants[0]
    for each in sorted(candidates, key=lambda candidate: -candidate.texts_per_second):
        yield {
            "name": each.name,
            "score": each.score,
            "loss": fp32.validation.checkpoint_score - each.score,
            "texts_per_second": each.texts_per_second,
            "times_fp32": each.texts_per_second / fp32.texts_per_second,
            "passed": each.passed,
            "front": each in front,
            "chosen": each.chosen,
        }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """`*` marks the Pareto front."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"  {'candidate':<{width}}  texts/s  x fp32  score   loss"]
    for row in rows:
        result = "  chosen" if row["chosen"] else "" if row["passed"] else "  refused"
        lines.append(
            f"{'*' if row['front'] else ' '} {row['name']:<{width}}  {row['texts_per_second']:7,.0f}  "
            f"{row['times_fp32']:6.2f}  {row['score']:.4f}  {row['loss']:+.4f}{result}"
        )
    return "\n".join([*lines, "(* no other candidate that passed is both faster and better; on validation texts)"])
