r"""Measure a release: its engine alone, then served by Triton under load, on the same texts in one run.

examples:
  python -m load --repository model_repository --data build/scenarios/customer_service/test.csv
  python -m load --repository banking77_repository --data test.csv --label-column category \
                 --checkpoint .millibert/banking77/checkpoint --json > bench.json
  python -m load --repository repo --data test.csv --concurrency 64 --texts 1 --rounds 5 --mixes data --transports grpc

All of --concurrency and --texts are measured over gRPC on the texts as they are. Everything else is compared at the
smallest and at a usual concurrency (64, or the largest asked for): HTTP; texts of a few words, and texts up to the
model's limit (--mixes); and other forms of the same release (--forms): `fused`, all in one model, and `fused2`, two
instances of it; `padded`, the classical layout, made from --checkpoint; `cached`, which keeps answers, so that each
text is computed only once.

Load comes from perf_analyzer where that is installed (`python -m load.install_perf_analyzer`), else from our own
client; the report says which. Each case is run several times in turns with all others, each time after the engine alone
on the same texts, and medians are shown, of ratios too (of a single text under way: the p50 above the engine's). On a
machine that the load shares with the server the figures are lower than a server of its own would give; ratios within
one run are what counts.

exit status: 0 measured, 1 a request failed, 2 wrong usage
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from load import report
from load.cases import Bench, Case, Run, as_json, run_cases
from load.ceiling import EngineAlone, Pace, load_tokenizer
from load.command import run_command
from load.machine import describe_machine
from load.mixes import MIXES, make_mix
from load.released import add_release
from load.twins import write_cached_twin, write_padded_twin
from millibert import _perf_analyzer as perf_analyzer
from millibert import connect
from millibert._arguments import positive_float, positive_int
from millibert._errors import UsageError
from millibert._labelled_texts import LabelledText, read_labelled_texts
from millibert_build.fuse import fuse
from millibert_ensemble.server import TritonServer

AS_IT_IS, FUSED, FUSED_2, PADDED, CACHED = "release", "fused", "fused2", "padded", "cached"
_USUAL_CONCURRENCY = 64


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_release(parser)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="what the release was made from; for `padded`")
    parser.add_argument("--concurrency", type=positive_int, nargs="+", default=[1, 8, 32, 64, 256], metavar="N")
    parser.add_argument("--texts", type=positive_int, nargs="+", default=[1, 8, 32], metavar="N", help="of a request")
    parser.add_argument("--transports", choices=("grpc", "http"), nargs="+", default=["grpc", "http"])
    parser.add_argument("--mixes", choices=tuple(MIXES), nargs="+", default=list(MIXES))
    parser.add_argument(
        "--forms",
        choices=(FUSED, FUSED_2, PADDED, CACHED),
        nargs="*",
        help="default: all, `padded` if there is a --checkpoint",
    )
    parser.add_argument("--seconds", type=positive_float, default=5.0, metavar="N", help="of each run")
    parser.add_argument("--rounds", type=positive_int, default=3, metavar="N", help="runs of each case")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw throughput against latency there (.svg)")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    return run_command("load", __doc__, configure, _run_and_plot, report.table, argv)


def _run_and_plot(args: argparse.Namespace) -> dict[str, Any]:
    found = run(args)
    if args.plot is not None:
        report.write_plot(args.plot, found)
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The engine alone on each mix, then every case on servers of our own."""
    rows = read_labelled_texts(args.data, args.text_column, args.label_column)
    forms = _forms(args)
    tokenizer, max_tokens = load_tokenizer(args.repository)
    mixes = {name: make_mix(name, [row.text for row in rows], tokenizer, max_tokens) for name in ("data", *args.mixes)}
    alone = EngineAlone(args.repository)
    with ExitStack() as stack:
        servers = _serve(stack, args, forms, [row.text for row in rows])
        quality = _quality(servers[AS_IT_IS], rows, alone)
        bench = Bench(
            servers,
            {name: mix.texts for name, mix in mixes.items()},
            {name: alone.pace_on(mix.texts) for name, mix in mixes.items()},
            perf_analyzer.is_here(),
            args.seconds,
            args.rounds,
        )
        cases = run_cases(bench, plan(args, forms))
    return {
        "model": servers[AS_IT_IS].services[0],
        "precision": alone.precision,
        **describe_machine(),
        "load": perf_analyzer.PROGRAM if bench.by_perf_analyzer else "own client",
        "texts": len(rows),
        "rounds": args.rounds,
        "engine": {name: _engine(cases, name) for name in mixes},
        "mixes": {name: {"mean_tokens": mix.mean, "longest": mix.longest} for name, mix in mixes.items()},
        **quality,
        "cases": [as_json(case, runs) for case, runs in cases.items()],
    }


def _engine(cases: Mapping[Case, Sequence[Run]], mix: str) -> dict[str, float]:
    """The engine alone on a mix, by all times that it was measured."""
    return Pace.median([run.engine for case, runs in cases.items() if case.mix == mix for run in runs])._asdict()


def plan(args: argparse.Namespace, forms: Sequence[str]) -> Iterator[Case]:
    """The whole grid over gRPC, and what is compared with it where that says most."""
    for texts in args.texts:
        for concurrency in args.concurrency:
            yield Case(AS_IT_IS, "data", args.transports[0], texts, concurrency)
    usual = min(_USUAL_CONCURRENCY, max(args.concurrency))
    for texts in sorted({min(args.texts), max(args.texts)}):
        for concurrency in sorted({min(args.concurrency), usual}):
            yield from (Case(AS_IT_IS, "data", transport, texts, concurrency) for transport in args.transports[1:])
            yield from (Case(AS_IT_IS, mix, args.transports[0], texts, concurrency) for mix in args.mixes)
            yield from (Case(form, "data", args.transports[0], texts, concurrency) for form in forms)


def _forms(args: argparse.Namespace) -> list[str]:
    if args.forms is None:
        return [FUSED, FUSED_2, *([PADDED] if args.checkpoint else []), CACHED]
    if PADDED in args.forms and args.checkpoint is None:
        raise UsageError("--forms padded needs --checkpoint: `millibert build` keeps it in its --work folder")
    return list(args.forms)


def _serve(
    stack: ExitStack, args: argparse.Namespace, forms: Sequence[str], texts: Sequence[str]
) -> Mapping[str, TritonServer]:
    """A server for each form; a server without requests takes no CPU from the others."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="millibert-load-")))
    make: dict[str, Callable[[Path], object]] = {
        FUSED: lambda out: fuse(args.repository, out),
        FUSED_2: lambda out: fuse(args.repository, out, 2),
        PADDED: lambda out: write_padded_twin(args.repository, args.checkpoint, texts, out),
        CACHED: lambda out: write_cached_twin(args.repository, len(texts), out),
    }
    for form in forms:
        make[form](folder / form)
    places = {AS_IT_IS: args.repository, **{form: folder / form for form in forms}}
    return {form: stack.enter_context(TritonServer(place)) for form, place in places.items()}


def _quality(server: TritonServer, rows: list[LabelledText], engine: EngineAlone) -> dict[str, float]:
    """Accuracy through the service, and how often the best label is the engine's own in process."""
    with connect(server.grpc_url, server.services[0]) as client:
        labels, size = client.labels(), client.max_batch_size()
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        answers = [answer for chunk in chunks for answer in client.classify([row.text for row in chunk], top_k=1)]
    served = [answer.label for answer in answers]
    alone = [labels[index] for index in engine.best_labels([row.text for row in rows])]
    return {
        "served_accuracy": float(np.mean([a in row.labels for a, row in zip(served, rows, strict=True)])),
        "engine_accuracy": float(np.mean([a in row.labels for a, row in zip(alone, rows, strict=True)])),
        "same_label": float(np.mean([a == b for a, b in zip(served, alone, strict=True)])),
    }


if __name__ == "__main__":
    sys.exit(main())
