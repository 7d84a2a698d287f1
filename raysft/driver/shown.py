"""Examples as the model reads them: what a dry run shows with `--show N`.

Runs on the driver, on what `prepare` has prepared: the index, read by the encoder as a run does.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from raysft.data.encode import Encoder
from raysft.data.example import MicroBatch, Sequence
from raysft.data.index.build import Index
from raysft.data.pairs import apart
from raysft.data.read.reader import Reader, Work

LEARNT, END = "\x1b[32m", "\x1b[0m"  # green
MARKS = ("\u27e6", "\u27e7")  # where there are no colours: white square brackets
REPEATS = 4  # of a token that are written out


def examples(index: Index, encoder: Encoder, budget: int, count: int, colours: bool) -> list[str]:
    """Lines: of the first `count` examples their tokens as text, what is supervised marked.

    colours: marked green, else between white square brackets. A token that stands many times, as
    those of a clip do, is written once, with its number.
    """
    reader = Reader(index, encoder, budget, seed=None)
    works = (Work(0, 0, 0, np.array([row])) for row in range(min(count, len(index))))
    lines = []
    for number, batch in enumerate(reader.read(works), 1):
        lines += [f"example {number}: {_title(batch)}", *_body(batch, encoder, colours), ""]
    return lines


def _title(batch: MicroBatch) -> str:
    if not batch.ids:
        return f"{batch.quarantined[0].id} is unusable: {batch.quarantined[0].reason}"
    answers = apart(batch.sequences()[0])
    positions = sum(len(answer.input_ids) for answer in answers)
    supervised = sum(int((answer.labels != -100).sum()) for answer in answers)
    audio = f", {batch.seconds:.1f} s of audio" if batch.seconds else ""
    return (
        f"{batch.ids[0]}, task {batch.tasks[0]}: {positions} positions, {supervised} "
        f"supervised{audio}"
    )


def _body(batch: MicroBatch, encoder: Encoder, colours: bool) -> Iterator[str]:
    if not batch.ids:
        return
    if not encoder.writes:
        for name, ragged in batch.arrays.items():
            yield f"    {name}: {ragged.values.dtype} {list(ragged.values.shape)}"
        return
    for number, answer in enumerate(apart(batch.sequences()[0])):
        if number:
            yield "  rejected:"
        yield from _text(answer, encoder, colours)


def _text(answer: Sequence, encoder: Encoder, colours: bool) -> Iterator[str]:
    before, behind = (LEARNT, END) if colours else MARKS
    text = ""
    positions = zip(answer.input_ids.tolist(), (answer.labels != -100).tolist(), strict=True)
    for learnt, run in groupby(positions, key=lambda position: position[1]):
        shown = _decoded([token for token, _ in run], encoder)
        # Each line has its own colour: pagers and terminals lose it at a line's end.
        text += (
            "\n".join(f"{before}{line}{behind}" for line in shown.split("\n")) if learnt else shown
        )
    yield from (f"    {line}" for line in text.split("\n"))


def _decoded(ids: list[int], encoder: Encoder) -> str:
    found, plain = "", []
    for token, run in groupby(ids):
        times = len(list(run))
        if times <= REPEATS:
            plain += [token] * times
            continue
        found += encoder.tokenizer.decode(plain) + f"{encoder.tokenizer.decode([token])} x {times} "
        plain = []
    return found + encoder.tokenizer.decode(plain)
