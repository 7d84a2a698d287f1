"""What a process computes in: `train.precision: auto` by its device, and products of float32."""

from __future__ import annotations

import torch

from raysft.config.precision import with_precision
from raysft.config.schema import Config


def has_bf16(device: torch.device | int) -> bool:
    """Whether a GPU computes in bfloat16, rather than by other types."""
    if torch.version.hip:
        return True
    return torch.cuda.get_device_properties(device).major >= 8


def settled(config: Config, device: torch.device) -> Config:
    """`config` in the precision that auto is on `device`: bf16 on GPUs that have it, else fp32. A
    run that a driver has started names one already."""
    if config.train.precision != "auto":
        return config
    on_gpu = device.type == "cuda" and has_bf16(device)
    return with_precision(config, "bf16" if on_gpu else "fp32")


def use_tf32(on: bool) -> None:
    """Whether GPUs of this process multiply float32 in TF32, of 10 bits of fraction; by default
    torch does so in convolutions.

    By torch's older switches: after its newer ones it refuses to read them, as some of it does.
    """
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on
