r"""Measure a running service, or one of its stages, with NVIDIA's perf_analyzer.

examples:
  millibert perf --url grpc://127.0.0.1:8001 --model banking77 --texts test.csv
  millibert perf --url http://127.0.0.1:8000 --model banking77 --texts test.csv --concurrency 1 16 64 \
                 --texts-per-request 1 8 --out runs.json
  millibert perf --url grpc://127.0.0.1:8001 --model banking77 --texts synthetic:lognormal:mean=15,sigma=0.6,max=128 \
                 --rate 200 400 800 --spacing poisson --seconds 10
  millibert perf --url grpc://127.0.0.1:8001 --model banking77 --texts test.csv --stage bert --concurrency 8

Each --concurrency (a closed loop: so many requests under way) and each --rate (an open loop: so many requests a
second) is measured with each --texts-per-request. --stage asks one of the service's models alone, with what the models
before it said of the texts. Answers of the whole service are compared with what it said before the load, unless they go
through --shared-memory.

perf_analyzer stops at the first request that is refused or fails, so that such a load has no figures: it is named, and
the others are measured. `python -m load.install_perf_analyzer` installs perf_analyzer.

exit status: 0 all measured and answered, 1 some were not, 2 wrong usage
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from load.perf_analyzer import STAGES, Expected, PerfLoad, behind, write_data
from load.perf_analyzer import run as run_load
from load.results import Run, write_runs
from load.texts import Texts, ask_reference, read_source
from millibert._address import parse_address
from millibert._arguments import add_service, open_client, positive_float, positive_int
from millibert._errors import MillibertError, UsageError

_USUAL_CONCURRENCY = (1, 16, 64)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_service(parser)
    parser.add_argument("--texts", required=True, metavar="FILE", help="texts, or synthetic:DISTRIBUTION:…")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--stage", choices=STAGES, help="this one alone")
    parser.add_argument("--concurrency", type=positive_int, nargs="+", metavar="N", help="default: 1 16 64, or --rate")
    parser.add_argument("--rate", type=positive_float, nargs="+", default=[], metavar="N", help="requests/s")
    parser.add_argument("--spacing", choices=("even", "poisson"), default="even", help="of a rate (default: even)")
    parser.add_argument("--texts-per-request", type=positive_int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--shared-memory", action="store_true", help="texts and answers through /dev/shm")
    parser.add_argument("--seconds", type=positive_float, default=6.0, metavar="N", help="of each load (default: 6)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the runs there, JSON")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit status."""
    if parse_address(args.url).secure:
        args.wrong_usage("perf_analyzer is used without TLS")
    texts = read_source(args.texts, args.text_column)
    # Its export names texts, not their places.
    texts = texts._replace(each=tuple(dict.fromkeys(texts.each)))
    print(texts.description, file=sys.stderr)
    expected = None if args.stage or args.shared_memory else _expected(args, texts)
    with tempfile.TemporaryDirectory(prefix="millibert-perf-") as folder:
        loads = _loads(args, texts, Path(folder))
        runs, complete = _measure(loads, expected)
    if args.out is not None and runs:
        _write(args.out, runs)
    print(json.dumps([each.model_dump(mode="json") for each in runs]) if args.json else table(runs))
    return 0 if complete and all(not each.counts.errors for each in runs) else 1


def _write(path: Path, runs: Sequence[Run]) -> None:
    try:
        write_runs(path, runs)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error


def _expected(args: argparse.Namespace, texts: Texts) -> Expected:
    with open_client(args) as client:
        return Expected(client.labels(), texts.each, ask_reference(client, texts.each))


def _loads(args: argparse.Namespace, texts: Texts, folder: Path) -> Iterator[PerfLoad]:
    concurrencies = args.concurrency or ([] if args.rate else _USUAL_CONCURRENCY)
    for size in args.texts_per_request:
        data = folder / f"{size}.json"
        write_data(data, args.url, args.stage, texts.each, size)
        closed = ((number, None) for number in concurrencies)
        for concurrency, rate in itertools.chain(closed, ((None, rate) for rate in args.rate)):
            yield PerfLoad(
                url=args.url,
                model=args.stage or args.model,
                data=data,
                seconds=args.seconds,
                texts_per_request=size,
                concurrency=concurrency,
                rate=rate,
                poisson=args.spacing == "poisson",
                shared_memory=args.shared_memory,
            )


def _measure(loads: Iterator[PerfLoad], expected: Expected | None) -> tuple[list[Run], bool]:
    """The runs, and whether all were measured."""
    runs, complete = [], True
    for load in loads:
        try:
            runs.append(run_load(load, expected))
        except UsageError:
            raise
        except MillibertError as error:
            print(f"millibert perf: {error}", file=sys.stderr)
            complete = False
            continue
        if said := behind(runs[-1]):
            print(f"millibert perf: {said}", file=sys.stderr)
    return runs, complete


def table(runs: Sequence[Run]) -> str:
    """The figures for people."""
    head = ("texts each", "load", "requests/s", "texts/s", "p50 ms", "p99 ms", "not answered")
    return "\n".join(_line(*cells) for cells in (head, *map(_cells, runs)))


def _cells(run: Run) -> tuple[str, ...]:
    latency, arrival = run.latency_ms, run.arrival
    load = f"{arrival.under_way} under way" if arrival.rate is None else f"{arrival.rate:g}/s, {arrival.spacing}"
    p50, p99 = (f"{latency.p50:.2f}", f"{latency.p99:.2f}") if latency else ("-", "-")
    errors = f"{run.counts.errors} of {run.counts.sent:,}{'' if run.steady else '; not steady'}"
    rates = f"{run.requests_per_second:,.1f}", f"{run.texts_per_second:,.1f}"
    return str(run.texts_per_request), load, *rates, p50, p99, errors


def _line(
    texts: str, load: str, requests_per_second: str, texts_per_second: str, p50: str, p99: str, errors: str
) -> str:
    return f"{texts:>10}  {load:<20} {requests_per_second:>10} {texts_per_second:>9} {p50:>8} {p99:>8}  {errors}"
