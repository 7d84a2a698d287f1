"""The deep part of the audit: some of a run's batches, read again from the data as they were read
for training, and held against the digests that the ledger has of them.

Costs what reading these batches costs; needs the model's tokenizer and, for audio, what makes its
features. Writes nothing, clips that stall included.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from raysft.data.clips.audio import Limits
from raysft.data.encode import make_encoder
from raysft.data.plan.generations import open_index
from raysft.data.plan.plan import PlannedStep
from raysft.data.plan.verify import Line, Report
from raysft.data.read.reader import Reader, Work
from raysft.errors import UserError
from raysft.run import plans
from raysft.run.folder import read_config, versions_of
from raysft.run.versions import versions

DECODING = ("numpy", "soundfile", "soxr", "torch", "transformers")
"""Packages on which a clip's features may depend in their last bits."""


@dataclass
class Sample:
    """At most `size` lines of a ledger, any as likely as any other, with the rows planned there."""

    size: int
    lines: list[tuple[Work, list[str], Line]] = field(default_factory=list)
    without: int = 0  # lines that have no digest: from before there were any
    _seen: int = 0
    _random: random.Random = field(default_factory=random.Random)

    def add(self, step: PlannedStep, lane: int, planned: Sequence[str], line: Line) -> None:
        """One more line, and the ids that were planned for it."""
        if not line.get("tensors"):
            self.without += bool(len(planned)) and "tensors" not in line
            return
        self._seen += 1
        place = len(self.lines)
        if place >= self.size:
            place = self._random.randrange(self._seen)
            if place >= self.size:
                return
        work = Work(step.epoch, step.step, lane, np.asarray(step.lanes[lane]))
        self.lines[place : place + 1] = [(work, list(planned), line)]


def reread(run: Path, sample: Sample, report: Report) -> None:
    """Read the sample's batches again; adds what differs to `report`. Raises UserError where the
    data, or the model's tokenizer, cannot be read any more."""
    config = read_config(run)
    budget = config.data.tokens_per_batch
    if not isinstance(budget, int):
        raise UserError(f"{run}: has no data.tokens_per_batch yet: it has not begun to train")
    encoder = make_encoder(config.model, config.data, run, config.train.objective)
    encoder.limits = Limits.of(config.data)
    reader = Reader(open_index(plans.places(run)), encoder, budget, config.run.seed)
    others = _other_versions(run)
    report.reread = 0
    for work, planned, line in sorted(sample.lines, key=lambda item: (item[0].step, item[0].lane)):
        where = f"step {work.step}, lane {work.lane}, read again"
        again = Work(work.epoch, work.step, work.lane, work.rows, _left_out(planned, line["ids"]))
        (batch,) = reader.read(iter([again]))
        report.reread += 1
        text, _, features = batch.tensors.partition(".")
        text_then, _, features_then = str(line["tensors"]).partition(".")
        if batch.quarantined:
            found = batch.quarantined[0]
            report.add(f"{where}: {found.id} was trained on, cannot be used now: {found.reason}")
        elif text != text_then:
            report.add(f"{where}: its token ids or labels are not those trained on")
        elif features != features_then and others:
            report.notes.append(
                f"{where}: its features are not bit for bit those trained on; what decodes clips "
                f"is of another version now: {', '.join(others)}"
            )
        elif features != features_then:
            report.add(
                f"{where}: its features are not those trained on: a clip was changed, or this "
                "machine decodes it otherwise than the one that trained"
            )


def _left_out(planned: Sequence[str], trained: Sequence[str]) -> frozenset[int]:
    """Places among the planned examples of those that were not trained on."""
    rest, found, place = iter(trained), set(), 0
    name = next(rest, None)
    for place, wanted in enumerate(planned):
        if wanted == name:
            name = next(rest, None)
        else:
            found.add(place)
    return frozenset(found)


def _other_versions(run: Path) -> list[str]:
    then, now = versions_of(run), versions()
    return [
        f"{name} {now[name]}, was {then[name]}"
        for name in DECODING
        if name in then and then[name] != now[name]
    ]
