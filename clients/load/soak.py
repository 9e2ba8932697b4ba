"""Send very many requests, and see whether the server's memory stays flat.

example:
  python -m load.soak --repository banking77_repository --data test.csv --label-column category --requests 200000

Sends single texts over gRPC, 64 under way, and looks at the resident memory of tritonserver and of each model's process
from the tenth part of the requests on, by when every size of batch has been met. Flat means: at the end at most
`--growth` above what it was then.

exit status: 0 flat, 1 it grew or a request failed, 2 wrong usage
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tqdm import tqdm

import millibert
from load.command import run_command
from load.generator import Load, measure
from load.machine import describe_machine
from load.released import add_release, memory_mib, serve, served_by
from load.transports import triton_requests
from millibert._arguments import positive_float, positive_int
from millibert._labelled_texts import read_labelled_texts
from millibert_ensemble.engine_choice import add_engine

_CONCURRENCY = 64
_LOOKS_SECONDS = 10.0
_WARM = 0.1


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_release(parser)
    add_engine(parser)
    parser.add_argument("--requests", type=positive_int, default=200_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--growth", type=positive_float, default=0.05, metavar="SHARE", help="default: %(default)s")


def main(argv: list[str] | None = None) -> int:
    """Send and look; returns the exit status."""
    return run_command("load.soak", __doc__, configure, run, table, argv, lambda found: bool(found["flat"]))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load in slices; after each a look at memory."""
    texts = [row.text for row in read_labelled_texts(args.data, args.text_column, args.label_column)]
    looks: list[dict[str, Any]] = []
    with (
        serve(args) as server,
        millibert.connect(server.grpc_url, server.services[0]) as client,
        tqdm(total=args.requests, disable=None, leave=False) as bar,
    ):
        model = client.model
        load = Load(triton_requests(server.grpc_url, model, texts), seconds=_LOOKS_SECONDS, concurrency=_CONCURRENCY)
        done = 0
        while done < args.requests:
            measure(load, 1)
            before, done = done, client.statistics()[model].requests
            looks.append({"requests": done, "memory_mib": memory_mib(server)})
            bar.update(done - before)
    return {
        "model": model,
        "engine": served_by(server),
        **describe_machine(),
        "looks": looks,
        **judge(looks, args.growth),
    }


def judge(looks: list[dict[str, Any]], growth: float) -> dict[str, Any]:
    """Memory after the warm-up and at the end, of all processes together."""
    total = [(look["requests"], sum(look["memory_mib"].values())) for look in looks]
    warm = next(memory for requests, memory in total if requests >= _WARM * total[-1][0])
    last = total[-1][1]
    return {"requests": total[-1][0], "warm_mib": warm, "last_mib": last, "flat": last <= (1 + growth) * warm}


def table(found: dict[str, Any]) -> str:
    """The verdict, and memory along the way."""
    lines = [f"{found['model']}, {found['cpus']} CPUs ({found['cpu']}): {found['requests']:,} requests"]
    every = max(1, len(found["looks"]) // 10)
    for look in [*found["looks"][:-1:every], found["looks"][-1]]:
        parts = ", ".join(f"{name} {mib:,.0f}" for name, mib in look["memory_mib"].items())
        lines.append(f"{look['requests']:>9,} requests: {sum(look['memory_mib'].values()):>6,.0f} MiB ({parts})")
    lines.append(f"{'PASS' if found['flat'] else 'FAIL'}  {found['warm_mib']:,.0f} to {found['last_mib']:,.0f} MiB")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
