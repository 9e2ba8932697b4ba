"""Arguments that `load.capacity` and `load.autoscaling` share."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from millibert._arguments import positive_float


def add_curve(parser: argparse.ArgumentParser) -> None:
    """Add the curve, the objective and the price."""
    parser.add_argument("--curve", type=Path, required=True, metavar="FILE", help="of `load.service_curve --json`")
    parser.add_argument(
        "--p99-ms", type=positive_float, default=50.0, metavar="N", help="the objective (default: %(default)g)"
    )
    parser.add_argument(
        "--cost-per-replica-hour",
        type=not_negative,
        default=0.1,
        metavar="PRICE",
        help="in whatever currency; an assumption (default: %(default)g)",
    )


def not_negative(text: str) -> float:
    """A number of at least 0."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, not {text}")
    return number
