"""Classify texts through a server: labels and scores, best first.

Without texts on the command line they are read from the standard input, one a line; empty lines are skipped.

examples:
  millibert classify --url grpc://127.0.0.1:8001 --model banking77 "Where is my new card?"
  millibert classify --url http://127.0.0.1:8000 --model banking77 --top 5 --json < texts.txt

The exit status is 0 when all texts were answered, 1 when a call failed, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from millibert._arguments import add_service, batch_limit, batches, open_client, positive_int
from millibert._client import Client
from millibert._types import Classification

_ACCEPTED = "  ✓"  # reaches its threshold
_SHOWN_CHARACTERS = 100
_SCORE_DECIMALS = 6  # FP32 carries no more


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `millibert classify`."""
    add_service(parser)
    parser.add_argument("--top", type=positive_int, metavar="K", help="labels per text (default: the model's)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="a text to classify")


def run(args: argparse.Namespace) -> int:
    """Classify; returns the exit status. Failed calls raise `ServiceError`."""
    texts = args.texts or _texts_of_input(args)
    with open_client(args) as client:
        answers = _answers(client, texts, args.top)
        if args.json:
            print(json.dumps([as_document(answer) for answer in answers], indent=2))
        else:
            for answer in answers:
                print(as_table(answer), flush=True)
    return 0


def as_document(answer: Classification) -> dict[str, Any]:
    """Lay an answer out for `--json`."""
    return {
        "text": answer.text,
        "truncated": answer.truncated,
        "known": answer.known,
        "predictions": [
            {
                "label": each.label,
                "id": each.id,
                "score": round(each.score, _SCORE_DECIMALS),
                "accepted": each.accepted,
            }
            for each in answer.predictions
        ],
    }


def as_table(answer: Classification) -> str:
    """Lay an answer out for people: the text, then a line per label with aligned scores."""
    width = max(len(each.label) for each in answer.predictions)
    lines = [_shown(answer.text)]
    lines += [f"  {each.label:<{width}}  {each.score:.3f}{_ACCEPTED * each.accepted}" for each in answer.predictions]
    if not answer.known:
        lines.append("  note: don't know; no label reaches the threshold that the build chose for it")
    if answer.truncated:
        lines.append("  note: longer than the model reads; the end of this text was ignored")
    return "\n".join(lines)


def _answers(client: Client, texts: list[str], top_k: int | None) -> Iterator[Classification]:
    # One text fits into any request: no need to ask.
    size = 1 if len(texts) == 1 else batch_limit(client)
    for batch in batches(texts, size):
        yield from client.classify(batch, top_k=top_k)


def _texts_of_input(args: argparse.Namespace) -> list[str]:
    if sys.stdin.isatty():
        args.wrong_usage("no text: give texts as arguments, or one a line on the standard input")
    data = sys.stdin.buffer.read()
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        args.wrong_usage(f"line {line} of the standard input is not UTF-8: {error.reason}")
    texts = [text for text in (line.removesuffix("\r") for line in lines) if text.strip()]
    if not texts:
        args.wrong_usage("no text: the standard input holds none (one a line is expected)")
    return texts


def _shown(text: str) -> str:
    """Fit a text on one line, without what would steer the terminal."""
    line = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"
