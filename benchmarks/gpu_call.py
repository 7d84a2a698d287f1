"""What one call of ten minutes on one GPU should tell, most important first. No Ray, no network.

    python benchmarks/gpu_call.py           every section, each in a process of its own
    python benchmarks/gpu_call.py NAME      one section
    CPU=1 python benchmarks/gpu_call.py     tiny shapes without a GPU, to try the script

    ceilings      products and copies: what the rest is measured against
    tests         tests/gpu
    attention     the variable-length kernel beside attention document by document
    lora          Llama-3-8B with LoRA: as it is, longer rows, compiled
    experts       a layer of DeepSeek-V2-Lite's experts by each backend; adapters on experts, split
                  and as whole updates (the exchange of `ep` wants several GPUs, and is left out)
    experts_step  a whole step of a DeepSeek-V2 of that width, by each backend
    trainer       the 8B by transformers' Trainer (gpu_finetune.py)
    full          Llama-3.2-1B, all weights: ddp, fsdp, a checkpoint
    audio         Qwen2-Audio's encoder, clips padded to 30 s and packed
    generate      answers of the 1B
    shapes        rows of the 1B as they are and filled up: speed, and memory that grows

A line of JSON a section, printed and appended to $OUT/results.jsonl; what was said besides lies in
$OUT/NAME.log. A section that is over its seconds is cut off, and all of it after LIMIT (560). Needs
what the package needs but Ray, and pytest for `tests`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_finetune import SHAPES as DENSE
from gpu_kernels import (
    CPU,
    Found,
    attention,
    audio,
    ceilings,
    device,
    failure,
    forget_peak,
    free,
    half,
    matmul_tflops,
    peak_gb,
    timed,
)

if TYPE_CHECKING:
    from raysft.config import Config
    from raysft.models import SpeechModel
    from raysft.parallel import Strategy, World

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(os.environ.get("OUT", Path(tempfile.gettempdir()) / "gpu_call"))
SHAPES: dict[str, Found] = {  # beside those of gpu_finetune.py
    "lite": {  # DeepSeek-V2-Lite, three of its 26 layers of experts
        **{"model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048},
        **{"intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 4},
        **{"first_k_dense_replace": 1, "n_routed_experts": 64, "n_shared_experts": 2},
        **{"num_experts_per_tok": 6, "num_attention_heads": 16, "num_key_value_heads": 16},
        **{"q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128},
        **{"qk_rope_head_dim": 64, "v_head_dim": 128, "head_dim": 64},
        **{"topk_method": "greedy", "n_group": 1, "topk_group": 1},
    },
    "lite_tiny": {
        **{"model_type": "deepseek_v2", "vocab_size": 512, "hidden_size": 64},
        **{"intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2},
        **{"first_k_dense_replace": 1, "n_routed_experts": 8, "n_shared_experts": 1},
        **{"num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
        **{"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 16},
        **{"qk_rope_head_dim": 16, "v_head_dim": 16, "head_dim": 16},
        **{"topk_method": "greedy", "n_group": 1, "topk_group": 1},
    },
}


# -- a model of ours -----------------------------------------------------------------------------


def make(
    shape: str, row: int, strategy: str = "ddp", peft: Found | None = None, moe: Found | None = None
) -> tuple[Config, SpeechModel, float]:
    """A model of random weights, made on the GPU (a minute less than on a CPU), and its seconds."""
    import torch

    from raysft import models, remarks
    from raysft.adapters.attach import add_adapters
    from raysft.config import Config
    from raysft.data.encode import make_encoder

    remarks.quiet()
    config = Config.model_validate(
        {
            "data": {"train": [{"path": "none"}], "tokens_per_batch": row, "lanes": 1},
            "model": {"tokenizer": "bytes", "config": {**DENSE, **SHAPES}[shape], "moe": moe},
            "peft": peft or {},
            "optim": {"lr": 1e-4},
            "parallel": {"strategy": strategy},
            "train": {"precision": "fp32" if CPU and moe else "bf16"},
        }
    )
    encoder = make_encoder(config.model, config.data, ROOT)
    began = time.perf_counter()
    with device():
        model = models.build(config.model, config.data, encoder, seed=0)
        if peft:
            add_adapters(model, config, 100)
    if not CPU:
        torch.cuda.empty_cache()
    return config, model, time.perf_counter() - began


def speed(
    strategy: Strategy, world: World, model: SpeechModel, row: int, documents: int, times: int = 8
) -> Found | str:
    """Of whole steps on one packed row of so many documents."""
    import numpy as np
    import torch

    from raysft.data.example import MicroBatch, Sequence
    from raysft.train.feed import turn_of
    from raysft.train.step import StepBatch, forward_backward

    draws = np.random.default_rng(0)
    ids = [draws.integers(5, 250, row // documents).astype(np.int32) for _ in range(documents)]
    sequences = [Sequence(f"{number}", "asr", x, x) for number, x in enumerate(ids)]
    batch = StepBatch(0, 1, {}, [turn_of(model, MicroBatch.join(0, 1, 0, sequences))])

    def one() -> None:
        forward_backward(strategy, world, batch, ["asr"], batch.counts(), 0)
        strategy.step(1e-4)

    try:
        one()
        forget_peak()
        seconds = timed(one, times, 2)
        return {"tokens_per_s": row / seconds, "ms": 1e3 * seconds, "peak_gb": peak_gb()}
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"


def wrapped(config: Config, model: SpeechModel) -> tuple[Strategy, World]:
    from raysft.parallel import World, make_strategy

    world = World.current(device())
    strategy = make_strategy(config, model.supervised, world)
    strategy.module.train()
    return strategy, world


# -- sections ------------------------------------------------------------------------------------


def tests() -> Found:
    """tests/gpu, in a process of its own."""
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "--durations=5"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    (OUT / "tests.txt").write_text(done.stdout + done.stderr)
    return {"rc": done.returncode, "tail": done.stdout.strip().splitlines()[-12:]}


def lora() -> Found:
    """8B: as it is; adapters' inputs not cast; norms in half too; keys not repeated; longer rows;
    compiled. Each with those before it."""
    import torch

    from raysft.models.compiled import compile_blocks
    from raysft.parallel.blocks import blocks

    row = 256 if CPU else 4096
    config, model, built = make(
        "tiny" if CPU else "llama3_8b", row, peft={"method": "lora", "r": 16, "alpha": 32}
    )
    strategy, world = wrapped(config, model)
    found: Found = {"build_s": built, "as_is": speed(strategy, world, model, row, 8)}
    if CPU:
        return found
    kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as trace:
        speed(strategy, world, model, row, 8, 1)
    table = trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=40)
    (OUT / "lora_profile.txt").write_text(table)
    found["rows_of_8192"] = speed(strategy, world, model, 2 * row, 16)
    print(json.dumps({"lora, before it is compiled": found}), flush=True)
    began = time.perf_counter()
    compile_blocks(blocks(model.supervised), world.device)
    found["compiled"] = speed(strategy, world, model, row, 8)
    found["compile_s"] = time.perf_counter() - began
    return found


def experts() -> Found:
    """Forward and backward of one layer's experts, tokens given: milliseconds, TFLOP/s and what
    share of one large product's they are. tokens: balanced, and skewed to few experts."""
    from dataclasses import replace

    import moe

    shape = moe.SHAPES[1]  # DeepSeek-V2-Lite
    if CPU:
        shape = replace(shape, width=64, inner=32)
    ceiling = matmul_tflops()
    found: Found = {"shape": vars(shape), "matmul_tflops": ceiling}
    for trains, way in moe.ways(moe.model_of(shape)):
        name = f"{trains}, {way}"
        try:
            layer = moe.layer_of(moe.made(shape, trains, way))
            for tokens, skewed in ((2048, False), (8192, False), (8192, True)):
                count = tokens // 64 if CPU else tokens
                run = moe.block(layer, shape, count, skewed)
                run()
                forget_peak()
                seconds = sorted(run() for _ in range(1 if CPU else 5))[0 if CPU else 2]
                flops = (3 if trains == "full" else 2) * 6 * count * shape.chosen
                tflops = flops * shape.width * shape.inner / seconds / 1e12
                found[f"{name}, {count} {'skewed' if skewed else 'balanced'}"] = {
                    **{"ms": 1e3 * seconds, "tflops": tflops, "of_matmul": tflops / ceiling},
                    "peak_gb": peak_gb(),
                }
        except Exception as error:  # noqa: BLE001 - the next way may work
            found[name] = failure(error)
        free()
    return found


def experts_step() -> Found:
    """Whole steps through our own path, all weights and adapters on experts, by each backend and by
    transformers' loop."""
    from raysft.models.experts import use
    from raysft.models.fastest import candidates

    row, shape = (256, "lite_tiny") if CPU else (8192, "lite")
    found: Found = {"matmul_tflops": matmul_tflops()}
    lora: Found = {"method": "lora", "r": 16, "alpha": 32, "experts": True}
    for trains, peft in (("full", None), ("lora", lora)):
        config, model, _ = make(shape, row, peft=peft, moe={"experts": "torch"})
        strategy, world = wrapped(config, model)
        able = ["loop", *(way for way in candidates(model.net, device(), half()) if way != "loop")]
        for way in [*able, *([] if peft else ["transformers"])]:
            try:
                if way == "transformers":
                    model.net.set_experts_implementation("eager")
                else:
                    use(model.net, way)
                found[f"{trains}, {way}"] = speed(strategy, world, model, row, 16, 5)
            except Exception as error:  # noqa: BLE001 - the next way may work
                found[f"{trains}, {way}"] = failure(error)
        base = found[f"{trains}, loop"]
        for name, line in found.items():
            if name.startswith(trains) and isinstance(line, dict) and isinstance(base, dict):
                line["faster_than_loop"] = base["ms"] / line["ms"]
        del strategy, model
        free()
    return found


def trainer() -> Found:
    """The 8B with LoRA by transformers' Trainer."""
    import gpu_finetune

    shape, row = ("tiny", 256) if CPU else ("llama3_8b", 4096)
    return gpu_finetune.trainer(
        gpu_finetune.Case(shape, "lora", "full rows", row, 12, 2, 6), profile=None
    )


def full() -> Found:
    """1B, all weights: ddp (autocast over float32), fsdp of one process, two saves meanwhile."""
    import torch
    import torch.distributed as dist

    from raysft.run.catalogue import Catalogue
    from raysft.run.storage import Folder
    from raysft.train.checkpoint import Saver

    row, shape, found = (256, "tiny", {}) if CPU else (4096, "llama3_1b", {})
    with tempfile.TemporaryDirectory() as scratch:
        dist.init_process_group(
            "gloo" if CPU else "cpu:gloo,cuda:nccl",
            init_method=f"file://{scratch}/store",
            rank=0,
            world_size=1,
        )
        if not CPU:
            torch.cuda.set_device(0)
        for name in ("ddp", "fsdp"):
            config, model, _ = make(shape, row, strategy=name)
            strategy, world = wrapped(config, model)
            found[name] = speed(strategy, world, model, row, 8)
            if name == "ddp":
                del strategy, model
                free()
        saver = Saver(Catalogue(Folder(Path(scratch))), world, 1)
        for number in (1, 2):
            saver.start(number, strategy, {"cursor": None})
            meanwhile = speed(strategy, world, model, row, 8, 3)
            saver.wait()
            save = saver.finished()[-1]
            found[f"save_{number}"] = {
                **{"stalled_s": save.stalled, "seconds": save.seconds, "gb": save.bytes / 1e9},
                "steps_meanwhile": meanwhile,
            }
        dist.destroy_process_group()
    return found


def generate() -> Found:
    """Greedy answers of the 1B to prompts of 300 tokens."""
    import numpy as np

    from raysft.data.example import Sequence

    _, model, _ = make("tiny" if CPU else "llama3_1b", 4096)
    model.net.to(half())
    prompts, new = (4, 8) if CPU else (32, 64)
    draws = np.random.default_rng(0)
    asked = []
    for number in range(prompts):
        ids = draws.integers(5, 250, 300).astype(np.int32)
        asked.append(Sequence(f"{number}", "asr", ids, np.full_like(ids, -100)))
    model.stop_ids = [model.net.config.vocab_size - 1]  # so that all answers are as long
    seconds = timed(lambda: model.generate(asked, new), 2, 1)
    return {"prompts": prompts, "new_tokens": new, "s": seconds, "ms_a_token": 1e3 * seconds / new}


def shapes() -> Found:
    """1B with LoRA on rows of changing documents, 90% to 100% full: as they are, filled up
    (`train.static_shapes`), and compiled. Memory is what torch has reserved after 10 rows and after
    all; a step after the tenth counts for the speed."""
    import numpy as np
    import torch

    from raysft.data.example import MicroBatch, Sequence
    from raysft.models.compiled import compile_blocks
    from raysft.models.layout import Static
    from raysft.parallel.blocks import blocks
    from raysft.train.feed import turn_of
    from raysft.train.step import StepBatch, forward_backward

    row, rows = (256, 14) if CPU else (4096, 60)
    config, model, _ = make(
        "tiny" if CPU else "llama3_1b", row, peft={"method": "lora", "r": 16, "alpha": 32}
    )
    strategy, world = wrapped(config, model)

    def trained(static: Static | None) -> Found:
        draws, seconds, tokens, early = np.random.default_rng(0), 0.0, 0, 0.0
        free()
        for number in range(rows):
            left, sequences = int(row * draws.uniform(0.9, 1.0)), []
            while left > 8:
                length = min(left, int(draws.integers(8, row // 4)))
                ids = draws.integers(5, 250, length).astype(np.int32)
                sequences.append(Sequence(f"{left}", "asr", ids, ids))
                left -= length
            turn = turn_of(model, MicroBatch.join(0, 1, 0, sequences), static)
            batch = StepBatch(0, 1, {}, [turn])
            before = time.perf_counter()
            forward_backward(strategy, world, batch, ["asr"], batch.counts(), 0)
            strategy.step(1e-4)
            if not CPU:
                torch.cuda.synchronize()
            if number >= 10:
                seconds += time.perf_counter() - before
                tokens += int(turn.counts["tokens"])
            elif number == 9:
                early = reserved_gb()
        return {"tokens_per_s": tokens / seconds, "gb_early": early, "gb_late": reserved_gb()}

    found: Found = {"as_they_are": trained(None), "filled": trained(Static(row))}
    if CPU:
        return found
    torch._dynamo.utils.counters.clear()
    every = blocks(model.supervised)
    compile_blocks(every, device(), every)
    found["filled_compiled"] = trained(Static(row))
    found["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return found


def reserved_gb() -> float:
    """What torch holds of the GPU."""
    import torch

    return 0.0 if CPU else torch.cuda.memory_reserved() / 1e9


# -- all of them ---------------------------------------------------------------------------------

SECTIONS: dict[str, tuple[Callable[[], Found], int]] = {  # and seconds at most
    "ceilings": (ceilings, 40),
    "tests": (tests, 100),
    "attention": (attention, 45),
    "lora": (lora, 110),
    "experts": (experts, 60),
    "experts_step": (experts_step, 70),
    "trainer": (trainer, 45),
    "full": (full, 60),
    "audio": (audio, 40),
    "generate": (generate, 35),
    "shapes": (shapes, 60),
}


def one(name: str) -> None:
    """A section, in this process."""
    section, _ = SECTIONS[name]
    began = time.perf_counter()
    found = section()
    line = {name: found, "seconds": round(time.perf_counter() - began, 1), "cpu": CPU}
    text = json.dumps(line, default=str)
    print(text, flush=True)
    with (OUT / "results.jsonl").open("a") as file:
        file.write(text + "\n")


def section_of(name: str, seconds: float) -> str:
    """A section, in a process of its own; returns what is to be said of it."""
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # it may not be installed
    environment = {**os.environ, "OUT": str(OUT), "PYTHONPATH": os.pathsep.join(places)}
    if CPU:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with (OUT / f"{name}.log").open("w+") as log:
        command = [sys.executable, __file__, name]
        try:
            done = subprocess.run(
                command, timeout=seconds, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            ended = "" if done.returncode == 0 else f"{name}: failed, exit code {done.returncode}: "
        except subprocess.TimeoutExpired:
            ended = f"{name}: cut off after {seconds:.0f} s: "
        log.seek(0)
        said = log.read().strip()
    if ended:
        return ended + said[-800:]
    return "\n".join(line for line in said.splitlines() if line.startswith("{"))


def main() -> int:
    """Run all sections, or the one that is named; 1 where one has failed."""
    OUT.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) > 1:
        if sys.argv[1] not in SECTIONS:
            print(f"{sys.argv[1]}: there is no such section; there are {', '.join(SECTIONS)}")
            return 2
        one(sys.argv[1])
        return 0
    end = time.monotonic() + float(os.environ.get("LIMIT", 560))
    failed = False
    for name, (_, most) in SECTIONS.items():
        left = end - time.monotonic()
        said = section_of(name, min(most, left)) if left > 15 else f"{name}: no time is left"
        failed |= said.startswith(f"{name}: ")
        print(said, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
