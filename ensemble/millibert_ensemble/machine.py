"""What this machine has for a TensorRT plan: the library that would load it, and the GPUs it would run on.

Looking never fails: what is not there, or does not answer, is absent. The serving image has TensorRT as a library and
not as a Python package, so the library itself is asked.
"""

from __future__ import annotations

import csv
import ctypes
import importlib
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

# Newest first: of two installed the newer one is what a current Triton links to.
_LIBRARIES = ("libnvinfer.so.11", "libnvinfer.so.10")
_QUERY = "name,compute_cap,memory.total,driver_version"
_TIMEOUT_SECONDS = 30
_MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """One GPU as its driver describes it."""

    name: str
    compute_capability: str  # "9.0"
    memory_bytes: int
    driver: str


@dataclass(frozen=True)
class Machine:
    """TensorRT's version ("11.4.1"; None: not here), and the GPUs that a server would use."""

    tensorrt: str | None
    gpus: tuple[Gpu, ...]

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


def this_machine() -> Machine:
    """Ask the TensorRT library and the driver."""
    return Machine(tensorrt_version(), gpus())


def tensorrt_version() -> str | None:
    """MAJOR.MINOR.PATCH of the TensorRT of this machine: of the shared library, else of the Python package."""
    for name in _LIBRARIES:
        try:
            return decode_version(ctypes.CDLL(name).getInferLibVersion())
        except (OSError, AttributeError):
            continue
    try:
        return short_version(str(importlib.import_module("tensorrt").__version__))
    except (ImportError, AttributeError):
        return None


def decode_version(number: int) -> str:
    """What `getInferLibVersion` returns, since TensorRT 10 as MAJOR * 10000 + MINOR * 100 + PATCH."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def short_version(version: str) -> str:
    """MAJOR.MINOR.PATCH of a version that may name a build too: plans do not depend on it."""
    return ".".join(version.split(".")[:3])


def gpus() -> tuple[Gpu, ...]:
    """Ask the driver, through nvidia-smi; none where there is no driver or it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_SECONDS)
        return parse_gpus(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()


def parse_gpus(table: str) -> tuple[Gpu, ...]:
    """One GPU per line of nvidia-smi's table; its memory is in MiB. Raises ValueError for another table."""
    rows = [[field.strip() for field in row] for row in csv.reader(table.splitlines()) if row]
    return tuple(Gpu(name, capability, int(memory) * _MIB, driver) for name, capability, memory, driver in rows)
