"""What an autoscaler is told, and how late: Prometheus and KEDA, or the metrics server.

`rate()` is the one of Prometheus (https://prometheus.io/docs/prometheus/latest/querying/functions/#rate): the increase
between the first and the last sample of a window, extrapolated to the window's ends where samples lie near them. A Pod
that is gone counts for as long as two of its samples are in the window, and a new one from its second sample on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from load.scaling.controller import wanted_for_cpu, wanted_for_total
from load.scaling.parameters import Autoscaler, CpuSignal, QueueSignal

METRICS_SERVER_SECONDS = 15.0
"""The metrics server's --metric-resolution, unless that is set."""
# An end of the window is near when it is no farther than this many intervals between samples.
_NEAR = 1.1


class Seen(NamedTuple):
    """What a Pod shows at one moment: its counters, and whether it is ready."""

    pod: int
    waited: float
    """Seconds that its requests have waited, so far."""
    cpu: float
    """CPU time that it has used, in seconds of all that it requests."""
    ready: bool


class Samples:
    """Counters as Prometheus keeps them: a sample of each at every scrape."""

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self._series: dict[int, deque[tuple[float, float]]] = {}

    def scrape(self, now: float, values: Mapping[int, float]) -> None:
        """Take a sample of each counter, and forget what no window needs."""
        for name, value in values.items():
            self._series.setdefault(name, deque()).append((now, value))
        for name, series in list(self._series.items()):
            while series and series[0][0] < now - self._keep:
                series.popleft()
            if not series:
                del self._series[name]

    def rate(self, now: float, window: float) -> float | None:
        """`sum(rate(counter[window]))`; None where no series has two samples in it."""
        rates = [_rate(now, window, [it for it in series if it[0] > now - window]) for series in self._series.values()]
        known = [rate for rate in rates if rate is not None]
        return sum(known) if known else None


def _rate(now: float, window: float, samples: Sequence[tuple[float, float]]) -> float | None:
    if len(samples) < 2:
        return None
    (first_at, first), (last_at, last) = samples[0], samples[-1]
    covered, increase = last_at - first_at, last - first
    interval = covered / (len(samples) - 1)
    before, after = first_at - (now - window), now - last_at
    if increase > 0:
        # A counter is not extrapolated to before it was zero.
        before = min(before, covered * first / increase)
    ends = [gap if gap < _NEAR * interval else interval / 2 for gap in (before, after)]
    return increase * (covered + sum(ends)) / covered / window


@dataclass
class KedaSignal:
    """KEDA's answer to the HPA: what waits for all replicas together, from Prometheus, or a fallback."""

    scaler: Autoscaler
    signal: QueueSignal
    scrape_seconds: float
    _samples: Samples = field(init=False)
    _next_scrape: float = field(init=False, default=float("-inf"))
    _cached: tuple[float, float | None] = field(init=False, default=(float("-inf"), None))
    _failures: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._samples = Samples(self.signal.window)

    def observe(self, now: float, pods: Sequence[Seen]) -> None:
        """Prometheus' part, every second."""
        if now >= self._next_scrape:
            self._samples.scrape(now, {pod.pod: pod.waited for pod in pods})
            self._next_scrape = now + self.scrape_seconds

    def wanted(self, now: float, replicas: int, lost: bool) -> int | None:
        """How many replicas the HPA wants; None where it learns nothing. `lost`: Prometheus cannot be asked."""
        total = self._total(now, replicas, lost)
        return None if total is None else wanted_for_total(total, self.signal.target, replicas, self.scaler)

    def _total(self, now: float, replicas: int, lost: bool) -> float | None:
        total = self._asked(now, lost)
        if total is not None:
            self._failures = 0
            return total
        self._failures += 1
        fallback = self.signal.fallback
        if fallback is None or self._failures <= fallback.failures:
            return None
        return fallback.wanted(replicas) * self.signal.target

    def _asked(self, now: float, lost: bool) -> float | None:
        if self.signal.cached is not None and now < self._cached[0] + self.signal.cached:
            return self._cached[1]
        answer = None if lost else self._samples.rate(now, self.signal.window)
        self._cached = (now, answer)
        return answer


@dataclass
class MetricsServerSignal:
    """The metrics server's answer to the HPA: the CPU time of each Pod between its last two looks."""

    scaler: Autoscaler
    signal: CpuSignal
    _next: float = field(init=False, default=float("-inf"))
    _at: float = field(init=False, default=0.0)
    _counted: dict[int, float] = field(init=False, default_factory=dict)
    _used: dict[int, float] = field(init=False, default_factory=dict)
    _ready: dict[int, bool] = field(init=False, default_factory=dict)

    def observe(self, now: float, pods: Sequence[Seen]) -> None:
        """The metrics server's part, every second."""
        self._ready = {pod.pod: pod.ready for pod in pods}
        if now < self._next:
            return
        before, span = self._counted, now - self._at
        self._used = {pod.pod: (pod.cpu - before[pod.pod]) / span for pod in pods if pod.pod in before}
        self._counted = {pod.pod: pod.cpu for pod in pods}
        self._at, self._next = now, now + METRICS_SERVER_SECONDS

    def wanted(self, now: float, replicas: int, lost: bool) -> int | None:
        """How many replicas the HPA wants; None where it learns nothing. `lost`: there is no metrics server."""
        ready = [self._used[pod] for pod, is_ready in self._ready.items() if is_ready and pod in self._used]
        if lost or not ready:
            return None
        return wanted_for_cpu(ready, replicas - len(ready), self.signal.target, replicas, self.scaler)


def signal_of(scaler: Autoscaler, scrape_seconds: float) -> KedaSignal | MetricsServerSignal:
    """What tells this autoscaler."""
    if isinstance(scaler.signal, QueueSignal):
        return KedaSignal(scaler, scaler.signal, scrape_seconds)
    return MetricsServerSignal(scaler, scaler.signal)
