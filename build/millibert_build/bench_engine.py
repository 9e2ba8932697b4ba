"""Rows that texts share against padded texts: the same weights, engine, precision and texts, in one run, in process.

example:
  millibert bench-engine --checkpoint .millibert/banking77/checkpoint --data test.csv --text-column text

Texts are taken in their order in the file. The padded graph pads each batch to its longest text, and is the same
code with the same fused products; only the layout differs. The two take turns, round by round, and the ratio is
the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from millibert_build.engine import Floats, available_precisions
from millibert_build.layouts import rectangle, requests_of
from millibert_build.release import cpu_name
from millibert_build.scenario import Engine as EngineName
from millibert_ensemble.models.bert.engines import ENGINES, Engine
from millibert_ensemble.models.bert.inference import LAYOUTS, infer
from millibert_ensemble.models.bert.threads import cpu_limit

Ids = list[list[int]]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `millibert bench-engine`."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a fine-tuned checkpoint")
    parser.add_argument("--data", required=True, metavar="FILE", help="texts, labelled or not")
    parser.add_argument("--text-column", default="text", metavar="NAME")
    parser.add_argument("--engine", choices=typing.get_args(EngineName), default="openvino")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="texts of a batch (default: 32)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit status."""
    from millibert_build.bench_batches import batches_of, read_ids

    batches = batches_of(read_ids(args.checkpoint, args.data, args.text_column, args.max_tokens), args.batch)
    with tempfile.TemporaryDirectory() as folder:
        rows, padded = _export(args.checkpoint, args.max_tokens, Path(folder))
        precisions = available_precisions(args.engine, rows)
        results = [_measure(args, precision, rows, padded, batches) for precision in precisions]
    report = {
        "cpu": cpu_name(),
        "threads": cpu_limit(),
        "engine": args.engine,
        "batch": args.batch,
        "texts": sum(map(len, batches)),
        "rounds": args.rounds,
        "results": results,
    }
    if args.json:
        print(json.dumps(report))
        return 0
    print(f"{report['cpu']}, {report['threads']} threads, {args.engine}")
    print(f"{report['texts']} texts in batches of {args.batch}, medians of {args.rounds} rounds")
    print(f"{'precision':<10} {'padded texts/s':>15} {'rows texts/s':>15} {'ratio':>6} {'max |Δlogit|':>13}")
    for row in results:
        print(
            f"{row['precision']:<10} {row['padded']:>15,.0f} {row['rows']:>15,.0f} {row['ratio']:>6.2f} "
            f"{row['max_logit_difference']:>13.1e}"
        )
    return 0


def _export(checkpoint: Path, max_tokens: int, folder: Path) -> tuple[Path, Path]:
    from millibert_build.checkpoint import load_model
    from millibert_build.export import export_padded, export_rows

    rows, padded = folder / "rows.onnx", folder / "padded.onnx"
    for export, path in ((export_rows, rows), (export_padded, padded)):
        export(load_model(checkpoint), max_tokens, path)
    return rows, padded


def _measure(
    args: argparse.Namespace, precision: str, rows: Path, padded: Path, batches: Sequence[Ids]
) -> dict[str, float | str]:
    layouts: dict[str, Callable[[], Floats]] = {}
    for name, path in (("padded", padded), ("rows", rows)):
        engine = ENGINES[args.engine](path, precision, cpu_limit(), few_shapes=name == "rows")
        layouts[name] = _runner(engine, name, batches)
    logits = {name: run() for name, run in layouts.items()}  # the warm-up, too
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    for _ in tqdm(range(args.rounds), desc=precision, disable=None, leave=False):
        for name, run_layout in layouts.items():
            start = time.perf_counter()
            run_layout()
            seconds[name].append(time.perf_counter() - start)
    texts = sum(map(len, batches))
    ratios = [slow / fast for slow, fast in zip(seconds["padded"], seconds["rows"], strict=True)]
    return {
        "precision": precision,
        "padded": texts / statistics.median(seconds["padded"]),
        "rows": texts / statistics.median(seconds["rows"]),
        "ratio": statistics.median(ratios),
        "max_logit_difference": float(np.abs(logits["rows"] - logits["padded"]).max()),
    }


def _runner(engine: Engine, layout: str, batches: Sequence[Ids]) -> Callable[[], Floats]:
    """All batches as the server runs them; what it is given is laid out beforehand."""
    # Of the padded layout a batch is one request, padded to its longest text; of rows, a request a text.
    requests = [[rectangle(batch)] if layout == "padded" else requests_of(batch) for batch in batches]
    return lambda: np.concatenate([infer(engine, LAYOUTS[layout](each, engine.streams)) for each in requests])
