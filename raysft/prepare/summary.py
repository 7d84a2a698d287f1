"""prepare.html: what a preparation has made, as a page of one file."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from raysft.json_types import JsonObject
from raysft.page import build, facts

PAGE = "prepare.html"
BARS = 40
SPEAKERS = 25


@dataclass(frozen=True)
class Totals:
    """Of all rows: seconds float64 [rows], tokens int64 [rows], bytes of audio; utterances and
    seconds by speaker."""

    seconds: np.ndarray
    tokens: np.ndarray
    audio_bytes: int
    utterances: Counter[str]
    spoken: dict[str, float]


def gather(shards: Sequence[Path]) -> Totals:
    """Read what shards say of their rows; no audio."""
    seconds, tokens = [np.zeros(0)], [np.zeros(0, np.int64)]
    size, utterances, spoken = 0, Counter[str](), dict[str, float]()
    for path in shards:
        table = pq.read_table(path, columns=["seconds", "tokens", "spk", "audio_bytes"])
        seconds.append(table["seconds"].to_numpy())
        tokens.append(table["tokens"].to_numpy().astype(np.int64))
        size += int(table["audio_bytes"].to_numpy().sum())
        speakers = table["spk"].to_pylist()
        utterances.update(speakers)
        for speaker, long in zip(speakers, seconds[-1].tolist(), strict=True):
            spoken[speaker] = spoken.get(speaker, 0.0) + long
    return Totals(np.concatenate(seconds), np.concatenate(tokens), size, utterances, spoken)


def page(folder: Path, asked: JsonObject, totals: Totals, shards: int, left_out: int) -> bytes:
    """The page as a file. asked: what prepare.json has; quarantine.jsonl is there."""
    shown: JsonObject = {
        "title": f"{folder.name}: prepared",
        "at": time.strftime("%Y-%m-%d %H:%M"),
        "runs": [],
        "sweep": None,
        "prepared": of(folder, asked, totals, shards, left_out),
    }
    return build.render(shown).encode("utf-8", "surrogatepass")


def of(folder: Path, asked: JsonObject, totals: Totals, shards: int, left_out: int) -> JsonObject:
    """What the page shows."""
    named = {name: count for name, count in totals.utterances.items() if name}
    hours = float(totals.seconds.sum()) / 3600
    figures: JsonObject = {
        "utterances": len(totals.seconds),
        "hours": round(hours, 3),
        "left out": left_out,
        "speakers": len(named),
        "shards": shards,
        "GiB of audio": round(totals.audio_bytes / 2**30, 3),
    }
    histograms = [_histogram("Seconds", totals.seconds, " s")]
    if totals.tokens.any():
        figures["speech tokens"] = int(totals.tokens.sum())
        figures["speech tokens a second"] = round(float(totals.tokens.sum()) / (hours * 3600), 2)
        histograms.append(_histogram("Speech tokens", totals.tokens, ""))
    longest = sorted(named, key=lambda name: (-totals.spoken[name], name))[:SPEAKERS]
    return {
        "asked": _told(asked),
        "figures": figures,
        "histograms": [one for one in histograms if one is not None],
        "speakers": [
            {"speaker": n, "utterances": named[n], "hours": round(totals.spoken[n] / 3600, 4)}
            for n in longest
        ],
        "quarantine": facts.quarantine(folder),
    }


def _histogram(title: str, values: np.ndarray, unit: str) -> JsonObject | None:
    if not len(values):
        return None
    counts, edges = np.histogram(values, max(5, min(BARS, int(len(values) ** 0.5))))
    return {"title": title, "unit": unit, "counts": counts.tolist(), "edges": edges.tolist()}


def _told(asked: JsonObject) -> JsonObject:
    """Keys of the section `prepare` that are set, and how tokens are made in a run's way."""
    sections = dict(asked["prepare"])
    sections["data.speech_tokens"] = asked["tools"].get("speech_tokens")
    found: JsonObject = {}
    for name, value in sections.items():
        inner = value if isinstance(value, dict) else {}
        for key, of_inner in inner.items():
            if of_inner not in (None, False, []):
                found[f"{name}.{key}"] = of_inner
        if not isinstance(value, dict) and value is not None:
            found[name] = value
    return found
