"""What the commands that call a server have in common: their arguments, and the client these describe."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from millibert._address import parse_target
from millibert._asking import DEFAULT_TIMEOUT, ClientOptions
from millibert._client import Client
from millibert._connect import connect
from millibert._errors import UsageError
from millibert._security import TLS


def add_service(parser: argparse.ArgumentParser) -> None:
    """Add `--url`, `--model`, `--timeout`, what secures them, and `wrong_usage`: the parser's way to end with 2."""
    parser.add_argument("--model", required=True, help="name of the service's model")
    add_server(parser)


def add_server(parser: argparse.ArgumentParser) -> None:
    """The same without a model."""
    parser.add_argument(
        "--url",
        required=True,
        type=_url,
        help="grpc://host:port or http://host:port of the server, grpcs:// or https:// with TLS",
    )
    parser.add_argument(
        "--timeout",
        type=positive_float,
        default=DEFAULT_TIMEOUT,
        metavar="SECONDS",
        help="longest wait for each answer (default: %(default)g)",
    )
    security = parser.add_argument_group("security")
    security.add_argument("--ca", metavar="FILE", help="authorities to trust, PEM (default: this machine's)")
    security.add_argument("--cert", metavar="FILE", help="this client's certificate, PEM, for mutual TLS")
    security.add_argument("--key", metavar="FILE", help="its key, PEM")
    security.add_argument("--token-file", metavar="FILE", help="holds a bearer token; read again for every attempt")
    security.add_argument(
        "--restricted-key",
        metavar="NAME=FILE",
        type=_name_and_file,
        help="key of Triton's restricted APIs, and the file that holds its value",
    )
    parser.set_defaults(wrong_usage=parser.error)


def open_client(args: argparse.Namespace, model: str | None = None) -> Client:
    """Make the client that the arguments of `add_service` describe; `model` where they have none."""
    options: ClientOptions = {}
    if args.ca or args.cert or args.key:
        options["tls"] = TLS(args.ca, args.cert, args.key)
    if args.token_file:
        options["token"] = partial(_secret, Path(args.token_file))
    if args.restricted_key:
        name, file = args.restricted_key
        options["restricted"] = {name: _secret(file)}
    return connect(args.url, model or args.model, args.timeout, **options)


def _secret(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


def _name_and_file(text: str) -> tuple[str, Path]:
    name, separator, file = text.partition("=")
    if not (name and separator and file):
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, not {text}")
    return name, Path(file)


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
        parse_target(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


positive_int.__name__ = "integer"  # argparse names the function in "invalid … value"
positive_float.__name__ = "number"
