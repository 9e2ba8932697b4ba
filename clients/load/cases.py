"""What a benchmark measures: every case on servers that are all up, in turns, each after the engine alone."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from load.ceiling import Pace
from load.generator import Load
from load.generator import measure as measure_ourselves
from load.transports import triton_requests
from millibert import _perf_analyzer as perf_analyzer
from millibert._perf_analyzer import Measurement, Refused
from millibert_ensemble.server import TritonServer


class Case(NamedTuple):
    """One line of the table."""

    form: str  # of the release: as it is, padded, …
    mix: str
    transport: str
    texts: int  # of a request
    concurrency: int


class Run(NamedTuple):
    """A case measured once; without figures where it was refused or never became steady."""

    engine: Pace  # the engine alone on the same texts, just before
    served: Measurement | None


class Bench(NamedTuple):
    """The servers by form, the texts and the engine alone by mix, and how to measure."""

    servers: Mapping[str, TritonServer]
    texts: Mapping[str, Sequence[str]]
    engine: Mapping[str, Callable[[], Pace]]
    by_perf_analyzer: bool
    seconds: float
    rounds: int


def run_cases(bench: Bench, cases: Iterable[Case]) -> dict[Case, list[Run]]:
    """All cases in turns, so that a slow minute does not hit one of them only."""
    wanted = list(dict.fromkeys(cases))
    found: dict[Case, list[Run]] = {case: [] for case in wanted}
    with tempfile.TemporaryDirectory() as folder:
        files = {mix: Path(folder, f"{mix}.json") for mix in bench.texts}
        for mix, texts in bench.texts.items():
            perf_analyzer.write_texts(files[mix], texts)
        for case in tqdm(wanted * bench.rounds, desc="cases", disable=None, leave=False):
            engine = bench.engine[case.mix]()
            try:
                one = _by_perf_analyzer(bench, case, files[case.mix]) if bench.by_perf_analyzer else _by_us(bench, case)
            except Refused:
                one = None  # more than the server does within its queue timeout
            found[case].append(Run(engine, one))
    return found


def _by_perf_analyzer(bench: Bench, case: Case, texts: Path) -> Measurement | None:
    window = round(1000 * bench.seconds / 3)  # it wants three steady windows
    url, model = _target(bench, case)
    return perf_analyzer.measure(url, model, texts, case.texts, case.concurrency, window)


def _by_us(bench: Bench, case: Case) -> Measurement:
    requests = triton_requests(*_target(bench, case), bench.texts[case.mix], case.texts)
    return measure_ourselves(Load(requests, bench.seconds, case.concurrency), case.texts)


def _target(bench: Bench, case: Case) -> tuple[str, str]:
    server = bench.servers[case.form]
    return server.grpc_url if case.transport == "grpc" else server.http_url, server.services[0]


def as_json(case: Case, runs: Sequence[Run]) -> dict[str, Any]:
    """The case and its medians; without figures where no run had any."""
    pairs = [(run.engine, run.served) for run in runs if run.served is not None]
    document: dict[str, Any] = {**case._asdict(), "runs": len(pairs)}
    if not pairs:
        return document
    document |= {
        "texts_per_second": statistics.median(served.texts_per_second for _, served in pairs),
        "of_engine": statistics.median(served.texts_per_second / engine.texts_per_second for engine, served in pairs),
        "p50_ms": statistics.median(served.p50_ms for _, served in pairs),
        "p99_ms": statistics.median(served.p99_ms for _, served in pairs),
    }
    if case.texts == case.concurrency == 1:
        document["above_engine_ms"] = statistics.median(served.p50_ms - engine.batch_1_ms for engine, served in pairs)
    return document
