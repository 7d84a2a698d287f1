"""What flows between sources, encoders, the stream and the trainer: plain, picklable values.

sources yield `Example`; an encoder turns one into a `Sequence`; the stream joins the sequences of
one (step, lane) into a `MicroBatch`. None of these needs torch or Ray.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeVar

import numpy as np

from raysft.data import weave
from raysft.data.judged import Asked, Judged
from raysft.scorers.rated import Rated


@dataclass(frozen=True, slots=True)
class Within:
    """A clip's file inside of another: bytes [offset, offset + size) of `file` (a path, or the URL
    of an object), as a tar has its members."""

    file: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Cell:
    """A clip's file as a cell of Parquet: of row `row` of row group `group` in `file`, the column
    of bytes with the dotted name `column`."""

    file: str
    group: int
    row: int
    column: str


@dataclass(frozen=True, slots=True)
class Measured:
    """What whoever wrote a clip measured of it: samples of a channel, Hz, channels."""

    samples: int
    rate: int
    channels: int


@dataclass(frozen=True, slots=True)
class Audio:
    """A clip, still to be decoded: a file (absolute path, or the URL of an object in a store), a
    part of one, or what a record carries.

    stated: the seconds its record says it has, held against what it has when it is measured.
    start, stop: of a part, seconds from the file's beginning, as records have them; None: to its
        end. The samples nearest to them are taken at the file's own rate: sample n is n / rate.
    channel: of the file, from 0; None: all of them, mixed.
    bytes: the file's content, where a record carries it. The path is then no file's, but what
        messages call it, and its alone.
    held: where its file lies in another; the path is then what messages call it, as with bytes.
    measured: of its file, where that is written beside it: it is then not opened for its length.
    latents: frames, and values of each, where the cell that holds it has latents of a clip.
    """

    path: str
    stated: float | None = None
    start: float = 0.0
    stop: float | None = None
    channel: int | None = None
    bytes: bytes | None = field(default=None, repr=False)
    held: Within | Cell | None = None
    measured: Measured | None = None
    latents: tuple[int, int] | None = None

    @property
    def stored(self) -> str | None:
        """The file or object that has to be there for it; None where its record carries it."""
        if self.bytes is not None:
            return None
        return self.path if self.held is None else self.held.file

    @property
    def part(self) -> bool:
        """Whether it is not all of its file."""
        return self.start != 0 or self.stop is not None or self.channel is not None

    @property
    def file(self) -> Audio:
        """All of its file."""
        return Audio(self.path, bytes=self.bytes, held=self.held, measured=self.measured)

    @property
    def sound(self) -> Audio:
        """The same, whatever is stated of it."""
        if self.stated is None:
            return self
        return replace(self, stated=None, measured=None)


@dataclass(frozen=True, slots=True)
class Units:
    """Discrete speech units, as numbered by the tokenizer that made them."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Token:
    """A token by its name, such as `<|continue|>`: one that no text is tokenized to."""

    name: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """An example that is token ids already. learnt: of each whether the model learns it."""

    ids: tuple[int, ...]
    learnt: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Woven:
    """Units and the words that are spoken in them, of which a document is drawn: see `weave`."""

    units: tuple[int, ...]
    words: tuple[weave.Word, ...]

    def drawn(self, rng: np.random.Generator) -> tuple[str | Units | Token, ...]:
        """One of its documents."""
        return self._parts(weave.woven(self.words, rng))

    def longest(self) -> tuple[str | Units | Token, ...]:
        """Parts that take as many positions as any of its documents."""
        return self._parts(weave.longest(self.words))

    def _parts(self, pieces: list[weave.Piece]) -> tuple[str | Units | Token, ...]:
        parts: list[str | Units | Token] = []
        for piece in pieces:
            parts += [Token(piece.marker)] if piece.marker else []
            parts += [piece.text] if piece.text else []
            units = self.units[piece.start : piece.stop]
            parts += [Units(units)] if units else []
        return tuple(parts)


Part = str | Audio | Units
_Value = TypeVar("_Value")

ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Turn:
    """A message of a conversation.

    role: as chat templates have it: system, user, assistant, tool. content: in order. learnt: of
    the assistant's, whether the model is to learn it; None: as `data.supervise` says. calls: of
    tools, as the JSON of a list that chat templates are given as the message's `tool_calls`; "":
    none.
    """

    role: str
    content: tuple[Part, ...]
    learnt: bool | None = None
    calls: str = ""

    @property
    def texts(self) -> list[str]:
        """Its texts alone."""
        return [part for part in self.content if isinstance(part, str)]

    @property
    def text(self) -> str:
        """Its texts, joined."""
        return "".join(self.texts)


@dataclass(frozen=True, slots=True)
class Example:
    """One training item: a conversation, or its short form: what is asked (`instruction`, `input`)
    and what is to be answered (`output`).

    `turns` are the whole conversation; where there are any, the short form is empty. `tools`: that
    it may use, as the JSON of a list that chat templates are given; "": none.
    `instruction` is None where the source has none: `data.prompts` then supplies it by task.
    `text` is what an answer is held against in evaluation: the plain transcript, of a conversation
    the last turn that is learnt (None: there is nothing to hold it against).
    `document`: a text that is learnt whole, without a template, from the token that begins a text
    to the one that ends it; `woven`: what such a document is drawn of at each step of training (in
    evaluation always the same); `tokens`: ids as they are. Where there is one of these, there is
    nothing else.
    `judged`: what it may ask about at a step, and the answers (see `judged.Judged`), itself being
    one of these; `rated`: in evaluation what raters said of what it asks about.
    `speaker`: who speaks in it, where the source says so; `voice`: an embedding of that speaker, or
    of the speech itself. `language`: that its record names where the answer does not begin with it
    (`lang`); examples are counted by it, and no more.
    `script`: by what its turns are told in place of the chat template alone (`data.scripts`); "":
    none.
    `variants` are what it may be instead (another rated dimension, another rater): at each step of
    training one is drawn, itself as likely as each of them, under its own id, task, lang and text.
    It is measured at its longest, and evaluation takes itself. They have none of their own.
    `rejected`: an answer to the same that is worse than its own, for who learns from pairs; its
    turns are those of the whole conversation. Others do not look at it.
    """

    id: str
    task: str
    input: tuple[Part, ...]
    output: tuple[Part, ...]
    instruction: str | None = None
    lang: str | None = None
    text: str | None = None
    variants: tuple[Example, ...] = ()
    turns: tuple[Turn, ...] = ()
    tools: str = ""
    speaker: str | None = None
    document: tuple[str | Units | Token, ...] = ()
    woven: Woven | None = None
    tokens: Tokens | None = None
    voice: tuple[float, ...] = ()
    language: str | None = None
    judged: Judged | None = None
    rated: tuple[Rated, ...] = ()
    script: str = ""
    rejected: Example | None = None

    @property
    def counted(self) -> str:
        """The language that it is counted by; "": it names none."""
        return self.lang or self.language or ""

    @property
    def parts(self) -> tuple[Part, ...]:
        """All that is said in it, in order, but for the instruction."""
        return (*self.input, *self.output, *(part for turn in self.turns for part in turn.content))

    def audio(self) -> list[Audio]:
        """The clips this example needs, input before output; then those that only variants do, or
        the rejected answer."""
        found = [part for part in self.parts if isinstance(part, Audio)]
        others = self.variants if self.rejected is None else (*self.variants, self.rejected)
        for other in others:
            found += [clip for clip in other.audio() if clip not in found]
        return found

    @property
    def forms(self) -> list[Example]:
        """What it may be at a step: itself first. Of variants only what is asked and answered
        counts. Of what is woven, and of what is judged: what takes as much room as any."""
        if self.woven is not None:
            return [replace(self, document=self.woven.longest(), woven=None)]
        if self.judged is not None:
            return [self._asking(asked) for asked in self.judged.forms()]
        own = [
            replace(variant, id=self.id, task=self.task, lang=self.lang, text=self.text)
            for variant in self.variants
        ]
        return [self, *own]

    def drawn(self, rng: np.random.Generator | None) -> Example:
        """One of its forms, any as likely as any other; itself where rng is None. Nothing is taken
        from rng where it has no variants."""
        if self.woven is not None:
            drawn = self.woven.drawn(rng or np.random.default_rng(self.seed()))
            return replace(self, document=drawn, woven=None)
        if rng is not None and self.judged is not None:
            return self._asking(self.judged.drawn(rng))
        if rng is None or not self.variants:
            return self
        return self.forms[rng.integers(1 + len(self.variants))]

    def _asking(self, asked: Asked) -> Example:
        question, answer = asked
        return replace(self, instruction=question, output=(answer,), text=answer, judged=None)

    def seed(self, rng: np.random.Generator | None = None) -> int:
        """Of what is random in it: drawn from rng, in training; None: by its id."""
        if rng is not None:
            return int(rng.integers(2**63))
        return zlib.crc32(self.id.encode("utf-8", "surrogatepass"))

    def of_form(self, form: Example, values: Iterable[_Value]) -> Iterable[_Value]:
        """values: one of each clip of `audio()`, or none at all; those of a form's clips."""
        if form is self:
            return values  # its own are the first
        known = dict(zip(self.audio(), values))
        return [known[clip] for clip in form.audio() if clip in known]


@dataclass(frozen=True, slots=True)
class Quarantined:
    """An example that could not be used, and why: one line of quarantine.jsonl.

    kind: see `BadExample`; None also where it was written down by a raysft that kept no kinds.
    """

    id: str
    source: str
    path: str
    reason: str
    kind: str | None = None


@dataclass(slots=True)
class Sequence:
    """An encoded example.

    input_ids: int32 [T].
    labels: int32 [T]; labels[t] == input_ids[t] where position t is supervised, else -100
        (not shifted: the loss shifts).
    arrays: what else the model reads, by name: arrays of any lengths and one dtype, which agree in
        all dimensions but the first ("features": float32 [frames, mels], one a clip).
    seconds: of audio behind it (units count with their frame rate where it is known).
    """

    id: str
    task: str
    input_ids: np.ndarray
    labels: np.ndarray
    arrays: dict[str, list[np.ndarray]] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Ragged:
    """Arrays of one name, one after the other.

    values: [sum(lengths), ...]. lengths: int32 [arrays]. owners: int32 [arrays], ascending: the
    sequence of the micro-batch that each belongs to.
    """

    values: np.ndarray
    lengths: np.ndarray
    owners: np.ndarray

    @classmethod
    def join(cls, of_sequences: list[list[np.ndarray]]) -> Ragged:
        """The arrays of each sequence, of which there is at least one in all."""
        counts = [len(arrays) for arrays in of_sequences]
        arrays = list(chain.from_iterable(of_sequences))
        return cls(
            np.concatenate(arrays),
            np.array([len(array) for array in arrays], np.int32),
            np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        )

    def of_sequences(self, count: int) -> list[list[np.ndarray]]:
        """The inverse of `join`: views, for each of `count` sequences."""
        found: list[list[np.ndarray]] = [[] for _ in range(count)]
        cuts = np.cumsum(self.lengths)[:-1]
        for owner, array in zip(self.owners, np.split(self.values, cuts), strict=True):
            found[owner].append(array)
        return found


@dataclass(slots=True)
class MicroBatch:
    """The examples of one (step, lane), concatenated; the model lays them out packed or padded.

    lengths: int32 [n], tokens of each sequence. input_ids, labels: int32 [sum(lengths)].
    arrays: what else the sequences have, by name; a name that none of them has is not there.
    slots: for each sequence its place among the planned examples; quarantined ones leave gaps.
    langs: of each sequence the language that its asr answer begins with; None: with none.
    tensors: digest of the arrays (`data.digest`), where it is to be recorded.
    An empty micro-batch (n == 0) is legal: its examples were quarantined, or the epoch ended.
    The arrays are not to be written to: those from a stream lie in Ray's shared memory.
    """

    epoch: int
    step: int
    lane: int
    ids: list[str]
    tasks: list[str]
    lengths: np.ndarray
    input_ids: np.ndarray
    labels: np.ndarray
    arrays: dict[str, Ragged] = field(default_factory=dict)
    seconds: float = 0.0
    slots: list[int] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    langs: list[str | None] = field(default_factory=list)
    tensors: str = ""

    @property
    def nbytes(self) -> int:
        """Of its arrays."""
        own = self.lengths.nbytes + self.input_ids.nbytes + self.labels.nbytes
        return own + sum(ragged.values.nbytes for ragged in self.arrays.values())

    @classmethod
    def join(
        cls,
        epoch: int,
        step: int,
        lane: int,
        sequences: list[Sequence],
        quarantined: list[Quarantined] | None = None,
        slots: list[int] | None = None,
        langs: list[str | None] | None = None,
    ) -> MicroBatch:
        """Concatenate `sequences` in the order given (`slots` default to 0, 1, ...)."""
        names = sorted({name for s in sequences for name, arrays in s.arrays.items() if arrays})
        empty = np.zeros(0, np.int32)
        return cls(
            epoch=epoch,
            step=step,
            lane=lane,
            ids=[s.id for s in sequences],
            tasks=[s.task for s in sequences],
            lengths=np.array([len(s.input_ids) for s in sequences], np.int32),
            input_ids=np.concatenate([s.input_ids for s in sequences]) if sequences else empty,
            labels=np.concatenate([s.labels for s in sequences]) if sequences else empty,
            arrays={n: Ragged.join([s.arrays.get(n, []) for s in sequences]) for n in names},
            seconds=float(sum(s.seconds for s in sequences)),
            slots=list(range(len(sequences)) if slots is None else slots),
            quarantined=list(quarantined or []),
            langs=[None] * len(sequences) if langs is None else langs,
        )

    def sequences(self) -> list[Sequence]:
        """The inverse of `join`, but for seconds: views."""
        if not self.ids:
            return []
        cuts = np.cumsum(self.lengths)[:-1]
        parts = zip(np.split(self.input_ids, cuts), np.split(self.labels, cuts), strict=True)
        names = zip(self.ids, self.tasks, strict=True)
        found = [Sequence(*name, *part) for name, part in zip(names, parts, strict=True)]
        for name, ragged in self.arrays.items():
            for sequence, arrays in zip(found, ragged.of_sequences(len(found)), strict=True):
                sequence.arrays[name] = arrays
        return found
