"""What does a start of training cost a worker: host memory and time to load a checkpoint?

One checkpoint of 2 GB in float32 (random weights, llama's layers), loaded for full training under
ddp (which keeps all of it), fsdp and zero3, by 2 and by 4 processes on one machine. `peak_gb` is
the most anonymous memory that a worker held until it had its weights, libraries among it (sampled
each 5 ms; the pages of the mapped files are the system's to drop, and not counted); of zero3 that
is before DeepSpeed makes its optimizer, which copies all of them (`ready_gb`). `own_gb` is what the
weights that a worker keeps take: 4 bytes each.

For 8B and 70B, by formula: peak = libraries + 4 N / W + what was more than that here (`more_gb`,
of single matrices and of what is read ahead), times the largest matrix over the largest here.
Full run: about 2 min on 2 cores, and 12 GB.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results_io
from matplotlib import pyplot

WAYS = (("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("zero3", 2), ("zero3", 4))
LARGER = {"8B": (8.03e9, 128_256 * 4096), "70B": (70.6e9, 128_256 * 8192)}


@dataclass(frozen=True)
class Size:
    hidden: int
    layers: int
    vocabulary: int


FULL = Size(hidden=2048, layers=7, vocabulary=32_000)
QUICK = Size(hidden=64, layers=2, vocabulary=512)


def write(size: Size, folder: Path) -> int:
    """A checkpoint of some files there; returns its number of parameters."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from raysft.data.tokenizer import byte_tokenizer

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=11 * size.hidden // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 64,
        dtype="float32",
    )
    with torch.device("meta"):
        net = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in net.named_parameters():
        layer = name.split(".")[2] if ".layers." in name else "ends"
        values = torch.empty(parameter.shape)
        shards.setdefault(layer, {})[name] = values.normal_(std=0.02, generator=generator)
        if "norm" in name:
            values.fill_(1.0)
    files = {layer: f"model-{layer}.safetensors" for layer in shards}
    for layer, tensors in shards.items():
        save_file(tensors, folder / files[layer], metadata={"format": "pt"})
    weights = {name: files[layer] for layer, tensors in shards.items() for name in tensors}
    index = {"metadata": {}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return sum(parameter.numel() for parameter in net.parameters())


class Peak(threading.Thread):
    """The most anonymous memory of this process, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0

    def run(self) -> None:
        while True:
            self.bytes = max(self.bytes, held())
            time.sleep(0.005)


def held() -> int:
    """Anonymous memory of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def one_worker(checkpoint: str, strategy: str) -> dict[str, Any]:
    """This process's share; RANK, WORLD_SIZE and the rendezvous are in the environment."""
    peak = Peak()
    peak.start()
    import torch
    import torch.distributed as dist

    from raysft import remarks, worker
    from raysft.config.schema import Config
    from raysft.data.encode import make_encoder
    from raysft.parallel import World, zero_fill

    remarks.quiet()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['RENDEZVOUS']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    settings = {
        "data": {"train": [{"path": "none"}]},
        "model": {"path": checkpoint},
        "parallel": {"strategy": strategy},
    }
    config = Config.model_validate(settings)
    if strategy.startswith("zero"):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401 - libraries are not what a strategy takes
    import torch.distributed.fsdp

    filled: list[int] = []
    fill = zero_fill.fill

    def watched(*args: Any) -> None:
        fill(*args)
        filled.append(peak.bytes)

    zero_fill.fill = watched
    encoder = make_encoder(config.model, config.data, Path.cwd())
    world = World.current("cpu")
    before = held()
    world.barrier()
    began = time.perf_counter()
    speech_model, _ = worker.build_to_wrap(config, encoder, 0)
    wrapped = worker.wrap(config, speech_model, world)
    world.barrier()
    seconds = time.perf_counter() - began
    ready = max(world.gather(peak.bytes))
    loaded = max(world.gather(filled[0] if filled else peak.bytes))
    del wrapped
    gb = 2**30
    return {
        "seconds": seconds,
        "libraries_gb": before / gb,
        "peak_gb": loaded / gb,
        "ready_gb": ready / gb,
    }


def measure(size: Size) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        checkpoint.mkdir()
        parameters = write(size, checkpoint)
        found = []
        for strategy, workers in WAYS:
            result = results_io.run_group(__file__, [str(checkpoint), strategy], workers)
            share = 1 if strategy == "ddp" else workers
            own = 4 * parameters / share / 2**30
            more = result["peak_gb"] - result["libraries_gb"] - own
            found.append(
                {"strategy": strategy, "workers": workers, **result, "own_gb": own, "more_gb": more}
            )
            print(
                f"{strategy:6} x {workers}: {result['seconds']:6.1f} s, peak "
                f"{result['peak_gb']:5.2f} GB, of them weights {own:5.2f} GB",
                flush=True,
            )
    return {"parameters": parameters, "runs": found}


def extrapolate(size: Size, runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """GB a worker for larger models on 8 of them, by the formula above."""
    found: dict[str, dict[str, float]] = {}
    for name, (parameters, matrix) in LARGER.items():
        found[name] = {}
        for strategy in ("ddp", "fsdp", "zero3"):
            run = [r for r in runs if r["strategy"] == strategy][-1]
            scale = max(1.0, matrix / (size.vocabulary * size.hidden))
            own = 4 * parameters / (1 if strategy == "ddp" else 8) / 2**30
            found[name][strategy] = run["libraries_gb"] + own + max(0.0, run["more_gb"]) * scale
    return found


def draw(runs: list[dict[str, Any]]) -> pyplot.Figure:
    figure, axis = pyplot.subplots(figsize=(7, 3.4))
    names = [f"{run['strategy']} x {run['workers']}" for run in runs]
    below = [0.0] * len(runs)
    for key, label in (("libraries_gb", "libraries"), ("own_gb", "weights"), ("more_gb", "more")):
        values = [max(0.0, run[key]) for run in runs]
        axis.bar(names, values, bottom=below, label=label)
        below = [a + b for a, b in zip(below, values, strict=True)]
    axis.set_ylabel("GB of a worker, at most")
    axis.legend()
    figure.tight_layout()
    return figure


def main() -> None:
    if "--worker" in sys.argv:
        checkpoint, strategy, out = sys.argv[sys.argv.index("--worker") + 1 :]
        result = one_worker(checkpoint, strategy)
        if os.environ["RANK"] == "0":
            Path(out).write_text(json.dumps(result))
        return
    options = results_io.arguments(__doc__.splitlines()[0])
    size = QUICK if options.quick else FULL
    measured = measure(size)
    payload = {
        "size": vars(size),
        **measured,
        "on_8_workers_gb": extrapolate(size, measured["runs"]),
    }
    figure = draw(measured["runs"])
    print(results_io.write("load", payload, figure, quick=options.quick, out=options.out))


if __name__ == "__main__":
    main()
