"""Runs of judged speech in processes: what was drawn of each record is written down as the step is
taken, and what a checkpoint gets right is counted by several workers."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from tests.support import worlds
from tests.support.drama import FIELDS, LABELS, TOLD, prompts, role, written
from tests.support.models import AUDIO

if TYPE_CHECKING:
    from raysft.data.example import MicroBatch
    from raysft.train.job import Job

RECORDS = 34
CHOSEN = ["pitch_dynamics", "emotion_accuracy", "local_scene_fit"]  # of those asked all at once
RATED = ("pitch_variation", "emotion_accuracy")  # the fields of the first two


def corpus(folder: Path) -> list[dict[str, Any]]:
    """Entries of data.train: records asked about one dimension, whose ratings say which rater was
    drawn; and records asked about three dimensions in any order."""
    spread = {field: [1, 2, 3, 4, 5][: 2 + n % 4] for n, field in enumerate(FIELDS)}
    clips = [f"wav/{number % 8}.wav" for number in range(RECORDS)]
    records = [role(n, **spread) | {"wav_path": clip} for n, clip in enumerate(clips)]
    one = written(folder, *records)
    others = [{**record, "id": f"all {record['id']}"} for record in records[:6]]
    several = written(folder, *others, name="several.jsonl")
    worded = {"variations": str(prompts(folder, 2))}
    flexible = {"dataset": "RoleAllFlexOrderConsistent", "dimensions": CHOSEN}
    return [
        {"path": str(one), "judging": worded},
        {"path": str(several), "judging": flexible},
    ]


def write(folder: Path, name: str, **sections: dict[str, Any]) -> Path:
    """The config file of a run of nine steps of three lanes, which is saved after each fourth."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": name, "storage_path": str(folder / "runs"), "seed": 3},
        "data": {"lanes": 3, "window": 64, "tokens_per_batch": 900},
        "model": AUDIO,
        "optim": {"lr": 1e-3},
        "train": {"max_steps": 9},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 4},
    }
    for section, keys in sections.items():
        tree.setdefault(section, {}).update(keys)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def rated(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records with two dimensions that are asked about, rated 1 to 5; entries of records that are
    rated 3 and 4, and of these."""
    clips = [f"wav/{number % 8}.wav" for number in range(9)]
    same = [role(n, **dict(zip(RATED, ([3], [4])))) | {"wav_path": c} for n, c in enumerate(clips)]
    spread = [
        role(n, **{field: [1 + (n + 2 * k) % 5] for k, field in enumerate(RATED)}) | {"wav_path": c}
        for n, c in enumerate(clips)
    ]
    judging = {"variations": str(prompts(folder, 1)), "dimensions": CHOSEN[:2]}
    files = written(folder, *same, name="same.jsonl"), written(folder, *spread, name="spread.jsonl")
    return spread, [{"path": str(file), "judging": judging} for file in files]


def settled(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Question and answer of each dimension of a record of `rated`, in words of its own."""
    labels = {"pitch_variation": "PitchDynamics", "emotion_accuracy": "EmotionAccuracy"}
    return [
        (
            f"Wording 0: rate {labels[field]}.\n\n{TOLD}",
            f"<answer>{record['annotations'][field][0]}</answer>",
        )
        for field in RATED
    ]


def asked(run: Path) -> dict[tuple[int, int], list[tuple[str, str]]]:
    """By (step, lane) the id of each example and what was asked and answered of it. A step that was
    taken again after a kill must have been the same."""
    found: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for file in sorted(run.glob("asked_*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            pairs = [(id_, text) for id_, text in line["asked"]]
            assert found.setdefault((line["step"], line["lane"]), pairs) == pairs
    return found


def drawn(text: str) -> tuple[str, str]:
    """Dimension and rating of what was asked about one dimension."""
    (label,) = [label for label in LABELS if f"rate {label}." in text]
    return label, text.partition("<answer>")[2].partition("</answer>")[0]


def main(size: int, kill_at: int, paths: list[Path]) -> None:
    """A process that `worlds.run` starts: trains each config; in the last one rank 0 dies after
    step kill_at. kill_at -1: evaluates the newest checkpoint of each instead, into SIZE.json."""
    import torch.distributed as dist

    from raysft.config import load_config
    from raysft.parallel import World
    from raysft.train.loop import train
    from raysft.worker import evaluate_checkpoint

    place = f"file://{os.environ['RENDEZVOUS']}"
    dist.init_process_group("gloo", place, rank=int(os.environ["RANK"]), world_size=size)

    def die(line: dict[str, Any]) -> None:
        if kill_at > 0 and "loss" in line and line["step"] >= kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    for path in paths:
        config = load_config(path, [f"parallel.workers={size}"])
        job = worlds.start(config, World.current(), die if path == paths[-1] else None)
        if kill_at < 0:
            figures = evaluate_checkpoint(job)
            (job.folder / f"{size}_{job.world.rank}.json").write_text(json.dumps(figures))
        else:
            write_down(job)
            train(job)
    dist.barrier()
    dist.destroy_process_group()


def write_down(job: Job) -> None:
    """From now on, what each step of this worker's is made of is kept in its run."""
    from raysft.train.feed import Feed

    assert isinstance(job.stream, Feed)
    opened, decode = job.stream.open, job.stream.speech_model.tokenizer.decode
    file = job.folder / f"asked_{job.world.rank}.jsonl"

    def texts(batch: MicroBatch) -> list[str]:
        rows = np.split(batch.input_ids, np.cumsum(batch.lengths)[:-1]) if batch.ids else []
        return [decode(row[row >= 0], skip_special_tokens=True) for row in rows]

    def watched(cursor: Any) -> Iterator[Any]:
        for batch in opened(cursor):
            with file.open("a") as out:
                for one in batch.micro_batches:
                    pairs = list(zip(one.ids, texts(one), strict=True))
                    line = {"epoch": batch.epoch, "step": batch.step, "lane": one.lane}
                    out.write(json.dumps({**line, "asked": pairs}) + "\n")
            yield batch

    job.stream.open = watched  # type: ignore[method-assign]
