"""The parts of `gpu_call.py` that need no model of ours: what the GPU itself does, attention, an
encoder. And what its sections share. CPU=1: tiny shapes, without a GPU.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Found = dict[str, Any]
CPU = os.environ.get("CPU") == "1"


# -- what the sections share ---------------------------------------------------------------------


def device() -> torch.device:
    import torch

    return torch.device("cpu" if CPU else "cuda:0")


def half() -> torch.dtype:
    """bf16; on a CPU, which has no grouped products of it, float32."""
    import torch

    return torch.float32 if CPU else torch.bfloat16


def timed(run: Callable[[], object], times: int = 10, warm: int = 3) -> float:
    """Median seconds of a run, by the GPU's own clock."""
    import torch

    for _ in range(1 if CPU else warm):
        run()
    if CPU:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken = []
    for _ in range(times):
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return sorted(taken)[times // 2]


def forget_peak() -> None:
    import torch

    if not CPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    """Of the GPU's memory since `forget_peak`."""
    import torch

    return 0.0 if CPU else torch.cuda.max_memory_allocated() / 1e9


def matmul_tflops() -> float:
    """Of one large product in bf16: the ceiling."""
    import torch

    n = 256 if CPU else 8192
    a, b = (torch.randn(n, n, device=device(), dtype=torch.bfloat16) for _ in range(2))
    return float(2 * n**3 / timed(lambda: a @ b) / 1e12)


def failure(error: Exception) -> str:
    """One way of several has failed: what is kept of it, instead of figures."""
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def free() -> None:
    """Give back what nothing refers to any more."""
    import torch

    gc.collect()
    if not CPU:
        torch.cuda.empty_cache()


# -- sections ------------------------------------------------------------------------------------


def ceilings() -> Found:
    """Products, copies within the GPU and to it; whether a pageable copy waits for the queue."""
    import torch

    found: Found = {"bf16_tflops": matmul_tflops()}
    n = 256 if CPU else 8192
    a, b = (torch.randn(n, n, device=device()) for _ in range(2))
    found["fp32_tflops"] = 2 * n**3 / timed(lambda: a @ b, 3, 1) / 1e12
    torch.set_float32_matmul_precision("high")
    found["tf32_tflops"] = 2 * n**3 / timed(lambda: a @ b, 3, 1) / 1e12
    inside = torch.empty((1 if CPU else 1000) * 2**20, dtype=torch.uint8, device=device())
    other = torch.empty_like(inside)
    found["copy_tb_s"] = 2 * inside.numel() / timed(lambda: other.copy_(inside)) / 1e12
    host = torch.empty(1000 if CPU else 77_000_000, dtype=torch.uint8)
    there = torch.empty(host.shape, dtype=torch.uint8, device=device())
    sources = {"pageable": host} | ({} if CPU else {"pinned": host.pin_memory()})
    for name, source in sources.items():
        copies = {
            "to": lambda source=source: there.copy_(source, non_blocking=True),
            "from": lambda source=source: source.copy_(there, non_blocking=True),
        }
        for way, copy in copies.items():
            found[f"{way}_gpu_{name}_gb_s"] = host.numel() / timed(copy) / 1e9
        if not CPU:
            torch.cuda.synchronize()
            for _ in range(20):
                a @ b
            began = time.perf_counter()
            copies["to"]()
            found[f"host_ms_of_{name}_copy_behind_work"] = 1e3 * (time.perf_counter() - began)
            torch.cuda.synchronize()
    if not CPU:
        found["device"] = torch.cuda.get_device_name()
        found["capability"] = torch.cuda.get_device_capability()
    installed = ("triton", "grouped_gemm", "kernels", "bitsandbytes", "torchao")
    found["installed"] = [name for name in installed if importlib.util.find_spec(name)]
    return found


def attention() -> Found:
    """A row of log-normal documents: milliseconds, distance from float32, the same bits twice."""
    import numpy as np
    import torch

    from raysft.models import attention as ours

    positions, heads, groups = (256, 4, 2) if CPU else (8192, 32, 8)
    draws, lengths = np.random.default_rng(0), []
    while (left := positions - sum(lengths)) > 0:
        drawn = int(draws.lognormal(np.log(positions / 30), 0.7))
        lengths.append(min(max(drawn, 8), left))
    lengths.sort()
    ends = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device())
    longest = max(lengths)
    ways: dict[str, Callable[..., torch.Tensor]] = {
        "by_document": lambda q, k, v, w: ours._by_document(q, k, v, lengths, 0.0, None, w, True)
    }
    if not CPU:
        ways["varlen"] = lambda q, k, v, w: ours._varlen(q, k, v, ends, longest, None, w, True)
    found: Found = {"documents": len(lengths)}
    for size, window in ((128, None), (64, None), (80, None), (96, None), (256, None), (128, 512)):
        torch.manual_seed(0)
        inputs = [
            torch.randn(1, n, positions, size, device=device(), dtype=torch.bfloat16)
            for n in (heads, groups, groups)
        ]
        back = torch.randn(1, positions, heads, size, device=device(), dtype=torch.bfloat16)
        exact = [x.float().requires_grad_() for x in inputs]
        wanted = ours._by_document(*exact, lengths, 0.0, None, window, True)
        wanted.backward(back.float())
        row: Found = {}
        for name, way in ways.items():
            leaves = [x.clone().requires_grad_() for x in inputs]

            def both(
                way: Callable[..., torch.Tensor] = way,
                leaves: list[torch.Tensor] = leaves,
                window: int | None = window,
                back: torch.Tensor = back,
            ) -> torch.Tensor:
                for leaf in leaves:
                    leaf.grad = None
                out = way(*leaves, window)
                out.backward(back)
                return out

            try:
                out, first = both(), [leaf.grad.clone() for leaf in leaves]
                both()
                again = [leaf.grad for leaf in leaves]
                pairs = [(out, wanted), *zip(first, (x.grad for x in exact), strict=True)]
                errors = [(a.float() - b).norm() / b.norm() for a, b in pairs]
                row[name] = {
                    "ms": 1e3 * timed(both),
                    "error": float(max(errors)),
                    "same_bits": all(map(torch.equal, first, again)),
                }
            except Exception as error:  # noqa: BLE001 - the next way may work
                row[name] = failure(error)
        found[f"head {size}" + (f", window {window}" if window else "")] = row
    return found


def audio() -> Found:
    """30 clips of 8 s through Qwen2-Audio's encoder: padded to 30 s by transformers', and
    packed by ours."""
    import torch
    from transformers import CONFIG_MAPPING
    from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

    from raysft.families.audio_lm import cut as cut_rows

    width, layers, clips = (64, 2, 2) if CPU else (1280, 32, 30)
    config = CONFIG_MAPPING["qwen2_audio_encoder"](
        num_mel_bins=128,
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=4 if CPU else 20,
        encoder_ffn_dim=4 * width,
    )
    config._attn_implementation = "sdpa"
    with device():
        tower = Qwen2AudioEncoder(config).to(half()).eval()
    mels = torch.randn(clips, 128, 3000, device=device(), dtype=half())

    cut_rows.attach(tower)

    def packed(features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return tower(features, mask).last_hidden_state

    def padded(features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return Qwen2AudioEncoder.forward(tower, features, mask).last_hidden_state

    found: Found = {}
    for trains in (False, True):
        tower.requires_grad_(trains)
        for name, frames, forward in (("padded", 3000, padded), ("packed", 808, packed)):
            length = frames // 2
            mask = torch.zeros(clips, 1, length, length, device=device(), dtype=half())
            mask[..., 400:] = float("-inf")

            def run(
                forward: Callable[..., torch.Tensor] = forward,
                given: torch.Tensor = mels[..., :frames],
                mask: torch.Tensor = mask,
                trains: bool = trains,
            ) -> None:
                with torch.set_grad_enabled(trains):
                    out = forward(given, mask)
                    if trains:
                        out.float().sum().backward()

            run()
            forget_peak()
            ms = 1e3 * timed(run, 5, 1)
            found[f"{name}, {'trains' if trains else 'frozen'}"] = {"ms": ms, "peak_gb": peak_gb()}
    return found
