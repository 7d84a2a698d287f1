"""Answers and their clips for TensorBoard, which has its curves from the loop itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from torch.utils.tensorboard import SummaryWriter

from raysft.json_types import JsonObject
from raysft.loggers.sender import Known
from raysft.run.answers import RATE, Answers, table


class ToTensorboard:
    """Text eval/answers/SOURCE at each evaluation; audio eval/clips/SOURCE/ID at the first."""

    name = "log.tensorboard (answers)"

    def __init__(self, writer: SummaryWriter, answers: Answers, step: int, heard: bool) -> None:
        """step: that the run goes on after; heard: clips were written by an earlier start."""
        self._writer, self._answers, self._step, self._heard = writer, answers, step, heard

    def open(self) -> Known:
        """Nothing of what was before is written again."""
        return Known(self._step, (self._step, True))

    def metrics(self, lines: Sequence[JsonObject]) -> None:
        """Not here."""

    def evaluation(self, line: JsonObject) -> None:
        """See the class."""
        shown = self._answers.at(line["step"])
        for source, own in groupby(shown, key=lambda one: one.source):
            self._writer.add_text(f"eval/answers/{source}", table(list(own)), line["step"])
        if self._heard or not shown:
            return
        self._heard = True
        for clip in self._answers.clips():
            tag = f"eval/clips/{clip.source}/" + re.sub(r"[^-./ \w]", "_", clip.id)
            tag += f" (first {clip.samples.size / RATE:g} s)" if clip.cut else ""
            self._writer.add_audio(tag, clip.samples, line["step"], RATE)

    def event(self, line: JsonObject) -> None:
        """Not here."""

    def close(self, outcome: str) -> None:
        """The writer is closed by who made it."""
