"""What a server is worth, from what the supervisor and the canary see: for probes, and for Prometheus.

A Triton that has lost a model's process, or whose engine hangs, goes on to call itself ready. So readiness here is the
canary's word, a real text that was answered a moment ago, and the supervisor's, who knows of a death at once.

An overloaded server is ready and alive: to be told "busy" is an answer. Taking it out of service would only move its
load to the others.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from enum import StrEnum

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

# How long after the canary's last answer a server counts as ready, and as alive. A full queue may make it wait; what
# hangs for this long helps nobody. (Deaths need no waiting: the supervisor is told by the kernel.)
READY_SECONDS = 20.0
LIVE_SECONDS = 60.0


class Outcome(StrEnum):
    """What became of a canary."""

    ANSWERED = "answered"
    BUSY = "busy"
    FAILED = "failed"
    LATE = "late"


class Phase(StrEnum):
    """What the supervisor is doing."""

    STARTING = "starting"
    SERVING = "serving"
    STOPPING = "stopping"


class Health(Collector):
    """Collects what is known; may be asked and told from any thread. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._phase = Phase.STARTING
        self._last_answer = clock()
        self._last_outcome = Outcome.ANSWERED
        self._canary_seconds = 0.0
        self._outcomes = Counter(dict.fromkeys(Outcome, 0))
        self._deaths: Counter[str] = Counter()

    def watch(self, processes: list[str]) -> None:
        """Name the processes whose deaths are counted, so that each has a series from the start, at 0."""
        with self._lock:
            self._deaths.update(dict.fromkeys(processes, 0))

    def enter(self, phase: Phase) -> None:
        """The supervisor's word. `SERVING` means that a text has just been answered."""
        with self._lock:
            self._phase = phase
            if phase is Phase.SERVING:
                self._last_answer, self._last_outcome = self._clock(), Outcome.ANSWERED

    @property
    def serving(self) -> bool:
        """Whether it is the time for canaries."""
        return self._phase is Phase.SERVING

    def died(self, process: str) -> None:
        """A process ended that should not have: a model's, or tritonserver."""
        with self._lock:
            self._deaths[process] += 1
            self._phase = Phase.STARTING

    def heard(self, outcome: Outcome, seconds: float) -> None:
        """A canary came back, or was given up, after that time."""
        with self._lock:
            self._outcomes[outcome] += 1
            self._last_outcome = outcome
            if outcome in (Outcome.ANSWERED, Outcome.BUSY):
                self._last_answer = self._clock()
            if outcome is Outcome.ANSWERED:
                self._canary_seconds = seconds

    def unready(self) -> str | None:
        """Why no requests should come here; None: they should."""
        with self._lock:
            if self._phase is not Phase.SERVING:
                return self._phase.value
            if self._last_outcome is Outcome.FAILED:
                return "the last text sent through the service failed; the log says why"
            return self._silence(READY_SECONDS)

    def dead(self) -> str | None:
        """Why only a restart would help; None: it would not. Starting and stopping have time limits of their own."""
        with self._lock:
            return self._silence(LIVE_SECONDS) if self._phase is Phase.SERVING else None

    def collect(self) -> Iterator[Metric]:
        """The metrics; see docs/runbooks for what to make of them."""
        ready = float(self.unready() is None)
        yield GaugeMetricFamily("millibert_server_ready", "Whether the readiness probe is told yes.", ready)
        with self._lock:
            deaths, outcomes, seconds = dict(self._deaths), dict(self._outcomes), self._canary_seconds
        died = CounterMetricFamily(
            "millibert_process_deaths",
            "Processes that ended by themselves; each made the server start again in place.",
            labels=["process"],
        )
        for process, count in deaths.items():
            died.add_metric([process], count)
        yield died
        canaries = CounterMetricFamily(
            "millibert_canary", "Texts sent through the service to see whether it answers.", labels=["outcome"]
        )
        for outcome, count in outcomes.items():
            canaries.add_metric([outcome.value], count)
        yield canaries
        yield GaugeMetricFamily("millibert_canary_seconds", "How long the last answered canary took.", seconds)

    def _silence(self, seconds: float) -> str | None:
        silent = self._clock() - self._last_answer
        return f"no text has been answered for {silent:.0f} s" if silent > seconds else None
