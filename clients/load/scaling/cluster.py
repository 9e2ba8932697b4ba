"""Pods that serve requests, second by second: they start, share the load, queue, refuse, and go.

Requests are a fluid. Each replica that callers know gets an equal share of it. Up to the rate that it sustains it
answers all of them, as the measured curve says. Above, what it cannot answer waits, first come first served; it answers
as many as were measured at that rate, what waits delays all that comes after it, and what would wait for longer than
the queue's timeout is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from load.scaling.curve import REFUSED_AT_MOST, Curve
from load.scaling.parameters import Pods
from load.scaling.signals import Seen

# A rate of which less than this share is answered is above what a replica sustains.
_SUSTAINED = 0.97
_NEVER = float("inf")


class Served(NamedTuple):
    """What a replica did with a second's requests."""

    answered: float
    refused: float
    p99_ms: float
    backlog: float
    """Requests that wait because they cannot be answered yet."""
    waited: float
    """Seconds that requests have waited in queues, all together."""
    cpu: float
    """CPU time, as a share of what there is."""


class Replica:
    """One replica's service: the curve, and a queue behind it."""

    def __init__(self, curve: Curve) -> None:
        self.sustained = max(
            point.rate
            for point in curve.points
            if point.median.achieved >= _SUSTAINED * point.rate and point.median.refused <= REFUSED_AT_MOST
        )
        self._capacity = curve.capacity
        self._timeout = curve.queue_timeout_ms / 1000
        self._answered, self._waiting = curve.at("achieved"), curve.at("waiting")
        self._p99, self._cpu = curve.at("p99_ms"), curve.at("cpu")
        # A saturated server takes all the CPU that it can get.
        self._all_cpu = max(point.median.cpu for point in curve.points)

    def serve(self, rate: float, backlog: float) -> Served:
        """A second at that rate, after which `backlog` requests were left over from the seconds before."""
        can = self._capacity if rate <= self._capacity else self._answered(rate)
        answered = min(rate + backlog, can)
        left = rate + backlog - answered
        refused = max(0.0, left - can * self._timeout)
        left -= refused
        within = min(rate, self.sustained)
        return Served(
            answered,
            refused,
            self._p99(within) + 1000 * left / can,
            left,
            self._waiting(within) + left,
            1.0 if left else self._cpu(within) / self._all_cpu,
        )


@dataclass
class Pod:
    """A Pod's times, and its counters."""

    name: int
    zone: int
    started: float
    """When its counters can be scraped."""
    ready: float
    known: float
    """When callers send it requests."""
    unknown: float = _NEVER
    """When callers stop to, because it is going or gone."""
    deleted: float = _NEVER
    lost: float = _NEVER
    """When its node died."""
    ended: float = _NEVER
    backlog: float = 0.0
    waited: float = 0.0
    cpu: float = 0.0

    def is_replica(self, now: float) -> bool:
        """Whether the Deployment counts it."""
        return now < self.deleted

    def is_asked(self, now: float) -> bool:
        """Whether callers send it requests."""
        return self.known <= now < self.unknown

    def is_there(self, now: float) -> bool:
        """Whether it takes room on a node that lives, and costs money."""
        return now < min(self.ended, self.lost)


@dataclass(frozen=True)
class Delays:
    """How long things take that no manifest says, in seconds. Assumed, but for the start of the server."""

    schedule: float = 10.0
    """Scheduling, an image that the node has, mounts and preflight."""
    start: float = 5.0
    """Of the server: measured, with the curve."""
    notice: float = 2.0
    """Until a gateway, or the resolver of a client that asks, knows a change of the ready Pods."""
    failures: float = 10.0
    """Until callers no longer send requests to a node that died."""
    node: float = 50.0
    """Until the control plane knows that: --node-monitor-grace-period, as of Kubernetes 1.32."""


@dataclass
class Second:
    """What happened to all requests of one second."""

    requests: float = 0.0
    answered: float = 0.0
    refused: float = 0.0
    failed: float = 0.0
    """Sent to a node that died, or to nobody."""
    p99_ms: float = 0.0
    """Of the slowest replica."""
    busiest: float = 0.0
    """Requests that each replica got."""


@dataclass
class Cluster:
    """All Pods of the Deployment."""

    replica: Replica
    pods: Pods
    delays: Delays
    zones: int
    all: list[Pod] = field(default_factory=list)
    _made: int = 0
    _dead_zones: set[int] = field(default_factory=set)

    def replicas(self, now: float) -> int:
        """How many the Deployment counts: those on their way, and those on lost nodes until they are evicted."""
        return sum(pod.is_replica(now) for pod in self.all)

    def ready(self, now: float) -> int:
        """How many serve."""
        return sum(pod.ready <= now < min(pod.deleted, pod.lost) for pod in self.all)

    def there(self, now: float) -> int:
        """How many cost money."""
        return sum(pod.is_there(now) for pod in self.all)

    def scale(self, now: float, replicas: int) -> None:
        """Add Pods, or delete some: those that are not ready first, then the youngest."""
        counted = [pod for pod in self.all if pod.is_replica(now)]
        for _ in range(replicas - len(counted)):
            self._add(now)
        by_worth = sorted(counted, key=lambda pod: (pod.ready <= now < pod.lost, -pod.started))
        for pod in by_worth[: max(0, len(counted) - replicas)]:
            self._delete(pod, now)

    def begin(self, now: float, replicas: int) -> None:
        """Have so many that have been there for a while."""
        for _ in range(replicas):
            pod = self._add(now)
            pod.started = pod.ready = pod.known = now

    def lose(self, now: float, zone: int) -> None:
        """All nodes of a zone die, and stay away."""
        self._dead_zones.add(zone)
        for pod in self.all:
            if pod.zone == zone and pod.is_there(now):
                pod.lost = now
                pod.unknown = min(pod.unknown, now + self.delays.failures)
                pod.deleted = min(pod.deleted, now + self.delays.node + self.pods.eviction)
                pod.ended = pod.deleted

    def _add(self, now: float) -> Pod:
        alive = [zone for zone in range(self.zones) if zone not in self._dead_zones]
        here = [sum(pod.zone == zone and pod.is_replica(now) for pod in self.all) for zone in alive]
        zone = alive[here.index(min(here))]
        started = now + self.delays.schedule + self.delays.start
        ready = started + self.pods.probing
        pod = Pod(self._made, zone, started, ready, ready + self._found_out(now))
        self._made += 1
        self.all.append(pod)
        return pod

    def _found_out(self, now: float) -> float:
        """Until callers know of a new Pod: at once through a gateway, else when one of their connections is closed.

        Each has one to every Pod, of all ages, and the first that closes makes it look for all.
        """
        if self.pods.connection_age is None:
            return self.delays.notice
        return self.delays.notice + self.pods.connection_age / max(1, self.ready(now))

    def _delete(self, pod: Pod, now: float) -> None:
        pod.deleted = now
        pod.unknown = min(pod.unknown, now + min(self.delays.notice, self.pods.pre_stop))
        # By then the queue, whose timeout is shorter, is empty: the drain has nothing to wait for.
        pod.ended = now + self.pods.pre_stop

    def step(self, now: float, rate: float) -> Second:
        """One second of so many requests."""
        second = Second(requests=rate)
        self.all = [pod for pod in self.all if now < pod.ended or pod.is_replica(now)]
        asked = [pod for pod in self.all if pod.is_asked(now)]
        share = rate / len(asked) if asked else 0.0
        second.busiest = share
        if not asked:
            second.failed = rate
        serve = _remembered(self.replica)
        for pod in self.all:
            if now >= pod.lost:
                second.failed += share if pod.is_asked(now) else 0.0
            elif now >= pod.started:
                self._serve(pod, serve(share if pod.is_asked(now) else 0.0, pod.backlog), second)
        return second

    def _serve(self, pod: Pod, served: Served, second: Second) -> None:
        pod.backlog = served.backlog
        pod.waited += served.waited
        pod.cpu += served.cpu
        second.answered += served.answered
        second.refused += served.refused
        if served.answered:
            second.p99_ms = max(second.p99_ms, served.p99_ms)

    def seen(self, now: float) -> list[Seen]:
        """What monitoring sees of each Pod that runs."""
        return [
            Seen(pod.name, pod.waited, pod.cpu, pod.ready <= now and pod.is_replica(now))
            for pod in self.all
            if pod.started <= now and pod.is_there(now)
        ]


def _remembered(replica: Replica) -> Callable[[float, float], Served]:
    """Serve; most replicas of a second are in the same state."""
    known: dict[tuple[float, float], Served] = {}

    def serve(rate: float, backlog: float) -> Served:
        key = (rate, backlog)
        if key not in known:
            known[key] = replica.serve(rate, backlog)
        return known[key]

    return serve
