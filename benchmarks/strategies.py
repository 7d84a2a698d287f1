"""What does a step cost under each strategy, in time and in memory of a worker?

One model (Qwen3, random weights) and the same batches under ddp, fsdp, zero1, zero2, zero3, all
weights trained and with LoRA: two gloo processes on CPU, or one process on a GPU where there is
one. The ways take turns, each in fresh processes; of the rounds the medians count.

`peak_gb` is the largest memory of a worker during steps, above what it held before the model was
built (GPU: allocated; CPU: resident set, in a run of its own whose heap gives back what is freed,
which costs time). Full run: about 12 min on 4 cores.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import results_io
from matplotlib import pyplot

STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
METHODS = ("none", "lora")
# glibc keeps most of what is freed for later; so told, it returns it to the system at once.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


@dataclass(frozen=True)
class Size:
    """tokens: of a packed row, of which a worker computes one a step."""

    hidden: int
    layers: int
    vocabulary: int
    tokens: int
    warm: int
    steps: int
    rounds: int


FULL = Size(hidden=768, layers=6, vocabulary=4096, tokens=128, warm=1, steps=5, rounds=3)
QUICK = Size(hidden=64, layers=2, vocabulary=512, tokens=256, warm=1, steps=2, rounds=1)
ON_GPU = Size(hidden=2048, layers=24, vocabulary=65536, tokens=4096, warm=3, steps=10, rounds=3)


def tree(size: Size, strategy: str, method: str) -> dict[str, Any]:
    return {
        "data": {"train": [{"path": "none"}], "tokens_per_batch": size.tokens},
        "model": {
            "tokenizer": "bytes",
            "config": {
                "model_type": "qwen3",
                "vocab_size": size.vocabulary,
                "hidden_size": size.hidden,
                "intermediate_size": 3 * size.hidden,
                "num_hidden_layers": size.layers,
                "num_attention_heads": size.hidden // 64,
                "num_key_value_heads": size.hidden // 64,
                "head_dim": 64,
            },
        },
        "peft": {"method": method},
        "parallel": {"strategy": strategy},
        "optim": {"lr": 1e-4},
    }


def one_worker(size: Size, strategy: str, method: str) -> dict[str, Any]:
    """This process's share; RANK, WORLD_SIZE and the rendezvous are in the environment."""
    import torch
    import torch.distributed as dist

    from raysft import models, remarks
    from raysft.adapters.attach import add_adapters
    from raysft.config.schema import Config
    from raysft.data.encode import make_encoder
    from raysft.data.example import MicroBatch, Sequence
    from raysft.parallel import World, make_strategy
    from raysft.train.feed import turn_of
    from raysft.train.step import StepBatch, forward_backward

    remarks.quiet()
    settings = tree(size, strategy, method)
    cuda = torch.cuda.is_available()
    if cuda:
        settings["train"] = {"precision": "bf16"}
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{os.environ['RENDEZVOUS']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    world = World.current("cuda:0" if cuda else "cpu")
    config = Config.model_validate(settings)
    encoder = make_encoder(config.model, config.data, Path.cwd())
    if strategy.startswith("zero"):
        os.environ["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"
        import deepspeed  # noqa: F401 - libraries are not what a strategy takes
    import torch.distributed.fsdp

    before = _held_gb(cuda)
    adapter = models.build(config.model, config.data, encoder, seed=0)
    if method != "none":
        add_adapters(adapter, config, size.warm + size.steps)
    wrapped = make_strategy(config, adapter.supervised, world)
    wrapped.module.train()
    _held_gb(cuda)
    rng = np.random.default_rng(world.rank)

    def batch(step: int) -> StepBatch:
        lengths = [size.tokens // 8] * 8
        rows = [rng.integers(5, 250, n).astype(np.int32) for n in lengths]
        sequences = [Sequence(f"{i}", "asr", ids, ids) for i, ids in enumerate(rows)]
        turn = turn_of(adapter, MicroBatch.join(0, step, world.rank, sequences))
        return StepBatch(0, step, {}, [turn])

    seconds = []
    for step in range(1, size.warm + size.steps + 1):
        this = batch(step)
        world.barrier()
        began = time.perf_counter()
        local = this.counts()
        counts = dict(zip(local, world.sum(list(local.values())).tolist()))
        sums = forward_backward(wrapped, world, this, ["asr"], counts, 0)
        wrapped.step(1.0)
        world.barrier()
        if step > size.warm:
            seconds.append(time.perf_counter() - began)
    world.sum_tensor(sums.values)
    loss = sums.means(["asr"])["loss"]
    return {
        "step_s": statistics.median(seconds),
        "peak_gb": _peak_gb(cuda) - before,
        "loss": loss,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def _held_gb(cuda: bool) -> float:
    if cuda:
        return 0.0
    import psutil

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    return psutil.Process().memory_info().rss / 2**30


def _peak_gb(cuda: bool) -> float:
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def measure(size: Size, workers: int) -> list[dict[str, Any]]:
    """Every strategy and method once a round, and before that once for its memory."""
    found, peaks = [], {}
    for number in range(-1, size.rounds):
        for method in METHODS:
            for strategy in STRATEGIES:
                result = _run(size, workers, strategy, method, GIVE_BACK if number < 0 else {})
                if number < 0:
                    peaks[method, strategy] = result["peak_gb"]
                    continue
                result["peak_gb"] = peaks[method, strategy]
                found.append({"round": number, "strategy": strategy, "method": method, **result})
                print(
                    f"round {number} {method:5} {strategy:6} {1000 * result['step_s']:8.1f} ms a "
                    f"step  {result['peak_gb']:6.3f} GB  loss {result['loss']:.4f}",
                    flush=True,
                )
    return found


def _run(
    size: Size, workers: int, strategy: str, method: str, environment: dict[str, str]
) -> dict[str, Any]:
    call = [json.dumps(vars(size)), strategy, method]
    found: dict[str, Any] = results_io.run_group(__file__, call, workers, environment)
    return found


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians by method and strategy; ratios to ddp within a round."""
    summary: dict[str, Any] = {}
    for method in METHODS:
        base = {r["round"]: r for r in runs if (r["strategy"], r["method"]) == ("ddp", method)}
        summary[method] = {}
        for strategy in STRATEGIES:
            mine = [r for r in runs if (r["strategy"], r["method"]) == (strategy, method)]
            np.testing.assert_allclose([r["loss"] for r in mine], base[0]["loss"], rtol=1e-2)
            summary[method][strategy] = {
                "step_s": statistics.median(r["step_s"] for r in mine),
                "step_over_ddp": statistics.median(
                    r["step_s"] / base[r["round"]]["step_s"] for r in mine
                ),
                "peak_gb": statistics.median(r["peak_gb"] for r in mine),
            }
    return summary


def draw(summary: dict[str, Any]) -> pyplot.Figure:
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.4))
    places = np.arange(len(STRATEGIES))
    for axis, key, title in zip(
        axes, ("step_over_ddp", "peak_gb"), ("step time / ddp's", "peak GB a worker"), strict=True
    ):
        for number, method in enumerate(METHODS):
            values = [summary[method][strategy][key] for strategy in STRATEGIES]
            bars = axis.bar(places + 0.4 * number, values, 0.38, label=f"peft.method: {method}")
            axis.bar_label(bars, fmt="%.2f", fontsize=7)
        axis.set_xticks(places + 0.2, STRATEGIES)
        axis.set_title(title)
    axes[0].legend()
    figure.tight_layout()
    return figure


def main() -> None:
    if "--worker" in sys.argv:
        size, strategy, method, out = sys.argv[sys.argv.index("--worker") + 1 :]
        result = one_worker(Size(**json.loads(size)), strategy, method)
        if os.environ["RANK"] == "0":
            Path(out).write_text(json.dumps(result))
        return
    options = results_io.arguments(__doc__.splitlines()[0])
    import torch

    cuda = torch.cuda.is_available()
    size = QUICK if options.quick else ON_GPU if cuda else FULL
    workers = 1 if cuda else 2
    runs = measure(size, workers)
    summary = summarize(runs)
    payload = {"size": vars(size), "workers": workers, "summary": summary, "runs": runs}
    name = "strategies_gpu" if cuda else "strategies"
    print(results_io.write(name, payload, draw(summary), quick=options.quick, out=options.out))


if __name__ == "__main__":
    main()
