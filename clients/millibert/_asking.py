"""One call of a client: its deadline, where it goes, how often it is tried, and what its failure means.

A call is a generator of effects: things to be done that wait, which it yields and whose outcome it is sent. It never
waits itself. What drives it, `Client` or `AsyncClient`, does nothing else than to carry out effects. So all this exists
a single time for threads and asyncio, gRPC and HTTP.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import secrets
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypedDict, TypeVar, Unpack

from millibert._address import Address, Target, parse_target
from millibert._codec import (
    CodecError,
)
from millibert._endpoints import Endpoint, Endpoints
from millibert._errors import (
    Busy,
    InvalidRequest,
    ServerFault,
    ServiceError,
    Timeout,
    Unavailable,
    UsageError,
)
from millibert._protocol import AttemptFailed, Exchange, Protocol, is_loopback
from millibert._retry import Budget, Retry
from millibert._security import TLS, Credentials, Headers, HeaderSource, TokenSource
from millibert._shared_memory import Regions
from millibert._types import ANSWERED, CANCELLED, Call

T = TypeVar("T")

DEFAULT_TIMEOUT = 10.0
"""Seconds a call may take where nobody says otherwise."""
LONGEST_TIMEOUT = 86_400.0
"""Seconds; beyond a day a timeout is a mistake, and gRPC overflows far beyond it."""
# An attempt after a pause with less time than this would end by its deadline, and hide why those before it failed.
_WORTH_A_PAUSE_SECONDS = 0.02
_log = logging.getLogger("millibert")


class Send(NamedTuple):
    """Take a message to an endpoint; the outcome is what came back, or `AttemptFailed`."""

    endpoint: Endpoint
    message: Any
    seconds: float


class Resolve(NamedTuple):
    """Look a name up; the outcome is its addresses, or `OSError`."""

    host: str
    port: int
    seconds: float


class Pause(NamedTuple):
    """Wait."""

    seconds: float


Effect: TypeAlias = Send | Resolve | Pause
Steps: TypeAlias = Generator[Effect, Any, T]
Texts: TypeAlias = str | list[str] | tuple[str, ...]


class ClientOptions(TypedDict, total=False):
    """What a client may be told besides where to go."""

    tls: TLS | None
    """Files for `grpcs://` and `https://`; without them this machine's authorities are trusted."""
    token: TokenSource | None
    """Sent as `Authorization: Bearer …`. A function is called for every attempt."""
    headers: HeaderSource | None
    """More headers (gRPC: metadata). A function is called for every attempt."""
    restricted: Headers | None
    """The keys of Triton's restricted APIs and their values, named as in the server's options."""
    retry: Retry | None
    on_call: Callable[[Call], None] | None
    """Is told of every finished call, in the thread of the call."""
    shared_memory: bool
    """Texts of large requests go to a server on this machine through /dev/shm."""


class _Progress:
    """What there is to tell of a call, however it ends."""

    def __init__(self) -> None:
        self.attempts = 0
        self.endpoint = ""


class Question(NamedTuple):
    """A call under way."""

    seconds: float
    start: float
    request_id: str
    progress: _Progress

    def left(self) -> float:
        """Seconds until its deadline."""
        return self.start + self.seconds - time.monotonic()


class Asking:
    """What all clients are: a model, where it is served, and how it is asked.

    `url` is `grpc://host:port`, `http://…`, with TLS `grpcs://…` or `https://…`; several hosts after commas, or
    `dns:///name:port` (`http+dns://…`, …) for all addresses of a name, share the load. `timeout` is the seconds that a
    call may take from its start to the complete answer, all attempts together. Nothing is sent before the first call.
    The rest is described at `ClientOptions`.
    """

    protocol: ClassVar[Protocol]

    def __init__(
        self,
        url: str | Sequence[str],
        model: str,
        timeout: float = DEFAULT_TIMEOUT,
        **options: Unpack[ClientOptions],
    ) -> None:
        if unknown := options.keys() - ClientOptions.__annotations__:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}")
        target = parse_target(url)
        if target.addresses[0].protocol != self.protocol.name:
            raise UsageError(f"{type(self).__name__} needs a url with {self.protocol.name}://, not {str(target)!r}")
        if not isinstance(model, str) or not model or not model.isprintable():
            raise UsageError(f"the model must be named, not {model!r}")
        if not _is_timeout(timeout):
            raise UsageError(f"timeout must be a positive number of seconds up to a day, not {timeout!r}")
        _check_options(target, options)
        self.target = target
        self.model = model
        self.timeout = float(timeout)
        self._retry = options.get("retry") or Retry()
        self._credentials = Credentials(options.get("token"), options.get("headers"), options.get("restricted"))
        self._tls = (options.get("tls") or TLS()) if target.addresses[0].secure else None
        if self._tls is not None:
            self._tls.check()
        self._on_call = options.get("on_call")
        self._shared_memory = options.get("shared_memory", False)
        self._batch_limit: int | None = None
        self._begin()
        _alive.add(self)

    def _begin(self) -> None:
        """Begin as new: at first, and in a forked child, where what threads were doing has no end."""
        self._endpoints = Endpoints(self.target)
        self._budget = Budget(self._retry)
        self._regions: dict[Endpoint, Regions] = {}
        self._request_numbers = itertools.count()
        self._request_prefix = secrets.token_hex(4)
        self._closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.model!r} at {self.target}{' (closed)' * self._closed}>"

    # Attempts.

    def _ask(
        self, question: Question, exchange: Exchange[T], *, patient: bool = True, only: Endpoint | None = None
    ) -> Steps[T]:
        """Attempts until one is answered, the deadline is near, or there is no point in another.

        `patient`: also pauses and asks servers again; else each is asked once. `only`: this one and no other.
        """
        tried: list[Endpoint] = []
        while True:
            endpoint = only or (yield from self._endpoint(question, tried))
            left = question.left()
            if left <= 0:
                raise self._error(Timeout, _too_late(question), question)
            question.progress.attempts += 1
            question.progress.endpoint = str(endpoint)
            try:
                answer = exchange.parse((yield Send(endpoint, exchange.message(left), left)))
            except CodecError as error:
                self._endpoints.answered(endpoint)
                raise self._error(ServerFault, f"the answer breaks the contract: {error}", question) from error
            except AttemptFailed as failure:
                self._note(endpoint, failure)
                tried.append(endpoint)
                pause = self._before_another(question, failure, tried, patient and only is None)
                if pause is None:
                    raise self._error(failure.kind, _reason(failure, question), question) from failure.__cause__
                if pause > 0:
                    yield Pause(pause)
            else:
                self._endpoints.answered(endpoint)
                self._budget.answered()
                return answer

    def _note(self, endpoint: Endpoint, failure: AttemptFailed) -> None:
        if failure.kind in (Unavailable, Timeout):
            self._endpoints.failed(endpoint, connected=failure.connected)
        else:
            self._endpoints.answered(endpoint)

    def _before_another(
        self, question: Question, failure: AttemptFailed, tried: list[Endpoint], patient: bool
    ) -> float | None:
        """Seconds to wait before another attempt; None where there should be none."""
        untried = [each for each in self._endpoints.known() if each not in tried]
        if failure.kind is Busy:
            # To ask a busy server again is what it needs least, and one that is down is no better.
            pause = 0.0 if any(each.aside_until <= time.monotonic() for each in untried) else None
        elif failure.kind is Unavailable:
            pause = 0.0 if untried else self._retry.pause(len(tried)) if patient else None
        else:
            pause = None
        if pause is None or (patient and len(tried) >= self._retry.attempts):
            return None
        if (pause + _WORTH_A_PAUSE_SECONDS if pause else 0.0) >= question.left():
            return None
        return pause if self._budget.take() else None

    def _endpoint(self, question: Question, tried: Sequence[Endpoint]) -> Steps[Endpoint]:
        if names := self._endpoints.to_resolve():
            found: list[tuple[Address, str]] = []
            for name in names:
                with suppress(OSError):
                    hosts = yield Resolve(name.host, name.port, max(0.0, question.left()))
                    found += [(name._replace(host=host), name.host) for host in hosts]
            if found:
                self._endpoints.resolved(found)
        endpoint = self._endpoints.choose(tried)
        if endpoint is None and question.left() <= 0:
            raise self._error(Timeout, _too_late(question), question)
        if endpoint is None:
            raise self._error(Unavailable, "cannot reach the server: the host name is not known", question)
        return endpoint

    # Around a call.

    @contextmanager
    def _asking(
        self, method: str, timeout: float | None, request_id: str | None = None, texts: int = 0
    ) -> Iterator[Question]:
        start = time.monotonic()
        seconds = self.timeout if timeout is None else timeout
        number = request_id or f"{self._request_prefix}-{next(self._request_numbers):x}"
        question = Question(seconds, start, number, _Progress())
        outcome, failed = CANCELLED, None
        try:
            if self._closed:
                raise self._error(InvalidRequest, "this client is closed", question)
            if not _is_timeout(seconds):
                reason = f"timeout must be a positive number of seconds up to a day, not {timeout!r}"
                raise self._error(InvalidRequest, reason, question)
            yield question
            outcome = ANSWERED
        except Exception as error:
            outcome = type(error).__name__
            failed = error if isinstance(error, ServiceError) else None
            raise
        finally:
            if self._on_call is not None:
                spent, progress = time.monotonic() - start, question.progress
                facts = (method, self.model, number, progress.endpoint, texts, progress.attempts, spent)
                self._tell(Call(*facts, outcome, failed))

    def _tell(self, call: Call) -> None:
        assert self._on_call is not None
        try:
            self._on_call(call)
        except Exception:
            # What watches a call must not be what fails it.
            _log.exception("the on_call hook failed")

    @contextmanager
    def _blaming_the_caller(self, question: Question) -> Iterator[None]:
        try:
            yield
        except CodecError as error:
            raise self._error(InvalidRequest, str(error), question) from error

    @contextmanager
    def _blaming_the_server(self, question: Question) -> Iterator[None]:
        try:
            yield
        except CodecError as error:
            raise self._error(ServerFault, f"the answer breaks the contract: {error}", question) from error

    def _error(self, kind: type[ServiceError], reason: str, question: Question) -> ServiceError:
        progress = question.progress
        return kind(
            reason,
            endpoint=progress.endpoint or str(self.target),
            model=self.model,
            request_id=question.request_id,
            attempts=progress.attempts,
        )


def _check_options(target: Target, options: ClientOptions) -> None:
    """Raise `UsageError` for options that do not go with where the client leads."""
    if options.get("tls") is not None and not target.addresses[0].secure:
        wanted = f"{target.addresses[0].protocol}s://…"
        raise UsageError(f"{target} is without TLS; with certificates it must be {wanted}")
    if options.get("shared_memory") and not all(is_loopback(each.host) for each in target.addresses):
        raise UsageError(f"shared memory needs a server on this machine, such as 127.0.0.1, not {target}")


def _reason(failure: AttemptFailed, question: Question) -> str:
    return _too_late(question) if failure.kind is Timeout else failure.reason


def _too_late(question: Question) -> str:
    return f"no answer within {question.seconds:g} s"


def _is_timeout(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and 0 < value <= LONGEST_TIMEOUT


# Connections, locks and threads of a parent are of no use in a forked child.
_alive: weakref.WeakSet[Asking] = weakref.WeakSet()
_of_the_parent: list[object] = []


def _after_fork() -> None:
    for client in list(_alive):
        if not client._closed:
            # Kept, because to be destroyed they would wait for those threads.
            _of_the_parent.append(vars(client).copy())
            client._begin()


os.register_at_fork(after_in_child=_after_fork)
