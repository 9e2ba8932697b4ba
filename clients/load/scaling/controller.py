"""How a HorizontalPodAutoscaler decides, one sync after another, as Kubernetes documents it.

https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/ (algorithm details, configurable
scaling behaviour); what that leaves open is as in the controller's source, pkg/controller/podautoscaler.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from load.scaling.parameters import Autoscaler, Rules, Select

SYNC_SECONDS = 15.0
"""The controller manager's --horizontal-pod-autoscaler-sync-period, unless that is set."""


def wanted_for_total(total: float, target: float, replicas: int, scaler: Autoscaler) -> int:
    """Replicas for an external metric with a target of type AverageValue.

    All replicas count, ready or not: the total is what it is.
    """
    if _is_close(total / (target * replicas), scaler):
        return replicas
    return math.ceil(total / target - _ROUNDING)


def wanted_for_cpu(
    utilisations: Sequence[float], unready: int, target: float, replicas: int, scaler: Autoscaler
) -> int:
    """Replicas for a target of CPU utilisation, from that of each ready Pod (1: all that it requests).

    Pods that are not ready are left out, unless more are wanted: then they count as idle, so that what is on its way
    is not asked for again. A change of direction that follows from this alone is none.
    """
    if not utilisations:
        return replicas
    used, ready = sum(utilisations), len(utilisations)
    ratio = used / ready / target
    if ratio <= 1 or not unready:
        return replicas if _is_close(ratio, scaler) else math.ceil(ratio * ready - _ROUNDING)
    considered = ready + unready
    ratio = used / considered / target
    if ratio < 1 or _is_close(ratio, scaler):
        return replicas
    return max(replicas, math.ceil(ratio * considered - _ROUNDING))


# Sums of fractions may be above a whole number by less than anything that was measured.
_ROUNDING = 1e-9


def _is_close(ratio: float, scaler: Autoscaler) -> bool:
    tolerance = (scaler.up if ratio > 1 else scaler.down).tolerance
    return abs(1 - ratio) <= tolerance + _ROUNDING


@dataclass
class Controller:
    """The controller's memory: what it proposed, and what it did."""

    scaler: Autoscaler
    _proposals: list[tuple[float, int]] = field(default_factory=list)
    _changes: list[tuple[float, int]] = field(default_factory=list)

    def sync(self, now: float, replicas: int, wanted: int | None) -> int:
        """How many replicas there are to be; `wanted` is None where the metric could not be had."""
        if replicas > self.scaler.ceiling or replicas < self.scaler.floor:
            decided = min(max(replicas, self.scaler.floor), self.scaler.ceiling)
        elif wanted is None:
            return replicas
        else:
            decided = self._limited(now, replicas, self._stabilised(now, replicas, wanted))
        if decided != replicas:
            self._changes.append((now, decided - replicas))
        return decided

    def _stabilised(self, now: float, replicas: int, wanted: int) -> int:
        """Up to the lowest proposal of one window, down to the highest of the other; else as it is."""
        up, down = self.scaler.up.window, self.scaler.down.window
        self._proposals = [(at, proposal) for at, proposal in self._proposals if at > now - max(up, down)]
        lowest = min([wanted, *(proposal for at, proposal in self._proposals if at > now - up)])
        highest = max([wanted, *(proposal for at, proposal in self._proposals if at > now - down)])
        self._proposals.append((now, wanted))
        return min(max(replicas, lowest), highest)

    def _limited(self, now: float, replicas: int, wanted: int) -> int:
        """As far as the policies allow within their periods, and floor and ceiling."""
        if wanted > replicas:
            most = max(replicas, self._limit(now, replicas, self.scaler.up, 1))
            return min(wanted, most, self.scaler.ceiling)
        if wanted < replicas:
            least = min(replicas, self._limit(now, replicas, self.scaler.down, -1))
            return max(wanted, least, self.scaler.floor)
        return replicas

    def _limit(self, now: float, replicas: int, rules: Rules, sign: int) -> int:
        """The farthest that the policies let it go; each counts from how many there were when its period began."""
        if rules.select is Select.DISABLED:
            return replicas
        limits = []
        for policy in rules.policies:
            start = replicas - sum(change for at, change in self._changes if at > now - policy.period)
            if policy.kind == "Pods":
                limits.append(start + sign * int(policy.value))
            else:
                # Rounded so that a change is possible: up when replicas are added, down when they are removed.
                share = start * (1 + sign * policy.value / 100)
                limits.append(math.ceil(share - _ROUNDING) if sign > 0 else math.floor(share + _ROUNDING))
        farthest = max if (rules.select is Select.MAX) == (sign > 0) else min
        return farthest(limits)
