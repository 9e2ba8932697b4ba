"""What the machine is asked: the driver for its GPUs and their slices, the library for its version."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest

from millibert_ensemble import machine
from millibert_ensemble.machine import Gpu


@pytest.fixture
def smi(monkeypatch, tmp_path):
    """An nvidia-smi that answers what it is told to: to the query, and to `-L`."""
    path = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def say(query, listing="", status=0):
        (tmp_path / "query").write_text(query)
        (tmp_path / "listing").write_text(listing)
        which = f'[ "$1" = -L ] && cat {tmp_path}/listing || cat {tmp_path}/query'
        path.write_text(f"#!/bin/sh\n{which}\nexit {status}\n")
        path.chmod(0o755)

    yield say
    path.unlink(missing_ok=True)


def test_the_driver_is_asked_for_gpus(monkeypatch, smi):
    smi("NVIDIA H100 80GB HBM3, 9.0, 81559, 580.105.08, Disabled\nTesla T4, 7.5, 15360, 580.1, [N/A]\n")
    assert machine.gpus() == (
        Gpu("NVIDIA H100 80GB HBM3", "9.0", 81559 << 20, "580.105.08"),
        Gpu("Tesla T4", "7.5", 15360 << 20, "580.1"),
    )
    smi("No devices were found\n")
    assert machine.gpus() == ()
    smi("", status=9)
    assert machine.gpus() == ()
    monkeypatch.setenv("PATH", "")
    assert machine.gpus() == ()


def test_a_slice_has_the_name_of_its_profile(smi):
    """As a container that was given one sees it: it may not ask for the memory of the whole GPU."""
    smi(
        "NVIDIA H100 80GB HBM3, 9.0, [Insufficient Permissions], 580.105.08, Enabled\n",
        "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-5d5ba0d6)\n  MIG 1g.10gb     Device  0: (UUID: MIG-7a5b)\n",
    )
    (gpu,) = machine.gpus()
    assert gpu == Gpu("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "9.0", None, "580.105.08")


def test_a_divided_gpu_counts_by_its_slices_and_a_whole_one_beside_it_as_it_is(smi):
    smi(
        "NVIDIA A100-SXM4-40GB, 8.0, 40960, 580.1, Enabled\nNVIDIA A100-SXM4-40GB, 8.0, 40960, 580.1, Disabled\n",
        "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-1)\n"
        "  MIG 3g.20gb     Device  0: (UUID: MIG-1)\n"
        "  MIG 1g.5gb+me   Device  1: (UUID: MIG-2)\n"
        "GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-2)\n",
    )
    name = "NVIDIA A100-SXM4-40GB"
    assert [gpu.name for gpu in machine.gpus()] == [f"{name} MIG 3g.20gb", f"{name} MIG 1g.5gb+me", name]
    smi(f"{name}, 8.0, 40960, 580.1, Enabled\n", f"GPU 0: {name} (UUID: GPU-1)\n")  # divided into nothing
    assert machine.gpus() == ()


def test_the_library_is_asked_for_its_version(monkeypatch):
    def load(name):
        if name != "libnvinfer.so.10":
            raise OSError(name)
        return SimpleNamespace(getInferLibVersion=lambda: 101501)

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert machine.tensorrt_version() == "10.15.1"
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.1.2"))
    assert machine.tensorrt_version() == "11.4.1"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert machine.tensorrt_version() is None
