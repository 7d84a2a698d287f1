"""How much memory this process has taken at most."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def host_peak() -> float | None:
    """Bytes of host memory at the peak (VmHWM); None where there is no Linux /proc."""
    if not _STATUS.exists():
        return None
    found = _STATUS.read_text(encoding="utf-8").partition("VmHWM:")[2].split()
    return 1024.0 * int(found[0]) if found else None


def peak_memory(device: torch.device) -> float | None:
    """Bytes at the peak: of tensors on the GPU that trains, else of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return host_peak()
