"""What the commands that call a server have in common: their arguments, and requests of the right size."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from millibert._client import DEFAULT_TIMEOUT, Client, parse_address
from millibert._connect import connect
from millibert._errors import InvalidRequest, UsageError

T = TypeVar("T")


def add_service(parser: argparse.ArgumentParser) -> None:
    """Add `--url`, `--model`, `--timeout`, and `wrong_usage`: the parser's way to end with status 2."""
    parser.add_argument("--url", required=True, type=_url, help="grpc://host:port or http://host:port of the server")
    parser.add_argument("--model", required=True, help="name of the service's model")
    parser.add_argument(
        "--timeout",
        type=positive_float,
        default=DEFAULT_TIMEOUT,
        metavar="SECONDS",
        help="longest wait for each answer (default: %(default)g)",
    )
    parser.set_defaults(wrong_usage=parser.error)


def open_client(args: argparse.Namespace) -> Client:
    """Make the client that the arguments of `add_service` describe."""
    return connect(args.url, args.model, args.timeout)


def batch_limit(client: Client) -> int:
    """Ask how many texts a request may hold; 1, with a note, where the server hides its configuration."""
    try:
        return client.max_batch_size()
    except InvalidRequest as error:
        print(f"note: sending one text a request: {error}", file=sys.stderr)
        return 1


def batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """Cut into lists of `size`, the last one shorter."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def positive_int(text: str) -> int:
    """Read an integer of at least 1; for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, not {text}")
    return number


def positive_float(text: str) -> float:
    """Read a number above 0; for argparse."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, not {text}")
    return number


def _url(text: str) -> str:
    try:
        parse_address(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


positive_int.__name__ = "integer"  # argparse names the function in "invalid … value"
positive_float.__name__ = "number"
