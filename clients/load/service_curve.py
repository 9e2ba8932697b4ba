r"""Measure a service curve: what one server answers, how fast, and how many wait, at rates up to beyond saturation.

examples:
  python -m load.service_curve --repository banking77_repository --data test.csv --label-column category \
                               --json > curve.json
  python -m load.service_curve --repository repo --data test.csv --rates 200 400 800 1200 --server-cpus 4

Single texts over gRPC in an open loop: requests come at random, like those of many independent callers (a Poisson
process), and a latency counts from the moment that its request was due. Unless --rates names them, the rates are
shares of what a closed loop reaches first. Every rate is run --rounds times, in turn with all others; the table shows
medians. What waits is what an autoscaler sees: the growth of nv_inference_queue_duration_us over all models, by
Little's law (J. D. C. Little, Operations Research 9, 1961) the mean number of requests in their queues.

With --server-cpus the server has that many CPUs to itself and the load takes others, as in a cluster. Without, they
share all CPUs, so that the server has less of them the more is sent. What others use is measured too: --others-at-most
waits until it is no more than so many CPUs before each run, and repeats a run in which it was more; of ten attempts the
least disturbed counts. `python -m load.capacity` and `load.autoscaling` reckon with the result.

exit status: 0 measured, 1 a request failed other than by being refused, 2 wrong usage
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import json
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psutil

from load.command import run_command
from load.generator import Answers, Load, Phase, measure, send
from load.machine import describe_machine
from load.released import add_release, serve, served_by
from load.scaling.curve import Curve, Figures, Point
from load.transports import ANSWERED, BUSY, triton_requests
from millibert._arguments import positive_float, positive_int
from millibert._errors import MillibertError, UsageError
from millibert._labelled_texts import read_labelled_texts
from millibert_ensemble import contract
from millibert_ensemble.cpu_time import cpu_seconds
from millibert_ensemble.engine_choice import add_engine
from millibert_ensemble.server import TritonServer

_CONCURRENCY = 64
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.3, 1.6, 2.0)
# Share of each run that is not counted, at its start.
_WARM_UP = 0.2
# Runs of one rate, where others disturb them; and how long to wait for them to be done before each.
_ATTEMPTS = 10
_PATIENCE_SECONDS = 120.0
_SAMPLE = re.compile(r'^(\w+)\{model="([^"]+)",version="\d+"\} (\S+)$', re.MULTILINE)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_release(parser)
    add_engine(parser)
    parser.add_argument("--rates", type=positive_float, nargs="+", metavar="N", help="requests/s, instead of shares")
    parser.add_argument("--seconds", type=positive_float, default=6.0, metavar="N", help="of each run")
    parser.add_argument("--rounds", type=positive_int, default=3, metavar="N", help="runs of each rate")
    parser.add_argument(
        "--queue-timeout-ms", type=positive_float, default=1000.0, metavar="N", help="default: %(default)g"
    )
    parser.add_argument("--others-at-most", type=positive_float, metavar="CPUS", help="else wait, and repeat")
    parser.add_argument("--server-cpus", type=positive_int, metavar="N", help="for the server alone (default: shared)")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    return run_command("load.service_curve", __doc__, configure, run, table, argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """A server, and every rate in turn, as often as asked for."""
    texts = [row.text for row in read_labelled_texts(args.data, args.text_column, args.label_column)]
    for_server, for_load = divide_cpus(sorted(os.sched_getaffinity(0)), args.server_cpus)
    with running_on(for_server):
        machine = describe_machine()
        start = time.monotonic()
        with serve(args) as server:
            start_seconds = time.monotonic() - start
            with running_on(for_load):
                bench = _Bench(server, texts, args.queue_timeout_ms, args.seconds, args.others_at_most)
                bench.warm_up()
                rates = sorted(set(args.rates or bench.ladder()))
                rounds = [[bench.run(rate, seed) for rate in rates] for seed in range(args.rounds)]
    release = json.loads((args.repository / "release.json").read_text(encoding="utf-8"))
    shared = "the server's CPUs" if args.server_cpus is None else f"{len(for_load)} other CPUs"
    curve = Curve(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        model=server.services[0],
        release=release["created"],
        precision=release["tensorrt" if served_by(server) == "tensorrt" else "engine"]["precision"],
        **machine,
        load=f"own client, open loop, Poisson, gRPC, single texts, on {shared}",
        seconds=args.seconds,
        queue_timeout_ms=args.queue_timeout_ms,
        start_seconds=start_seconds,
        points=[Point(rate=rate, runs=runs) for rate, runs in zip(rates, zip(*rounds, strict=True), strict=True)],
    )
    return curve.model_dump()


def divide_cpus(cpus: Sequence[int], for_server: int | None) -> tuple[set[int], set[int]]:
    """Which CPUs the server and the load may use: all of them both, or the first ones and the others."""
    if for_server is None:
        return set(cpus), set(cpus)
    if for_server >= len(cpus):
        raise UsageError(f"--server-cpus {for_server}: of {len(cpus)} CPUs, one at least must be left for the load")
    return set(cpus[:for_server]), set(cpus[for_server:])


@contextmanager
def running_on(cpus: set[int]) -> Iterator[None]:
    """What is started inside may use these CPUs only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class _Counted(NamedTuple):
    """What the server has counted so far."""

    queue_seconds: float  # that requests of all models have waited
    texts: float  # of the model with the engine in it
    executions: float
    cpu_seconds: float
    other_seconds: float  # of CPU time, that neither the server nor this command and its load have used


class _Bench:
    """A running server, and how one rate is measured on it."""

    def __init__(
        self,
        server: TritonServer,
        texts: Sequence[str],
        queue_timeout_ms: float,
        seconds: float,
        others_at_most: float | None,
    ) -> None:
        self._server, self._seconds, self._others_at_most = server, seconds, others_at_most
        url, service = server.grpc_url, server.services[0]
        self._requests = triton_requests(url, service, texts, queue_timeout_ms=queue_timeout_ms)
        # In a fused release the service is the engine's model.
        self._engine = contract.BERT if (server.repository / contract.BERT).is_dir() else service

    def warm_up(self) -> None:
        """What a server does for the first time is not what a curve shows."""
        send(Load(self._requests, seconds=_WARM_UP * self._seconds, concurrency=_CONCURRENCY))

    def ladder(self) -> list[float]:
        """Rates from a tenth of what a closed loop reaches to twice of it."""
        closed = Load(self._requests, seconds=self._seconds, concurrency=_CONCURRENCY)
        capacity = statistics.median(measure(closed, 1).texts_per_second for _ in range(3))
        return [float(f"{share * capacity:.3g}") for share in _SHARES]

    def run(self, rate: float, seed: int) -> Figures:
        """One run at one rate, or the least disturbed of several."""
        if self._others_at_most is None:
            return self._run(rate, seed)
        attempts: list[Figures] = []
        while len(attempts) < _ATTEMPTS and not (attempts and attempts[-1].others <= self._others_at_most):
            wait_for_quiet(self._others_at_most)
            attempts.append(self._run(rate, seed))
        return min(attempts, key=lambda found: found.others)

    def _run(self, rate: float, seed: int) -> Figures:
        before = self._count()
        answers = send(Load(self._requests, phases=[Phase(rate, self._seconds, poisson=True)], seed=seed))
        after = self._count()
        counted = _Counted(*(late - early for late, early in zip(after, before, strict=True)))
        return figures(answers, self._seconds, counted)

    def _count(self) -> _Counted:
        metrics = read_metrics(self._server.metrics_url)
        of_server = sum(cpu_seconds(self._server.pid).values())
        return _Counted(
            sum(metrics["nv_inference_queue_duration_us"].values()) / 1e6,
            metrics["nv_inference_count"][self._engine],
            metrics["nv_inference_exec_count"][self._engine],
            of_server,
            busy_seconds() - of_server - _own_seconds(),
        )


def figures(answers: Answers, seconds: float, counted: _Counted) -> Figures:
    """What a run of so many seconds found. Raises `MillibertError` where a request failed, or none was answered."""
    failed = sorted(set(answers.status) - {ANSWERED, *BUSY})
    if failed:
        raise MillibertError(f"requests failed: {', '.join(failed)}")
    steady = answers.between(_WARM_UP * seconds, seconds)
    if not steady.answered.any():
        raise MillibertError(f"no request was answered in {seconds:g} s")
    # Counters have no warm-up to leave out, but a run begins and ends with nobody waiting: over all of its time, the
    # time that all requests have waited, divided by its length, is exactly the mean number of those who wait.
    lasted = float((answers.due + answers.latency).max())
    ends = (answers.due + answers.latency)[answers.answered]
    return Figures(
        achieved=float(((ends >= _WARM_UP * seconds) & (ends < seconds)).sum()) / ((1 - _WARM_UP) * seconds),
        refused=1 - float(steady.answered.mean()),
        p50_ms=steady.percentile(50),
        p90_ms=steady.percentile(90),
        p99_ms=steady.percentile(99),
        waiting=counted.queue_seconds / lasted,
        batch=counted.texts / counted.executions,
        cpu=counted.cpu_seconds / lasted,
        others=max(0.0, counted.other_seconds) / lasted,
    )


def busy_seconds() -> float:
    """CPU time that all processes of this machine have used, and what was taken from it by its host."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _own_seconds() -> float:
    """CPU time of this process and of those of its children that have ended, as the load has after each run."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(it.ru_utime + it.ru_stime for it in used)


def wait_for_quiet(others_at_most: float, patience: float = _PATIENCE_SECONDS) -> None:
    """Return when all processes together have used no more than that for a second, or when patience is at its end."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        before = busy_seconds()
        time.sleep(1.0)
        if busy_seconds() - before <= others_at_most:
            return


def read_metrics(url: str) -> dict[str, dict[str, float]]:
    """Triton's counters for each model, by their names; raises `MillibertError` where there are none."""
    split = urlsplit(url)
    connection = http.client.HTTPConnection(split.netloc, timeout=10)
    try:
        connection.request("GET", split.path)
        body = connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise MillibertError(f"{url}: {error!r}") from error
    finally:
        connection.close()
    found: dict[str, dict[str, float]] = {}
    for name, model, value in _SAMPLE.findall(body):
        found.setdefault(name, {})[model] = float(value)
    return found


def table(found: dict[str, Any]) -> str:
    """The medians for people, with how far apart the runs lie."""
    curve = Curve.model_validate(found)
    runs = len(curve.points[0].runs)
    lines = [
        f"{curve.model} of {curve.release}, {curve.precision}, {curve.cpus} CPUs ({curve.cpu}), {curve.date}",
        f"{curve.load}; a request may wait {curve.queue_timeout_ms:g} ms",
        f"ready {curve.start_seconds:.1f} s after its start",
        f"medians of {runs} runs of {curve.seconds:g} s, and by how much the p99 of these differ",
        f"{'requests/s':>10} {'answered/s':>10} {'refused':>8} {'p50 ms':>8} {'p90 ms':>8} {'p99 ms':>8} {'differ':>7} "
        f"{'waiting':>8} {'batch':>6} {'CPUs':>5} {'others':>6}",
        *map(_row, curve.points),
    ]
    return "\n".join(lines)


def _row(point: Point) -> str:
    it = point.median
    return (
        f"{point.rate:>10,.0f} {it.achieved:>10,.0f} {it.refused:>8.2%} {it.p50_ms:>8.2f} {it.p90_ms:>8.2f} "
        f"{it.p99_ms:>8.2f} {point.spread('p99_ms'):>7.0%} {it.waiting:>8.2f} {it.batch:>6.1f} {it.cpu:>5.2f} "
        f"{it.others:>6.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
