"""Where texts to classify come from: arguments, a file, or a pipe while it is being written; in constant memory."""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from millibert._errors import UsageError
from millibert._records import READERS, decoded, lines_of, read_records, text_of

# A writer that has been silent for that long has stopped for now.
_PAUSE_SECONDS = 0.01
_CHUNK_BYTES = 1 << 16


class Texts:
    """Texts in order, which can be gone through once."""

    def __init__(
        self, each: Iterator[str], count: int | None = None, is_waiting: Callable[[], bool] = lambda: False
    ) -> None:
        """`count`: None where it is not known. `is_waiting`: whether the next text has yet to be written."""
        self.each = each
        self.count = count
        self._is_waiting = is_waiting
        self._error: UsageError | None = None

    def bursts(self) -> Iterator[Iterator[str]]:
        """All texts, cut where the next has yet to be written. Each burst must be used up before the next.

        Raises `UsageError` for a text that cannot be read, after the burst of those before it.
        """
        for first in self.each:
            yield self._burst(first)
            if self._error is not None:
                raise self._error

    def _burst(self, first: str) -> Iterator[str]:
        yield first
        while not self._is_waiting():
            try:
                text = next(self.each, None)
            except UsageError as error:
                # Raised here it would drop the answers that are under way.
                self._error = error
                return
            if text is None:
                return
            yield text


def given(texts: list[str]) -> Texts:
    """Texts that are at hand."""
    return Texts(iter(texts), len(texts))


def of_file(path: Path, column: str) -> Texts:
    """The column of a file that `read_records` reads, or the lines of a `.txt`.

    The whole file is read once before, so that a fault at its end is known before the work has begun, and its texts
    are counted. Raises `UsageError`.
    """
    # Of a named pipe there is nothing to read twice.
    count = None if path.is_fifo() else sum(1 for _ in _each_of_file(path, column))
    if count == 0:
        raise UsageError(f"{path}: no texts")
    return Texts(_each_of_file(path, column), count)


def of_pipe(descriptor: int, name: str) -> Texts:
    """The lines of an open file, such as standard input, without empty ones; errors call it `name`."""
    lines = _Lines(descriptor, name)
    return Texts(_without_empty(decoded(lines, name)), None, lines.is_waiting)


def _each_of_file(path: Path, column: str) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return _without_empty(lines_of(path))
    if suffix not in READERS:
        known = ", ".join((*READERS, ".txt"))
        raise UsageError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; use {known}")
    return (text_of(path, record, column) for record in read_records(path))


def _without_empty(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if line.strip():
            yield line.removesuffix("\n").removesuffix("\r")


class _Lines:
    """The lines of an open file, and whether there is one without waiting, which no `io` class can tell."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        self._lines: deque[bytes] = deque()
        self._rest = b""
        self._ended = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while not self._lines:
            if self._ended:
                raise StopIteration
            self._read()
        return self._lines.popleft()

    def is_waiting(self) -> bool:
        """Whether the next line, other than empty ones, has yet to be written."""
        if self._ended or any(line.strip() for line in self._lines):
            return False
        return not select.select([self._descriptor], [], [], _PAUSE_SECONDS)[0]

    def _read(self) -> None:
        try:
            chunk = os.read(self._descriptor, _CHUNK_BYTES)
        except OSError as error:
            raise UsageError(f"{self._name}: cannot be read: {error.strerror}") from error
        if chunk:
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            self._lines.extend(lines)
        else:
            self._ended = True
            if self._rest:
                self._lines.append(self._rest)
