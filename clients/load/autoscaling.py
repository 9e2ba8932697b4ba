r"""Simulate the autoscaler of the manifests: how it follows a step, a ramp, a spike, a lost zone, lost metrics, a day.

examples:
  python -m load.autoscaling --curve docs/scaling/curve.json --manifests k8s/overlays/prod-cpu
  python -m load.autoscaling --curve curve.json --manifests rendered.yaml --scenario step --plot step.svg --json
  python -m load.autoscaling --curve curve.json --manifests k8s/overlays/prod-cpu --scenario day --target 2 4 8

Replicas, windows, policies, thresholds, fallback, intervals, preStop and probes are read from the manifests: a folder,
which kubectl renders, or a file of what was rendered. What a replica does with so many requests a second is the curve,
as measured. All else is assumed, and listed in what is printed.

The model, in steps of a second:
- Requests are a fluid, and all replicas that callers know get equal shares. A replica answers what it sustains; more
  waits, and is refused when it would wait for longer than the queue's timeout. p99 is the curve's at that rate, plus
  the wait for what was there before. Requests that wait are the curve's, plus that backlog (Little's law).
- Prometheus scrapes counters of the time that requests have waited; rate() over its window, extrapolated as Prometheus
  does, gives the mean number of those who wait. KEDA asks for it whenever the HPA does, or keeps an answer for its
  polling interval; after some failures it falls back. The metrics server looks at CPU time, every 15 s.
- Every 15 s the HPA wants ceil(all that wait / target) replicas, or ceil(replicas × utilisation / target), unless that
  is within its tolerance. Stabilisation windows and policies then limit it (load/scaling/controller.py has the
  sources).
- A new Pod is scheduled, starts as long as was measured, is found ready by its probes, and then by callers. A deleted
  one serves until callers know, and ends after its preStop. One on a lost node counts as a replica until evicted.

Its limits: no node is ever lacking, nor slow to come; replicas are alike, and get alike; callers neither retry nor
leave; latency within a second is one number, that of the slowest replica; rates beyond the measured ones are served
like the highest measured one (`beyond` counts such seconds). One scenario is one path, not a distribution.

exit status: 0 simulated, 1 the curve or the manifests cannot be used, 2 wrong usage
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from load.command import run_command
from load.scaling.arguments import add_curve
from load.scaling.cluster import Delays
from load.scaling.controller import SYNC_SECONDS
from load.scaling.curve import read_curve
from load.scaling.manifests import read_parameters
from load.scaling.parameters import Parameters
from load.scaling.plots import write_scenario
from load.scaling.scenarios import SCENARIOS, Scenario
from load.scaling.simulation import SCRAPE_SECONDS, Moment, Setting, simulate, summarise
from millibert._arguments import positive_float, positive_int
from millibert._errors import UsageError

_ALL = "all"
# The base rate, in replicas at their highest rate within the objective, unless --rate says.
_USUAL_REPLICAS = 4


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_curve(parser)
    parser.add_argument("--manifests", type=Path, required=True, metavar="PATH", help="a kustomization or a YAML file")
    parser.add_argument("--scenario", choices=(*SCENARIOS, _ALL), default=_ALL, help="default: %(default)s")
    parser.add_argument(
        "--rate",
        type=positive_float,
        metavar="N",
        help=f"base rate in requests/s (default: a round number that {_USUAL_REPLICAS} replicas serve)",
    )
    parser.add_argument("--zones", type=positive_int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--target", type=positive_float, nargs="+", metavar="N", help="try other targets than the manifests' own"
    )
    parser.add_argument("--plot", type=Path, metavar="PATH", help="an .svg file, or a folder for one of each scenario")


def main(argv: list[str] | None = None) -> int:
    """Simulate and print; returns the exit status."""
    return run_command("load.autoscaling", __doc__, configure, run, table, argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Each scenario, with each target."""
    curve, parameters = read_curve(args.curve), read_parameters(args.manifests)
    rate = args.rate or rounded_down(_USUAL_REPLICAS * curve.highest_rate(args.p99_ms))
    delays = Delays(start=curve.start_seconds)
    scenarios = list(SCENARIOS.values()) if args.scenario == _ALL else [SCENARIOS[args.scenario]]
    if args.plot is not None and args.target is not None:
        raise UsageError("--plot draws one target, --target tries several")
    outcomes = []
    for target in args.target or [parameters.autoscaler.signal.target]:
        setting = Setting(
            curve,
            with_target(parameters, target),
            rate,
            args.p99_ms,
            delays,
            args.zones,
            args.cost_per_replica_hour,
        )
        outcomes += [_outcome(setting, scenario, args) for scenario in scenarios]
    return {
        "measured": curve.model_dump(exclude={"points"}),
        "read": dataclasses.asdict(parameters),
        "assumed": {
            "rate": rate,
            "zones": args.zones,
            "cost_per_replica_hour": args.cost_per_replica_hour,
            "sync_seconds": SYNC_SECONDS,
            **({"scrape_seconds": SCRAPE_SECONDS} if parameters.scrape is None else {}),
            **{f"{name}_seconds": value for name, value in dataclasses.asdict(delays).items() if name != "start"},
        },
        "objective": {"p99_ms": args.p99_ms},
        "outcomes": outcomes,
    }


def rounded_down(rate: float) -> float:
    """To two digits: a load that replicas just serve, to the last digit, would be decided by rounding."""
    unit = 10.0 ** (math.floor(math.log10(rate)) - 1)
    return math.floor(rate / unit) * unit


def with_target(parameters: Parameters, target: float) -> Parameters:
    """The same with another target of the autoscaler's metric."""
    scaler = parameters.autoscaler
    signal = dataclasses.replace(scaler.signal, target=target)
    return dataclasses.replace(parameters, autoscaler=dataclasses.replace(scaler, signal=signal))


def _outcome(setting: Setting, scenario: Scenario, args: argparse.Namespace) -> dict[str, Any]:
    moments = list(simulate(setting, scenario))
    if args.plot is not None:
        file = args.plot if args.plot.suffix == ".svg" else args.plot / f"{scenario.name}.svg"
        write_scenario(file, setting, scenario, moments)
    return {
        "target": setting.parameters.autoscaler.signal.target,
        **summarise(setting, scenario, moments).as_json(),
        # With one scenario, its course too.
        **({"course": _course(moments)} if args.scenario != _ALL and args.json else {}),
    }


def _course(moments: Sequence[Moment]) -> list[dict[str, float]]:
    return [
        {
            "at": moment.at,
            "rate": moment.rate,
            "replicas": moment.replicas,
            "ready": moment.ready,
            "ideal": moment.ideal,
            "p99_ms": moment.second.p99_ms,
            "refused": moment.second.refused,
            "failed": moment.second.failed,
        }
        for moment in moments[:: int(SYNC_SECONDS)]
    ]


def table(found: dict[str, Any]) -> str:
    """What was measured, read and assumed, and what came of it, for people."""
    measured, scaler = found["measured"], found["read"]["autoscaler"]
    assumed = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in found["assumed"].items())
    lines = [
        f"measured: {measured['model']}, {measured['precision']}, {measured['cpus']} CPUs ({measured['cpu']}), "
        f"{measured['date']}; a start takes {measured['start_seconds']:.1f} s",
        f"read: {scaler['name']}, {scaler['floor']} to {scaler['ceiling']} replicas, target "
        f"{scaler['signal']['target']:g}",
        f"assumed: {assumed}",
        f"objective: p99 within {found['objective']['p99_ms']:g} ms; out: seconds outside it, in all and at a stretch, "
        "and the requests of these",
        "simulated:",
        f"{'scenario':>12} {'target':>6} {'out s':>6} {'longest':>8} {'requests out':>12} {'refused':>8} {'failed':>7} "
        f"{'worst p99':>10} {'peak':>5} {'mean':>6} {'ideal':>6} {'over':>6} {'cost':>8} {'beyond':>7}",
        *map(_row, found["outcomes"]),
    ]
    return "\n".join(lines)


def _row(it: dict[str, Any]) -> str:
    return (
        f"{it['scenario']:>12} {it['target']:>6g} {it['seconds_out']:>6,} {it['longest_out']:>8,} "
        f"{it['requests_out']:>12.2%} {it['refused'] / it['requests']:>8.2%} {it['failed'] / it['requests']:>7.2%} "
        f"{it['worst_p99_ms']:>10,.0f} {it['peak_replicas']:>5} {it['mean_replicas']:>6.1f} {it['mean_ideal']:>6.1f} "
        f"{it['over_provision']:>6.0%} {it['cost']:>8.2f} {it['beyond_measured']:>7}"
    )


if __name__ == "__main__":
    sys.exit(main())
