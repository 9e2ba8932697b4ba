"""How far this engine is and how fast, told to the tokenizer, which lets no more in than is computed in time."""

from __future__ import annotations

import mmap
import struct
import zlib
from pathlib import Path

# As `admission.py` of the tokenizer reads it, and the CRC-32 of it.
_RECORD, _CHECKSUM = struct.Struct("=4d"), struct.Struct("=Q")
RECORD_BYTES = _RECORD.size + _CHECKSUM.size
# An execution of fewer texts says little of what the engine can do.
_TELLING = 32
# What each execution weighs in the rate.
_WEIGHT = 0.3
# A pause between executions of less than so much of the one after it is part of what an execution takes.
_NO_PAUSE = 0.25
# For how long a rate holds: a second, or some executions where these take longer.
_HOLDS_SECONDS, _HOLDS_EXECUTIONS = 1.0, 3.0


class Progress:
    """Writes record `instance` of the file at `path`; tells nobody where there is none, or no room in it."""

    def __init__(self, path: Path | None, instance: int, most_texts: int) -> None:
        self._most, self._at = most_texts, RECORD_BYTES * instance
        self._finished, self._rate = 0, 0.0
        self._ended = self._until = float("-inf")
        self._records = None
        if path is not None and self._at + RECORD_BYTES <= path.stat().st_size:
            with path.open("r+b") as file:
                self._records = mmap.mmap(file.fileno(), 0)

    def executed(self, texts: int, last: int, begun: float, ended: float) -> None:
        """An execution of so many texts, between two monotonic times in seconds.

        `last` is the greatest of the numbers that the tokenizer gave to these, and to those that were too late; 0 where
        they did not come from there. The rate is of executions that follow one another, with all that lies between.
        """
        self._finished = last or self._finished
        seconds = ended - begun
        if begun - self._ended < _NO_PAUSE * seconds:
            seconds = ended - self._ended
        self._ended = ended
        if texts >= min(_TELLING, self._most // 2):
            rate = texts / seconds
            self._rate = rate if ended > self._until else self._rate + _WEIGHT * (rate - self._rate)
            self._until = ended + max(_HOLDS_SECONDS, _HOLDS_EXECUTIONS * seconds)
        if self._records is not None:
            record = _RECORD.pack(self._until, self._finished, self._rate, self._most)
            self._records[self._at : self._at + RECORD_BYTES] = record + _CHECKSUM.pack(zlib.crc32(record))
