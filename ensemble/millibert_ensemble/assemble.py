"""A release and a plan from elsewhere as one model repository, made of links.

A release never changes and a plan is of one kind of machine, so neither goes into the other. Here they meet: real
folders, as Triton reads them, with a link for each file to where it really is.
"""

from __future__ import annotations

import os
from pathlib import Path

from millibert._errors import UsageError
from millibert_ensemble import contract, staging
from millibert_ensemble.plan_manifest import PLAN, PLAN_MANIFEST
from millibert_ensemble.repository_check import RELEASE

_PLAN_FOLDER = Path(contract.BERT, contract.VERSION)
_PLAN_FILES = (PLAN, PLAN_MANIFEST)


def assemble(release: Path, plan: Path | None, out: Path) -> None:
    """Make `out` of a release and the folder of a plan, in one step; an older one is replaced.

    Raises `UsageError` if `out` holds anything that was not made here.
    """
    check_replaceable(release, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with staging.staged(out.parent, out.name) as folder:
        _link_release(release.resolve(), folder)
        if plan is not None:
            for name in _PLAN_FILES:
                (folder / _PLAN_FOLDER / name).symlink_to((plan / name).resolve())
        try:
            folder.rename(out)
        except OSError as error:
            if error.errno not in staging.OCCUPIED:
                raise
            staging.exchange(folder, out)


def check_replaceable(release: Path, out: Path) -> None:
    """Raise `UsageError` unless `out` is absent, empty or an older one, and apart from the release."""
    if out.resolve().is_relative_to(release.resolve()):
        raise UsageError(f"{out}: in the release itself, which is not changed; give another --out")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out}: not a folder; give another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / RELEASE).is_symlink():
        raise UsageError(f"{out}: holds something that `millibert preflight --out` did not make; give another --out")


def lost_link(repository: Path) -> str | None:
    """Say which file of an assembled repository leads nowhere; the plan is looked at by who needs it."""
    for path in sorted(repository.rglob("*")):
        is_plan = path.name in _PLAN_FILES and path.parent == repository / _PLAN_FOLDER
        if path.is_symlink() and not path.exists() and not is_plan:
            name = path.relative_to(repository)
            return (
                f"{name} is a link to {path.readlink()}, which is not there: the release was moved or is not mounted; "
                f"make {repository} again with `millibert preflight --repository RELEASE --out {repository}`"
            )
    return None


def _link_release(release: Path, folder: Path) -> None:
    """Every folder anew, every file as a link; without a plan, which is chosen and not taken along."""
    for place, folders, files in os.walk(release):
        here = Path(place)
        there = folder / here.relative_to(release)
        linked = [name for name in folders if (here / name).is_symlink()]
        for name in sorted(set(folders) - set(linked)):
            (there / name).mkdir()
        is_plan_folder = here == release / _PLAN_FOLDER
        for name in (*linked, *files):
            if not (is_plan_folder and name in _PLAN_FILES):
                (there / name).symlink_to((here / name).resolve())
