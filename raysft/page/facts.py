"""What a page shows of a run, read from the files of its folder: no torch, no Ray."""

from __future__ import annotations

import base64
import io
import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import soundfile

from raysft.config import Config
from raysft.data.clips.audio import Limits, load
from raysft.data.example import Audio
from raysft.data.quarantine import kind_of_line
from raysft.errors import BadExample, UserError
from raysft.hearing import samples
from raysft.json_types import JsonObject
from raysft.run.answers import KINDS, clips_of, compared
from raysft.run.evaluations import predictions_of
from raysft.run.folder import load_plugins, read_config, reopen
from raysft.run.lines import read_lines, stream_lines
from raysft.scorers import figure_of, of_losses

log = logging.getLogger(__name__)

RATE = 16_000  # Hz, of clips that the page cannot have as they are
POINTS = 1500  # of a curve
EXAMPLES = 24
SPOKEN = 12
MEASURED = (
    *("wer", "wer_bound", "distortion", "distortion_bound", "similarity", "similarity_bound"),
)
CLIP_BYTES = 400_000  # of a file that is put into the page as it is
CLIP_S = 60.0  # of one that is decoded
PLAYED = {
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".mp3": "audio/mpeg",
    ".ogg": "audio/ogg",
    ".opus": "audio/ogg",
    ".m4a": "audio/mp4",
}
KEYS = (
    "model.path",
    "peft.method",
    "peft.r",
    "parallel.strategy",
    "optim.lr",
    "optim.schedule",
    "train.precision",
    "data.lanes",
    "data.tokens_per_batch",
    "data.mode",
    "run.seed",
)
SHOWN_EVENTS = ("continued", "stopped", "failed", "skipped", "warning")


class NothingYet(UserError):
    """A run that has not logged a step."""


def of_run(folder: Path, examples: bool = True) -> JsonObject:
    """All that the page shows of the run in `folder`; with examples, also what it answered.

    Raises UserError where there is no run, NothingYet where it has not logged a step.
    """
    config = read_config(folder)
    try:
        load_plugins(folder)  # whose scorers say what their figures are
    except UserError as error:
        log.warning("%s; shown without it", error)
    metrics = read_lines(folder / "metrics.jsonl", {"step": int, "loss": float})
    if not metrics:
        raise NothingYet(f"{folder}: nothing to show, metrics.jsonl is missing or empty")
    lines = read_lines(folder / "eval.jsonl", {"step": int})
    evaluations = sorted(
        {line["step"]: line for line in lines}.values(), key=lambda line: line["step"]
    )
    return {
        "name": folder.name,
        "config": _chosen(config),
        "series": _series(metrics),
        "evaluations": _evaluations(evaluations),
        "events": _events(folder),
        "quarantine": quarantine(folder),
        "examples": _examples(folder, [e["step"] for e in evaluations]) if examples else [],
        "spoken": _spoken(folder) if examples else [],
        "experts": _experts(folder),
        "seconds": _number(float(sum(line.get("seconds", 0.0) for line in metrics))),
    }


def _chosen(config: Config) -> JsonObject:
    found: JsonObject = {}
    for key in KEYS:
        value: object = config
        for part in key.split("."):
            value = getattr(value, part)
        if value is not None and value != "none":
            found[key] = value
    if config.peft.method == "none":
        found.pop("peft.r", None)
    return found


def _series(metrics: Sequence[JsonObject]) -> JsonObject:
    """Columns of metrics.jsonl that are numbers; of many lines every n-th, and the last."""
    every = -(-len(metrics) // POINTS)
    kept = [line for place, line in enumerate(metrics) if place % every == 0]
    if kept[-1] is not metrics[-1]:
        kept.append(metrics[-1])
    names = dict.fromkeys(
        name for line in kept for name, value in line.items() if isinstance(value, int | float)
    )
    return {name: [_number(line.get(name)) for line in kept] for name in names}


def _number(value: object) -> float | None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _evaluations(lines: Sequence[JsonObject]) -> list[JsonObject]:
    names = dict.fromkeys(name for line in lines for name in line if "/" in name)
    return [
        {
            "name": name,
            "percent": figure_of(name).unit == "percent",
            "loss": of_losses(name),
            "steps": [line["step"] for line in lines if name in line],
            "values": [_number(line[name]) for line in lines if name in line],
        }
        for name in names
    ]


def _events(folder: Path) -> list[JsonObject]:
    """Restarts, resizes and what was warned of, by the step after which they were."""
    return [
        {
            "event": line["event"],
            "step": line.get("step", 0),
            "reason": str(line.get("reason", "")),
            "workers": line.get("workers"),
            "lost_s": _number(line.get("lost_s")),
        }
        for line in read_lines(folder / "events.jsonl", {"event": str})
        if line["event"] in SHOWN_EVENTS
    ]


def quarantine(folder: Path) -> list[JsonObject]:
    """Of quarantine.jsonl: {"kind", "count", "first": its reason}, most frequent first."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for line in stream_lines(folder / "quarantine.jsonl", {"id": str, "reason": str}):
        kind = kind_of_line(line)
        counts[kind] += 1
        first.setdefault(kind, line["reason"])
    return [{"kind": k, "count": n, "first": first[k]} for k, n in counts.most_common()]


def _experts(folder: Path) -> list[JsonObject]:
    """Tokens by kind, layer and expert over the second half of the run, as shares: 1 is equal."""
    lines = read_lines(folder / "experts.jsonl", {"tokens": dict})
    lines = lines[len(lines) // 2 :]
    found = []
    for kind in lines[-1]["tokens"] if lines else ():
        table = [[0.0] * len(row) for row in lines[-1]["tokens"][kind]]
        for line in lines:
            for layer, row in enumerate(line["tokens"][kind]):
                for expert, count in enumerate(row):
                    table[layer][expert] += count
        used = sum(any(row[expert] for row in table) for expert in range(len(table[0])))
        shares = [[round(used * n / (sum(row) or 1), 3) for n in row] for row in table]
        found.append({"kind": kind, "shares": shares})
    return found


def _examples(folder: Path, steps: Sequence[int]) -> list[JsonObject]:
    """Answers of the newest evaluation, half of them those with most errors, the others as they
    come; with their clips, where these can be read."""
    lines: list[JsonObject] = []
    for step in reversed(steps):
        if lines := read_lines(predictions_of(folder, step), KINDS):
            break
    marked = [(*compared(line["reference"], line["hypothesis"]), line) for line in lines]
    marked.sort(key=lambda one: -one[0])
    half = EXAMPLES // 2
    rest = sorted(marked[half:], key=lambda one: lines.index(one[2]))[:half]
    shown = [*marked[:half], *rest]
    clips = _clips(folder, {line["id"] for *_, line in shown})
    return [
        {
            "id": line["id"],
            "source": line.get("source", ""),
            "errors": errors,
            "parts": parts,
            "clip": clips.get(line["id"]),
        }
        for errors, parts, line in shown
    ]


def _spoken(folder: Path) -> list[JsonObject]:
    """What the run spoke last, half of these with most errors, the others as they come: what was
    heard against what was to be said, and both waves as data URLs."""
    there = samples.newest(folder)
    lines = samples.read(there) if there is not None else []
    order = sorted(range(len(lines)), key=lambda place: -lines[place].get("wer", 0.0))
    half = SPOKEN // 2
    shown = [lines[place] for place in [*order[:half], *sorted(order[half:])[:half]]]
    return [
        {
            "id": line["id"],
            "task": line["task"],
            "parts": _parts(line),
            "numbers": {key: _number(line[key]) for key in MEASURED if key in line},
            "spoken": _flac(there / line["spoken"]),
            "bound": _flac(there / line["bound"]),
        }
        for line in shown
        if there is not None
    ]


def _parts(line: JsonObject) -> list[JsonObject]:
    """What was heard against what was to be said; one of them alone, where the other is unknown."""
    said, heard = line.get("reference"), line.get("heard")
    if said is not None and heard is not None:
        return compared(said, heard)[1]
    alone = heard if said is None else said
    return [{"kind": "equal", "said": alone, "heard": alone}] if alone else []


def _flac(path: Path) -> str | None:
    """A data URL; None for a wave that is too much for a page."""
    if path.stat().st_size > CLIP_BYTES:
        return None
    return f"data:audio/flac;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _clips(folder: Path, ids: set[str]) -> dict[str, str]:
    """Clips of examples of the run's data.eval, as data URLs. Those that are gone are left out: a
    page is drawn long after, and elsewhere too."""
    found: dict[str, str] = {}
    try:
        for name, clip in clips_of(reopen(folder), ids):
            if (url := _url(clip)) is not None:
                found[name] = url
    except (UserError, OSError):
        return found
    return found


def _url(clip: Audio) -> str | None:
    path = Path(clip.path)
    try:
        kind = PLAYED.get(path.suffix.lower())
        if kind and not clip.part and path.is_file() and path.stat().st_size <= CLIP_BYTES:
            return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
        samples = load(clip, RATE, Limits(), most_seconds=CLIP_S)
    except (BadExample, OSError):
        return None
    out = io.BytesIO()
    soundfile.write(out, samples, RATE, format="FLAC")
    return f"data:audio/flac;base64,{base64.b64encode(out.getvalue()).decode()}"
