"""How far an instance is and how fast, told to the tokenizer, which lets no more in than is computed in time.

The server makes a file, and the models map it: how many texts the tokenizer has let in, and then a record of each
instance that tells. The CPU engine does; a TensorRT plan cannot, so behind one the postprocessor does.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

# As `admission.py` of the tokenizer has them: how many were let in; a record, and the CRC-32 of it. The number is
# native, so that it is written and read in one piece.
_ADMITTED = struct.Struct("@Q")
_RECORD, _CHECKSUM = struct.Struct("=4d"), struct.Struct("=Q")
RECORD_BYTES = _RECORD.size + _CHECKSUM.size
# Fewer texts say little of what can be done.
_TELLING = 32
# What each measurement weighs in the rate.
_WEIGHT = 0.3
# For how long a rate holds: a second, or some executions where these take longer.
_HOLDS_SECONDS, _HOLDS_EXECUTIONS = 1.0, 3.0


def room(instances: int) -> int:
    """Bytes of a file for so many instances; zeros are what nobody has told yet."""
    return _ADMITTED.size + instances * RECORD_BYTES


class Progress:
    """Writes record `instance` of the file at `path`; tells nobody where there is none, or no room in it.

    What is measured is a stretch that began with enough texts waiting, so that nothing had to be waited for.
    """

    def __init__(self, path: Path | None, instance: int, most_texts: int) -> None:
        # One at least: a stretch of none would have a rate of 0.
        self._most, self._telling = most_texts, max(1, min(_TELLING, most_texts // 2))
        self._finished, self._rate, self._until = 0, 0.0, float("-inf")
        # The stretch: since when, the last number that waited then (0: too few did), texts computed.
        self._since, self._waited, self._computed = 0.0, 0, 0
        self._at, self._told = room(instance), None
        if path is not None and room(instance + 1) <= path.stat().st_size:
            with path.open("r+b") as file:
                self._told = mmap.mmap(file.fileno(), 0)

    @classmethod
    def of(cls, instance: Mapping[str, str]) -> Progress:
        """Of an instance of a model, as Triton describes it; one that gets no numbers tells nobody."""
        config = json.loads(instance["model_config"])
        numbered = any(tensor["name"] == "admission" for tensor in config["input"])
        file = os.environ.get("MILLIBERT_ADMISSION") if numbered else None  # the server names it
        number = int(instance["model_instance_name"].rpartition("_")[2])
        return cls(Path(file) if file else None, number, config["max_batch_size"])

    def passed(self, texts: int, numbers: Iterable[int], now: float) -> None:
        """So many texts have been computed by a monotonic time in seconds.

        `numbers` are those that the tokenizer gave to their requests, and to requests that were refused on the way; 0
        for one that did not come from there.
        """
        if self._told is None:
            return
        numbers = [number for number in numbers if number]
        self._finished = max((self._finished, *numbers))
        self._computed += texts
        waited = bool(numbers) and min(numbers) <= self._waited
        if waited and self._computed >= self._telling:
            self._measure(now)
        if not waited or self._computed >= self._telling or self._finished >= self._waited:
            self._begin(now, _ADMITTED.unpack_from(self._told)[0])
        record = _RECORD.pack(self._until, self._finished, self._rate, self._most)
        self._told[self._at : self._at + RECORD_BYTES] = record + _CHECKSUM.pack(zlib.crc32(record))

    def _begin(self, now: float, admitted: int) -> None:
        self._waited = admitted if admitted - self._finished >= self._telling else 0
        self._since, self._computed = now, 0

    def _measure(self, now: float) -> None:
        seconds = now - self._since
        rate = self._computed / seconds
        self._rate = rate if now > self._until else self._rate + _WEIGHT * (rate - self._rate)
        self._until = now + max(_HOLDS_SECONDS, _HOLDS_EXECUTIONS * seconds)
