"""Where a server listens: an address of this machine and three ports on it."""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import NamedTuple

from millibert._errors import UsageError

LOCALHOST = "127.0.0.1"
EVERYWHERE = "0.0.0.0"  # noqa: S104 - for users who ask for it


class Ports(NamedTuple):
    """The three ports that Triton listens on; 0 means any free one."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


ANY_PORTS = Ports(0, 0, 0)


def reserve(host: str, ports: Ports) -> tuple[str, Ports]:
    """Return the host's IPv4 address and three different ports on it, free a moment ago.

    Raises UsageError, with the option to change, when a port is taken or the address is not ours.
    """
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise UsageError(f"--host {host} is not an address of this machine: {error}") from error
    with contextlib.ExitStack() as held:
        numbers = [_bound(held, address, *wanted) for wanted in ports._asdict().items()]
    return address, Ports(*numbers)


def _bound(held: contextlib.ExitStack, address: str, use: str, port: int) -> int:
    listener = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    # As Triton does: connections of an earlier server that linger must not count as taken.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            advice = f"choose another with --{use}-port N, or 0 for any free one"
            raise UsageError(f"port {port} ({use}) on {address} is taken; {advice}") from error
        raise UsageError(f"cannot listen on {address}:{port} ({use}): {error.strerror}") from error
    return int(listener.getsockname()[1])
