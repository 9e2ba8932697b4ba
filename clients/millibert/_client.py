"""The client for threads."""

from __future__ import annotations

import socket
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, overload

from millibert._asking import Effect, Pause, Resolve, Send, Steps
from millibert._calls import Calls
from millibert._endpoints import Endpoint
from millibert._errors import InvalidRequest, UsageError
from millibert._many import (
    DEFAULT_CONCURRENCY,
    DEFAULT_PATIENCE,
    Answer,
    ManyOptions,
    choose_batch_size,
    classify_batch,
    in_order,
)
from millibert._protocol import AttemptFailed
from millibert._security import HeaderSource, TokenSource, check_headers
from millibert._statistics import Counters
from millibert._tracing import trace_headers
from millibert._types import Classification, ModelState, ServerInfo

T = TypeVar("T")


class Sender(Protocol):
    """Takes messages of one protocol to endpoints. Safe to share between threads."""

    def send(self, endpoint: Endpoint, message: Any, headers: Mapping[str, str], seconds: float) -> Any:
        """Return what came back within the seconds, or raise `AttemptFailed`."""
        ...

    def close(self) -> None:
        """Close all connections."""
        ...


class Client(Calls):
    """A service, called from threads; `connect` makes the right one for a url. Safe to share between threads.

    Usable as a context manager, and after a fork. See `Asking` for the arguments. Every failed call raises a
    `ServiceError`.
    """

    @abstractmethod
    def _make_sender(self) -> Sender: ...

    def _begin(self) -> None:
        super()._begin()
        self._sender: Sender | None = None
        self._lock = threading.Lock()

    @overload
    def classify(
        self,
        texts: str,
        top_k: int | None = None,
        *,
        threshold: float | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Classification: ...

    @overload
    def classify(
        self,
        texts: list[str] | tuple[str, ...],
        top_k: int | None = None,
        *,
        threshold: float | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> tuple[Classification, ...]: ...

    def classify(
        self,
        texts: str | list[str] | tuple[str, ...],
        top_k: int | None = None,
        *,
        threshold: float | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Classification | tuple[Classification, ...]:
        """Classify one text, or several, in order; more than the model takes at once go in several requests.

        `top_k` is the number of labels per text (None: the model's default). A label is `accepted` from a score of
        `threshold` on (None: the threshold that the build chose for it). `timeout`, in seconds, overrides the client's
        for this call. `request_id` is what server and errors call this request.
        """
        answer: Classification | tuple[Classification, ...] = self._run(
            self._classify(texts, top_k, threshold, timeout, request_id)
        )
        return answer

    def classify_many(
        self,
        texts: Iterable[str],
        top_k: int | None = None,
        *,
        threshold: float | None = None,
        timeout: float | None = None,
        batch_size: int | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        patience: float = DEFAULT_PATIENCE,
        progress: bool = False,
    ) -> Iterator[Answer]:
        """Classify any number of texts; yields an answer each, in order, in constant memory.

        `concurrency` requests of `batch_size` texts (None: as many as the model takes) are under way at a time. A text
        that alone is at fault yields a `Failure`. While the server is busy, slow or away, a batch is tried again for
        `patience` seconds; what lasts longer, or is wrong with every text, is raised. `timeout` is that of each
        request. `progress` shows a bar on standard error.
        """
        options = ManyOptions(top_k, threshold, timeout, batch_size, concurrency, patience, progress)
        return self._in_order(texts, options)

    def _in_order(self, texts: Iterable[str], options: ManyOptions) -> Iterator[Answer]:
        chosen = self._run(choose_batch_size(self, options))

        def work(batch: list[object], abandoned: Callable[[], bool]) -> list[Answer]:
            return self._run(classify_batch(self, batch, chosen, abandoned))

        yield from in_order(texts, work, chosen)

    def ready(self, timeout: float | None = None) -> bool:
        """Whether server and model take requests now; False too where no server answers."""
        return self._run(self._is_ready(timeout))

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Return once server and model take requests; raises `Timeout` if they do not in that many seconds."""
        self._run(self._wait_until_ready(timeout))

    def max_batch_size(self, timeout: float | None = None) -> int:
        """How many texts one request may hold, from the model's configuration on the server."""
        return self._run(self._max_batch_size(timeout))

    def labels(self, timeout: float | None = None) -> tuple[str, ...]:
        """All labels the model can answer, in the order of their ids, from its configuration on the server."""
        return self._run(self._labels(timeout))

    def steps(self, timeout: float | None = None) -> tuple[str, ...]:
        """Of an ensemble, the models that it runs, in order; of another model, none."""
        return self._run(self._steps(timeout))

    def configuration(self, model: str | None = None, timeout: float | None = None) -> dict[str, Any]:
        """The configuration of a model, of this client's or of another, as the server shows it.

        gRPC leaves out what has its default and writes large numbers as strings, HTTP does not.
        """
        return self._run(self._configuration(model, timeout))

    def models(self, timeout: float | None = None) -> tuple[ModelState, ...]:
        """All models of the server's repository, and whether they are ready."""
        return self._run(self._models(timeout))

    def statistics(self, timeout: float | None = None) -> dict[str, Counters]:
        """What the server has counted for each of its models since they were loaded."""
        return self._run(self._statistics(timeout))

    def server(self, timeout: float | None = None) -> ServerInfo:
        """Name, version and extensions of the server."""
        return self._run(self._server(timeout))

    def close(self) -> None:
        """Close the connections; the client cannot be used afterwards. May be called again."""
        if self._closed:
            return
        self._run(self._close_regions())
        self._closed = True
        with self._lock:
            sender, self._sender = self._sender, None
        if sender is not None:
            sender.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        """Carry out the steps of a call, one effect after another."""
        try:
            effect = next(steps)
            while True:
                try:
                    outcome = self._perform(effect)
                except BaseException as failure:  # the call's to judge, and to tell its hook
                    effect = steps.throw(failure)
                else:
                    effect = steps.send(outcome)
        except StopIteration as done:
            result: T = done.value
            return result
        finally:
            steps.close()

    def _perform(self, effect: Effect) -> Any:
        if isinstance(effect, Send):
            return self._open_sender().send(effect.endpoint, effect.message, self._headers(), effect.seconds)
        if isinstance(effect, Pause):
            return time.sleep(effect.seconds)
        assert isinstance(effect, Resolve)
        return _resolved(effect)

    def _open_sender(self) -> Sender:
        sender = self._sender
        if sender is None:
            with self._lock:
                if self._closed:
                    raise AttemptFailed(InvalidRequest, "this client is closed")
                if self._sender is None:
                    self._sender = self._make_sender()
                sender = self._sender
        return sender

    def _headers(self) -> dict[str, str]:
        given = self._credentials
        headers = given.restricted_headers(self.protocol.name)
        if given.headers is not None:
            headers |= check_headers(_called(given.headers))
        if given.token is not None:
            headers |= check_headers({"authorization": f"Bearer {_called(given.token)}"})
        return headers | trace_headers()


def _resolved(effect: Resolve) -> list[str]:
    """The addresses of a name; raises `OSError`, which a timeout is too."""
    # In a thread, since the system's look-up knows no deadline.
    pool = ThreadPoolExecutor(1, thread_name_prefix="millibert-dns")
    try:
        look_up = pool.submit(socket.getaddrinfo, effect.host, effect.port, type=socket.SOCK_STREAM)
        return [str(address[4][0]) for address in look_up.result(effect.seconds)]
    finally:
        pool.shutdown(wait=False)


def _called(source: HeaderSource | TokenSource) -> Any:
    value = source() if callable(source) else source
    if hasattr(value, "__await__"):
        if hasattr(value, "close"):
            value.close()  # a coroutine that is never awaited complains
        raise UsageError("a coroutine function can only be called by the clients for asyncio; give a plain function")
    return value
