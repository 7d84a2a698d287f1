"""Fine-tuning on one GPU: ours against transformers' Trainer with peft, in the same run. No Ray.

Shapes of Llama-3-8B and Qwen2.5-7B with LoRA, and of Llama-3.2-1B with all weights trained; random
weights, bf16, AdamW, every token supervised.

    full rows   examples of exactly one row: what the kernels give
    varied      log-normal lengths: ours packs rows; the Trainer's padding-free collator joins the
                examples of a batch, as many as fill a row on average

TFLOP/s by the formula that the published figures use: 4 N a token for LoRA (no gradients of frozen
weights), 6 N for all weights, N = weights of matrices, the head among them; attention not counted.
Ways run one after the other, each in a fresh process. `--profile` writes where our time goes.
Without a GPU only --quick works: tiny shapes on the CPU. Full run: about 12 min on an H100.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import results_io
from matplotlib import pyplot

LLAMA = {"model_type": "llama", "rope_theta": 500000.0, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "llama3_8b": {
        **LLAMA,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen2_5_7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "llama3_1b": {
        **LLAMA,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        **LLAMA,
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
RANK, ALPHA, RATE = 16, 32, 1e-4


@dataclass(frozen=True)
class Case:
    """row: tokens of a packed row. examples: of varied lengths, one epoch of them is timed."""

    shape: str
    method: str
    lengths: str
    row: int
    examples: int
    warm: int
    steps: int


def cases(quick: bool) -> list[Case]:
    if quick:
        sizes = {"row": 256, "examples": 12, "warm": 1, "steps": 2}
        return [Case("tiny", "lora", lengths, **sizes) for lengths in ("full rows", "varied")]
    sizes = {"row": 4096, "examples": 160, "warm": 3, "steps": 12}
    wanted = (("llama3_8b", "lora"), ("qwen2_5_7b", "lora"), ("llama3_1b", "none"))
    return [
        Case(shape, method, lengths, **sizes)
        for shape, method in wanted
        for lengths in ("full rows", "varied")
    ]


def lengths_of(case: Case) -> np.ndarray:
    """Examples' lengths in tokens: warm-up first, then what is timed."""
    rng = np.random.default_rng(0)
    if case.lengths == "full rows":
        return np.full(case.warm + case.steps, case.row)
    drawn = rng.lognormal(np.log(case.row / 8), 0.8, case.examples)
    return np.clip(drawn, 16, case.row).astype(np.int64)


def tokens_of(case: Case) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    high = min(250, SHAPES[case.shape]["vocab_size"])
    return [rng.integers(5, high, n).astype(np.int32) for n in lengths_of(case)]


# -- ours ----------------------------------------------------------------------------------------


def ours(case: Case, profile: Path | None) -> dict[str, Any]:
    """Our adapter, packed rows, strategy and step."""
    import torch

    from raysft import models, remarks
    from raysft.adapters.attach import add_adapters
    from raysft.config.schema import Config
    from raysft.data.encode import make_encoder
    from raysft.data.example import MicroBatch, Sequence
    from raysft.data.plan import pack
    from raysft.parallel import World, make_strategy
    from raysft.train.feed import turn_of
    from raysft.train.step import StepBatch, forward_backward

    remarks.quiet()
    cuda = torch.cuda.is_available()
    world = World.current("cuda:0" if cuda else "cpu")
    peft = {"method": "lora", "r": RANK, "alpha": ALPHA} if case.method == "lora" else {}
    config = Config.model_validate(
        {
            "data": {"tokens_per_batch": case.row},
            "model": {"tokenizer": "bytes", "config": SHAPES[case.shape]},
            "peft": peft,
            "optim": {"lr": RATE},
            "train": {"precision": "bf16"},
        }
    )
    encoder = make_encoder(config.model, config.data, Path.cwd())
    adapter = models.build(config.model, config.data, encoder, seed=0)
    matrices = weights_of(adapter.model)
    if case.method == "lora":
        add_adapters(adapter, config, 100)
    strategy = make_strategy(config, adapter.supervised, world)
    strategy.module.train()

    examples = tokens_of(case)
    rows = pack.packed(lengths_of(case), case.row)
    if case.lengths == "varied":
        rows = [*rows[:1] * case.warm, *rows]
    batches = []
    for step, row in enumerate(rows):
        sequences = [Sequence(f"{i}", "asr", examples[i], examples[i]) for i in row]
        turn = turn_of(adapter, MicroBatch.join(0, step, 0, sequences))
        batches.append(StepBatch(0, step, {}, [turn]))

    def one(batch: StepBatch) -> float:
        sums = forward_backward(strategy, world, batch, ["asr"], batch.counts(), 0)
        strategy.step(1.0)
        return sums.means(["asr"])["loss"]

    for batch in batches[: case.warm]:
        one(batch)
    _reset_peak(cuda)
    began = time.perf_counter()
    losses = [one(batch) for batch in batches[case.warm :]]
    seconds = time.perf_counter() - began
    if profile is not None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
        with torch.profiler.profile(activities=kinds) as found:
            one(batches[-1])
        key = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        profile.write_text(found.key_averages().table(sort_by=key, row_limit=25))
    tokens = sum(batch.turns[0].tokens for batch in batches[case.warm :])
    return _result(case, seconds, tokens, losses[0], matrices, cuda)


# -- transformers' Trainer -----------------------------------------------------------------------


def trainer(case: Case, profile: Path | None) -> dict[str, Any]:
    """transformers' Trainer, peft, DataCollatorWithFlattening."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        CONFIG_MAPPING,
        AutoModelForCausalLM,
        DataCollatorWithFlattening,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
    from transformers.utils import is_flash_attn_2_available

    cuda = torch.cuda.is_available()
    settings = dict(SHAPES[case.shape])
    config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
    attention = "flash_attention_2" if cuda and is_flash_attn_2_available() else "sdpa"
    torch.manual_seed(0)
    dtype = torch.bfloat16 if case.method == "lora" else torch.float32
    with torch.device("cuda" if cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    matrices = weights_of(model)
    if case.method == "lora":
        lora = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, lora)
    examples = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in tokens_of(case)]
    mean = float(lengths_of(case).mean())
    batch = max(1, round(case.row / mean))
    warm = case.warm

    class Timed(TrainerCallback):
        """Begins after the warm-up."""

        began = ended = 0.0

        def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            self.ended = time.perf_counter()
            if state.global_step == warm:
                _reset_peak(cuda)
                self.began = self.ended

    timed = Timed()
    with tempfile.TemporaryDirectory() as scratch:
        if case.lengths == "varied":
            examples = [*examples[: warm * batch], *examples]
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=1,
            per_device_train_batch_size=batch,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            bf16=True,
            use_cpu=not cuda,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            dataloader_pin_memory=cuda,
        )
        run = Trainer(
            model, arguments, data_collator=DataCollatorWithFlattening(), train_dataset=examples
        )
        run.add_callback(timed)
        run.remove_callback(PrinterCallback)
        run.train()
        losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    tokens = sum(len(example["input_ids"]) for example in examples[warm * batch :])
    seconds = timed.ended - timed.began
    found = _result(case, seconds, tokens, losses[warm], matrices, cuda)
    return {**found, "attention": attention}


# -- both ----------------------------------------------------------------------------------------


def weights_of(model: Any) -> int:
    """Weights of matrices that a token is multiplied with: not the embedding, but the head."""
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    return matrices - (0 if head is table else table.numel())


def _reset_peak(cuda: bool) -> None:
    if cuda:
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _result(
    case: Case, seconds: float, tokens: int, loss: float, matrices: int, cuda: bool
) -> dict[str, Any]:
    import torch

    each = (4 if case.method == "lora" else 6) * matrices
    return {
        "tokens_per_s": tokens / seconds,
        "tflops": each * tokens / seconds / 1e12,
        "peak_gb": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "first_loss": loss,
        "matrices": matrices,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


WAYS = {"ours": ours, "Trainer": trainer}


def _run(case: Case, way: str, profile: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "result.json"
        call = json.dumps([vars(case), way, str(profile) if profile else None, str(out)])
        command = [sys.executable, str(Path(__file__).absolute()), "--way", call]
        subprocess.run(command, check=True, cwd=scratch, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())


def draw(runs: list[dict[str, Any]]) -> pyplot.Figure:
    names = list(dict.fromkeys(f"{r['shape']}\n{r['method']}, {r['lengths']}" for r in runs))
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 3.6))
    places = np.arange(len(names))
    for axis, key in zip(axes, ("tokens_per_s", "tflops"), strict=True):
        for number, way in enumerate(WAYS):
            values = [r[key] for r in runs if r["way"] == way]
            bars = axis.bar(places + 0.4 * number, values, 0.38, label=way)
            axis.bar_label(bars, fmt="{:,.0f}", fontsize=7)
        axis.set_xticks(places + 0.2, names, fontsize=6)
        axis.set_title(key)
    axes[0].legend()
    figure.tight_layout()
    return figure


def main() -> None:
    if "--way" in sys.argv:
        case, way, profile, out = json.loads(sys.argv[sys.argv.index("--way") + 1])
        result = WAYS[way](Case(**case), Path(profile) if profile else None)
        Path(out).write_text(json.dumps(result))
        return
    profiled = "--profile" in sys.argv
    if profiled:
        sys.argv.remove("--profile")
    options = results_io.arguments(__doc__.splitlines()[0])
    import torch

    if not options.quick and not torch.cuda.is_available():
        raise SystemExit("gpu_finetune: there is no GPU; --quick runs tiny shapes on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for case in cases(options.quick):
        for way in WAYS:
            name = f"gpu_profile_{case.shape}_{case.lengths.replace(' ', '_')}.txt"
            profile = options.out.absolute() / name if profiled and way == "ours" else None
            result = _run(case, way, profile)
            runs.append({"way": way, **vars(case), **result})
            print(
                f"{case.shape:10} {case.method:5} {case.lengths:9} {way:8}"
                f"{result['tokens_per_s']:10,.0f} tokens/s {result['tflops']:8.1f} TFLOP/s  peak "
                f"{result['peak_gb'] or 0:5.1f} GB  first loss {result['first_loss']:.3f}",
                flush=True,
            )
    pairs = zip(runs[::2], runs[1::2], strict=True)
    ratios = {
        f"{mine['shape']} {mine['method']} {mine['lengths']}": mine["tokens_per_s"]
        / theirs["tokens_per_s"]
        for mine, theirs in pairs
    }
    payload = {"ours_over_trainer": ratios, "runs": runs}
    quick, out = options.quick, options.out
    print(results_io.write("gpu_finetune", payload, draw(runs), quick=quick, out=out))


if __name__ == "__main__":
    main()
