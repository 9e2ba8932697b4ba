"""`classify_many`: a stream of texts in, a stream of answers out, with a bounded number of requests under way."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

from tqdm import tqdm

from millibert._asking import Pause, Steps
from millibert._calls import Calls
from millibert._codec import CodecError, check_text
from millibert._errors import Busy, InvalidRequest, ServerFault, Timeout, Unavailable, UsageError
from millibert._retry import Retry
from millibert._types import Classification, Failure

T = TypeVar("T")
R = TypeVar("R")
Answer: TypeAlias = Classification | Failure

DEFAULT_CONCURRENCY = 8
DEFAULT_PATIENCE = 60.0
# Where a server hides its configuration. If it is too much, the server says so, and the client cuts requests smaller.
_BATCH_SIZE_UNKNOWN = 32
# Between attempts at a batch, on top of those of each call.
_PAUSES = Retry(pause_seconds=0.2, longest_pause_seconds=5.0)
# A text that no model refuses: finds out whether a refusal was about the texts.
_HARMLESS = "a"


@dataclass(frozen=True)
class ManyOptions:
    """How to go through many texts."""

    top_k: int | None = None
    threshold: float | None = None
    timeout: float | None = None
    batch_size: int | None = None
    concurrency: int = DEFAULT_CONCURRENCY
    patience: float = DEFAULT_PATIENCE
    """Seconds for which a batch is tried again while the server is busy, slow or away."""
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "concurrency"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} must be an integer of at least 1, not {value!r}")


def choose_batch_size(calls: Calls, options: ManyOptions) -> Steps[ManyOptions]:
    """Fill in how many texts a request gets: as many as the model takes."""
    if options.batch_size is not None:
        return options
    try:
        size = yield from calls._max_batch_size(options.timeout)
    except InvalidRequest:
        size = _BATCH_SIZE_UNKNOWN
    return replace(options, batch_size=size)


def classify_batch(
    calls: Calls, texts: Sequence[object], options: ManyOptions, abandoned: Callable[[], bool]
) -> Steps[list[Answer]]:
    """Answers in the order of the texts. A text that alone is at fault gets a `Failure`, whatever is around it.

    Raises the `ServiceError` of what is wrong with all of them, or lasts longer than the options' patience.
    """
    found: dict[int, Answer] = {}
    for index, text in enumerate(texts):
        try:
            check_text(text, index)
        except CodecError as error:
            reason = str(error).replace(f"text {index} ", "it ", 1)
            found[index] = Failure(text, InvalidRequest(reason, endpoint=str(calls.target), model=calls.model))
    parts = [[index for index in range(len(texts)) if index not in found]]
    asked_why = False
    while parts:
        part = parts.pop()
        if not part:
            continue
        try:
            answers = yield from _patiently(calls, [str(texts[index]) for index in part], options, abandoned)
            found.update(zip(part, answers, strict=True))
        except (InvalidRequest, ServerFault) as error:
            if not asked_why:
                asked_why = True
                # If even this is refused it is not about the texts, and every other batch would go the same way.
                yield from _patiently(calls, [_HARMLESS], options, abandoned)
            if len(part) == 1:
                found[part[0]] = Failure(texts[part[0]], error)
            else:
                half = len(part) // 2
                parts += [part[half:], part[:half]]
    return [found[index] for index in range(len(texts))]


def _patiently(
    calls: Calls, texts: list[str], options: ManyOptions, abandoned: Callable[[], bool]
) -> Steps[tuple[Classification, ...]]:
    end = time.monotonic() + options.patience
    for attempt in itertools.count(1):
        try:
            answers: tuple[Classification, ...] = yield from calls._classify(
                texts, options.top_k, options.threshold, options.timeout, None
            )
            return answers
        except (Busy, Timeout, Unavailable):
            pause = _PAUSES.pause(attempt)
            if abandoned() or time.monotonic() + pause > end:
                raise
            yield Pause(pause)
    raise AssertionError("unreachable")


def in_order(
    texts: Iterable[object], work: Callable[[list[object], Callable[[], bool]], list[Answer]], options: ManyOptions
) -> Iterator[Answer]:
    """Hand batches to threads and yield what comes back, in order; at most twice as many as threads are held."""
    assert options.batch_size is not None
    over = False
    window: deque[Future[list[Answer]]] = deque()
    pool = ThreadPoolExecutor(options.concurrency, thread_name_prefix="millibert")
    source = _Source(texts)
    try:
        with _bar(texts, options) as bar:
            for batch in _batches(source, options.batch_size):
                window.append(pool.submit(work, batch, lambda: over))
                if len(window) >= 2 * options.concurrency or window[0].done():
                    yield from _counted(window.popleft().result(), bar)
            while window:
                yield from _counted(window.popleft().result(), bar)
            source.check()
    finally:
        over = True
        pool.shutdown(wait=False, cancel_futures=True)


async def in_order_async(
    texts: Iterable[object] | AsyncIterable[object],
    work: Callable[[list[object]], Awaitable[list[Answer]]],
    options: ManyOptions,
) -> AsyncIterator[Answer]:
    """The same with tasks."""
    assert options.batch_size is not None
    window: deque[asyncio.Task[list[Answer]]] = deque()
    slots = asyncio.Semaphore(options.concurrency)
    source = _Source(texts)

    async def one(batch: list[object]) -> list[Answer]:
        async with slots:
            return await work(batch)

    try:
        with _bar(texts, options) as bar:
            async for batch in _batches_async(source, options.batch_size):
                window.append(asyncio.create_task(one(batch)))
                if len(window) >= 2 * options.concurrency or window[0].done():
                    for answer in _counted(await window.popleft(), bar):
                        yield answer
            while window:
                for answer in _counted(await window.popleft(), bar):
                    yield answer
            source.check()
    finally:
        for task in window:
            task.cancel()
        await asyncio.gather(*window, return_exceptions=True)


class _Source:
    """Texts up to the first error of the iterator that they are from: what came before it is still answered."""

    def __init__(self, texts: Any) -> None:
        self._texts = texts
        self._error: Exception | None = None

    def check(self) -> None:
        """Raise that error."""
        if self._error is not None:
            raise self._error

    def __iter__(self) -> Iterator[object]:
        try:
            yield from self._texts
        except Exception as error:
            self._error = error

    async def __aiter__(self) -> AsyncIterator[object]:
        try:
            if isinstance(self._texts, AsyncIterable):
                async for text in self._texts:
                    yield text
            else:
                for text in self._texts:
                    yield text
        except Exception as error:
            self._error = error


def _counted(answers: list[Answer], bar: tqdm[Any]) -> Iterator[Answer]:
    for answer in answers:
        yield answer
        bar.update()


def _bar(texts: object, options: ManyOptions) -> tqdm[Any]:
    total = len(texts) if hasattr(texts, "__len__") else None
    return tqdm(total=total, desc="classifying", unit=" texts", smoothing=0.05, disable=not options.progress)


def _batches(texts: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size`, the last one shorter."""
    iterator = iter(texts)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


async def _batches_async(texts: AsyncIterable[T], size: int) -> AsyncIterator[list[T]]:
    batch: list[T] = []
    async for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
