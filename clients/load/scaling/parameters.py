"""What decides how a Deployment scales, as its manifests say it: autoscaler, Pods, and how often these are looked at.

Where a manifest leaves something out, Kubernetes' own default counts (HorizontalPodAutoscaler, autoscaling/v2).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Select(StrEnum):
    """Which of several policies counts."""

    MAX = "Max"
    MIN = "Min"
    DISABLED = "Disabled"


@dataclass(frozen=True)
class Policy:
    """How many replicas may come or go within a period."""

    kind: str
    """`Pods`, or `Percent` of those at the period's start."""
    value: float
    period: float
    """Seconds."""


@dataclass(frozen=True)
class Rules:
    """How replicas are added, or removed."""

    window: float
    """Stabilisation: the most cautious of the proposals of so many seconds counts."""
    policies: tuple[Policy, ...]
    select: Select = Select.MAX
    tolerance: float = 0.1
    """Proposals for a smaller change than this share are ignored."""


DEFAULT_UP = Rules(0, (Policy("Pods", 4, 15), Policy("Percent", 100, 15)))
DEFAULT_DOWN = Rules(300, (Policy("Percent", 100, 15),))


class Behaviour(StrEnum):
    """How many replicas KEDA asks for when it has no metrics."""

    STATIC = "static"
    CURRENT = "currentReplicas"
    HIGHER = "currentReplicasIfHigher"
    LOWER = "currentReplicasIfLower"


@dataclass(frozen=True)
class Fallback:
    """What KEDA does after more than so many failures in a row."""

    failures: int
    replicas: int
    behaviour: Behaviour

    def wanted(self, current: int) -> int:
        """How many replicas to ask for."""
        return {
            Behaviour.STATIC: self.replicas,
            Behaviour.CURRENT: current,
            Behaviour.HIGHER: max(current, self.replicas),
            Behaviour.LOWER: min(current, self.replicas),
        }[self.behaviour]


@dataclass(frozen=True)
class QueueSignal:
    """KEDA's Prometheus trigger on the mean number of requests that wait, over all Pods."""

    target: float
    """So many for each replica (AverageValue)."""
    window: float
    """Of rate(), in seconds."""
    cached: float | None
    """Seconds for which KEDA keeps an answer; None: every sync of the HPA asks Prometheus."""
    fallback: Fallback | None


@dataclass(frozen=True)
class CpuSignal:
    """CPU time of the containers, as a share of what they request."""

    target: float


@dataclass(frozen=True)
class Autoscaler:
    """A HorizontalPodAutoscaler, be it KEDA's or one of its own."""

    name: str
    floor: int
    ceiling: int
    signal: QueueSignal | CpuSignal
    up: Rules = DEFAULT_UP
    down: Rules = DEFAULT_DOWN


@dataclass(frozen=True)
class Pods:
    """How Pods come and go."""

    pre_stop: float
    """Seconds for which one serves after its deletion."""
    probing: float
    """Seconds until the probes have noticed that one is ready, at worst."""
    connection_age: float | None
    """Seconds after which a gRPC connection is closed and its client looks for new Pods; None: a gateway does."""
    eviction: float
    """Seconds for which Pods on a node that is lost still count as replicas, after that is noticed."""


@dataclass(frozen=True)
class Parameters:
    """All that a simulation takes from manifests."""

    autoscaler: Autoscaler
    pods: Pods
    scrape: float | None
    """Seconds between two looks of Prometheus; None: no manifest says."""
