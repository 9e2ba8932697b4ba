"""Put a finished folder in the place of an older one, in one step or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from millibert._errors import UsageError

RELEASE_FILE = "release.json"
_NEW = ".new"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Give a new, empty folder beside `out`; on leaving it becomes `out`, and after an error it is gone.

    Raises `UsageError` if `out` holds something that is not a release, which replacing would destroy. A
    `README.md` beside the release stays.
    """
    check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    with _staging(out) as staging:
        yield staging
        staging.chmod(0o755)  # mkdtemp's folders are private; the server may be another user
        if (out / "README.md").is_file():
            shutil.copy2(out / "README.md", staging / "README.md")
        check_replaceable(out)
        if out.exists():
            _exchange(staging, out)
        else:
            staging.rename(out)


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder beside `out`, locked while its owner lives, and removed with whatever is in its place in the end."""
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=_NEW, dir=out.parent))
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # what failed, or what was replaced
        os.close(descriptor)


def _sweep(out: Path) -> None:
    """Remove the staging folders of builds that were killed while they published; living ones hold a lock."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.*{_NEW}"):
        descriptor = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)


def check_replaceable(out: Path) -> None:
    """Raise `UsageError` unless `out` is absent, a release, or a folder with nothing but a README.md."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise UsageError(f"{out}: not a folder; choose another --out")
    foreign = sorted(set(os.listdir(out)) - {"README.md"})
    if foreign and RELEASE_FILE not in foreign:
        raise UsageError(
            f"{out}: holds {', '.join(foreign[:3])} and no {RELEASE_FILE}, so it is not a release of ours; "
            "choose another --out, or empty it"
        )


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders atomically (Linux `renameat2`)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code), str(old))
    # A file system without exchange (NFS, some overlays): two renames, and the old release comes back if
    # the second one fails.
    aside = Path(tempfile.mkdtemp(prefix=f".{old.name}.", suffix=".old", dir=old.parent)) / "release"
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)
