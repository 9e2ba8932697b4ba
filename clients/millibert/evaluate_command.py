"""Measure how often a served model is right, on labelled texts sent through the server.

The data are CSV files with a header, JSON arrays of objects, or JSON Lines; UTF-8. Texts that the server refuses or
fails at count as errors and are left out of the figures; a server that stays busy or away ends the run.

examples:
  millibert evaluate --url grpc://127.0.0.1:8001 --model banking77 --data test.csv --label-column category
  millibert evaluate --url http://127.0.0.1:8000 --model banking77 --data test.jsonl --json > figures.json
  millibert evaluate --url … --model banking77 --data test.csv --checkpoint .millibert/banking77/checkpoint
  millibert evaluate --url … --model nlupp --data fold1[6-9].json --label-column intents --multi-label
  millibert evaluate --url … --model banking77 --data test.csv --out-of-scope chatter.csv

The exit status is 0 when all texts were answered, 1 when a call failed, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from millibert import _metrics as metrics
from millibert._arguments import add_service, open_client, positive_int
from millibert._client import Client
from millibert._errors import InvalidRequest, ServiceError, UsageError
from millibert._labelled_texts import LabelledText, read_labelled_texts, read_texts
from millibert._many import DEFAULT_CONCURRENCY
from millibert._types import Failure

_TOP_K = 3
_NAMED_AT_MOST = 5  # labels or errors in a message
_PROBE = "Hello"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `millibert evaluate`."""
    add_service(parser)
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        nargs="+",
        action="extend",
        metavar="FILE",
        help=".csv, .tsv, .json or .jsonl files",
    )
    parser.add_argument("--text-column", default="text", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--label-column", default="label", metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--multi-label",
        action="store_true",
        help="a text has any number of labels (a list, or separated in one field): measure the accepted ones",
    )
    parser.add_argument("--label-separator", default="|", metavar="TEXT", help="default: %(default)s")
    parser.add_argument(
        "--batch-size", type=positive_int, metavar="N", help="texts per request (default: the model's limit)"
    )
    parser.add_argument(
        "--concurrency",
        type=positive_int,
        default=DEFAULT_CONCURRENCY,
        metavar="N",
        help="requests under way at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="also run this fine-tuned checkpoint here, in PyTorch and fp32, and measure how often the served "
        "best label, or with --multi-label the set of accepted ones, is its own (needs the extra 'build')",
    )
    parser.add_argument(
        "--out-of-scope",
        type=Path,
        metavar="FILE",
        help="also send these texts, which none of the labels fits, and measure how often the answer is "
        '"don\'t know"; the file needs the text column only',
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="also write each text's label and prediction there, as JSON Lines",
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate; returns the exit status. Raises `ServiceError` when the service answers nothing at all."""
    separator = args.label_separator if args.multi_label else None
    files = (read_labelled_texts(file, args.text_column, args.label_column, separator) for file in args.data)
    rows = list(itertools.chain.from_iterable(files))
    outside = [] if args.out_of_scope is None else read_texts(args.out_of_scope, args.text_column)
    if args.predictions is not None:
        # Where that fails, it should before the work is done.
        _write_predictions(args.predictions, [], args.multi_label)
    with open_client(args) as client:
        top_k = len(client.labels()) if args.multi_label else _accepted_top_k(client)
        start = time.perf_counter()
        pairs, failures = _answers(client, rows, top_k, args)
        seconds = round(time.perf_counter() - start, 3)
        outside_pairs, outside_failures = _answers(client, outside, top_k, args)
    failures += outside_failures
    if not pairs:
        raise failures[0]
    measured = _multi_label_figures(pairs) if args.multi_label else _figures(pairs)
    figures = {**measured, **_counts(pairs, len(rows)), "seconds": seconds, "model": args.model, "url": args.url}
    if outside:
        figures |= _out_of_scope_figures(outside_pairs, len(outside))
    if args.checkpoint is not None:
        figures["agreement"] = _agreement(pairs, args.checkpoint, multi_label=args.multi_label)
    _warn(pairs, failures, figures)
    if args.predictions is not None:
        _write_predictions(args.predictions, pairs, args.multi_label)
    print(json.dumps(figures, indent=2) if args.json else _table(figures))
    return 1 if failures else 0


def _accepted_top_k(client: Client) -> int | None:
    """Find out whether the model has `_TOP_K` labels; otherwise it answers with as many as it likes.

    One call before all others, so that an unreachable server is one message and not an error per text.
    """
    try:
        client.classify(_PROBE, top_k=_TOP_K)
    except InvalidRequest:
        client.classify(_PROBE)
        return None
    return _TOP_K


def _answers(
    client: Client, rows: Sequence[LabelledText], top_k: int | None, args: argparse.Namespace
) -> tuple[list[metrics.Pair], list[ServiceError]]:
    """Each text that has an answer with it, and what went wrong with the others."""
    if not rows:
        return [], []
    answers = client.classify_many(
        [row.text for row in rows],
        top_k,
        batch_size=args.batch_size,
        concurrency=args.concurrency,
        progress=sys.stderr.isatty() and not args.json,
    )
    pairs: list[metrics.Pair] = []
    failures: list[ServiceError] = []
    for row, answer in zip(rows, answers, strict=True):
        if isinstance(answer, Failure):
            failures.append(answer.error)
        else:
            pairs.append((row, answer))
    return pairs, failures


def _figures(pairs: Sequence[metrics.Pair]) -> dict[str, Any]:
    return {
        "accuracy": metrics.accuracy(pairs),
        "top_k_accuracy": metrics.top_k_accuracy(pairs),
        "top_k": len(pairs[0][1].predictions),
        "macro_f1": metrics.macro_f1(pairs),
        "known": metrics.known(pairs),
    }


def _multi_label_figures(pairs: Sequence[metrics.Pair]) -> dict[str, Any]:
    return {
        "micro_f1": metrics.micro_f1(pairs),
        "macro_f1": metrics.multi_label_macro_f1(pairs),
        "exact_match": metrics.exact_match(pairs),
    }


def _out_of_scope_figures(pairs: Sequence[metrics.Pair], total: int) -> dict[str, Any]:
    """Share answered with "don't know"; None where no text got an answer."""
    return {
        "out_of_scope_refused": 1 - metrics.known(pairs) if pairs else None,
        "out_of_scope_n": total,
        "out_of_scope_errors": total - len(pairs),
    }


def _counts(pairs: Sequence[metrics.Pair], total: int) -> dict[str, Any]:
    return {
        "n": total,
        "errors": total - len(pairs),
        "truncated": sum(answer.truncated for _, answer in pairs),
    }


def _agreement(pairs: Sequence[metrics.Pair], checkpoint: Path, *, multi_label: bool) -> float:
    """Share of the answered texts whose best label, or set of accepted ones, the checkpoint gives in process too."""
    try:
        from millibert_build.checkpoint_labels import label_sets
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--checkpoint needs the extra 'build' ({error.name} is missing): pip install 'millibert[build]'"
        ) from error
    own = label_sets(checkpoint, [row.text for row, _ in pairs])
    served = (frozenset(answer.accepted) if multi_label else {answer.label} for _, answer in pairs)
    return sum(one == other for one, other in zip(own, served, strict=True)) / len(pairs)


def _warn(pairs: Sequence[metrics.Pair], failures: Sequence[ServiceError], figures: dict[str, Any]) -> None:
    if failures:
        errors, texts = (figures[name] + figures.get(f"out_of_scope_{name}", 0) for name in ("errors", "n"))
        print(f"error: {errors} of {texts} texts got no answer:", file=sys.stderr)
        for reason in _some({str(failure) for failure in failures}):
            print(f"  {reason}", file=sys.stderr)
    if unknown := metrics.labels_never_answered(pairs):
        print(
            "warning: labels of the data that the model never answered, does it know them? "
            + ", ".join(_some(unknown)),
            file=sys.stderr,
        )


def _some(values: Iterable[str]) -> list[str]:
    ordered = sorted(values)
    rest = len(ordered) - _NAMED_AT_MOST
    return ordered[:_NAMED_AT_MOST] + ([f"… and {rest} more"] if rest > 0 else [])


def _write_predictions(path: Path, pairs: Sequence[metrics.Pair], multi_label: bool) -> None:
    try:
        with path.open("w", encoding="utf-8") as file:
            for row, answer in pairs:
                line = {
                    "text": row.text,
                    "label": list(row.labels) if multi_label else row.label,
                    "predicted": answer.label,
                    "accepted": list(answer.accepted),
                    "score": answer.score,
                }
                file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error


def _table(figures: dict[str, Any]) -> str:
    names = {"accuracy": "accuracy", "micro_f1": "micro F1", "exact_match": "exact match"}
    names |= {"top_k_accuracy": f"top-{figures.get('top_k')} accuracy", "macro_f1": "macro F1", "known": "known"}
    lines = [
        ("model", f"{figures['model']} at {figures['url']}"),
        *((names[key], f"{value:.4f}") for key, value in figures.items() if key in names),
        ("texts", f"{figures['n']}, {figures['errors']} without an answer, {figures['truncated']} truncated"),
        ("seconds", f"{figures['seconds']:.2f}"),
    ]
    if (refused := figures.get("out_of_scope_refused")) is not None:
        answered = figures["out_of_scope_n"] - figures["out_of_scope_errors"]
        lines.append(("out of scope", f'{refused:.4f} of {answered} answered texts: "don\'t know"'))
    if "agreement" in figures:
        lines.append(("agreement", f"{figures['agreement']:.4f} with the checkpoint in PyTorch, fp32"))
    return "\n".join(f"{name:<15} {value}" for name, value in lines)
