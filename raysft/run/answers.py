"""What a run's evaluations answered, as people are shown it: differences, and clips."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

import jiwer
import numpy as np

from raysft.config import Config
from raysft.data import sources
from raysft.data.clips.audio import Limits, load, probe
from raysft.data.example import Audio
from raysft.errors import BadExample, UserError
from raysft.json_types import JsonObject
from raysft.run.evaluations import predictions_of
from raysft.run.lines import read_lines

Key = tuple[str, str]  # source, id
KINDS = {"id": str, "reference": str, "hypothesis": str}

PER_SOURCE = 4  # answers of a source that are shown at each evaluation
MOST = 24  # of all sources
CLIPS = 8  # of those, with their audio
CLIP_S = 30.0  # of a clip
RATE = 16_000  # Hz, of the clips
LETTERS = 600  # of a text
LOOKED_THROUGH = 50_000  # examples of data.eval, for the clips of those that are shown


def compared(reference: str, hypothesis: str) -> tuple[int, list[JsonObject]]:
    """How many words differ, and the alignment: {"kind": equal, substitute, insert or delete,
    "said", "heard"}; said is the reference's."""
    if not reference.split():
        return len(hypothesis.split()), [{"kind": "insert", "said": "", "heard": hypothesis}]
    found = jiwer.process_words(reference, hypothesis)
    said, heard = reference.split(), hypothesis.split()
    parts = [
        {
            "kind": chunk.type,
            "said": " ".join(said[chunk.ref_start_idx : chunk.ref_end_idx]),
            "heard": " ".join(heard[chunk.hyp_start_idx : chunk.hyp_end_idx]),
        }
        for chunk in found.alignments[0]
    ]
    return found.substitutions + found.insertions + found.deletions, parts


def clips_of(config: Config, ids: Iterable[str]) -> Iterator[tuple[str, Audio]]:
    """The first clip of each example of data.eval with one of these ids that has any, among the
    first LOOKED_THROUGH examples. Raises UserError or OSError where data.eval cannot be read."""
    looked, wanted = 0, set(ids)
    for source in sources.resolve_all(config.data.eval, "eval"):
        for file in source.files:
            for located in sources.scan(source, file):
                looked += 1
                if looked > LOOKED_THROUGH or not wanted:
                    return
                example = located.example
                if example is not None and example.id in wanted:
                    wanted.discard(example.id)
                    if clips := example.audio():
                        yield example.id, clips[0]


@dataclass(frozen=True)
class Shown:
    """An answer to an example."""

    id: str
    source: str
    reference: str
    hypothesis: str

    @cached_property
    def _compared(self) -> tuple[int, list[JsonObject]]:
        return compared(self.reference, self.hypothesis)

    @property
    def errors(self) -> int:
        """Words that differ."""
        return self._compared[0]

    def marked(self) -> tuple[str, str]:
        """Reference and hypothesis in Markdown, what differs in bold."""
        said: list[str] = []
        heard: list[str] = []
        for same, parts in groupby(self._compared[1], lambda part: part["kind"] == "equal"):
            own = list(parts)
            for texts, key in ((said, "said"), (heard, "heard")):
                if text := " ".join(part[key] for part in own if part[key]):
                    shown = _plain(_cut(text))
                    texts.append(shown if same else f"**{shown}**")
        return " ".join(said), " ".join(heard)


@dataclass(frozen=True)
class Clip:
    """Of an answer. samples: float32 [T] in [-1, 1] at RATE; cut: only its first CLIP_S seconds."""

    id: str
    source: str
    reference: str
    samples: np.ndarray
    cut: bool

    @property
    def said(self) -> str:
        """Under the player."""
        what = f"{self.id}: {_cut(self.reference)}"
        return f"{what} (its first {CLIP_S:g} s)" if self.cut else what


def _cut(text: str) -> str:
    return text if len(text) <= LETTERS else f"{text[:LETTERS]}... ({len(text):,} letters)"


def _plain(text: str) -> str:
    """Text as it is, in a cell of a table in Markdown."""
    text = re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", text)
    return " ".join(text.replace("\\<", "&lt;").replace("\\|", "&#124;").split())


def table(answers: Sequence[Shown]) -> str:
    """Answers as a table in Markdown."""
    rows = ["| id | words that differ | reference | answer |", "|---|---|---|---|"]
    for one in answers:
        said, heard = one.marked()
        rows.append(f"| {_plain(one.id)} | {one.errors} | {said} | {heard} |")
    return "\n".join(rows)


class Answers:
    """A few examples of each source, the same ones at each evaluation of a run. Asked by several
    threads."""

    def __init__(self, config: Config, folder: Path) -> None:
        """config: as the run has it now; folder: the run's."""
        self._config, self._folder = config, folder
        self._lock = threading.Lock()
        self._chosen: dict[Key, str] = {}  # with the reference
        self._clips: list[Clip] | None = None

    def at(self, step: int) -> list[Shown]:
        """What was answered at `step`; [] where nothing was."""
        found = {
            key: Shown(key[1], key[0], line["reference"], line["hypothesis"])
            for line in read_lines(predictions_of(self._folder, step), KINDS)
            for key in [(line.get("source", ""), line["id"])]
        }
        with self._lock:
            self._chosen = self._chosen or self._first() or _spread(found.values())
            if found and not found.keys() & self._chosen.keys():  # data.eval is another now
                self._chosen, self._clips = _spread(found.values()), None
            return [found[key] for key in self._chosen if key in found]

    def _first(self) -> dict[Key, str]:
        """From the first evaluation of the run that is there: another start has the same ones."""
        steps = [
            int(number)
            for path in predictions_of(self._folder, 0).parent.glob("step_*.jsonl")
            if (number := path.stem.removeprefix("step_")).isdecimal()
        ]
        lines = read_lines(predictions_of(self._folder, min(steps, default=0)), KINDS)
        return _spread(
            Shown(line["id"], line.get("source", ""), line["reference"], line["hypothesis"])
            for line in lines
        )

    def clips(self) -> list[Clip]:
        """Of the examples that have one, at most CLIPS, from all sources; decoded once. Those that
        cannot be read are left out."""
        with self._lock:
            if self._clips is None:
                self._clips = self._read_clips()
            return self._clips

    def _read_clips(self) -> list[Clip]:
        found: list[Clip] = []
        try:
            there = dict(clips_of(self._config, {id_ for _, id_ in self._chosen}))
        except (UserError, OSError):
            return []
        for source, id_ in _in_turns(self._chosen):
            if len(found) < CLIPS and id_ in there:
                with contextlib.suppress(BadExample, OSError):
                    samples, cut = beginning(there[id_])
                    reference = self._chosen[source, id_]
                    found.append(Clip(id_, source, reference, samples, cut))
        return found


def beginning(clip: Audio) -> tuple[np.ndarray, bool]:
    """The first CLIP_S seconds of a clip, float32 [T] at RATE; and whether there are more. Raises
    BadExample or OSError where it cannot be read."""
    found = probe(clip)
    cut = found.samples > CLIP_S * found.rate
    if cut:
        clip = replace(clip, stop=clip.start + CLIP_S, stated=None)
    return np.clip(load(clip, RATE, Limits()), -1.0, 1.0), cut


def _spread(answers: Iterable[Shown]) -> dict[Key, str]:
    """PER_SOURCE examples of each source, evenly from the first to the last; fewer where there are
    so many sources that they would be more than MOST."""
    by_source: dict[str, list[Shown]] = {}
    for answer in answers:
        by_source.setdefault(answer.source, []).append(answer)
    each = max(1, min(PER_SOURCE, MOST // max(1, len(by_source))))
    chosen: dict[Key, str] = {}
    for source, own in by_source.items():
        for place in np.linspace(0, len(own) - 1, min(each, len(own))).astype(int):
            chosen[source, own[place].id] = own[place].reference
    return dict(list(chosen.items())[:MOST])


def _in_turns(keys: Iterable[Key]) -> list[Key]:
    """One of each source, then another of each."""
    turns: Counter[str] = Counter()
    order = []
    for place, key in enumerate(keys):
        order.append((turns[key[0]], place, key))
        turns[key[0]] += 1
    return [key for *_, key in sorted(order)]
