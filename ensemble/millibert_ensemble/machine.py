"""What this machine has for a TensorRT plan: the library that would load it, and the GPUs it would run on.

Looking never fails: what is not there, or does not answer, is absent. The serving image has TensorRT as a library and
not as a Python package, so the library itself is asked.
"""

from __future__ import annotations

import csv
import ctypes
import importlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

# Newest first: of two installed the newer one is what a current Triton links to.
_LIBRARIES = ("libnvinfer.so.11", "libnvinfer.so.10")
_QUERY = "name,compute_cap,memory.total,driver_version,mig.mode.current"
# A line of `nvidia-smi -L`: a GPU, or, below it, one of the slices that it is divided into.
_LISTED = re.compile(r"GPU (\d+): | +MIG (\S+) +Device ")
_TIMEOUT_SECONDS = 30
_MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """One GPU as its driver describes it, or a MIG slice of one: `NVIDIA H100 80GB HBM3 MIG 1g.10gb`."""

    name: str
    compute_capability: str  # "9.0"
    memory_bytes: int | None
    """None: the driver does not tell, as of the GPU that a slice is of."""
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
    try:
        table = _nvidia_smi(f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits")
        found = parse_gpus(table)
        if not any(divided for _, divided in found):
            return tuple(gpu for gpu, _ in found)
        return tuple(_slices(found, _nvidia_smi("-L")))
    except (OSError, subprocess.SubprocessError, ValueError, LookupError):
        return ()


def parse_gpus(table: str) -> tuple[tuple[Gpu, bool], ...]:
    """One GPU per line of nvidia-smi's table, and whether it is divided into slices.

    Its memory is in MiB. Raises ValueError for another table.
    """
    rows = [[field.strip() for field in row] for row in csv.reader(table.splitlines()) if row]
    return tuple(
        (Gpu(name, capability, int(memory) * _MIB if memory.isdecimal() else None, driver), mode == "Enabled")
        for name, capability, memory, driver, mode in rows
    )


def _slices(found: tuple[tuple[Gpu, bool], ...], listing: str) -> Iterator[Gpu]:
    """Whole GPUs as they are, and in the place of a divided one the slices of it that are here.

    A plan is tuned for a slice, whose name the table lacks; and a container that was given a slice may not ask for the
    memory of the whole.
    """
    gpu, divided = found[0]
    for line in listing.splitlines():
        match = _LISTED.match(line)
        if match and match[1]:
            gpu, divided = found[int(match[1])]
            if not divided:
                yield gpu
        elif match:
            yield replace(gpu, name=f"{gpu.name} MIG {match[2]}", memory_bytes=None)


def _nvidia_smi(*options: str) -> str:
    command = ["nvidia-smi", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_SECONDS).stdout
