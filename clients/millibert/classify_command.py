"""Classify texts through a server: labels and scores, best first.

The texts are arguments, or the column of a file, or lines of the standard input; empty lines are skipped. They go out
in batches, several at a time, and the answers come in the order of the texts. Files and the standard input may hold
any number of them.

examples:
  millibert classify --url grpc://127.0.0.1:8001 --model banking77 "Where is my new card?"
  millibert classify --url http://127.0.0.1:8000 --model banking77 --top 5 --json < texts.txt
  tail -f chat.log | millibert classify --url … --model banking77 --jsonl
  millibert classify --url … --model banking77 --input chats.csv --text-column message --threshold 0.8
  millibert classify --url … --model banking77 --input chats.jsonl --output answers.jsonl

With --output the answers are written to answers.jsonl.partial, which gets its name when it is complete. After an
interruption of any kind the same command goes on where it was.

A line of JSON Lines is {"text", "truncated", "known", "predictions": [{"label", "id", "score", "accepted"}]}. A text
that the server refuses or fails at, and no other, has {"text", "error": {"type", "reason"}} instead.

The exit status is 0 when all texts were answered; 1 when a call failed, which ends the run, or when some texts have
errors, whose number is the last line on standard error; 2 for wrong usage and for files that cannot be read or
written; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from millibert import _text_sources
from millibert._answer_layouts import as_document, as_table
from millibert._arguments import add_service, open_client, positive_float, positive_int
from millibert._client import Client
from millibert._errors import InvalidRequest, MillibertError, UsageError
from millibert._many import DEFAULT_CONCURRENCY, DEFAULT_PATIENCE, Answer
from millibert._output_file import OutputFile, as_line
from millibert._text_sources import Texts
from millibert._types import Failure


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `millibert classify`."""
    add_service(parser)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="a text to classify")
    parser.add_argument("--input", type=Path, metavar="FILE", help="a .csv, .tsv, .jsonl, .json or .txt of texts")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="its column (default: %(default)s)")
    parser.add_argument("--top", type=positive_int, metavar="K", help="labels per text (default: the model's)")
    parser.add_argument(
        "--threshold",
        type=_score,
        metavar="SCORE",
        help="accept labels from this score on, 0 to 1 (default: what the build chose for each)",
    )
    _add_output(parser.add_argument_group("output"))
    _add_pace(parser.add_argument_group("pace"))


def _add_output(group: argparse._ArgumentGroup) -> None:
    form = group.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON document, at the end, instead of a table")
    form.add_argument("--jsonl", action="store_true", help="print one JSON object a line instead of a table")
    group.add_argument(
        "--output", type=Path, metavar="FILE.jsonl", help="write one JSON object a line there, and nothing on screen"
    )
    group.add_argument("--restart", action="store_true", help="begin anew where FILE.jsonl.partial is there")
    group.add_argument("--force", action="store_true", help="replace FILE.jsonl if it is there")


def _add_pace(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch-size", type=positive_int, metavar="N", help="texts per request (default: the model's limit)"
    )
    group.add_argument(
        "--concurrency",
        type=positive_int,
        default=DEFAULT_CONCURRENCY,
        metavar="N",
        help="requests under way at a time (default: %(default)s)",
    )
    group.add_argument(
        "--patience",
        type=positive_float,
        default=DEFAULT_PATIENCE,
        metavar="SECONDS",
        help="how long a server may be busy or away before the run ends (default: %(default)g)",
    )


def run(args: argparse.Namespace) -> int:
    """Classify; returns the exit status. Failed calls raise `ServiceError`."""
    _refuse_contradictions(args)
    try:
        texts = _texts(args)
        count, errors = _into_file(args, texts) if args.output else _onto_screen(args, texts)
    except UsageError as error:
        print(f"millibert classify: {error}", file=sys.stderr)
        return 2
    if errors:
        print(f"error: {errors} of {count} texts could not be classified", file=sys.stderr)
    return 1 if errors else 0


def _refuse_contradictions(args: argparse.Namespace) -> None:
    if args.texts and args.input:
        args.wrong_usage("give texts as arguments or --input, not both")
    if args.json and args.output:
        args.wrong_usage("--output writes JSON Lines; leave --json out")
    for name in ("restart", "force"):
        if getattr(args, name) and not args.output:
            args.wrong_usage(f"--{name} is about the file of --output; give that too")
    if args.input and args.output and args.output.exists() and args.input.samefile(args.output):
        args.wrong_usage("--output would replace the file of --input; give another name")


def _texts(args: argparse.Namespace) -> Texts:
    if args.texts:
        return _text_sources.given(args.texts)
    if args.input:
        return _text_sources.of_file(args.input, args.text_column)
    if sys.stdin is None or sys.stdin.isatty():
        args.wrong_usage("no text: give texts as arguments, in a file as --input, or one a line on the standard input")
    return _text_sources.of_pipe(sys.stdin.fileno(), "standard input")


def _onto_screen(args: argparse.Namespace, texts: Texts) -> tuple[int, int]:
    """Print all answers; returns how many there are, and how many of them are errors."""
    count = errors = 0
    documents = []
    with closing(_answers(args, texts)) as answers:
        for answer in answers:
            count, errors = count + 1, errors + isinstance(answer, Failure)
            if args.json:
                documents.append(as_document(answer))
            else:
                print(as_line(as_document(answer)) if args.jsonl else as_table(answer), flush=True)
    if args.json:
        print(json.dumps(documents, indent=2))
    return count, errors


def _into_file(args: argparse.Namespace, texts: Texts) -> tuple[int, int]:
    """The same into the file of `--output`, counting what it holds from an earlier run."""
    with OutputFile(args.output, restart=args.restart, force=args.force) as output:
        output.resume(texts.each)
        if output.lines:
            print(f"going on after {output.lines} texts in {output.partial}", file=sys.stderr)
        try:
            with closing(_answers(args, texts, output.lines)) as answers:
                for answer in answers:
                    output.write(as_document(answer))
        except (MillibertError, KeyboardInterrupt):
            if output.lines:
                print(f"{output.lines} texts are in {output.partial}; run this again to go on", file=sys.stderr)
            raise
        output.complete()
        return output.lines, output.errors


def _answers(args: argparse.Namespace, texts: Texts, done: int = 0) -> Generator[Answer, None, None]:
    """Answers to the texts that are left after the first `done`; raises `UsageError` where there are none at all."""
    bursts = texts.bursts()
    first = next(bursts, None)
    if first is None:
        if not done:
            raise UsageError("no text: the standard input holds none (one a line is expected)")
        return
    with open_client(args) as client, _bar(args, texts, done) as bar:
        size = _batch_size(client, args.batch_size)
        for burst in itertools.chain([first], bursts):
            for answer in client.classify_many(
                burst,
                args.top,
                threshold=args.threshold,
                batch_size=size,
                concurrency=args.concurrency,
                patience=args.patience,
            ):
                yield answer
                bar.update()


def _batch_size(client: Client, given: int | None) -> int | None:
    # Asked in any case: a server that cannot be reached is to be known now, and not when patience is at its end.
    try:
        limit = client.max_batch_size()
    except InvalidRequest:
        return given
    return given or limit


def _bar(args: argparse.Namespace, texts: Texts, done: int) -> tqdm[Any]:
    # Answers on the terminal show by themselves that it goes on.
    shown = not args.texts and sys.stderr.isatty() and bool(args.output or args.json or not sys.stdout.isatty())
    return tqdm(total=texts.count, initial=done, desc="classifying", unit=" texts", smoothing=0.05, disable=not shown)


def _score(text: str) -> float:
    """Read a number from 0 to 1; for argparse."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, not {text}")
    return number


_score.__name__ = "number"
