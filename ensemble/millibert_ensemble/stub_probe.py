"""Say what this interpreter would be inside Triton's Python backend. Run by path, not imported.

    python3 -I stub_probe.py LIBPYTHON…

`-I` isolates it as the backend isolates its own: no PYTHONPATH, no user site-packages. Prints one JSON
object: `python` (version), `numpy` (version or null), `libpython` (the first that loads, or null).
"""

from __future__ import annotations

import ctypes
import json
import sys
from importlib.metadata import PackageNotFoundError, version


def loadable(names: list[str]) -> str | None:
    """Return the first shared library of `names` that the loader finds."""
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    return None


def numpy_version() -> str | None:
    """Return the version of the NumPy that this interpreter would import."""
    try:
        return version("numpy")
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    print(json.dumps({"python": python, "numpy": numpy_version(), "libpython": loadable(sys.argv[1:])}))
