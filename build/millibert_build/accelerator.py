"""Where training runs: a CUDA GPU where PyTorch finds one, else the CPU.

`CUDA_VISIBLE_DEVICES=` (empty) keeps a build off the GPU.
"""

from __future__ import annotations

import torch


def training_device() -> torch.device:
    """The GPU that PyTorch would use first, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic, not merely the data type: for a CPU AVX-512 BF16, AMX, or Arm BF16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
