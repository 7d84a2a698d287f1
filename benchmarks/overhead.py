"""What does everything around the model cost, and what do packed rows win?

One model (Qwen3, 6 layers of 256, random weights), one corpus (dialogues of text and speech units,
log-normal lengths), one epoch, AdamW fused, clipping, the same torch threads, in four ways:

    ours              launch.run: a Ray Train worker, the plan through data tasks, ledger, metrics
    bare loop         plain torch on the very same batches, laid out in memory beforehand, with the
                      same attention: what is left of a step when nothing is around it
    Trainer, padding  transformers' Trainer, a padding collator, batches of about as many tokens
    Trainer, grouped  the same with train_sampling_strategy="group_by_length"

`step_ratio` compares ours with the bare loop, ten steps with the same ten steps, the first ten left
out. The two run at the same time, in step: the bare loop begins its second lap when ours does, so
that whatever slows the machine slows both; the median of all laps of all rounds counts.
`supervised_tokens_per_s` compares all four: the Trainers' data lies in memory already encoded and
they are warmed up before their epoch is timed; ours reads, encodes and packs while it trains. The
Trainers run alone, in fresh processes with no Ray up, and the fastest of their rounds counts.
Full run: about 12 min; it wants four cores.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import results_io
from matplotlib import pyplot

from raysft.config import Config
from raysft.data.encode import Encoder
from raysft.data.index.build import Index

UNITS = 500
LAP = 10  # steps
SYLLABLES = ("ba", "den", "fi", "gor", "ka", "lum", "mi", "nes", "po", "ral", "su", "tev")


@dataclass(frozen=True)
class Size:
    """How much is measured. batch: examples of a Trainer's batch, about `budget` tokens."""

    examples: int
    rounds: int  # of ours beside the bare loop, whose steps are compared to the hundredth
    trainer_rounds: int
    threads: int
    layers: int
    hidden: int
    budget: int
    batch: int


# One thread: Ray's processes and the data tasks then have a core even on a machine of two.
FULL = Size(
    examples=800,
    rounds=3,
    trainer_rounds=1,
    threads=1,
    layers=6,
    hidden=256,
    budget=2560,
    batch=16,
)
QUICK = Size(
    examples=150, rounds=1, trainer_rounds=1, threads=1, layers=2, hidden=32, budget=1280, batch=8
)


def write_corpus(path: Path, n: int, rng: np.random.Generator) -> None:
    """MoST JSON: half asr, half tts; each word has its units, so that there is something to learn.

    Lengths with the prompt are log-normal with mean 156 and at most 879 tokens; a text character
    goes with about 1.7 units, as in speech of 15 characters a second and 25 units.
    """
    words = ["".join(rng.choice(SYLLABLES, rng.integers(1, 4))) for _ in range(300)]
    spoken = [rng.integers(0, UNITS, round(1.7 * (len(word) + 1))) for word in words]
    items = []
    for number in range(n):
        room = float(np.clip(rng.lognormal(4.8, 0.7), 40, 870)) - 25
        chosen: list[int] = []
        while room > 0:
            chosen.append(int(rng.integers(len(words))))
            room -= len(words[chosen[-1]]) + 1 + len(spoken[chosen[-1]])
        text = " ".join(words[w] for w in chosen)
        units = "".join(f"[Hu{unit}]" for w in chosen for unit in spoken[w])
        asr = {"instruction": "Transcribe.", "input": units, "output": text}
        tts = {"instruction": "Speak.", "input": text, "output": units}
        items.append({"id": f"item{number}", **(tts if number % 2 else asr)})
    path.write_text(json.dumps(items))


def make_config(folder: Path, name: str, size: Size, mode: str = "packed") -> Config:
    """One epoch at a constant rate. Everything that is recorded by default is recorded."""
    return Config.model_validate(
        {
            "run": {"name": name, "storage_path": str(folder / "runs")},
            "data": {
                "train": [{"path": str(folder / "train.json")}],
                "lanes": 1,
                "tokens_per_batch": size.budget,
                "mode": mode,
            },
            "model": {
                "tokenizer": "bytes",
                "speech_units": UNITS,
                "config": {
                    "model_type": "qwen3",
                    "hidden_size": size.hidden,
                    "intermediate_size": 3 * size.hidden,
                    "num_hidden_layers": size.layers,
                    "num_attention_heads": size.hidden // 32,
                    "num_key_value_heads": size.hidden // 64 or 1,
                    "head_dim": 32,
                },
            },
            "parallel": {"threads": size.threads, "device": "cpu"},
            "optim": {"lr": 1e-3},
            "train": {"epochs": 1},
            "checkpoint": {"every": 0},
            "log": {"every": LAP},
        }
    )


# -- ours ----------------------------------------------------------------------------------------


def ours(folder: Path, size: Size, number: int) -> dict[str, Any]:
    """The whole job, as `jobs/sft.py` runs it; timed by its own metrics.jsonl."""
    from raysft.driver import launch
    from raysft.driver.session import ray_session
    from raysft.run.lines import read_lines

    config = make_config(folder, _name(number), size)
    began = time.perf_counter()
    with ray_session():
        outcome = launch.run(config, lambda line: None)
    lines = read_lines(_metrics(folder, number))
    assert outcome.folder == _metrics(folder, number).parent
    steps = np.diff([0, *(line["step"] for line in lines)])
    return {
        "laps": [line["seconds"] / n for line, n in zip(lines, steps, strict=True)],
        "losses": [line["loss"] for line in lines],
        "loss": _mean_loss([(line["loss"], line["supervised_tokens"]) for line in lines]),
        "data_wait": statistics.median(line["data_wait"] for line in lines[1:]),
        "supervised_tokens_per_s": sum(line["supervised_tokens"] for line in lines[1:])
        / sum(line["seconds"] for line in lines[1:]),
        "wall_s_with_start": time.perf_counter() - began,
    }


def _name(number: int) -> str:
    return f"ours_{number}"


def _metrics(folder: Path, number: int) -> Path:
    return folder / "runs" / _name(number) / "metrics.jsonl"


# -- the others: each in a fresh process ---------------------------------------------------------


def bare_loop(folder: Path, size: Size, number: int) -> dict[str, Any]:
    """Plain torch on our batches; the same laps as ours, from the second on at the same time."""
    import torch
    import torch.nn.functional as F

    from raysft import models
    from raysft.data.plan.plan import Plan
    from raysft.data.read.reader import Reader, Work
    from raysft.models.attention import document_mask

    torch.set_num_threads(size.threads)
    config = make_config(folder, "bare", size)
    encoder, index = _prepared(config)
    adapter = models.build(config.model, config.data, encoder, config.run.seed)
    plan = Plan.of(index, config.data, config.run.seed)
    works = []
    for step in plan.steps(plan.start()):
        if step.epoch > 0:
            break
        works.append(Work(step.epoch, step.step, 0, step.lanes[0]))
    reader = Reader(index, encoder, config.data.tokens_per_batch, config.run.seed)
    batches = [adapter.collate(micro_batch) for micro_batch in reader.read(iter(works))]

    model, rate = adapter.model.train(), config.optim.lr
    betas = (config.optim.betas[0], config.optim.betas[1])
    optimizer = torch.optim.AdamW(
        model.parameters(), rate, betas, weight_decay=config.optim.weight_decay, fused=True
    )
    laps, losses = [], []
    for at in range(0, len(batches), LAP):
        chosen = batches[at : at + LAP]
        if at == LAP:
            _wait_for_lap(_metrics(folder, number))
        began, total = time.perf_counter(), 0.0
        for batch in chosen:
            logits = model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                attention_mask=document_mask(batch["documents"]),
                logits_to_keep=batch["keep"],
                use_cache=False,
            ).logits
            loss = F.cross_entropy(logits[0], batch["targets"])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.item() * len(batch["targets"])
        laps.append(time.perf_counter() - began)
        losses.append((total, sum(len(batch["targets"]) for batch in chosen)))
    tokens = sum(count for _, count in losses[1:])
    return {
        "laps": [lap / len(batches[i * LAP : (i + 1) * LAP]) for i, lap in enumerate(laps)],
        "losses": [total / count for total, count in losses],
        "loss": sum(total for total, _ in losses) / sum(count for _, count in losses),
        "supervised_tokens_per_s": tokens / sum(laps[1:]),
    }


def _wait_for_lap(metrics: Path) -> None:
    """Until ours has written the line of its first lap: it begins the second at that moment."""
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().endswith("\n")):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{metrics} has no line after 300 s: ours did not start")
        time.sleep(0.005)


def trainer_padding(folder: Path, size: Size, number: int) -> dict[str, Any]:
    """transformers' Trainer, examples in random order, each batch padded to its longest."""
    return _trainer(folder, size, "random", number)


def trainer_grouped(folder: Path, size: Size, number: int) -> dict[str, Any]:
    """transformers' Trainer, batches of examples of about the same length."""
    return _trainer(folder, size, "group_by_length", number)


def _trainer(folder: Path, size: Size, sampling: str, number: int) -> dict[str, Any]:
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from raysft import models
    from raysft.data.read.reader import Reader, Work

    torch.set_num_threads(size.threads)
    config = make_config(folder, "trainer", size, mode="padded")
    encoder, index = _prepared(config)
    reader = Reader(index, encoder, int(index.tokens.sum()), config.run.seed)
    everything = next(reader.read(iter([Work(0, 1, 0, np.arange(len(index)))])))
    cuts = np.cumsum(everything.lengths)[:-1]
    examples = [
        {"input_ids": torch.from_numpy(ids).long(), "labels": torch.from_numpy(labels).long()}
        for ids, labels in zip(
            np.split(everything.input_ids, cuts), np.split(everything.labels, cuts), strict=True
        )
    ]
    tokenizer = encoder.tokenizer

    def pad(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        columns = {"input_ids": tokenizer.pad_token_id, "labels": -100}
        padded = {
            name: torch.nn.utils.rnn.pad_sequence(
                [example[name] for example in batch], batch_first=True, padding_value=value
            )
            for name, value in columns.items()
        }
        lengths = torch.tensor([len(example["input_ids"]) for example in batch])
        mask = torch.arange(padded["input_ids"].shape[1]) < lengths.unsqueeze(1)
        return {**padded, "attention_mask": mask.long()}

    class Ends(TrainerCallback):
        """When the epoch's steps began and ended."""

        began = ended = 0.0

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ended = time.perf_counter()

    def run(max_steps: int) -> tuple[float, Any]:
        arguments = TrainingArguments(
            output_dir=str(folder / "trainer"),
            num_train_epochs=1,
            max_steps=max_steps,
            per_device_train_batch_size=size.batch,
            train_sampling_strategy=sampling,
            learning_rate=config.optim.lr,
            adam_beta1=config.optim.betas[0],
            adam_beta2=config.optim.betas[1],
            weight_decay=config.optim.weight_decay,
            max_grad_norm=config.optim.clip,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            logging_steps=LAP,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=number,
        )
        net = models.build(config.model, config.data, encoder, config.run.seed).model
        ends = Ends()
        trainer = Trainer(net, arguments, data_collator=pad, train_dataset=examples)
        trainer.add_callback(ends)
        trainer.remove_callback(PrinterCallback)
        result = trainer.train()
        return ends.ended - ends.began, result

    run(3)
    seconds, result = run(-1)
    supervised = sum(int((example["labels"][1:] != -100).sum()) for example in examples)
    return {"supervised_tokens_per_s": supervised / seconds, "loss": result.training_loss}


def _prepared(config: Config) -> tuple[Encoder, Index]:
    from raysft.driver.preflight import prepare
    from raysft.remarks import quiet

    quiet()
    folder = Path(config.run.storage_path)
    folder.mkdir(parents=True, exist_ok=True)  # the run beside it, which makes it too, may be later
    prepared = prepare(config, folder)
    return prepared.encoder, prepared.train


def _mean_loss(parts: list[tuple[float, int]]) -> float:
    return sum(loss * count for loss, count in parts) / sum(count for _, count in parts)


# -- all -----------------------------------------------------------------------------------------

Way = Callable[[Path, Size, int], dict[str, Any]]
TRAINERS: dict[str, Way] = {
    "Trainer, padding": trainer_padding,
    "Trainer, grouped": trainer_grouped,
}


def measure(folder: Path, size: Size) -> dict[str, list[dict[str, Any]]]:
    """Ours beside the bare loop, then the Trainers, each in a process of its own."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "bare loop": []}
    for number in range(size.rounds):
        _together(folder, size, number, {"ours": ours, "bare loop": bare_loop}, found)
    for number in range(size.trainer_rounds):
        for name, way in TRAINERS.items():
            _together(folder, size, number, {name: way}, found)
    return found


def _together(
    folder: Path,
    size: Size,
    number: int,
    ways: dict[str, Way],
    found: dict[str, list[dict[str, Any]]],
) -> None:
    """These ways at the same time; what they measured is appended to `found`."""
    with ExitStack() as stack:
        started = {
            name: stack.enter_context(
                ProcessPoolExecutor(1, mp_context=get_context("spawn"))
            ).submit(way, folder, size, number)
            for name, way in ways.items()
        }
        for name, future in started.items():
            result = future.result()
            found.setdefault(name, []).append(result)
            print(
                f"round {number} {name:18} {result['supervised_tokens_per_s']:8,.0f} supervised "
                f"tokens/s  loss {result['loss']:.4f}",
                flush=True,
            )


def summarize(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of the laps of ten steps, which ran in pairs; the best tokens/s of each way."""
    for mine, bare in zip(found["ours"], found["bare loop"], strict=True):
        np.testing.assert_allclose(mine["losses"], bare["losses"], rtol=1e-3)
    laps = {
        name: np.array([run["laps"][1:] for run in found[name]]) for name in ("ours", "bare loop")
    }
    ratios = laps["ours"] / laps["bare loop"]
    speeds = {
        name: max(run["supervised_tokens_per_s"] for run in runs) for name, runs in found.items()
    }
    return {
        "step_s": {name: float(np.median(values)) for name, values in laps.items()},
        "step_ratio": float(np.median(ratios)),
        "step_ratio_by_round": [float(np.median(of_round)) for of_round in ratios],
        "step_ratio_quartiles": [float(q) for q in np.percentile(ratios, (25, 75))],
        "supervised_tokens_per_s": speeds,
        "ours_over": {name: speeds["ours"] / speed for name, speed in speeds.items()},
        "loss": {name: statistics.median(r["loss"] for r in runs) for name, runs in found.items()},
    }


def draw(found: dict[str, list[dict[str, Any]]], summary: dict[str, Any]) -> pyplot.Figure:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6))
    for name, colour in (("ours", "tab:green"), ("bare loop", "tab:grey")):
        for number, run in enumerate(found[name]):
            steps = LAP * np.arange(1, len(run["laps"]))
            label = name if number == 0 else None
            left.plot(steps, run["laps"][1:], color=colour, alpha=0.7, label=label)
    left.set(
        xlabel="step",
        ylabel="seconds a step",
        ylim=(0, None),
        title=f"ours / bare loop: {summary['step_ratio']:.3f}",
    )
    left.legend()
    speeds = summary["supervised_tokens_per_s"]
    colours = ["tab:green" if name == "ours" else "tab:grey" for name in speeds]
    bars = right.barh(list(speeds), list(speeds.values()), color=colours)
    right.bar_label(bars, fmt="{:,.0f}", padding=3)
    right.set(xlabel="supervised tokens/s", xlim=(0, 1.2 * max(speeds.values())))
    right.invert_yaxis()
    figure.tight_layout()
    return figure


def main() -> None:
    options = results_io.arguments(__doc__.splitlines()[0])
    size = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_corpus(folder / "train.json", size.examples, np.random.default_rng(0))
        found = measure(folder, size)
    summary = summarize(found)
    print(
        f"ours / bare loop: {summary['step_ratio']:.3f} x a step; supervised tokens/s: ours / "
        f"Trainer with padding {summary['ours_over']['Trainer, padding']:.2f}, ours / Trainer "
        f"with length grouping {summary['ours_over']['Trainer, grouped']:.2f}"
    )
    payload = {"size": vars(size), "summary": summary, "runs": found}
    figure = draw(found, summary)
    print(results_io.write("overhead", payload, figure, quick=options.quick, out=options.out))


if __name__ == "__main__":
    main()
