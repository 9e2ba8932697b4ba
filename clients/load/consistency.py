"""Whether a release gives each text the same answer however it is batched, on a server that is started again and again.

An engine makes kernels for sizes as it meets them, on several threads, and a fault in that shows in some starts only
and for some sizes only (docs/log.md). So each start asks every text alone, and then all of them over and over, many
under way, which come in batches of ever other sizes. Scores may differ by what rounding does, --tolerance; a wrong
kernel changes them by tenths.

examples:
  python -m load.consistency --repository banking77_repository --data test.csv --label-column category
  python -m load.consistency --repository model_repository --data test.csv --starts 50 --seconds 20

exit status: 0 all answers alike, 1 some differ, or a call failed, 2 wrong usage
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

import millibert
from load.command import run_command
from load.machine import describe_machine
from load.released import add_release, serve
from millibert._arguments import positive_float, positive_int
from millibert._client import Client
from millibert._labelled_texts import read_labelled_texts
from millibert._types import Failure
from millibert_ensemble.engine_choice import add_engine

Scores = npt.NDArray[np.float64]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_release(parser)
    add_engine(parser)
    parser.add_argument("--starts", type=positive_int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=positive_float, default=10.0, metavar="S", help="of each (default: 10)")
    parser.add_argument("--texts", type=positive_int, default=400, metavar="N", help="at most (default: %(default)s)")
    parser.add_argument("--tolerance", type=positive_float, default=0.05, metavar="P", help="default: %(default)g")


def main(argv: list[str] | None = None) -> int:
    """Ask, compare, print; returns the exit status."""
    return run_command("load.consistency", __doc__, configure, run, table, argv, lambda found: bool(found["alike"]))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Each start of the server with how often, and by how much, its answers differed."""
    rows = read_labelled_texts(args.data, args.text_column, args.label_column)
    texts = list(dict.fromkeys(row.text for row in rows))[: args.texts]
    starts = [_start(args, texts) for _ in tqdm(range(args.starts), desc="starts", disable=None, leave=False)]
    return {
        **describe_machine(),
        "texts": len(texts),
        "tolerance": args.tolerance,
        "starts": starts,
        "alike": not any(start["differing"] for start in starts),
    }


def _start(args: argparse.Namespace, texts: Sequence[str]) -> dict[str, Any]:
    with (
        serve(args) as server,
        millibert.connect(server.grpc_url, server.services[0]) as client,
    ):
        end = time.monotonic() + args.seconds
        alone = scores(client, texts, batch_size=1, concurrency=1)
        return compare(alone, _passes(client, texts, end), args.tolerance)


def _passes(client: Client, texts: Sequence[str], end: float) -> Iterator[Scores]:
    """At least one."""
    while True:
        yield scores(client, texts)
        if time.monotonic() >= end:
            return


def scores(client: Client, texts: Sequence[str], batch_size: int | None = None, concurrency: int = 8) -> Scores:
    """[texts, labels]; raises the `ServiceError` of a text that got no answer."""
    labels = client.labels()
    found = np.zeros((len(texts), len(labels)))
    answers = client.classify_many(texts, len(labels), batch_size=batch_size, concurrency=concurrency)
    for row, answer in zip(found, answers, strict=True):
        if isinstance(answer, Failure):
            raise answer.error
        for each in answer.predictions:
            row[each.id] = each.score
    return found


def compare(alone: Scores, passes: Iterable[Scores], tolerance: float) -> dict[str, Any]:
    """How many passes there were, in how many a text differed, how many texts at most, and the largest difference."""
    found = {"passes": 0, "differing": 0, "most_texts": 0, "largest": 0.0}
    for together in passes:
        differences = np.abs(together - alone).max(axis=1)
        wrong = int((differences > tolerance).sum())
        found["passes"] += 1
        found["differing"] += bool(wrong)
        found["most_texts"] = max(found["most_texts"], wrong)
        found["largest"] = max(found["largest"], float(differences.max()))
    return found


def table(found: dict[str, Any]) -> str:
    """A line for each start that was not as it should be, and the verdict."""
    starts = found["starts"]
    lines = [
        f"start {number}: {start['differing']} of {start['passes']} passes differ, up to {start['most_texts']} of "
        f"{found['texts']} texts, by {start['largest']:.2f}"
        for number, start in enumerate(starts, 1)
        if start["differing"]
    ]
    passes, largest = sum(start["passes"] for start in starts), max(start["largest"] for start in starts)
    lines.append(
        f"{'PASS' if found['alike'] else 'FAIL'}  {len(lines)} of {len(starts)} starts with differing answers; "
        f"{passes:,} passes over {found['texts']} texts, largest difference {largest:.4f} "
        f"({found['cpu']}, {found['cpus']} CPUs)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
