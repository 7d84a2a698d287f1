"""Texts that a small model of sweeps' tests learns."""

from __future__ import annotations

import json
from pathlib import Path


def write_texts(folder: Path) -> None:
    """train.jsonl and dev.jsonl: questions with two answers each."""
    for name, count in (("train", 80), ("dev", 8)):
        lines = [
            {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": w}]}
            for n in range(count)
            for w in ["yes it is" if n % 2 else "no"]
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
