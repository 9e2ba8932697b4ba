"""The client for asyncio."""

from __future__ import annotations

import asyncio
import socket
from abc import abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, overload

from millibert._asking import Effect, Pause, Resolve, Send, Steps
from millibert._calls import Calls
from millibert._endpoints import Endpoint
from millibert._errors import InvalidRequest
from millibert._many import (
    DEFAULT_CONCURRENCY,
    DEFAULT_PATIENCE,
    Answer,
    ManyOptions,
    choose_batch_size,
    classify_batch,
    in_order_async,
)
from millibert._protocol import AttemptFailed
from millibert._security import HeaderSource, TokenSource, check_headers
from millibert._statistics import Counters
from millibert._tracing import trace_headers
from millibert._types import Classification, ModelState, ServerInfo

T = TypeVar("T")


class AsyncSender(Protocol):
    """Takes messages of one protocol to endpoints, within one event loop."""

    async def send(self, endpoint: Endpoint, message: Any, headers: Mapping[str, str], seconds: float) -> Any:
        """Return what came back within the seconds, or raise `AttemptFailed`."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


class AsyncClient(Calls):
    """A service, called from asyncio; `connect_async` makes the right one for a url. Same calls as `Client`.

    Usable as an asynchronous context manager, and from one event loop after another. When a call is cancelled, its gRPC
    call is too, and its HTTP connection is closed. What a server makes of that is its own: Triton 2.51 finishes the
    step of an ensemble that it is at; a call that waits for the engine is dropped when its deadline has passed.
    """

    @abstractmethod
    def _make_sender(self) -> AsyncSender: ...

    def _begin(self) -> None:
        super()._begin()
        self._sender: AsyncSender | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @overload
    async def classify(
        self,
        texts: str,
        top_k: int | None = None,
        *,
        threshold: float | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Classification: ...

    @overload
    async def classify(
        self,
        texts: list[str] | tuple[str, ...],
        top_k: int | None = None,
        *,
        threshold: float | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> tuple[Classification, ...]: ...

    async def classify(
        self,
        texts: str | list[str] | tuple[str, ...],
        top_k: int | None = None,
        *,
        threshold: float | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Classification | tuple[Classification, ...]:
        """As `Client.classify`."""
        answer: Classification | tuple[Classification, ...] = await self._run(
            self._classify(texts, top_k, threshold, timeout, request_id)
        )
        return answer

    def classify_many(
        self,
        texts: Iterable[str] | AsyncIterable[str],
        top_k: int | None = None,
        *,
        threshold: float | None = None,
        timeout: float | None = None,
        batch_size: int | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        patience: float = DEFAULT_PATIENCE,
        progress: bool = False,
    ) -> AsyncIterator[Answer]:
        """As `Client.classify_many`; the texts may come from an asynchronous iterator."""
        options = ManyOptions(top_k, threshold, timeout, batch_size, concurrency, patience, progress)
        return self._in_order(texts, options)

    async def _in_order(self, texts: Iterable[str] | AsyncIterable[str], options: ManyOptions) -> AsyncIterator[Answer]:
        chosen = await self._run(choose_batch_size(self, options))

        async def work(batch: list[object]) -> list[Answer]:
            return await self._run(classify_batch(self, batch, chosen, lambda: False))

        async for answer in in_order_async(texts, work, chosen):
            yield answer

    async def ready(self, timeout: float | None = None) -> bool:
        """As `Client.ready`."""
        return await self._run(self._is_ready(timeout))

    async def wait_until_ready(self, timeout: float = 60.0) -> None:
        """As `Client.wait_until_ready`."""
        await self._run(self._wait_until_ready(timeout))

    async def max_batch_size(self, timeout: float | None = None) -> int:
        """As `Client.max_batch_size`."""
        return await self._run(self._max_batch_size(timeout))

    async def labels(self, timeout: float | None = None) -> tuple[str, ...]:
        """As `Client.labels`."""
        return await self._run(self._labels(timeout))

    async def steps(self, timeout: float | None = None) -> tuple[str, ...]:
        """As `Client.steps`."""
        return await self._run(self._steps(timeout))

    async def configuration(self, model: str | None = None, timeout: float | None = None) -> dict[str, Any]:
        """The configuration of a model, of this client's or of another, as the server shows it."""
        return await self._run(self._configuration(model, timeout))

    async def models(self, timeout: float | None = None) -> tuple[ModelState, ...]:
        """As `Client.models`."""
        return await self._run(self._models(timeout))

    async def statistics(self, timeout: float | None = None) -> dict[str, Counters]:
        """As `Client.statistics`."""
        return await self._run(self._statistics(timeout))

    async def server(self, timeout: float | None = None) -> ServerInfo:
        """As `Client.server`."""
        return await self._run(self._server(timeout))

    async def close(self) -> None:
        """Close the connections; the client cannot be used afterwards. May be called again."""
        if self._closed:
            return
        await self._run(self._close_regions())
        self._closed = True
        sender, self._sender = self._sender, None
        if sender is not None and self._loop is asyncio.get_running_loop():
            await sender.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        """Carry out the steps of a call, one effect after another."""
        try:
            effect = next(steps)
            while True:
                try:
                    outcome = await self._perform(effect)
                except BaseException as failure:  # the call's to judge, and to tell its hook
                    effect = steps.throw(failure)
                else:
                    effect = steps.send(outcome)
        except StopIteration as done:
            result: T = done.value
            return result
        finally:
            steps.close()

    async def _perform(self, effect: Effect) -> Any:
        if isinstance(effect, Send):
            headers = await self._headers()
            return await self._open_sender().send(effect.endpoint, effect.message, headers, effect.seconds)
        if isinstance(effect, Pause):
            return await asyncio.sleep(effect.seconds)
        assert isinstance(effect, Resolve)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(effect.seconds):
            found = await loop.getaddrinfo(effect.host, effect.port, type=socket.SOCK_STREAM)
        return [str(address[4][0]) for address in found]

    def _open_sender(self) -> AsyncSender:
        if self._closed:
            raise AttemptFailed(InvalidRequest, "this client is closed")
        loop = asyncio.get_running_loop()
        if self._sender is None or self._loop is not loop:
            # Connections belong to the loop in which they were made; those of a loop that is over cannot be closed.
            self._sender, self._loop = self._make_sender(), loop
        return self._sender

    async def _headers(self) -> dict[str, str]:
        given = self._credentials
        headers = given.restricted_headers(self.protocol.name)
        if given.headers is not None:
            headers |= check_headers(await _called(given.headers))
        if given.token is not None:
            headers |= check_headers({"authorization": f"Bearer {await _called(given.token)}"})
        return headers | trace_headers()


async def _called(source: HeaderSource | TokenSource) -> Any:
    value = source() if callable(source) else source
    return await value if hasattr(value, "__await__") else value
