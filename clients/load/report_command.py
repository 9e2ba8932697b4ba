"""Write a page about runs under load: verdict first, curve, percentiles over time, stage budget, and what changed.

The runs are what `millibert load --out` and its kin write: a file holds one run or several. The load of the first run
is what is judged; other runs under the same load are its repeats, and runs under other loads are points of the curve
of latency over throughput. Of the previous runs, those under that load are compared with, or where there are none,
those under the load of the first.

examples:
  millibert load-report run.json --out report.html
  millibert load-report run.json --slo "p99<25ms,errors<0.1%" --out report.html
  millibert load-report run.json --previous before.json --out report.html --fail-on-regression
  millibert load-report at_400.json at_200.json at_800.json --slo "p99<25ms" --out report.html --json

A change counts as a regression where it is beyond the noise: what repeats, or the seconds of a single run, leave to
chance at 99 %.

exit status: 0 written, 1 the SLO is missed (or with --fail-on-regression, a figure is worse), 2 wrong usage
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from load.comparison import Change, Comparison, compare
from load.report_page import Result, judge_repeats, write_page
from load.results import Run, read_runs
from load.slo import slo_argument
from millibert._errors import UsageError

__all__ = ["configure", "read_runs", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `millibert load-report`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN.json", help="the load of the first run is judged")
    parser.add_argument("--slo", type=slo_argument, default=(), metavar="SLO", help='"p99<25ms,errors<0.1%%"')
    parser.add_argument("--previous", type=Path, nargs="+", metavar="FILE", help="runs to compare with")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page (.html); it is replaced")
    parser.add_argument("--fail-on-regression", action="store_true", help="end with 1 where a figure is worse")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.set_defaults(wrong_usage=parser.error)


def run(args: argparse.Namespace) -> int:
    """Read, judge, write the page and say what is in it; returns the exit status."""
    if args.fail_on_regression and not args.previous:
        args.wrong_usage("--fail-on-regression needs runs to compare with: give --previous")
    runs, previous = (_read(args, paths) for paths in (args.runs, args.previous or ()))
    judged, others = divide(runs, runs[0])
    before = (divide(previous, judged[0])[0] or divide(previous, previous[0])[0]) if previous else []
    try:
        write_page(args.out, judged, args.slo, before or None, others)
    except OSError as error:
        args.wrong_usage(f"{args.out}: cannot be written: {error.strerror}")
    results = judge_repeats(args.slo, judged)
    comparison = compare(judged, before) if before else None
    held = all(result.verdict.held for result in results)
    print(json.dumps(_document(args, judged, results, comparison)) if args.json else _table(args, results, comparison))
    regressed = args.fail_on_regression and comparison is not None and comparison.regressed
    return 1 if not held or regressed else 0


def divide(runs: Sequence[Run], like: Run) -> tuple[list[Run], list[Run]]:
    """Those under the load of a run, and those under others."""
    same = [_load(each) == _load(like) for each in runs]
    chosen = [each for each, is_same in zip(runs, same, strict=True) if is_same]
    return chosen, [each for each, is_same in zip(runs, same, strict=True) if not is_same]


def _load(run: Run) -> tuple[object, ...]:
    return run.model, run.texts_per_request, tuple(run.arrival.model_dump().values())


def _read(args: argparse.Namespace, paths: Sequence[Path]) -> list[Run]:
    try:
        return [each for path in paths for each in read_runs(path)]
    except UsageError as error:
        args.wrong_usage(str(error))
        raise


def _document(
    args: argparse.Namespace, runs: Sequence[Run], results: Sequence[Result], comparison: Comparison | None
) -> dict[str, Any]:
    return {
        "page": str(args.out),
        "model": runs[0].model,
        "arrival": runs[0].arrival.model_dump(exclude_none=True),
        "runs": len(runs),
        "held": all(result.verdict.held for result in results) if results else None,
        "verdicts": [result.as_json() for result in results],
        "comparison": comparison.as_json() if comparison else None,
    }


def _table(args: argparse.Namespace, results: Sequence[Result], comparison: Comparison | None) -> str:
    lines = [f"{'PASS' if result.verdict.held else 'FAIL'}  {_told(result)}" for result in results]
    if comparison is not None:
        words = {(True, False): "WORSE beyond the noise", (False, True): "BETTER beyond the noise"}
        word = words.get((comparison.regressed, comparison.improved), "SAME within the noise")
        lines.append(f"{word}, against {comparison.previous_runs} previous")
        lines += [f"  {each.name}: {each.judgement}, {_percent(each)}" for each in comparison.figures if each.change]
        lines += [f"warning: {warning}" for warning in comparison.warnings]
        if comparison.slowest is not None:
            lines.append(f"slower most: {comparison.slowest}")
    return "\n".join([*lines, f"written: {args.out}"])


def _told(result: Result) -> str:
    verdict = result.verdict
    factor, unit = (1, "ms") if str(verdict.objective).endswith("ms") else (100, "%")
    measured = "nothing" if verdict.measured is None else f"{factor * verdict.measured:.4g}{unit}"
    return f"{verdict.objective}: {measured} measured"


def _percent(change: Change) -> str:
    unit = " points" if change.unit == "share" else " %"
    band = "" if change.band is None else f" (noise: up to {100 * change.band:.2g}{unit})"
    return f"{100 * (change.change or 0.0):+.2f}{unit}{band}"
