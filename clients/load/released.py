"""What all benchmarks under load start from: a release and its server, labelled texts, and a look at its memory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import psutil

from millibert._errors import UsageError
from millibert_ensemble import processes
from millibert_ensemble.engine_choice import engine_options
from millibert_ensemble.server import TritonServer


def add_release(parser: argparse.ArgumentParser) -> None:
    """Add what all benchmarks need: a release, and labelled texts."""
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="labelled texts")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--label-column", default="label", metavar="NAME", help="default: %(default)s")


def serve(args: argparse.Namespace) -> TritonServer:
    """A server on the release, by the engine that `millibert serve` would choose; with `--engine` of `add_engine`."""
    options = engine_options(args.repository, args.engine, lambda line: print(line, file=sys.stderr))
    return TritonServer(args.repository, options=options)


def served_by(server: TritonServer) -> str:
    """`tensorrt` or `cpu`."""
    return "tensorrt" if server.options else "cpu"


def memory_mib(server: TritonServer) -> dict[str, float]:
    """Resident memory of tritonserver and of each model's processes, in MiB.

    Raises `UsageError` where one of them has ended.
    """
    found: dict[str, float] = {}
    try:
        for pid, name in ((server.pid, "tritonserver"), *processes.stubs(server.pid)):
            found[name] = found.get(name, 0.0) + psutil.Process(pid).memory_info().rss / 2**20
        return found
    except psutil.NoSuchProcess as error:
        raise UsageError(f"a process of the server has ended: {error}") from error
