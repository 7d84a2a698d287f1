"""`train.deterministic`: whether the same step on the same machine has the same last bits.

Most of torch always does. What does not adds in the order in which threads arrive: on CPUs, where
the gradient of a row that was taken several times is summed up (the tokens of a mixture, each sent
to several experts); on GPUs also in the backward pass of flash attention, and in cuBLAS where it
has several streams. Setting it is a process's own affair: call `settle` before the model is used.
"""

from __future__ import annotations

import os

import torch

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def settle(deterministic: bool | None, device: torch.device) -> None:
    """Choose torch's algorithms for this process.

    deterministic: None is true on CPUs, where it costs next to nothing, and false on GPUs. Where it
    was asked for, an operation that has no such algorithm raises RuntimeError, with its name.
    """
    asked = deterministic is True
    on = device.type == "cpu" if deterministic is None else asked
    if asked and device.type == "cuda":
        os.environ.setdefault(_WORKSPACE, ":4096:8")  # cuBLAS reads it at its first product
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(on, warn_only=not asked)
    # It would fill all memory that is about to be written anyway.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
