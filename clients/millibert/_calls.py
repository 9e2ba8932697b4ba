"""Every call of a client, written once for threads and asyncio.

A call is a generator of effects: things to be done that wait, which it yields and whose outcome it is sent. It never
waits itself. What drives it, `Client` or `AsyncClient`, does nothing else than to carry out effects. So the deadline
over all attempts, the choice of endpoints, the retries and the meaning of failures exist a single time.
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

from millibert._address import Address, parse_target
from millibert._codec import (
    CodecError,
    Outputs,
    Request,
    batch_limit_in,
    check_threshold,
    decode,
    encode,
    region_is_unknown,
)
from millibert._documents import Config, read_config, read_models, read_server, read_statistics
from millibert._endpoints import Endpoint, Endpoints
from millibert._errors import (
    Busy,
    InvalidRequest,
    NotFound,
    ServerFault,
    ServiceError,
    Timeout,
    Unavailable,
    UsageError,
)
from millibert._protocol import AttemptFailed, Exchange, Protocol, is_loopback
from millibert._retry import Budget, Retry
from millibert._security import TLS, Credentials, Headers, HeaderSource, TokenSource
from millibert._shared_memory import SMALLEST_BYTES, Region, Regions, abandoned, make_region, serialized
from millibert._statistics import Counters
from millibert._types import ANSWERED, CANCELLED, Call, Classification, ModelState, ServerInfo

T = TypeVar("T")

DEFAULT_TIMEOUT = 10.0
"""Seconds a call may take where nobody says otherwise."""
LONGEST_TIMEOUT = 86_400.0
"""Seconds; beyond a day a timeout is a mistake, and gRPC overflows far beyond it."""
_READY_AGAIN_SECONDS = 0.2
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


class _Question(NamedTuple):
    """A call under way."""

    seconds: float
    start: float
    request_id: str
    progress: _Progress


class Calls:
    """What all clients are: a model, where it is served, and every call as steps.

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
        tls, shared_memory = options.get("tls"), options.get("shared_memory", False)
        target = parse_target(url)
        if target.addresses[0].protocol != self.protocol.name:
            raise UsageError(f"{type(self).__name__} needs a url with {self.protocol.name}://, not {str(target)!r}")
        if not isinstance(model, str) or not model or not model.isprintable():
            raise UsageError(f"the model must be named, not {model!r}")
        if not _is_timeout(timeout):
            raise UsageError(f"timeout must be a positive number of seconds up to a day, not {timeout!r}")
        if tls is not None and not target.addresses[0].secure:
            raise UsageError(f"{target} is without TLS; with certificates it must be {self.protocol.name}s://…")
        if shared_memory and not all(is_loopback(each.host) for each in target.addresses):
            raise UsageError(f"shared memory needs a server on this machine, such as 127.0.0.1, not {target}")
        self.target = target
        self.model = model
        self.timeout = float(timeout)
        self._retry = options.get("retry") or Retry()
        self._credentials = Credentials(options.get("token"), options.get("headers"), options.get("restricted"))
        self._tls = (tls or TLS()) if target.addresses[0].secure else None
        if self._tls is not None:
            self._tls.check()
        self._on_call = options.get("on_call")
        self._shared_memory = shared_memory
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

    # What can be asked.

    def _classify(
        self,
        texts: Texts,
        top_k: int | None,
        threshold: float | None,
        timeout: float | None,
        request_id: str | None,
    ) -> Steps[Any]:
        count = 1 if isinstance(texts, str) else len(texts) if hasattr(texts, "__len__") else 0
        with self._asking("classify", timeout, request_id, count) as question:
            with self._blaming_the_caller(question):
                request = encode([texts] if isinstance(texts, str) else texts, top_k)
                above = check_threshold(threshold)
            answers: list[Classification] = []
            while len(answers) < len(request.texts):
                part = request.part(len(answers), self._end_of_part(len(answers), len(request.texts)))
                try:
                    outputs = yield from self._infer(question, part)
                except InvalidRequest as error:
                    limit = batch_limit_in(error.reason)
                    if limit is None or limit >= len(part.texts):
                        raise
                    self._batch_limit = limit  # the server's own word: from now on requests are cut to it
                    continue
                with self._blaming_the_server(question):
                    answers += decode(part.texts, outputs, above)
        return answers[0] if isinstance(texts, str) else tuple(answers)

    def _end_of_part(self, start: int, count: int) -> int:
        return count if self._batch_limit is None else min(count, start + self._batch_limit)

    def _is_ready(self, timeout: float | None) -> Steps[bool]:
        try:
            with self._asking("ready", timeout) as question:
                if not (yield from self._ask(question, self.protocol.server_ready(), patient=False)):
                    return False
                return bool((yield from self._ask(question, self.protocol.model_ready(self.model), patient=False)))
        except (NotFound, Busy, Timeout, Unavailable):
            return False

    def _wait_until_ready(self, timeout: float) -> Steps[None]:
        with self._asking("wait_until_ready", timeout) as question:
            while not (yield from self._is_ready(_left(question))):
                if _left(question) <= _READY_AGAIN_SECONDS:
                    raise self._error(Timeout, f"not ready within {question.seconds:g} s", question)
                yield Pause(_READY_AGAIN_SECONDS)

    def _config(self, timeout: float | None) -> Steps[Config]:
        return self._document("config", self.protocol.config(self.model), read_config, timeout)

    def _max_batch_size(self, timeout: float | None) -> Steps[int]:
        return (yield from self._config(timeout)).max_batch_size

    def _labels(self, timeout: float | None) -> Steps[tuple[str, ...]]:
        found = (yield from self._config(timeout)).labels
        if not found:
            reason = "its configuration does not list its labels; built by an older millibert?"
            raise ServerFault(reason, endpoint=str(self.target), model=self.model)
        return found

    def _steps(self, timeout: float | None) -> Steps[tuple[str, ...]]:
        return (yield from self._config(timeout)).steps

    def _statistics(self, timeout: float | None) -> Steps[dict[str, Counters]]:
        return self._document("statistics", self.protocol.statistics(), read_statistics, timeout)

    def _models(self, timeout: float | None) -> Steps[tuple[ModelState, ...]]:
        return self._document("models", self.protocol.models(), read_models, timeout)

    def _server(self, timeout: float | None) -> Steps[ServerInfo]:
        return self._document("server", self.protocol.server(), read_server, timeout)

    def _document(
        self, method: str, exchange: Exchange[Any], read: Callable[[Any], T], timeout: float | None
    ) -> Steps[T]:
        with self._asking(method, timeout) as question:
            document = yield from self._ask(question, exchange)
            with self._blaming_the_server(question):
                return read(document)

    # How it is asked.

    def _infer(self, question: _Question, request: Request) -> Steps[Outputs]:
        if self._shared_memory:
            content = serialized(request.tensor)
            if len(content) >= SMALLEST_BYTES:
                return (yield from self._infer_shared(question, request, content))
        return (yield from self._ask(question, self.protocol.infer(self.model, request, question.request_id)))

    def _ask(
        self, question: _Question, exchange: Exchange[T], *, patient: bool = True, only: Endpoint | None = None
    ) -> Steps[T]:
        """Attempts until one is answered, the deadline is near, or there is no point in another.

        `patient`: also pauses and asks servers again; else each is asked once. `only`: this one and no other.
        """
        tried: list[Endpoint] = []
        while True:
            endpoint = only or (yield from self._endpoint(question, tried))
            left = _left(question)
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
        self, question: _Question, failure: AttemptFailed, tried: list[Endpoint], patient: bool
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
        if pause is None or (patient and len(tried) >= self._retry.attempts) or pause >= _left(question):
            return None
        return pause if self._budget.take() else None

    def _endpoint(self, question: _Question, tried: Sequence[Endpoint]) -> Steps[Endpoint]:
        if names := self._endpoints.to_resolve():
            found: list[tuple[Address, str]] = []
            for name in names:
                with suppress(OSError):
                    hosts = yield Resolve(name.host, name.port)
                    found += [(name._replace(host=host), name.host) for host in hosts]
            if found:
                self._endpoints.resolved(found)
        endpoint = self._endpoints.choose(tried)
        if endpoint is None:
            raise self._error(Unavailable, "cannot reach the server: the host name is not known", question)
        return endpoint

    # Through shared memory.

    def _infer_shared(self, question: _Question, request: Request, content: bytes) -> Steps[Outputs]:
        """As `_infer`; where shared memory does not work out, through the connection."""
        endpoint = yield from self._endpoint(question, ())
        regions = self._regions.setdefault(endpoint, Regions())
        through_connection = self.protocol.infer(self.model, request, question.request_id)
        try:
            region = regions.take(len(content))
            if region is None:
                region = yield from self._new_region(question, endpoint, regions, len(content))
        except (ServiceError, OSError) as error:
            _log.warning("no shared memory with %s, the texts go through the connection: %s", endpoint, error)
            return (yield from self._ask(question, through_connection))
        region.write(content)
        answered = False
        try:
            exchange = self.protocol.infer(self.model, request, question.request_id, region)
            outputs = yield from self._ask(question, exchange, only=endpoint)
            answered = True
        except (InvalidRequest, NotFound, Busy, ServerFault) as error:
            answered = not region_is_unknown(error.reason)
            if answered:
                raise
        except Unavailable:
            _log.info("%s is away, the texts go through the connection", endpoint)
        finally:
            # Without an answer the server may still be reading it.
            (regions.give_back if answered else regions.lose)(region)
        return outputs if answered else (yield from self._ask(question, through_connection))

    def _new_region(self, question: _Question, endpoint: Endpoint, regions: Regions, size: int) -> Steps[Region]:
        unused = regions.found()
        if not regions.swept:
            regions.swept = True
            registered = yield from self._ask(question, self.protocol.regions(), only=endpoint)
            unused += filter(abandoned, registered)
        for name in unused:
            yield from self._ask(question, self.protocol.unregister(name), only=endpoint)
        region = make_region(size)
        try:
            yield from self._ask(question, self.protocol.register(region), only=endpoint)
        except BaseException:
            region.close()
            raise
        region.unlink()
        return region

    def _close_regions(self) -> Steps[None]:
        regions, self._regions = self._regions, {}
        for endpoint, each in regions.items():
            for region in each.clear():
                region.close()
                with suppress(ServiceError), self._asking("close", None) as question:
                    yield from self._ask(question, self.protocol.unregister(region.name), only=endpoint)

    # Around a call.

    @contextmanager
    def _asking(
        self, method: str, timeout: float | None, request_id: str | None = None, texts: int = 0
    ) -> Iterator[_Question]:
        start = time.monotonic()
        seconds = self.timeout if timeout is None else timeout
        number = request_id or f"{self._request_prefix}-{next(self._request_numbers):x}"
        question = _Question(seconds, start, number, _Progress())
        outcome, failed = CANCELLED, None
        try:
            if self._closed:
                raise self._error(InvalidRequest, "this client is closed", question)
            if not _is_timeout(seconds):
                reason = f"timeout must be a positive number of seconds up to a day, not {timeout!r}"
                raise self._error(InvalidRequest, reason, question)
            yield question
            outcome = ANSWERED
        except ServiceError as error:
            outcome, failed = type(error).__name__, error
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
    def _blaming_the_caller(self, question: _Question) -> Iterator[None]:
        try:
            yield
        except CodecError as error:
            raise self._error(InvalidRequest, str(error), question) from error

    @contextmanager
    def _blaming_the_server(self, question: _Question) -> Iterator[None]:
        try:
            yield
        except CodecError as error:
            raise self._error(ServerFault, f"the answer breaks the contract: {error}", question) from error

    def _error(self, kind: type[ServiceError], reason: str, question: _Question) -> ServiceError:
        progress = question.progress
        return kind(
            reason,
            endpoint=progress.endpoint or str(self.target),
            model=self.model,
            request_id=question.request_id,
            attempts=progress.attempts,
        )


def _left(question: _Question) -> float:
    return question.start + question.seconds - time.monotonic()


def _reason(failure: AttemptFailed, question: _Question) -> str:
    return _too_late(question) if failure.kind is Timeout else failure.reason


def _too_late(question: _Question) -> str:
    return f"no answer within {question.seconds:g} s"


def _is_timeout(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and 0 < value <= LONGEST_TIMEOUT


# Connections, locks and threads of a parent are of no use in a forked child.
_alive: weakref.WeakSet[Calls] = weakref.WeakSet()
_of_the_parent: list[object] = []


def _after_fork() -> None:
    for calls in list(_alive):
        if not calls._closed:
            # Kept, because to be destroyed they would wait for those threads.
            _of_the_parent.append(vars(calls).copy())
            calls._begin()


os.register_at_fork(after_in_child=_after_fork)
