"""Put a finished folder in the place of an older one, in one step or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from millibert._errors import UsageError
from millibert_ensemble import staging

RELEASE_FILE = "release.json"


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Give a new, empty folder beside `out`; on leaving it becomes `out`, and after an error it is gone.

    Raises `UsageError` if `out` holds something that is not a release, which replacing would destroy. A
    `README.md` beside the release stays.
    """
    check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with staging.staged(out.parent, out.name) as folder:
        yield folder
        if (out / "README.md").is_file():
            shutil.copy2(out / "README.md", folder / "README.md")
        check_replaceable(out)
        if out.exists():
            staging.exchange(folder, out)
        else:
            folder.rename(out)


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
