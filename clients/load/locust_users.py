"""Locust's users of a served classifier, on our own clients, and the open loop that Locust itself does not have.

Each request is one attempt, and each answer is compared with what the server said of the same text before the load.
What is not answered is counted by what became of it: refused, timed out, wrong or failed, each a line of its own in
Locust's table of failures.

Locust's users wait for an answer before they send again, also with `constant_throughput`: the slower the server, the
less it is asked, and the requests that should have been sent meanwhile are in no percentile ("coordinated omission").
In the open loop here a schedule says when each request is due, whatever the server does, and a latency counts from that
moment. The users only stand for shares of the schedule, which is divided among Locust's workers by their users.

One client per process and model is shared by all users, as in an application: over gRPC one connection, over HTTP as
many as there are requests at once. All requests of a process are sent by one thread; `--processes` adds more.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import gevent  # type: ignore[import-untyped]
from gevent.pool import Group  # type: ignore[import-untyped]
from locust import User, task
from locust.env import Environment
from locust.exception import StopUser

from load.locust_run import RequestsFile
from load.locust_shapes import Schedule
from load.results import Outcome
from load.texts import Right, Texts, ask_reference
from millibert import connect
from millibert._address import parse_target
from millibert._errors import Busy, ServiceError, Timeout, UsageError
from millibert._retry import Retry

# How often a user of an open loop looks whether it should stop.
_LOOK_SECONDS = 0.1
_OUTCOMES = {Busy: Outcome.REFUSED, Timeout: Outcome.TIMED_OUT}
_log = logging.getLogger(__name__)
_gevent_lock = threading.Lock()
_grpc_is_ready = False


@dataclass(frozen=True)
class Plan:
    """What is sent, where to, and when."""

    url: str
    models: tuple[tuple[str, float], ...]  # and their weights
    texts: Texts
    per_request: int
    timeout: float
    wait: float  # of a user of a closed loop, after each answer
    schedule: Schedule | None  # of an open loop

    @property
    def protocol(self) -> str:
        """`grpc` or `http`."""
        return parse_target(self.url).addresses[0].protocol


class _Request(NamedTuple):
    texts: list[str]
    right: Right


class Target:
    """A server's models: a client for each, and requests whose right answers are known."""

    def __init__(self, plan: Plan) -> None:
        if plan.protocol == "grpc":
            _let_grpc_wait_for_gevent()
        self.plan = plan
        self._names, self._weights = zip(*plan.models, strict=True)
        self._clients = {name: connect(plan.url, name, plan.timeout, retry=Retry(attempts=1)) for name in self._names}
        try:
            self._requests = {name: itertools.cycle(self._laid_out(name)) for name in self._names}
        except BaseException:
            self.close()
            raise
        self._random = random.Random()  # noqa: S311 - which model is asked next is no secret

    def _laid_out(self, name: str) -> list[_Request]:
        each, size, client = self.plan.texts.each, self.plan.per_request, self._clients[name]
        if size > (most := client.max_batch_size()):
            raise UsageError(f"{name} takes at most {most} texts a request, not {size}")
        if size > len(each):
            raise UsageError(f"there are {len(each)} texts, and one request is to hold {size}")
        _log.info("%s: asking once what the right answers are", name)
        right = ask_reference(client, each)
        starts = range(0, len(each) - size + 1, size)
        return [_Request(list(each[at : at + size]), right[at : at + size]) for at in starts]

    def ask(self) -> tuple[str, Outcome, str]:
        """Send one request; returns the model's name, what became of the request, and why where it is not answered."""
        (name,) = self._random.choices(self._names, self._weights)
        request = next(self._requests[name])
        try:
            answers = self._clients[name].classify(request.texts, 1)
        except ServiceError as error:
            outcome = _OUTCOMES.get(type(error), Outcome.FAILED)
            return name, outcome, f"{outcome}: {error.reason}"
        for answer, right in zip(answers, request.right, strict=True):
            if answer.label not in right:
                return name, Outcome.WRONG, f"{Outcome.WRONG}: not {' or '.join(sorted(right))}"
        return name, Outcome.ANSWERED, ""

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            client.close()


class Bench:
    """One test in one of Locust's processes."""

    def __init__(self, environment: Environment, target: Target, file: RequestsFile | None) -> None:
        self.plan = target.plan
        self.stopping = False
        self._protocol = "gRPC" if target.plan.protocol == "grpc" else "HTTP"
        self._told: Any = environment.events.request
        self._target = target
        self._file = file
        self.open_loop = OpenLoop(target.plan.schedule, self.send) if target.plan.schedule else None

    def send(self, due: float | None = None) -> None:
        """Send one request that was due then, by `time.perf_counter`; or is now."""
        due = time.perf_counter() if due is None else due
        name, outcome, reason = self._target.ask()
        latency = time.perf_counter() - due
        self._told.fire(
            request_type=self._protocol,
            name=name,
            response_time=1000 * latency,
            response_length=0,
            exception=reason or None,
            context={},
        )
        if self._file is not None:
            self._file.add(due, latency, outcome, reason)

    def end(self) -> None:
        """Write what is left to be written."""
        if self._file is not None:
            self._file.close()


class OpenLoop:
    """Sends this process's share of the requests when they are due, whether earlier ones were answered or not."""

    def __init__(self, schedule: Schedule, send: Callable[[float], None]) -> None:
        self._schedule = schedule
        self._send = send
        self._began: float | None = None
        self._until = self._next = math.inf
        self._dispatcher: Any = None
        self._under_way = Group()

    def share(self, first: int, own: int, total: int) -> None:
        """Begin with this share of the schedule, or go on with another one; see `Schedule.share`."""
        self._stop()
        if not own:
            return
        now = time.perf_counter()
        self._began = now if self._began is None else self._began
        self._dispatcher = gevent.spawn(self._dispatch, self._began, now - self._began, first, own, total)

    def finish(self) -> None:
        """Send what is due by now, nothing more, and wait for all answers, which have their own deadlines."""
        if self._began is not None:
            self._until = min(self._until, time.perf_counter() - self._began)
        if self._next > self._until:
            self._stop()
        elif self._dispatcher is not None:
            self._dispatcher.join()
        self._under_way.join()

    def _stop(self) -> None:
        if self._dispatcher is not None:
            self._dispatcher.kill()
            self._dispatcher = None

    def _dispatch(self, began: float, after: float, first: int, own: int, total: int) -> None:
        for due in self._schedule.share(first, own, total):
            self._next = due
            if due > self._until:
                return
            if due < after:
                continue
            # Also where it is late already: else the requests, which share this thread, would not get on.
            gevent.sleep(max(0.0, began + due - time.perf_counter()))
            self._under_way.spawn(self._send, began + due)


class State:
    """Of this process: Locust makes the users, and hands them nothing of ours."""

    def __init__(self) -> None:
        self.bench: Bench | None = None
        self.began: float | None = None
        self._target: Target | None = None
        self._lock = threading.Lock()

    @property
    def running(self) -> Bench:
        """The test that the users belong to."""
        assert self.bench is not None, "users stop at once where there is no test"
        return self.bench

    @property
    def elapsed(self) -> float:
        """Seconds since the load began; 0 before."""
        return 0.0 if self.began is None else time.perf_counter() - self.began

    def begin(self) -> None:
        """The load begins now, unless it has begun already."""
        self.began = time.perf_counter() if self.began is None else self.began

    def aim(self, plan: Plan) -> Target:
        """The target of a plan; the last one is kept."""
        # One at a time: a worker may be told to start while it still prepares.
        with self._lock:
            if self._target is None or self._target.plan != plan:
                self.close()
                self._target = Target(plan)
            return self._target

    def close(self) -> None:
        """Close the target's connections."""
        target, self._target = self._target, None
        if target is not None:
            target.close()


STATE = State()


class TextUser(User):
    """In a closed loop, sends one request after another; in an open one, stands for a share of the schedule."""

    abstract = True
    protocol: ClassVar[str]

    def on_start(self) -> None:
        """Locust starts users even where the test could not be prepared."""
        if STATE.bench is None:
            raise StopUser

    def wait_time(self) -> float:
        """After an answer, in seconds."""
        bench = STATE.running
        return bench.plan.wait

    @task
    def request(self) -> None:
        """Send one, or look whether the open loop should end."""
        bench = STATE.running
        if bench.open_loop is None:
            bench.send()
        else:
            gevent.sleep(_LOOK_SECONDS)

    def on_stop(self) -> None:
        """Requests of the open loop have no user to wait for them; it ends with the test, not with one of its users."""
        bench = STATE.bench
        if bench is not None and bench.stopping and bench.open_loop is not None:
            bench.open_loop.finish()


class GrpcTextUser(TextUser):
    """Over gRPC."""

    protocol = "grpc"


class HttpTextUser(TextUser):
    """Over HTTP."""

    protocol = "http"


def _let_grpc_wait_for_gevent() -> None:
    """Else a call would block every other user. After Locust's fork, which threads of gRPC would not survive."""
    global _grpc_is_ready
    with _gevent_lock:
        if not _grpc_is_ready:
            from grpc.experimental.gevent import init_gevent

            init_gevent()
            _grpc_is_ready = True
