"""The servers behind a target: taken in turn, put aside while they fail, taken back when they answer again."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from millibert._address import Address, Target

# Of putting a failing server aside: the first time, and the longest.
_FIRST_SECONDS, _LONGEST_SECONDS = 0.5, 10.0
# A server that cannot be connected to is put aside at once; one that hangs up or does not answer may have had a
# reason of its own, and only after so many in a row.
_PATIENCE = 3
# How long the addresses of a name are believed, and how long at least when one of them has failed.
_RESOLVE_SECONDS, _RESOLVE_AGAIN_SECONDS = 10.0, 1.0


@dataclass(eq=False)
class Endpoint:
    """One server: where to connect, and how it has been doing."""

    address: Address
    name: str
    """The host of the url: what the server's certificate and the Host header must say."""
    failures: int = 0
    """In a row."""
    aside_until: float = 0.0
    """Of `time.monotonic`."""

    def __str__(self) -> str:
        return str(self.address)


class Endpoints:
    """All servers of a target. Safe to share between threads."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._turn = random.randrange(1 << 16)  # noqa: S311 - many clients must not all begin with the same server
        self._resolve_at = 0.0 if target.resolved else float("inf")
        self._resolved_at = float("-inf")
        self._all = [] if target.resolved else [Endpoint(each, each.host) for each in target.addresses]

    def to_resolve(self) -> tuple[Address, ...]:
        """The addresses whose names are to be looked up now, by this caller alone."""
        now = time.monotonic()
        if now < self._resolve_at:
            return ()
        with self._lock:
            if now < self._resolve_at and self._all:
                return ()
            self._resolve_at = now + _RESOLVE_SECONDS
            self._resolved_at = now
            return self._target.addresses

    def resolved(self, found: Sequence[tuple[Address, str]]) -> None:
        """What the look-up found: an address each, and its name. What was known keeps its history."""
        with self._lock:
            known = {(each.address, each.name): each for each in self._all}
            self._all = [known.get(pair) or Endpoint(*pair) for pair in dict.fromkeys(found)]

    def known(self) -> tuple[Endpoint, ...]:
        """Every endpoint there is now."""
        return tuple(self._all)

    def choose(self, tried: Collection[Endpoint] = ()) -> Endpoint | None:
        """The next in turn that is neither aside nor `tried`, or else the best of the others; None: there is none."""
        now = time.monotonic()
        with self._lock:
            if not tried:
                self._turn += 1  # not for a repeat, or every call might begin with the same server
            count = len(self._all)
            in_turn = [self._all[(self._turn + offset) % count] for offset in range(count)]
            for endpoint in in_turn:
                if endpoint not in tried and endpoint.aside_until <= now:
                    if endpoint.failures:
                        # This call is the trial. The others wait for what it finds.
                        endpoint.aside_until = now + _aside(endpoint.failures)
                    return endpoint
            untried = [each for each in in_turn if each not in tried]
            return min(untried or in_turn, key=lambda each: each.aside_until, default=None)

    def answered(self, endpoint: Endpoint) -> None:
        """It works."""
        if endpoint.failures:
            with self._lock:
                endpoint.failures, endpoint.aside_until = 0, 0.0

    def failed(self, endpoint: Endpoint, *, connected: bool) -> None:
        """It does not: no connection, or no answer though there was one."""
        now = time.monotonic()
        with self._lock:
            endpoint.failures += 1
            if not connected or endpoint.failures >= _PATIENCE:
                endpoint.aside_until = now + _aside(endpoint.failures)
            if self._target.resolved:
                self._resolve_at = min(self._resolve_at, self._resolved_at + _RESOLVE_AGAIN_SECONDS)


def _aside(failures: int) -> float:
    """Seconds, doubling with each failure, with jitter so that clients do not come back all at once."""
    seconds = min(_LONGEST_SECONDS, _FIRST_SECONDS * 2.0 ** min(failures - 1, 10))
    return seconds * random.uniform(0.75, 1.25)  # noqa: S311
