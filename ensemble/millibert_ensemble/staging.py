"""A folder that appears under its name whole or not at all, whoever else writes beside it, over NFS too.

It is filled under a name that begins with a dot, beside its place, and then renamed. A lock is held while its writer
lives; the next writer removes what dead ones left. The lock is a file of its own, and not the folder: NFS locks only
what is open for writing, and does not let go of a folder in which a file is open.

    .STEM.RANDOM.lock    held by the writer
    .STEM.RANDOM.new     what it has written so far
    .STEM.RANDOM.old     what it is replacing, for a moment, where two folders cannot be swapped; never swept
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

_LOCK = ".lock"
_NEW = ".new"
_OLD = ".old"
# What file systems without locks answer. There, nobody can know that a writer is dead, and what it left stays.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
# What rename says of a place that holds something.
OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def staged(parent: Path, stem: str) -> Iterator[Path]:
    """Give a new, empty folder in `parent`, to be renamed to its place; what has its name in the end is removed."""
    sweep(parent, stem)
    lock, descriptor = _create_lock(parent, stem)
    folder = lock.with_suffix(_NEW)
    try:
        folder.mkdir()
        folder.chmod(0o755)  # whatever the umask: who reads it may be another user
        yield folder
    finally:
        _remove(folder)
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def sweep(parent: Path, stem: str) -> None:
    """Remove what dead writers left; living ones, and other users', are left alone."""
    for lock in parent.glob(f".{glob.escape(stem)}.*{_LOCK}"):
        # Another sweep can be faster.
        with contextlib.suppress(FileNotFoundError, PermissionError), _opened(lock) as descriptor:
            if _try_lock(descriptor):
                _remove(lock.with_suffix(_NEW))
                lock.unlink()


def write(path: Path, content: bytes) -> None:
    """Write a new file that is on the disk when this returns, and that other users may read."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(new: Path, old: Path) -> None:
    """Swap two folders atomically (Linux `renameat2`)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code), str(old))
    _exchange_in_steps(new, old)


def _exchange_in_steps(new: Path, old: Path) -> None:
    """The same where a file system cannot (NFS, some overlays): the old folder comes back if the new one cannot."""
    aside = new.with_suffix(_OLD)
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


def _create_lock(parent: Path, stem: str) -> tuple[Path, int]:
    while True:
        path = parent / f".{stem}.{secrets.token_hex(8)}{_LOCK}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        # A sweep that came between the two has the lock, and takes the name away with it.
        if _try_lock(descriptor, wait=True) and not path.exists():
            os.close(descriptor)
            continue
        return path, descriptor


def _try_lock(descriptor: int, wait: bool = False) -> bool:
    """Return whether the lock is ours now; it never is where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        return False
    return True


@contextlib.contextmanager
def _opened(lock: Path) -> Iterator[int]:
    descriptor = os.open(lock, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
