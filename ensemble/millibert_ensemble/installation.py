"""Find tritonserver on this machine and make it able to run Python models.

A container or a system install is taken as it is. The PyPI wheel nvidia-pytriton carries the same server
without a working layout: its backend lacks the stub of any Python, so a private backend folder is
assembled from links. Nothing of pytriton is imported.

Inside the Python backend an interpreter starts anew, isolated: PYTHONPATH counts for nothing, and where it
looks for packages is decided by the first `python3` on PATH. That has to be this interpreter's own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from millibert._errors import UsageError
from millibert_ensemble import stub_probe
from millibert_ensemble.processes import STUB

SYSTEM_BINARY = Path("/opt/tritonserver/bin/tritonserver")
_MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"
_LIBPYTHON = re.compile(rb"libpython3[\w.-]*\.so[\d.]*")


@dataclass(frozen=True)
class Installation:
    """A tritonserver to start: its binary, its folder of backends, and its whole environment."""

    binary: Path
    backends: Path
    environment: Mapping[str, str]


def locate() -> Path:
    """Return the tritonserver of this machine; UsageError when there is none."""
    on_path = shutil.which("tritonserver")
    if on_path:
        return Path(on_path).resolve()
    if SYSTEM_BINARY.exists():
        return SYSTEM_BINARY
    wheel = _wheel()
    if wheel is not None:
        return wheel / "bin" / "tritonserver"
    raise UsageError(
        f"no tritonserver here: not on PATH, not {SYSTEM_BINARY}, and not in this Python; "
        "install one with: pip install 'millibert[serve]' (Linux, x86-64)"
    )


def prepare(folder: Path) -> Installation:
    """Return the installation that `locate` finds, ready to start; what it lacks is put into `folder`.

    Raises UsageError when this Python cannot run models inside it.
    """
    binary = locate()
    wheel = _wheel()
    if wheel is None or not binary.is_relative_to(wheel):
        return Installation(binary, binary.parents[1] / "backends", dict(os.environ))
    backend = _assemble(wheel, folder)
    environment = _environment(wheel, folder)
    _check_python(backend / STUB, environment)
    return Installation(binary, backend.parent, environment)


def _wheel() -> Path | None:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).resolve().parent / "tritonserver"
    return root if (root / "bin" / "tritonserver").exists() else None


def _assemble(wheel: Path, folder: Path) -> Path:
    """Link together a Python backend with the stub of this Python; returns its folder."""
    stubs = wheel / "python_backend_stubs"
    stub = stubs / _MINOR / STUB
    if not stub.exists():
        offered = ", ".join(sorted((path.name for path in stubs.iterdir()), key=_by_number))
        raise UsageError(
            f"nvidia-pytriton has no Python backend for Python {_MINOR}, only for {offered}; "
            "install millibert[serve] into a virtual environment of one of these"
        )
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    for source in [stub, *(wheel / "backends" / "python").iterdir()]:
        if source.is_file():
            (backend / source.name).symlink_to(source)
    return backend


def _environment(wheel: Path, folder: Path) -> dict[str, str]:
    libraries = folder / "lib"
    libraries.mkdir()
    # Only libpython itself is put before the system's libraries, not all that lies beside it.
    for directory in (sysconfig.get_config_var("LIBDIR"), Path(sys.base_prefix, "lib")):
        for library in Path(directory or os.devnull).glob(f"libpython{_MINOR}.so*"):
            link = libraries / library.name
            if not link.exists():
                link.symlink_to(library)
    search = [str(libraries), str(wheel.parents[1] / "nvidia_pytriton.libs")]
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "LD_LIBRARY_PATH": os.pathsep.join([*search, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]),
    }


def _check_python(stub: Path, environment: Mapping[str, str]) -> None:
    """Ask the interpreter that the stub will be; UsageError when it could not run our models."""
    needed = sorted({name.decode() for name in _LIBPYTHON.findall(stub.read_bytes())})
    found = _probe(needed, environment)
    where = Path(sys.executable).parent
    if found["python"] != _MINOR:
        raise UsageError(
            f"{where / 'python3'}, which Triton would start, is Python {found['python']}, not {_MINOR} like "
            "this one; install millibert[serve] into a virtual environment and run it from there"
        )
    if found["libpython"] is None:
        raise UsageError(
            f"Triton's Python backend needs the shared library {' or '.join(needed)}, which is not found; "
            f"on Debian or Ubuntu: apt-get install libpython{_MINOR}"
        )
    if found["numpy"] is None or int(found["numpy"].split(".")[0]) >= 2:
        raise UsageError(
            f"Triton's Python backend needs NumPy 1 (2 kills it) and finds {found['numpy'] or 'none'} in "
            f"{where.parent}; install it with: pip install 'numpy<2'"
        )


def _probe(libpythons: list[str], environment: Mapping[str, str]) -> dict[str, str | None]:
    # No path: the name is looked up on PATH as the stub's interpreter looks it up.
    command = [shutil.which("python3", path=environment["PATH"]) or "python3", "-I", stub_probe.__file__]
    try:
        done = subprocess.run(
            [*command, *libpythons], env=environment, capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise UsageError(f"{command[0]}, the Python that Triton would start, fails: {reason}") from error
    answer: dict[str, str | None] = json.loads(done.stdout)
    return answer


def _by_number(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
