"""Send more than a server can answer: the accepted ones must be fast, the others refused, and it over at once.

example:
  python -m load.overload --repository banking77_repository --data test.csv --label-column category

Measures the capacity in a closed loop, then sends single texts in an open loop: at 0.8 of the capacity, at twice the
capacity, and at 0.8 again. Each request may wait `--queue-timeout-ms` for the engine. Latencies count from the moment a
request was due. Load comes from our own client, which shares the machine with the server: its CPU time is part of what
capacity means here.

exit status: 0 all held, 1 something did not (FAIL), or a request failed otherwise; 2 wrong usage
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from load.command import run_command
from load.generator import Answers, Load, Phase, measure, send
from load.machine import describe_machine
from load.released import add_release, memory_mib, serve, served_by
from load.transports import BUSY, triton_requests
from millibert._arguments import positive_float
from millibert._labelled_texts import read_labelled_texts
from millibert_ensemble.engine_choice import add_engine

_CONCURRENCY = 64
_CAPACITY_SECONDS = 5.0
_USUAL, _OVER = 0.8, 2.0
# What is asked for.
_SLOWER, _RECOVERY_SECONDS = 4.0, 5.0
# Who was let in, and after the timeout is late, is refused when the engine looks at the queue next: behind the batch
# under way.
_REFUSAL_SLACK_MS = 150.0
_BATCHES = 5


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_release(parser)
    add_engine(parser)
    parser.add_argument(
        "--queue-timeout-ms", type=positive_float, default=50.0, metavar="N", help="default: %(default)g"
    )
    parser.add_argument("--seconds", type=positive_float, default=60.0, metavar="N", help="at twice the capacity")
    parser.add_argument("--usual-seconds", type=positive_float, default=20.0, metavar="N", help="before and after")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    return run_command("load.overload", __doc__, configure, run, table, argv, _held)


def _held(found: dict[str, Any]) -> bool:
    return all(verdict["held"] for verdict in found["verdicts"])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Capacity, then the three phases in one run."""
    texts = [row.text for row in read_labelled_texts(args.data, args.text_column, args.label_column)]
    with serve(args) as server:
        url, model = server.grpc_url, server.services[0]
        closed = Load(triton_requests(url, model, texts), seconds=_CAPACITY_SECONDS, concurrency=_CONCURRENCY)
        capacity = statistics.median(measure(closed, 1).texts_per_second for _ in range(4))
        phases = (
            Phase(_USUAL * capacity, args.usual_seconds),
            Phase(_OVER * capacity, args.seconds),
            Phase(_USUAL * capacity, args.usual_seconds),
        )
        requests = triton_requests(url, model, texts, queue_timeout_ms=args.queue_timeout_ms)
        before = memory_mib(server)
        answers = send(Load(requests, phases=phases))
        after, engine = memory_mib(server), served_by(server)
    figures = judge(answers, args.usual_seconds, args.seconds, args.queue_timeout_ms)
    return {
        "model": model,
        "engine": engine,
        **describe_machine(),
        "load": "own client, gRPC, single texts",
        "queue_timeout_ms": args.queue_timeout_ms,
        "capacity": capacity,
        "memory_mib": {"before": before, "after": after},
        **figures,
    }


def judge(answers: Answers, usual_seconds: float, over_seconds: float, queue_timeout_ms: float) -> dict[str, Any]:
    """Figures of the phases, and what is asked of them."""
    over_from, over_to = usual_seconds, usual_seconds + over_seconds
    usual = answers.between(0.2 * usual_seconds, over_from)
    over = answers.between(over_from, over_to)
    refused = np.isin(over.status, BUSY)
    p99_usual, p99_over = usual.percentile(99), over.percentile(99)
    refused_ms = _milliseconds(over.latency[refused], 99)
    before = _seconds(answers, 0.2 * usual_seconds, over_from)
    after = _seconds(answers, over_to, float(answers.due.max()))
    recovery = _recovery(after, before, p99_usual)
    other = int((~(over.answered | refused)).sum())
    verdicts = {
        f"p99 of accepted requests at most {_SLOWER:g} times that at {_USUAL:g} of capacity": p99_over
        <= _SLOWER * p99_usual,
        "every other request is told that the server is busy": other == 0,
        f"refused within the queue timeout and a batch or two ({queue_timeout_ms + _REFUSAL_SLACK_MS:g} ms, p99)": (
            refused_ms <= queue_timeout_ms + _REFUSAL_SLACK_MS
        ),
        f"as before within {_RECOVERY_SECONDS:g} s": recovery is not None and recovery <= _RECOVERY_SECONDS,
    }
    return {
        "usual": {"requests": len(usual.due), "answered": float(usual.answered.mean()), "p99_ms": p99_usual},
        "over": {
            "requests": len(over.due),
            "answered": float(over.answered.mean()),
            "answered_per_second": float(over.answered.sum() / over_seconds),
            "p50_ms": over.percentile(50),
            "p99_ms": p99_over,
            "refused_p50_ms": _milliseconds(over.latency[refused], 50),
            "refused_p99_ms": refused_ms,
            "failed_otherwise": other,
        },
        "recovery_seconds": recovery,
        "after": [second._asdict() for second in after],
        "verdicts": [{"asked": asked, "held": bool(held)} for asked, held in verdicts.items()],
    }


def _milliseconds(latency: npt.NDArray[np.float64], percent: float) -> float:
    return 1000 * float(np.percentile(latency, percent)) if len(latency) else 0.0


class Second(NamedTuple):
    """A second of a phase."""

    answered: float  # share of what was due then
    p99_ms: float | None
    """Of what was answered."""


def _seconds(answers: Answers, start: float, end: float) -> list[Second]:
    """Each whole second of a phase in which anything was due."""
    windows = (answers.between(start + second, start + second + 1) for second in range(int(end - start)))
    return [
        Second(float(window.answered.mean()), window.percentile(99) if window.answered.any() else None)
        for window in windows
        if len(window.due)
    ]


def _recovery(after: Sequence[Second], before: Sequence[Second], p99_usual: float) -> int | None:
    """After how many seconds one is as good as before: no fewer answered than in the worst, p99 at most twice.

    None: never. At 0.8 of the capacity a second may have a few refusals, before the overload as after it.
    """
    least = min((second.answered for second in before), default=1.0)
    for index, one in enumerate(after):
        if one.answered >= least and one.p99_ms is not None and one.p99_ms <= 2 * p99_usual:
            return index
    return None


def table(found: dict[str, Any]) -> str:
    """The figures and verdicts for people."""
    usual, over = found["usual"], found["over"]
    lines = [
        f"{found['model']}, {found['cpus']} CPUs ({found['cpu']}); {found['load']}",
        f"capacity {found['capacity']:,.0f} requests/s; each may wait {found['queue_timeout_ms']:g} ms for the engine",
        f"at {_USUAL:g} of it: {usual['answered']:.2%} answered, p99 {usual['p99_ms']:.1f} ms",
        f"at {_OVER:g} times: {over['answered']:.1%} answered ({over['answered_per_second']:,.0f}/s), p50 "
        f"{over['p50_ms']:.1f} ms, p99 {over['p99_ms']:.1f} ms; the others refused, p50 "
        f"{over['refused_p50_ms']:.1f} ms, p99 {over['refused_p99_ms']:.1f} ms",
        f"as before after {found['recovery_seconds']} s",
        *(f"{'PASS' if verdict['held'] else 'FAIL'}  {verdict['asked']}" for verdict in found["verdicts"]),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
