"""What a layout is worth: the same weights, engine, precision and texts, padded, packed and in rows, in process.

example:
  millibert bench-engine --checkpoint .millibert/banking77/checkpoint --data test.csv --text-column text

Texts are taken in their order in the file. `padded` pads each batch to its longest text; `packed`, the graph for
Triton's native backends, has the tokens of texts of about the same length end to end; `rows`, which the CPU engines
run, has several texts in a row. All three are the same code with the same fused products. They take turns, round by
round, and ratios are medians over the rounds. The int8 graphs have the scales that these very texts call for: they are
for timing only.
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
from typing import Any

import numpy as np
from tqdm import tqdm

from millibert_build.engine import Floats, available_precisions
from millibert_build.layouts import packed, rectangle, requests_of, without_padding
from millibert_build.release import cpu_name
from millibert_build.scenario import Engine as EngineName
from millibert_ensemble.models.bert.engines import ENGINES, Engine
from millibert_ensemble.models.bert.inference import LAYOUTS, Part, infer
from millibert_ensemble.models.bert.threads import cpu_limit

Ids = list[list[int]]

_LAYOUTS = ("padded", "packed", "rows")
_CALIBRATION_TEXTS = 512


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
        graphs = _export(args, [ids for batch in batches for ids in batch], Path(folder))
        results = [_measure(args, precision, layouts, batches) for precision, layouts in graphs.items()]
    report = {
        "cpu": cpu_name(),
        "threads": cpu_limit(),
        "engine": args.engine,
        "batch": args.batch,
        "texts": sum(map(len, batches)),
        "rounds": args.rounds,
        "results": results,
    }
    print(json.dumps(report) if args.json else _table(report))
    return 0


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['cpu']}, {report['threads']} threads, {report['engine']}",
        f"{report['texts']} texts in batches of {report['batch']}, medians of {report['rounds']} rounds",
        f"{'texts/s':<10} {'padded':>8} {'packed':>8} {'rows':>8} {'to padded':>10} {'to packed':>10} {'max |Δ|':>9}",
    ]
    for row in report["results"]:
        speeds = " ".join(f"{row[name]:>8,.0f}" for name in _LAYOUTS)
        ratios = f"{row['rows_to_padded']:>10.2f} {row['rows_to_packed']:>10.2f}"
        lines.append(f"{row['precision']:<10} {speeds} {ratios} {row['max_logit_difference']:>9.1e}")
    return "\n".join(lines)


def _export(args: argparse.Namespace, ids: Ids, folder: Path) -> dict[str, dict[str, Path]]:
    """The graph of each precision, of each layout."""
    from millibert_build.checkpoint import load_model
    from millibert_build.export import export_packed, export_padded, export_rows
    from millibert_build.quantize import calibrate, write_quantized

    graphs: dict[str, dict[str, Path]] = {}
    for layout, export in zip(_LAYOUTS, (export_padded, export_packed, export_rows), strict=True):
        export(load_model(args.checkpoint), args.max_tokens, folder / f"{layout}.onnx")
    for precision in available_precisions(args.engine, folder / "rows.onnx"):
        graphs[precision] = {layout: folder / f"{layout}.onnx" for layout in _LAYOUTS}
    activations = calibrate(folder / "rows.onnx", without_padding(ids[:_CALIBRATION_TEXTS], args.batch))
    graphs["int8"] = {layout: folder / f"{layout}_int8.onnx" for layout in _LAYOUTS}
    for layout, path in graphs["int8"].items():
        write_quantized(folder / f"{layout}.onnx", path, activations)
    return graphs


def _measure(
    args: argparse.Namespace, precision: str, graphs: dict[str, Path], batches: Sequence[Ids]
) -> dict[str, float | str]:
    layouts: dict[str, Callable[[], Floats]] = {}
    for name, path in graphs.items():
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
    return {
        "precision": precision,
        **{name: texts / statistics.median(times) for name, times in seconds.items()},
        "rows_to_padded": _ratio(seconds["padded"], seconds["rows"]),
        "rows_to_packed": _ratio(seconds["packed"], seconds["rows"]),
        "max_logit_difference": max(float(np.abs(logits["rows"] - logits[name]).max()) for name in layouts),
    }


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def _runner(engine: Engine, layout: str, batches: Sequence[Ids]) -> Callable[[], Floats]:
    """All batches on all streams; what a request brings is laid out beforehand."""
    if layout == "packed":
        return lambda: np.concatenate([infer(engine, _packed_parts(batch, engine.streams)) for batch in batches])
    # Of the padded layout a batch is one request, padded to its longest text; of rows, a request a text.
    requests = [[rectangle(batch)] if layout == "padded" else requests_of(batch) for batch in batches]
    return lambda: np.concatenate([infer(engine, LAYOUTS[layout](each, engine.streams)) for each in requests])


def _packed_parts(batch: Ids, streams: int) -> list[Part]:
    """Sorted by length, about as many tokens for each stream."""
    order = np.argsort([len(ids) for ids in batch], kind="stable")
    tokens = np.cumsum([len(batch[index]) for index in order])
    cuts = np.searchsorted(tokens, tokens[-1] * np.arange(1, streams) / streams)
    parts = [part for part in np.split(order, cuts) if len(part)]
    return [Part(part, packed([batch[index] for index in part])) for part in parts]
