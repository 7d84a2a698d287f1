"""A run in this process, without Ray: what tests train when Ray is not the promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raysft import worker
from raysft.config import Config
from raysft.driver.preflight import prepare
from raysft.hearing.run import hear
from raysft.parallel import World
from raysft.run.folder import write_config
from raysft.run.lines import read_lines
from raysft.train.loop import train


def run(folder: Path, **sections: dict[str, Any]) -> Path:
    """Trains by a config of these sections; its run folder."""
    torch.set_num_threads(1)
    tree = {
        **sections,
        "run": {"name": "run", "storage_path": str(folder), "seed": 1},
        "data": {"lanes": 2, "index_path": str(folder / "index"), **sections["data"]},
        "log": {"every": 1, "tensorboard": False},
    }
    config = Config.model_validate(tree)
    place = folder / "run"
    place.mkdir(parents=True)
    write_config(config, place)
    prepared = prepare(config, place)
    data = worker.Data.in_process(config, prepared.encoder, place, prepared.train, prepared.eval)
    data.hear = hear if config.evaluate.speaks else None
    train(worker.build_job(config, place, World.current(), data, prepared.total_steps, None))
    return place


def losses(place: Path) -> list[float]:
    """Of each step."""
    return [line["loss"] for line in read_lines(place / "metrics.jsonl") if "loss" in line]


def ledger(place: Path) -> list[list[str]]:
    """Ids of each (step, lane)."""
    files = sorted(place.glob("ledger/*.jsonl"))
    return [line["ids"] for file in files for line in read_lines(file)]
