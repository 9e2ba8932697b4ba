"""An autoscaler, its metrics and its Pods through a scenario, second by second."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from load.scaling.cluster import Cluster, Delays, Replica, Second
from load.scaling.controller import SYNC_SECONDS, Controller
from load.scaling.curve import REFUSED_AT_MOST, Curve
from load.scaling.parameters import Parameters
from load.scaling.scenarios import Scenario
from load.scaling.signals import signal_of

# Before a scenario begins, for the autoscaler to find its place; not counted.
SETTLING_SECONDS = 1800
# Where no manifest says how often Prometheus looks.
SCRAPE_SECONDS = 15.0
# Scrapes and syncs do not know of each other.
_SYNC_AT = 7


@dataclass(frozen=True)
class Setting:
    """What stays the same in all scenarios."""

    curve: Curve
    parameters: Parameters
    rate: float
    """The base rate, in requests a second."""
    p99_ms: float
    """The objective: a second is within it when its p99 is, and hardly a request is refused or fails."""
    delays: Delays
    zones: int = 3
    cost_per_replica_hour: float = 0.0


class Moment(NamedTuple):
    """A second of a scenario."""

    at: int
    rate: float
    second: Second
    replicas: int
    """As the Deployment counts them."""
    ready: int
    there: int
    """That cost money."""
    ideal: int
    """That would have been right, for one who knows what comes and needs no time."""
    within: bool
    """Within the objective."""


def simulate(setting: Setting, scenario: Scenario) -> Iterator[Moment]:
    """Yield every second of a scenario."""
    scaler = setting.parameters.autoscaler
    cluster = Cluster(Replica(setting.curve), setting.parameters.pods, setting.delays, setting.zones)
    signal = signal_of(scaler, setting.parameters.scrape or SCRAPE_SECONDS)
    controller = Controller(scaler)
    best = setting.curve.highest_rate(setting.p99_ms)

    def ideal(rate: float) -> int:
        return min(max(scaler.floor, math.ceil(rate / best)), scaler.ceiling)

    cluster.begin(-SETTLING_SECONDS, ideal(setting.rate * scenario.load(0)))
    for now in range(-SETTLING_SECONDS, int(scenario.seconds)):
        rate = setting.rate * scenario.load(now)
        if now == scenario.zone_lost:
            cluster.lose(now, zone=0)
        second = cluster.step(now, rate)
        signal.observe(now, cluster.seen(now))
        if now % SYNC_SECONDS == _SYNC_AT:
            replicas = cluster.replicas(now)
            wanted = signal.wanted(now, replicas, lost=not scenario.has_metrics(now))
            cluster.scale(now, controller.sync(now, replicas, wanted))
        if now >= 0:
            yield Moment(
                now,
                rate,
                second,
                cluster.replicas(now),
                cluster.ready(now),
                cluster.there(now),
                ideal(rate),
                is_within(second, setting.p99_ms),
            )


def is_within(second: Second, p99_ms: float) -> bool:
    """Whether a second's requests met the objective."""
    return second.p99_ms <= p99_ms and second.refused + second.failed <= REFUSED_AT_MOST * second.requests


@dataclass(frozen=True)
class Outcome:
    """What became of a scenario."""

    scenario: str
    seconds: int
    requests: float
    refused: float
    failed: float
    seconds_out: int
    """Outside the objective."""
    longest_out: int
    """The longest stretch of those."""
    requests_out: float
    """Share of all requests that came in such a second."""
    worst_p99_ms: float
    peak_replicas: int
    mean_replicas: float
    mean_ideal: float
    over_provision: float
    """By how much more replicas there were than would have been right, on average."""
    cost: float
    beyond_measured: int
    """Seconds in which a replica got more than the highest rate that was measured."""

    def as_json(self) -> dict[str, Any]:
        """A document of its fields."""
        return asdict(self)


def summarise(setting: Setting, scenario: Scenario, moments: Sequence[Moment]) -> Outcome:
    """The figures of a scenario."""
    count = len(moments)
    out = [not moment.within for moment in moments]
    requests = sum(moment.second.requests for moment in moments)
    there, ideal = (sum(getattr(moment, name) for moment in moments) for name in ("there", "ideal"))
    return Outcome(
        scenario.name,
        count,
        requests,
        sum(moment.second.refused for moment in moments),
        sum(moment.second.failed for moment in moments),
        sum(out),
        _longest(out),
        sum(moment.second.requests for moment in moments if not moment.within) / requests,
        max(moment.second.p99_ms for moment in moments),
        max(moment.there for moment in moments),
        there / count,
        ideal / count,
        there / ideal - 1,
        there / 3600 * setting.cost_per_replica_hour,
        sum(moment.second.busiest > setting.curve.highest for moment in moments),
    )


def _longest(flags: Sequence[bool]) -> int:
    longest = current = 0
    for flag in flags:
        current = current + 1 if flag else 0
        longest = max(longest, current)
    return longest
