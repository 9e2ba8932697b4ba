"""Whether a request would wait for too long, so that it is told at once, before any work on it.

The tokenizer numbers the texts that it lets in, and who computes them says which it has finished, and how many it does
in a second (`progress.py` of the engine). What lies between is in front of a request that comes now.
"""

from __future__ import annotations

import fcntl
import mmap
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# How many texts were let in, by all instances of the tokenizer.
_ADMITTED = struct.Struct("@Q")
# One instance of who computes, as it writes it: `until` when (seconds of the monotonic clock) the rest holds, the
# number of the last text that is `finished`, `texts_per_second`, and `most_texts` of an execution. And the CRC-32 of
# these, since they may be read while they are written.
_RECORD = struct.Struct("=4dQ")
_CHECKED = struct.calcsize("=4d")
# Of what is there (`_wait`); with a half many are let in that are late after all (docs/log.md).
_IN_FRONT = 0.75


class Asking(NamedTuple):
    """A request that wants to be let in."""

    texts: int
    timeout_us: int  # how long it may wait


class Engine(NamedTuple):
    """All instances together, as they were a moment ago."""

    finished: float
    texts_per_second: float
    most_texts: float


class Admission:
    """Numbers the texts that are let in, from 1 on.

    `path` is the file of the server, in which instances of the tokenizer count together. Without it all are let in.
    """

    def __init__(self, path: Path | None) -> None:
        # Open for as long as it is locked now and then.
        self._file = path.open("r+b") if path is not None else None
        self._told = mmap.mmap(self._file.fileno(), 0) if self._file is not None else mmap.mmap(-1, _ADMITTED.size)

    def engine(self, now: float) -> Engine | None:
        """How far the engine is at a monotonic time in seconds; None while it does not say, as it has little to do."""
        told = list(_read(self._told[_ADMITTED.size :], now))
        if not told:
            return None
        finished, rates, most = zip(*told, strict=True)
        return Engine(max(finished), sum(rates), sum(most))

    def admit(self, requests: Sequence[Asking], now: float) -> list[int | None]:
        """The number of the last text of each request; None for one that would wait for longer than it may."""
        engine = self.engine(now)
        numbers: list[int | None] = []
        with self._locked():
            admitted = _ADMITTED.unpack_from(self._told)[0]
            for request in requests:
                late = engine is not None and 1e6 * _wait(admitted, engine) > request.timeout_us
                admitted += 0 if late else request.texts
                numbers.append(None if late else admitted)
            _ADMITTED.pack_into(self._told, 0, admitted)
        return numbers

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """For other instances; the lock of one that dies ends with it."""
        if self._file is None:
            yield
            return
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)


def _wait(admitted: int, engine: Engine) -> float:
    """Seconds until a request that came now would be computed, at worst.

    All that is there is being computed or waits to be computed next, together with this request. That is about half
    each, and as executions differ, up to three quarters are in front; where more waits than an execution takes, all
    but half of one.
    """
    texts = admitted - engine.finished
    return max(_IN_FRONT * texts, texts - engine.most_texts / 2) / engine.texts_per_second


def _read(records: bytes, now: float) -> Iterator[Engine]:
    """What each instance says, while it holds; not of one that is just writing."""
    for at in range(0, len(records), _RECORD.size):
        until, *engine, checksum = _RECORD.unpack_from(records, at)
        if until > now and zlib.crc32(records[at : at + _CHECKED]) == checksum:
            yield Engine(*engine)
