"""Runs that learn from pairs of answers: corpora of text and of clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.support.models import CAUSAL
from tests.support.worlds import changed

PAIRS = 48


def records() -> list[dict[str, Any]]:
    """Of many lengths; what is chosen says yes, and says it shortly or at length."""
    found = []
    for number in range(PAIRS):
        asked = [{"role": "user", "content": "is it " + "so " * (number % 5) + f"{number}?"}]
        if number % 3 == 0:
            asked = [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "hello"},
                *asked,
            ]
        found.append(
            {
                "id": f"p{number}",
                "task": ("chat", "advice")[number % 2],
                "messages": asked,
                "chosen": "yes" + " indeed" * (number % 3),
                "rejected": [{"role": "assistant", "content": "no" + ", no" * (number % 4)}],
            }
        )
    return found


def corpus(folder: Path) -> Path:
    """A file of pairs, made once."""
    path = folder / "pairs.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps(record) + "\n" for record in records()))
    return path


def spoken(clips: list[Path], path: Path) -> Path:
    """A file of pairs about clips."""
    lines = [
        json.dumps(
            {
                "id": clip.stem,
                "messages": [{"role": "user", "content": "<audio>Is it loud?"}],
                "chosen": "yes" + "!" * (number % 3),
                "rejected": "not at all",
                "audios": [str(clip)],
            }
        )
        for number, clip in enumerate(clips)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def tree(folder: Path, name: str, dpo: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A config: 3 lanes, some pairs a step. changes: section__key=value."""
    found: dict[str, Any] = {
        "run": {"name": name, "storage_path": str(folder / "runs"), "seed": 3},
        "data": {
            "train": [{"path": str(corpus(folder))}],
            "lanes": 3,
            "tokens_per_batch": 400,
            "window": 16,
            "index_path": str(folder / "index"),
        },
        "model": CAUSAL,
        "parallel": {"strategy": "ddp"},
        "optim": {"lr": 1e-2},
        "train": {"max_steps": 4, "objective": "dpo"},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 2},
    }
    return changed(found, {**changes, "train__dpo": dpo})


def write(folder: Path, name: str, dpo: dict[str, Any], **changes: Any) -> Path:
    """`tree` as a file."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree(folder, name, dpo, **changes)))
    return path
