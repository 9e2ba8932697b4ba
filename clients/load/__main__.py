r"""Measure a release: its engine alone, then served by Triton under load, on the same texts in one run.

examples:
  python -m load --repository model_repository --data build/scenarios/customer_service/test.csv
  python -m load --repository banking77_repository --data test.csv --label-column category --json > bench.json

Load comes from perf_analyzer where that is on PATH, else from our own client, which takes more CPU; the report says
which. Each case is run several times, and the median by throughput is shown. On a machine that the load shares with the
server the figures are lower than a server of its own would give; ratios within one run are what counts.

exit status: 0 measured, 1 a request failed, 2 wrong usage
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from load.ceiling import Ceiling, measure_ceiling
from load.generator import Load
from load.generator import measure as measure_ourselves
from millibert import _perf_analyzer as perf_analyzer
from millibert import connect
from millibert._arguments import positive_float, positive_int
from millibert._errors import MillibertError, UsageError
from millibert._labelled_texts import LabelledText, read_labelled_texts
from millibert._perf_analyzer import Measurement
from millibert_ensemble.models.bert.threads import cpu_limit
from millibert_ensemble.server import TritonServer


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="labelled texts")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--label-column", default="label", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--concurrency", type=positive_int, nargs="+", default=[1, 8, 32, 64, 256], metavar="N")
    parser.add_argument("--texts", type=positive_int, nargs="+", default=[1, 8, 32], metavar="N", help="of a request")
    parser.add_argument("--transport", choices=("grpc", "http"), nargs="+", default=["grpc"])
    parser.add_argument("--seconds", type=positive_float, default=5.0, metavar="N", help="of each run")
    parser.add_argument("--rounds", type=positive_int, default=3, metavar="N", help="runs of each case")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    configure(parser)
    args = parser.parse_args(argv)
    try:
        report = run(args)
    except MillibertError as error:
        print(f"load: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report) if args.json else table(report))
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The engine alone, then every case on a server of our own."""
    rows = read_labelled_texts(args.data, args.text_column, args.label_column)
    by_perf_analyzer = perf_analyzer.is_here()
    if "http" in args.transport and not by_perf_analyzer:
        raise UsageError("--transport http needs perf_analyzer on PATH; our own client speaks gRPC only")
    ceiling = measure_ceiling(args.repository, [row.text for row in rows], args.rounds)
    with TritonServer(args.repository) as server:
        quality = _quality(server, rows, ceiling)
        cases = [_as_case(transport, runs, ceiling) for transport, runs in _cases(args, server, rows, by_perf_analyzer)]
    return {
        "model": server.services[0],
        "precision": ceiling.precision,
        "cpus": cpu_limit(),
        "load": perf_analyzer.PROGRAM if by_perf_analyzer else "own client",
        "texts": len(rows),
        "engine": {"texts_per_second": ceiling.texts_per_second, "batch_1_ms": ceiling.batch_1_ms},
        **quality,
        "cases": cases,
    }


def _cases(
    args: argparse.Namespace, server: TritonServer, rows: list[LabelledText], by_perf_analyzer: bool
) -> Iterator[tuple[str, Any]]:
    """Each case's runs that became steady; all cases in turns, so that a slow minute does not hit one of them only."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "texts.json")
        perf_analyzer.write_texts(data, [row.text for row in rows])
        wanted = [(t, n, c) for t in args.transport for n in args.texts for c in args.concurrency]
        found: dict[tuple[str, int, int], list[Measurement]] = {case: [] for case in wanted}
        for case in tqdm(wanted * args.rounds, desc="cases", disable=None, leave=False):
            transport, texts, concurrency = case
            url = server.grpc_url if transport == "grpc" else server.http_url
            if by_perf_analyzer:
                window = round(1000 * args.seconds / 3)  # it wants three steady windows
                one = perf_analyzer.measure(url, server.services[0], data, texts, concurrency, window)
            else:
                load = Load(url, server.services[0], [row.text for row in rows], texts, concurrency, args.seconds)
                one = measure_ourselves(load)
            found[case] += [one] if one is not None else []
    for (transport, texts, concurrency), runs in found.items():
        yield transport, (texts, concurrency, runs)


def _as_case(transport: str, case: tuple[int, int, list[Measurement]], ceiling: Ceiling) -> dict[str, Any]:
    texts, concurrency, runs = case
    document: dict[str, Any] = {"transport": transport, "texts": texts, "concurrency": concurrency, "runs": len(runs)}
    if not runs:
        return document
    middle = sorted(runs, key=lambda one: one.texts_per_second)[(len(runs) - 1) // 2]
    return {
        **document,
        "texts_per_second": middle.texts_per_second,
        "of_ceiling": middle.texts_per_second / ceiling.texts_per_second,
        "p50_ms": statistics.median(one.p50_ms for one in runs),
        "p99_ms": statistics.median(one.p99_ms for one in runs),
    }


def _quality(server: TritonServer, rows: list[LabelledText], ceiling: Ceiling) -> dict[str, float]:
    """Accuracy through the service, and how often the best label is the engine's own in process."""
    with connect(server.grpc_url, server.services[0]) as client:
        labels, size = client.labels(), client.max_batch_size()
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        answers = [answer for chunk in chunks for answer in client.classify([row.text for row in chunk], top_k=1)]
    served = [answer.label for answer in answers]
    alone = [labels[index] for index in ceiling.best_labels]
    return {
        "served_accuracy": float(np.mean([a in row.labels for a, row in zip(served, rows, strict=True)])),
        "engine_accuracy": float(np.mean([a in row.labels for a, row in zip(alone, rows, strict=True)])),
        "same_label": float(np.mean([a == b for a, b in zip(served, alone, strict=True)])),
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    engine = report["engine"]
    lines = [
        f"{report['model']}, {report['precision']}, {report['cpus']} CPUs, {report['texts']} texts; load from "
        f"{report['load']}, on the same machine",
        f"engine alone, in process: {engine['texts_per_second']:,.0f} texts/s (sorted by length), "
        f"{engine['batch_1_ms']:.2f} ms for one text",
        f"accuracy served {report['served_accuracy']:.2%}, in process {report['engine_accuracy']:.2%}, same label "
        f"{report['same_label']:.2%}",
        f"{'':>5} {'texts each':>11} {'under way':>10} {'texts/s':>9} {'of engine':>10} {'p50 ms':>8} {'p99 ms':>8}",
    ]
    for case in report["cases"]:
        head = f"{case['transport']:>5} {case['texts']:>11} {case['concurrency']:>10}"
        if case["runs"]:
            head += (
                f" {case['texts_per_second']:>9,.0f} {case['of_ceiling']:>10.2f} {case['p50_ms']:>8.2f} "
                f"{case['p99_ms']:>8.2f}"
            )
        lines.append(head if case["runs"] else f"{head}  no steady figures")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
