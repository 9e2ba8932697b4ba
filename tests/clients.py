"""The four clients behind one face, so that a test of behaviour is written once."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import AsyncIterator
from typing import Any, Self

import millibert

FORMS = ("grpc", "grpc-aio", "http", "http-aio")


class Driven:
    """An asynchronous client called like the others: each call runs in one event loop until it is done."""

    def __init__(self, client: millibert.AsyncClient) -> None:
        self.client = client
        self.runner = asyncio.Runner()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.client, name)
        return self._driven(value) if inspect.ismethod(value) else value

    def _driven(self, method: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            result = method(*arguments, **named)
            if isinstance(result, AsyncIterator):
                return self._each(result)
            return self._run(result)

        return call

    def _each(self, answers: AsyncIterator[Any]) -> Any:
        while True:
            try:
                yield self._run(anext(answers))
            except StopAsyncIteration:
                return

    def _run(self, work: Any) -> Any:
        # In the caller's context, as `await` would be.
        return self.runner.run(work, context=contextvars.copy_context())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.run(self.client.close())
        self.runner.close()


def open_client(form: str, url: str | list[str], model: str = "echo", timeout: float = 10.0, **options: Any) -> Any:
    """A client of one of `FORMS`, to be used in a `with`."""
    if form.endswith("-aio"):
        return Driven(millibert.connect_async(url, model, timeout, **options))
    return millibert.connect(url, model, timeout, **options)


def protocol(form: str) -> str:
    """`grpc` or `http`."""
    return form.removesuffix("-aio")
