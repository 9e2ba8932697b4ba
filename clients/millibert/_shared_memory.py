"""Texts handed to a server on the same machine through system shared memory, instead of through the connection.

A region is a file in /dev/shm that both map. It is unlinked as soon as the server has mapped it, so that nothing is
left there whoever is killed. The server's mapping lives until it is unregistered: when the client is closed, and of
a client that was killed or had calls without an answer, when the next client on this machine finds the registration of
a process that is gone.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

FOLDER = Path("/dev/shm")  # noqa: S108 - where Triton looks, by its protocol
SMALLEST_BYTES = 1 << 16
"""Of a region; smaller requests go through the connection, which is quicker for them."""
_PREFIX = "millibert-client-"
# After a call that got no answer. To unmap memory that is being read would crash the server.
_LOST_SECONDS = 120.0
_count = itertools.count()


@dataclass(eq=False)
class Region:
    """Memory shared with one server, used by one call at a time."""

    name: str
    size: int
    memory: mmap.mmap
    used: int = 0
    """Bytes of the request that it holds now."""

    @property
    def key(self) -> str:
        """The name that Triton opens it by."""
        return f"/{self.name}"

    def write(self, content: bytes) -> None:
        """Put a request's bytes at the front."""
        self.memory[: len(content)] = content
        self.used = len(content)

    def unlink(self) -> None:
        """Take its name away; those that have mapped it keep it."""
        (FOLDER / self.name).unlink(missing_ok=True)

    def close(self) -> None:
        """Unmap it."""
        self.unlink()
        self.memory.close()


def make_region(at_least: int) -> Region:
    """A region of the next power of two."""
    size = max(SMALLEST_BYTES, 1 << (at_least - 1).bit_length())
    name = f"{_PREFIX}{os.getpid()}-{next(_count)}"
    handle = os.open(FOLDER / name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(handle, 0, size)  # now, with an error, and not later with a SIGBUS
        return Region(name, size, mmap.mmap(handle, size))
    except OSError:
        (FOLDER / name).unlink()
        raise
    finally:
        os.close(handle)


def serialized(tensor: npt.NDArray[np.object_]) -> bytes:
    """A BYTES tensor as Triton reads it from shared memory: each element after its length, little-endian in 4 bytes."""
    return b"".join(len(each).to_bytes(4, "little") + each for each in tensor.ravel())


def abandoned(name: str) -> bool:
    """Whether a region of this name belongs to a client process of this machine that is gone."""
    if not name.startswith(_PREFIX):
        return False
    pid = name.removeprefix(_PREFIX).partition("-")[0]
    return pid.isdecimal() and not Path(f"/proc/{pid}").exists()


class Regions:
    """The regions registered at one endpoint. Safe to share between threads."""

    def __init__(self) -> None:
        self._free: list[Region] = []
        self._lost: list[tuple[float, str]] = []
        self._lock = threading.Lock()
        self.swept = False
        """What clients before us left at this server has been cleaned up."""

    def take(self, at_least: int) -> Region | None:
        """A free region that is large enough."""
        with self._lock:
            for index, region in enumerate(self._free):
                if region.size >= at_least:
                    return self._free.pop(index)
        return None

    def give_back(self, region: Region) -> None:
        """Its call has ended, and the server does not read it any more."""
        with self._lock:
            self._free.append(region)

    def lose(self, region: Region) -> None:
        """Its call has ended, and the server may still read it: it stays registered for a while."""
        region.close()
        with self._lock:
            self._lost.append((time.monotonic(), region.name))

    def found(self) -> list[str]:
        """Take the names of lost regions that no server can be reading any more."""
        long_ago = time.monotonic() - _LOST_SECONDS
        with self._lock:
            found = [name for since, name in self._lost if since <= long_ago]
            self._lost = [(since, name) for since, name in self._lost if since > long_ago]
        return found

    def clear(self) -> list[Region]:
        """Take all that are free."""
        with self._lock:
            free, self._free = self._free, []
        return free
