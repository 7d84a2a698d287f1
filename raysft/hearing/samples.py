"""A folder of what was spoken in an evaluation, for people: two waves of each example, and
spoken.jsonl, a line an example. No torch: the page is drawn from it."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile

from raysft.json_types import JsonObject
from raysft.patience import patient
from raysft.run.lines import encoded, read_lines
from raysft.scorers import Spoken

NAME = "spoken.jsonl"
KINDS = {"id": str, "task": str, "spoken": str, "bound": str}


@dataclass(frozen=True)
class Sample:
    """What was spoken of an example, and its real clip by the same vocoder: FLAC files' bytes.
    wer, wer_bound: of this one; None where nobody says what is right, or nobody heard it."""

    figures: Spoken
    spoken: bytes
    bound: bytes
    wer: float | None
    wer_bound: float | None


def flac(wave: np.ndarray, rate: int) -> bytes:
    """float32 [samples] as a file of 16-bit samples."""
    out = io.BytesIO()
    soundfile.write(out, np.clip(wave, -1.0, 1.0), rate, format="FLAC", subtype="PCM_16")
    return out.getvalue()


@patient
def write(folder: Path, samples: Sequence[Sample]) -> None:
    """Write the folder anew, spoken.jsonl last: without it there is none."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = []
    for number, sample in enumerate(samples):
        names = {"spoken": f"{number:04}.flac", "bound": f"{number:04}_bound.flac"}
        (folder / names["spoken"]).write_bytes(sample.spoken)
        (folder / names["bound"]).write_bytes(sample.bound)
        line = {**asdict(sample.figures), "wer": sample.wer, "wer_bound": sample.wer_bound, **names}
        lines.append(encoded({name: value for name, value in line.items() if value is not None}))
    (folder / NAME).write_bytes(b"".join(lines))


def newest(run: Path) -> Path | None:
    """The folder of what a run spoke last, in training or for jobs/evaluate.py; None: it did
    not."""
    there = [*run.glob(f"predictions/step_*.spoken/{NAME}")]
    there += run.glob(f"evaluations/*/predictions.spoken/{NAME}")
    return max(there, key=lambda path: path.stat().st_mtime).parent if there else None


def read(folder: Path) -> list[JsonObject]:
    """Lines of spoken.jsonl whose waves are there."""
    lines = read_lines(folder / NAME, KINDS)
    return [x for x in lines if all((folder / x[name]).is_file() for name in ("spoken", "bound"))]
