r"""Work out from a measured service curve how many replicas a rate takes, on how many nodes, and what they cost.

examples:
  python -m load.capacity --curve docs/scaling/curve.json --rate 10000 --p99-ms 50 --zones 3 --cost-per-replica-hour 0.1
  python -m load.capacity --curve curve.json --p99-ms 30 --headroom 0.5 --plot curve.svg --json

One replica serves up to the highest rate at which p99 and refusals are within the objective, interpolated between
measured rates and never beyond them. Replicas do not get equal shares, for reasons that last: callers that have old
lists of addresses, connections of different weight, nodes that are slower than others. --imbalance says by how much the
busiest has more than the mean, and the objective must hold for the busiest. (That requests come at random is in
the curve already: each replica of many, chosen at random, gets a Poisson process.) There are enough replicas when

    rate × (1 + headroom)       is served by all, and
    rate                        is served by those that are left when the fullest zone is lost,

whichever takes more. What this leaves out: requests in other sizes and of other lengths than measured, that a
replica on another machine or with more CPUs is another replica (measure it), what callers do when they are refused
(retries add load), and the network, gateways and clients, which are no part of the curve.

exit status: 0 worked out, 1 no measured rate meets the objective, 2 wrong usage
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from load.command import run_command
from load.scaling.arguments import add_curve, not_negative
from load.scaling.curve import REFUSED_AT_MOST, Curve, read_curve
from load.scaling.plots import write_curve
from millibert._arguments import positive_float, positive_int

_RATES = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)


@dataclass(frozen=True)
class Assumptions:
    """What no measurement says."""

    zones: int
    headroom: float
    imbalance: float
    replicas_per_node: int
    cost_per_replica_hour: float


@dataclass(frozen=True)
class Fleet:
    """What a rate takes."""

    rate: float
    serving: int
    """Replicas that serve the rate, and no more."""
    with_headroom: int
    with_zone_lost: int
    replicas: int
    nodes: int
    p99_ms: float
    """Of the busiest replica."""
    p99_zone_lost_ms: float
    cost_per_hour: float
    cost_per_million: float


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_curve(parser)
    parser.add_argument("--rate", type=positive_float, nargs="+", default=_RATES, metavar="N", help="requests/s")
    parser.add_argument("--zones", type=positive_int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--headroom", type=not_negative, default=0.25, metavar="SHARE", help="default: %(default)g")
    parser.add_argument("--imbalance", type=not_negative, default=0.1, metavar="SHARE", help="default: %(default)g")
    parser.add_argument("--replicas-per-node", type=positive_int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve there (.svg)")


def main(argv: list[str] | None = None) -> int:
    """Reckon and print; returns the exit status."""
    return run_command("load.capacity", __doc__, configure, run, table, argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What one replica serves, and a fleet for each rate."""
    curve = read_curve(args.curve)
    assumed = Assumptions(args.zones, args.headroom, args.imbalance, args.replicas_per_node, args.cost_per_replica_hour)
    one = curve.highest_rate(args.p99_ms)
    if args.plot is not None:
        write_curve(args.plot, curve, args.p99_ms, one)
    return {
        "measured": curve.model_dump(exclude={"points"}),
        "objective": {"p99_ms": args.p99_ms, "refused_at_most": REFUSED_AT_MOST},
        "assumed": asdict(assumed),
        "replica": {
            "rate": one,
            "highest_measured": curve.highest,
            "waiting": curve.at("waiting")(one),
            "cpu": curve.at("cpu")(one),
        },
        "fleets": [asdict(plan(curve, one, rate, assumed)) for rate in args.rate],
    }


def plan(curve: Curve, one: float, rate: float, assumed: Assumptions) -> Fleet:
    """The fleet for a rate, of replicas that each serve `one` requests a second within the objective."""
    usable = one / (1 + assumed.imbalance)
    serving = math.ceil(rate / usable)
    with_headroom = math.ceil(rate * (1 + assumed.headroom) / usable)
    with_zone_lost = survivor(serving, assumed.zones)
    replicas = max(with_headroom, with_zone_lost)
    p99 = curve.at("p99_ms")
    busiest = rate * (1 + assumed.imbalance)
    cost = replicas * assumed.cost_per_replica_hour
    return Fleet(
        rate,
        serving,
        with_headroom,
        with_zone_lost,
        replicas,
        nodes(replicas, assumed.zones, assumed.replicas_per_node),
        p99(busiest / replicas),
        p99(busiest / left(replicas, assumed.zones)),
        cost,
        cost / (rate * 3600) * 1e6,
    )


def left(replicas: int, zones: int) -> int:
    """How many are left when the fullest zone is lost; where there is but one zone: when a replica is."""
    return replicas - (math.ceil(replicas / zones) if zones > 1 else 1)


def survivor(serving: int, zones: int) -> int:
    """The fewest replicas of which so many are left."""
    replicas = serving
    while left(replicas, zones) < serving:
        replicas += 1
    return replicas


def nodes(replicas: int, zones: int, per_node: int) -> int:
    """Nodes that hold them, spread evenly over zones."""
    in_each = [replicas // zones + (zone < replicas % zones) for zone in range(zones)]
    return sum(math.ceil(count / per_node) for count in in_each)


def table(found: dict[str, Any]) -> str:
    """Measured, assumed and reckoned, for people."""
    measured, assumed, one = found["measured"], found["assumed"], found["replica"]
    more = "; the highest rate measured" if one["rate"] == one["highest_measured"] else ""
    lines = [
        f"measured: {measured['model']}, {measured['precision']}, {measured['cpus']} CPUs ({measured['cpu']}), "
        f"{measured['date']}; {measured['load']}",
        f"  one replica serves {one['rate']:,.0f} requests/s within a p99 of {found['objective']['p99_ms']:g} ms and "
        f"{found['objective']['refused_at_most']:.1%} refused{more}",
        f"  at that rate {one['waiting']:.1f} requests wait and the server uses {one['cpu']:.2f} CPUs",
        f"assumed: the busiest replica has {assumed['imbalance']:.0%} more than the mean; headroom "
        f"{assumed['headroom']:.0%}, or one of {assumed['zones']} zones lost; replicas on a node: "
        f"{assumed['replicas_per_node']}; a replica costs {assumed['cost_per_replica_hour']:g} an hour",
        f"reckoned:\n{'requests/s':>10} {'serving':>8} {'headroom':>9} {'zone lost':>10} {'replicas':>9} {'nodes':>6} "
        f"{'p99 ms':>7} {'p99 zone lost':>14} {'cost/h':>10} {'cost/million':>13}",
        *map(_row, found["fleets"]),
    ]
    return "\n".join(lines)


def _row(fleet: dict[str, Any]) -> str:
    return (
        f"{fleet['rate']:>10,.0f} {fleet['serving']:>8,} {fleet['with_headroom']:>9,} {fleet['with_zone_lost']:>10,} "
        f"{fleet['replicas']:>9,} {fleet['nodes']:>6,} {fleet['p99_ms']:>7.1f} {fleet['p99_zone_lost_ms']:>14.1f} "
        f"{fleet['cost_per_hour']:>10,.2f} {fleet['cost_per_million']:>13.4f}"
    )


if __name__ == "__main__":
    sys.exit(main())
