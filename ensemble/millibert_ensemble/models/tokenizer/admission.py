"""Whether a request would wait for too long, so that it is told at once, before any work on it.

The tokenizer numbers the texts that it lets in, and the engine's host says which of them it has finished, and how many
it does in a second (`progress.py` of the engine). What lies between is in front of a request that comes now.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# One instance of the engine's host, as it writes it: `until` when (seconds of the monotonic clock) the rest holds, the
# number of the last text that is `finished`, `texts_per_second`, and `most_texts` of an execution. And the CRC-32 of
# these, since they may be read while they are written.
_RECORD = struct.Struct("=4dQ")
_CHECKED = struct.calcsize("=4d")
# Of what is there (`_wait`); with a half many are let in that are late after all (docs/log.md).
_IN_FRONT = 0.75


class Busy(Exception):  # noqa: N818 - an answer more than an error
    """What a request is told that would wait for too long."""


class Engine(NamedTuple):
    """All instances together, as they were a moment ago."""

    finished: float
    texts_per_second: float
    most_texts: float


class Admission:
    """Numbers the texts that it lets in, from 1 on.

    `path` is the file that the engine's host writes. Without it all are let in.
    """

    def __init__(self, path: Path | None) -> None:
        self._admitted = 0
        self._records = None
        if path is not None:
            with path.open("rb") as file:
                self._records = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def engine(self, now: float) -> Engine | None:
        """How far the engine is at a monotonic time in seconds; None while it does not say, as it has little to do."""
        if self._records is None:
            return None
        told = list(_read(self._records[:], now))
        if not told:
            return None
        finished, rates, most = zip(*told, strict=True)
        return Engine(max(finished), sum(rates), sum(most))

    def admit(self, texts: int, timeout_us: int, engine: Engine | None) -> int:
        """The number of the last of these texts; raises `Busy` where they would wait for longer than the timeout."""
        if engine is not None and 1e6 * self._wait(engine) > timeout_us:
            raise Busy("busy: more texts wait for the engine than it computes in time")
        self._admitted += texts
        return self._admitted

    def _wait(self, engine: Engine) -> float:
        """Seconds until a request that came now would be computed, at worst.

        All that is there is being computed or waits to be computed next, together with this request. That is about half
        each, and as executions differ, up to three quarters are in front; where more waits than an execution takes, all
        but half of one.
        """
        texts = self._admitted - engine.finished
        return max(_IN_FRONT * texts, texts - engine.most_texts / 2) / engine.texts_per_second


def _read(records: bytes, now: float) -> Iterator[Engine]:
    """What each instance says, while it holds; not of one that is just writing."""
    for at in range(0, len(records), _RECORD.size):
        until, *engine, checksum = _RECORD.unpack_from(records, at)
        if until > now and zlib.crc32(records[at : at + _CHECKED]) == checksum:
            yield Engine(*engine)
