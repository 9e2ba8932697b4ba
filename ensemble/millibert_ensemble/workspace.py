"""What one server leaves on the machine, under one name, so that all of it can be found and removed.

Triton's Python backend keeps its tensors in shared memory (/dev/shm) and forgets them there when it is
killed. So every server of ours has a workspace: its name is part of the name of each region, of a
temporary folder, and of the command lines of the server and its stubs. A locked file beside the regions
says that the owner lives. The kernel lets go of the lock however the owner ends, and unlike a pid it means
the same in every container that shares the memory. A guardian process outlives the owner for long enough to
sweep; should it be killed too, the next start does.

    /dev/shm/millibert-PID-RANDOM.lock      held by the owner
    /dev/shm/millibert-PID-RANDOM-UUID      a region
    TMPDIR/millibert-PID-RANDOM/            the backend, as assembled for this Python
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from millibert_ensemble import processes

REGIONS = Path("/dev/shm")  # noqa: S108 - where shm_open keeps them
_STEM = "millibert-"
_LOCK = ".lock"


class Workspace:
    """A name of its own for one server's traces, and a private folder; `close` removes all of them."""

    def __init__(self) -> None:
        self.name = f"{_STEM}{os.getpid()}-{secrets.token_hex(4)}"
        self._lock = _create_lock(self.name)
        self.folder = _folder(self.name)
        self.folder.mkdir(mode=0o700)
        self._guardian = subprocess.Popen(
            [sys.executable, "-P", "-m", "millibert_ensemble.guardian", self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for the guardian
        )

    @property
    def region_prefix(self) -> str:
        """What the names of the shared-memory regions start with."""
        return _region_prefix(self.name)

    def clear(self) -> None:
        """Kill the processes that still carry the name and remove their regions."""
        _clear(self.name)

    def close(self) -> None:
        """Clear, remove the folder, and let go of the name. The lock goes last: it vouches for the rest."""
        _remove(self.name)
        os.close(self._lock)
        self._guardian.communicate()


def sweep_after(owner_name: str) -> None:
    """Wait until the owner of the workspace with that name has ended, and remove what it left.

    The kernel closes the files of a killed process one after another: whoever learns of its end by one of them, such
    as a pipe, can still find the lock held. So this waits for the lock.
    """
    # No such file: the owner tidied up itself.
    with contextlib.suppress(FileNotFoundError), _opened(REGIONS / f"{owner_name}{_LOCK}") as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _remove(owner_name)


def sweep() -> None:
    """Remove the traces of servers whose owner has died; living ones are left alone."""
    for path in sorted(REGIONS.glob(f"{_STEM}*{_LOCK}")):
        # A lock can be another user's, or be swept by someone else while we look.
        with contextlib.suppress(PermissionError, FileNotFoundError), _opened(path) as lock:
            if _try_lock(lock):
                _remove(path.name.removesuffix(_LOCK))


@contextlib.contextmanager
def _opened(lock: Path) -> Iterator[int]:
    descriptor = os.open(lock, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _create_lock(name: str) -> int:
    # Locked under a name that no sweep looks at, and only then given its own.
    unseen = REGIONS / f".{name}"
    descriptor = os.open(unseen, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    unseen.rename(REGIONS / f"{name}{_LOCK}")
    return descriptor


def _remove(name: str) -> None:
    _clear(name)
    shutil.rmtree(_folder(name), ignore_errors=True)
    (REGIONS / f"{name}{_LOCK}").unlink(missing_ok=True)


def _clear(name: str) -> None:
    prefix = _region_prefix(name)
    processes.kill(processes.carrying(prefix))
    for region in REGIONS.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def _region_prefix(name: str) -> str:
    return f"{name}-"


def _folder(name: str) -> Path:
    return Path(tempfile.gettempdir(), name)
