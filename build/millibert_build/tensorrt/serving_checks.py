"""The plan behind Triton: the same answers through the whole service, and how fast they come."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from millibert import connect
from millibert._errors import MillibertError
from millibert_build.tensorrt.verification import Bench, Line, Skipped
from millibert_ensemble import contract
from millibert_ensemble.server import TritonServer

# What rounding may change between a batch of the whole file and the batches that Triton happens to make.
MIN_SERVED_AGREEMENT = 0.999
_BATCHES = (1, 8, 32)
_CONCURRENCIES = (1, 8, 64)
_WINDOW_MS = 5000
# Three windows in a row must be this close; on a shared machine they seldom are within the default of 10.
_STABILITY_PERCENT = 20
_UNSTABLE = "Failed to obtain stable measurement"
_TIMEOUT_SECONDS = 600
# perf_analyzer's columns; latencies in microseconds.
_RATE, _MEDIAN, _TAIL = "Inferences/Second", "p50 latency", "p99 latency"


@contextmanager
def served(bench: Bench) -> Iterator[TritonServer]:
    """A server on the plan; raises `Skipped` where none can run here."""
    verdict = bench.verdict()
    if verdict.engine != "tensorrt":
        raise Skipped(f"no plan that runs here: {'; '.join(verdict.reasons)}")
    with TritonServer(bench.repository, options=verdict.options) as server:
        yield server


def check_service(bench: Bench) -> Line:
    """Every text through tokenizer, plan and postprocessor, by gRPC."""
    expected = [bench.labels[index] for index in bench.logits.argmax(axis=1)]
    size = bench.target.max_texts
    with served(bench) as server, connect(server.grpc_url, server.services[0]) as client:
        texts = [row.text for row in bench.rows]
        chunks = [texts[start : start + size] for start in range(0, len(texts), size)]
        answers = [answer for chunk in chunks for answer in client.classify(chunk, top_k=1)]
    same = sum(answer.label == label for answer, label in zip(answers, expected, strict=True)) / len(expected)
    detail = f"same best label as in process for {same:.2%} of {len(expected)} texts"
    return Line("PASS" if same >= MIN_SERVED_AGREEMENT else "FAIL", "service", detail, {"agreement": same})


def check_load(bench: Bench) -> Line:
    """Requests per second and latency by perf_analyzer, over texts per request and requests under way."""
    if shutil.which("perf_analyzer") is None:
        raise Skipped("perf_analyzer is not on PATH (it is in NVIDIA's Triton SDK image)")
    rows: list[dict[str, Any]] = []
    unstable: list[str] = []
    with served(bench) as server, tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "texts.json")
        data.write_text(json.dumps({"data": [{contract.TEXT.name: [row.text]} for row in bench.rows]}))
        for texts in (texts for texts in _BATCHES if texts <= bench.target.max_texts):
            for concurrency in _CONCURRENCIES:
                row = _measure(server, data, texts, concurrency)
                if row is None:
                    unstable.append(f"{texts} a request at concurrency {concurrency}")
                else:
                    rows.append(row)
    if not rows:
        raise Skipped(f"perf_analyzer found no stable measurement: {', '.join(unstable)}")
    best = max(rows, key=lambda row: row["texts_per_second"])
    first = rows[0]
    detail = (
        f"{first['p50_ms']:.2f} ms median ({first['texts']} a request, concurrency {first['concurrency']}); at most "
        f"{best['texts_per_second']:,.0f} texts/s ({best['texts']} a request, concurrency {best['concurrency']}, p99 "
        f"{best['p99_ms']:.1f} ms)"
    )
    if unstable:
        detail += f"; not stable: {', '.join(unstable)}"
    return Line("INFO", "load", detail, {"results": rows, "unstable": unstable})


def _measure(server: TritonServer, data: Path, texts: int, concurrency: int) -> dict[str, Any] | None:
    """One run of perf_analyzer; None where it found no stable measurement."""
    table = data.with_name(f"{texts}x{concurrency}.csv")
    command = ["perf_analyzer", "-m", server.services[0], "-i", "grpc", "-u", server.grpc_url.removeprefix("grpc://")]
    command += ["-b", str(texts), "--input-data", str(data), "--concurrency-range", str(concurrency)]
    command += ["--measurement-interval", str(_WINDOW_MS), "-s", str(_STABILITY_PERCENT), "-f", str(table)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_SECONDS)
    if _UNSTABLE in done.stderr + done.stdout:
        return None
    if done.returncode != 0:
        raise MillibertError(f"perf_analyzer failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return read_table(table, texts, concurrency)


def read_table(table: Path, texts: int, concurrency: int) -> dict[str, Any]:
    """The one row of perf_analyzer's CSV."""
    with table.open(encoding="utf-8", newline="") as file:
        row = next(csv.DictReader(file))
    return {
        "texts": texts,
        "concurrency": concurrency,
        "texts_per_second": float(row[_RATE]),
        "p50_ms": float(row[_MEDIAN]) / 1000,
        "p99_ms": float(row[_TAIL]) / 1000,
    }
