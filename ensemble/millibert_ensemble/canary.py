"""Sends a text through a served repository every few seconds and tells its health what became of it."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from types import TracebackType

from millibert_ensemble import readiness
from millibert_ensemble.health import READY_SECONDS, Health, Outcome

PERIOD_SECONDS = 2.0
_BUSY = http.client.SERVICE_UNAVAILABLE


class Canary:
    """A thread that asks `send` for an outcome, again and again while the server is serving, from `with` to its end."""

    def __init__(self, health: Health, send: Callable[[], Outcome], period: float = PERIOD_SECONDS) -> None:
        self._health = health
        self._send = send
        self._period = period
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="canary", daemon=True)

    def __enter__(self) -> Canary:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not joined: it may be waiting for a server that hangs, and what it hears then concerns nobody.
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(self._period):
            if not self._health.serving:
                continue
            start = time.monotonic()
            outcome = self._send()
            # What was sent before a death or a stop says nothing about what comes after.
            if self._health.serving and not self._over.is_set():
                self._health.heard(outcome, time.monotonic() - start)


def through(host: str, port: int, services: list[str]) -> Callable[[], Outcome]:
    """Return what sends a text through each of the services by HTTP; the worst outcome is the answer."""

    def send() -> Outcome:
        outcomes = [_outcome(host, port, service) for service in services]
        worst_first = (Outcome.FAILED, Outcome.LATE, Outcome.BUSY, Outcome.ANSWERED)
        return min(outcomes, key=worst_first.index)

    return send


def _outcome(host: str, port: int, service: str) -> Outcome:
    try:
        status, _ = readiness.ask_service(host, port, service, READY_SECONDS)
    except TimeoutError:
        return Outcome.LATE
    except (OSError, http.client.HTTPException):
        return Outcome.FAILED
    if status == http.client.OK:
        return Outcome.ANSWERED
    return Outcome.BUSY if status == _BUSY else Outcome.FAILED
