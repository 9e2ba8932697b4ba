"""What happens to a service: how many requests come, and what breaks. Rates are multiples of a base rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from load.scaling.curve import Interpolation

HOUR = 3600.0


@dataclass(frozen=True)
class Scenario:
    """Requests over time, and what breaks when; times in seconds."""

    name: str
    says: str
    seconds: float
    load: Callable[[float], float]
    """Multiple of the base rate at a time."""
    zone_lost: float | None = None
    """When a zone goes, with all Pods in it."""
    metrics_lost: tuple[float, float] | None = None
    """From when until when nothing can be learnt from metrics."""

    def has_metrics(self, now: float) -> bool:
        """Whether the autoscaler learns anything now."""
        return self.metrics_lost is None or not self.metrics_lost[0] <= now < self.metrics_lost[1]


def steps(*changes: tuple[float, float]) -> Callable[[float], float]:
    """Loads that change at once, each from its time on."""

    def load(now: float) -> float:
        return [each for at, each in changes if at <= max(now, changes[0][0])][-1]

    return load


def lines(*corners: tuple[float, float]) -> Callable[[float], float]:
    """A load that moves straight from corner to corner."""
    return Interpolation(*zip(*corners, strict=True))


def day(seed: int = 0) -> Callable[[float], float]:
    """A day of a service with people at the other end: quiet at night, two peaks, noise of minutes, and some bursts."""
    hours = [0, 2, 4, 6, 8, 9.5, 11, 12.5, 14, 16, 18, 20, 21.5, 23, 24]
    usual = [0.45, 0.3, 0.25, 0.35, 0.9, 1.6, 1.9, 1.6, 1.7, 1.7, 1.9, 2.4, 2.2, 0.9, 0.45]
    smooth = Interpolation([hour * HOUR for hour in hours], usual)
    random = np.random.default_rng(seed)
    noise = _noise(random, 24 * 60)
    bursts = [(random.uniform(7, 23) * HOUR, random.uniform(1.3, 1.8)) for _ in range(6)]

    def load(now: float) -> float:
        minute = min(int(max(0.0, now) // 60), len(noise) - 1)
        burst = max([factor for at, factor in bursts if at <= now < at + 180], default=1.0)
        return smooth(now) * noise[minute] * burst

    return load


def _noise(random: np.random.Generator, minutes: int) -> Sequence[float]:
    """A factor for each minute around 1, each like the one before it."""
    deviation, persistence = 0.06, 0.8
    values, value = [], 0.0
    for _ in range(minutes):
        value = persistence * value + math.sqrt(1 - persistence**2) * deviation * random.standard_normal()
        values.append(math.exp(value))
    return values


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("step", "three times as many, for 25 minutes", HOUR, steps((0, 1), (300, 3), (1800, 1))),
        Scenario(
            "ramp",
            "to four times as many within 10 minutes, and back",
            3000.0,
            lines((300, 1), (900, 4), (1500, 4), (2100, 1)),
        ),
        Scenario("spike", "five times as many for a minute", 1800.0, steps((0, 1), (300, 5), (360, 1))),
        Scenario("node-loss", "a zone goes, with a third of all Pods", 1800.0, steps((0, 2)), zone_lost=300.0),
        Scenario(
            "lost-metrics",
            "no metrics for 20 minutes, in which twice as many come",
            3000.0,
            steps((0, 1), (600, 2), (2100, 1)),
            metrics_lost=(300.0, 1500.0),
        ),
        Scenario("day", "24 hours with two peaks, noise and bursts", 24 * HOUR, day()),
    )
}
