"""The plan behind Triton: the same answers through the whole service, and how fast they come."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from millibert import _perf_analyzer as perf_analyzer
from millibert import connect
from millibert_build.tensorrt.verification import Bench, Line, Skipped
from millibert_ensemble.server import TritonServer

# What rounding may change between a batch of the whole file and the batches that Triton happens to make.
MIN_SERVED_AGREEMENT = 0.999
_BATCHES = (1, 8, 32)
_CONCURRENCIES = (1, 8, 64)


@contextmanager
def served(bench: Bench) -> Iterator[TritonServer]:
    """A server on the plan; raises `Skipped` where none can run here."""
    verdict = bench.verdict
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
    if not perf_analyzer.is_here():
        raise Skipped("perf_analyzer is not on PATH (it is in NVIDIA's Triton SDK image)")
    found: list[perf_analyzer.Measurement] = []
    unstable: list[str] = []
    with served(bench) as server, tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "texts.json")
        perf_analyzer.write_texts(data, [row.text for row in bench.rows])
        for texts in (texts for texts in _BATCHES if texts <= bench.target.max_texts):
            for concurrency in _CONCURRENCIES:
                one = perf_analyzer.measure(server.grpc_url, server.services[0], data, texts, concurrency)
                if one is None:
                    unstable.append(f"{texts} a request at concurrency {concurrency}")
                else:
                    found.append(one)
    if not found:
        raise Skipped(f"perf_analyzer found no steady figures: {', '.join(unstable)}")
    first, best = found[0], max(found, key=lambda one: one.texts_per_second)
    detail = (
        f"{first.p50_ms:.2f} ms median ({first.texts} a request, concurrency {first.concurrency}); at most "
        f"{best.texts_per_second:,.0f} texts/s ({best.texts} a request, concurrency {best.concurrency}, p99 "
        f"{best.p99_ms:.1f} ms)"
    )
    if unstable:
        detail += f"; not steady: {', '.join(unstable)}"
    return Line("INFO", "load", detail, {"results": [one._asdict() for one in found], "unstable": unstable})
