"""What every encoder is: an example and its clips -> token ids, labels and features.

Stands between the decoded clips and the micro-batches; also asked by the index (`measure`) how
long an example will be, from its clips' lengths alone. A family of models supplies two methods:
how many positions a part takes, and which ids (and frames) it becomes. The rest is here.

Costs 0.04 ms an example to measure, 0.06 ms to encode text and units, 0.5 ms a clip of 2 s.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from raysft.config.mel import Mel
from raysft.data import pairs
from raysft.data.clips.audio import SHORTEST_S, Limits
from raysft.data.clips.augment import Augmentation
from raysft.data.clips.effects import length_at
from raysft.data.clips.speech_tokens import SpeechTokenizer
from raysft.data.clips.stripes import Spectrogram
from raysft.data.encode.verdict import Verdict
from raysft.data.example import Audio, Example, Sequence, Units
from raysft.data.facts import FACTS, facts_of
from raysft.data.text import Rendered, Segment
from raysft.errors import BadExample, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VERSION = 2  # of the encoding: raise it when ids or lengths change with the same config
EXCESS = 0.02  # share by which an example may be longer than it was measured
_WRONG_KIND = {
    False: "holds latents (columns: {latents: NAME}), and this model reads clips: set "
    "model.patches.column for a patch_lm that learns them, or name a column of audio",
    True: "holds a clip, and model.patches.column reads latents: name their column in the entry, "
    "columns: {latents: NAME}",
}
IGNORED = -100  # label of positions that are not learnt


@dataclass(frozen=True, slots=True)
class Encoded:
    """A part as the model reads it. seconds: of audio behind it, 0 where that is not known.

    arrays: what the model reads of it besides, by name (see `Sequence`): the index, the stream and
    the feed carry them without knowing them.
    """

    ids: np.ndarray
    seconds: float = 0.0
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Varied:
    """How the clips that an example hears are varied. rng: of the example. factors: of speed, for
    which there is room."""

    by: Augmentation
    rng: np.random.Generator
    factors: tuple[float, ...]


class _Shown(NamedTuple):
    """An answer as the model sees it. samples: of each of its clips; clips: those, once they are
    read."""

    rendered: Rendered
    samples: list[int]
    clips: list[np.ndarray]


class Renders(Protocol):
    """What tells of an example what the model is given and what it learns, as `text.Template`
    does. source: what a run keeps of it. remark: what a user should know of it, or ""."""

    source: str
    remark: str
    end_id: int

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The transformers tokenizer."""

    def render(self, example: Example) -> Rendered:
        """Segments of prompt and answer. Raises BadExample, or UserError."""

    def prompt(self, example: Example) -> list[Segment]:
        """What a model is given to answer it. Raises as `render` does."""

    def answer_of(self, generated: str) -> str:
        """The answer in a generated text."""


class Measures(Protocol):
    """What an index asks: how long an example is. Of `Encoder`, and of what only measures."""

    sample_rate: int | None
    fingerprint: str
    limits: Limits

    def measure(self, example: Example, samples: Items[int]) -> int:
        """See `Encoder.measure`."""

    def workload(self, example: Example, samples: Items[int]) -> float:
        """See `Encoder.workload`."""

    def of_training(self) -> Measures:
        """See `Encoder.of_training`."""


class Encoder(ABC):
    """Turns examples into sequences. Picklable, and free of torch unless its features need it.

    sample_rate: Hz of the clips it wants; None where it takes no clips.
    fingerprint: changes whenever token ids or lengths could.
    template: holds the tokenizer; template.end_id is the token that ends every answer.
    limits: of the clips it is given. positions: that the model has; None: they do not end.
    new_ids: tokens that the tokenizer of the model lacked.
    units: which unit tokens are used and which are new, in words; "" where there are none.
    writes: whether its model reads and writes text: else it has no tokenizer.
    says_language: whether the answer of an asr example begins with its lang.
    audio_id: the id at the positions of clips, where its model's config does not say it.
    speech_tokens: what makes units of clips; None: it reads no clips as units.
    kinds: of a mixture whose experts are for kinds of tokens: of each token id, -1 where of none.
    augment: how clips are varied in training; None: they are not.
    spectrogram: where a clip's features are among its arrays; None: the model reads none.
    sounds: the log-mel that its model speaks; None: it writes text, or speaks otherwise.
    latents_per_second: values of latents that it reads instead of clips; 0: it reads clips.
    waves: makes waves [samples] at spoken_rate Hz of the frames [frames, width] that its model
        speaks, where those are no log-mel. raw: makes such frames what the data has of them,
        spoken_rate a second, where nothing makes waves of them. frames_of: makes such frames of a
        clip, where that is how they are made.
    speaker: of the model in it that sounds the units it writes; None: there is none.
    facts: whether sequences of training carry what rewards are told (`data.facts`).
    pairs: whether it encodes the rejected answer beside the chosen one (`data.pairs`).
    """

    sample_rate: int | None
    fingerprint: str
    template: Renders
    limits: Limits = Limits()
    positions: int | None = None
    verdict: Verdict | None = None
    new_ids: tuple[int, ...] = ()
    units: str = ""
    writes: bool = True
    says_language: bool = True
    audio_id: int | None = None
    speech_tokens: SpeechTokenizer | None = None
    kinds: np.ndarray | None = None
    augment: Augmentation | None = None
    spectrogram: Spectrogram | None = None
    sounds: Mel | None = None
    speaker: Encoder | None = None
    latents_per_second: int = 0
    waves: Callable[[np.ndarray], np.ndarray] | None = None
    spoken_rate: float = 0.0
    raw: Callable[[np.ndarray], np.ndarray] | None = None
    frames_of: Callable[[np.ndarray], np.ndarray] | None = None
    facts: bool = False
    pairs: bool = False
    _trains: bool = False
    _slower: tuple[float, ...] = ()  # factors of speed with which examples are measured

    @property
    def tokenizer(self):
        """The transformers fast tokenizer, with all tokens added that this encoder uses."""
        return self.template.tokenizer

    @property
    def end_id(self) -> int:
        """The token that ends every answer: generation stops there."""
        return self.template.end_id

    @abstractmethod
    def part_length(self, part: Audio | Units, samples: int, answer: bool) -> int:
        """Positions of a part; samples: of its clip at sample_rate (0 for units)."""

    @abstractmethod
    def part_encoded(
        self, part: Audio | Units, clip: np.ndarray | None, rng: np.random.Generator | None
    ) -> Encoded:
        """Ids of a part, with the arrays that the model reads of it. rng: augment with it."""

    def measure(self, example: Example, samples: Items[int]) -> int:
        """Positions the example takes, at its longest; samples: of each of example.audio() at
        sample_rate.

        Raises BadExample (this example cannot be used) or UserError (none of its kind can).
        """
        drawn = example.variants or example.woven is not None or example.judged is not None
        forms = example.forms if drawn else [example]
        return max(self._measured(form, [*example.of_form(form, samples)]) for form in forms)

    def of_training(self) -> Encoder:
        """The same, but examples of training are measured: at the slowest that their clips may be
        played (`data.augment.speed`), and none but pairs where it encodes those; itself where they
        are never played slower, and need be no pairs."""
        told = self.augment.lengthens if self.augment is not None else ""
        if not told and not self.pairs:
            return self
        other = copy.copy(self)
        other._trains = True
        if told and self.augment is not None:
            other._slower = tuple(self.augment.settings.slower)
            other.fingerprint = f"{other.fingerprint}, {told}"
        if self.pairs:
            other.fingerprint = f"{other.fingerprint}, none but pairs"
        return other

    def computed(self, samples: int) -> float:
        """Seconds that the model's encoder computes for a clip of so many samples: with what it is
        padded to, whatever lies beside it."""
        return samples / self.sample_rate if self.sample_rate else 0.0

    def workload(self, example: Example, samples: Items[int]) -> float:
        """Seconds that the model's encoder computes for the example, at the most; samples: as in
        `measure`."""
        forms = example.forms if example.variants else [example]
        return max(self._workload(form, [*example.of_form(form, samples)]) for form in forms)

    def _measured(self, example: Example, samples: Items[int]) -> int:
        shown = self._shown(example, samples, self._trains)
        found = self._taken(shown)
        for one in shown:
            for segment in one.rendered.segments:
                if isinstance(segment, np.ndarray):
                    self._check_kinds(segment)
            self._check_positions(one.rendered, self._positions(one))
        slower = self._slowest(shown)
        return found if slower is None else max(found, self._taken(shown, slower))

    def _workload(self, example: Example, samples: Items[int]) -> float:
        if not self._slower and not self.pairs:
            return sum(map(self.computed, samples))
        shown = self._shown(example, samples, self._trains)
        return self._computed(shown, self._slowest(shown) or 1.0)

    def _shown(
        self,
        example: Example,
        samples: Items[int],
        trains: bool,
        clips: Items[np.ndarray] = (),
    ) -> list[_Shown]:
        """What the model sees of an example: of a pair both answers. samples, clips: of its own."""
        if not self.pairs:
            return [_Shown(self.template.render(example), [*samples], [*clips])]
        found = []
        for answer in pairs.answers(example, trains):
            own = (example.of_form(answer, samples), example.of_form(answer, clips))
            found.append(_Shown(self.template.render(answer), [*own[0]], [*own[1]]))
        return found

    def _taken(self, shown: list[_Shown], factor: float = 1.0) -> int:
        return sum(self._positions(one, factor) for one in shown)

    def _computed(self, shown: list[_Shown], factor: float) -> float:
        """Seconds that the model's encoder computes, of clips that are played so fast."""
        lengths = (length for one in shown for length in one.samples)
        return sum(self.computed(length_at(length, factor)) for length in lengths)

    def _positions(self, shown: _Shown, factor: float = 1.0) -> int:
        """Of an answer whose clips, those that it hears, are played so fast."""
        lengths, rendered = iter(shown.samples), shown.rendered
        return sum(
            self._length(segment, lengths, learnt, factor)
            for segment, learnt in zip(rendered.segments, rendered.learnt, strict=True)
        )

    def _check_positions(self, rendered: Rendered, found: int) -> None:
        limited = self._limited(rendered, found)
        if self.positions is not None and limited > self.positions:
            raise BadExample(
                f"takes {limited} positions, and the model has learned {self.positions}: shorten "
                "it, or use a model with more",
                "beyond learned positions",
            )

    def _slowest(self, shown: list[_Shown]) -> float | None:
        """The slowest that its clips may be played, where that is slower than they are."""
        return next((f for f in self._slower if self._room(shown, f)), None)

    def _room(self, shown: list[_Shown], factor: float, promised: int | None = None) -> bool:
        """Whether an example with its clips played so fast can be used: by the model, within a
        micro-batch, and within the positions `promised` for it."""
        assert self.augment is not None
        try:
            found = self._taken(shown, factor)
            for one in shown:
                self._check_positions(one.rendered, self._positions(one, factor))
        except BadExample:
            return False
        heard = self._computed(shown, factor)
        limits = ((found, self.augment.budget), (found, promised), (heard, self.augment.heard))
        return all(most is None or taken <= most for taken, most in limits)

    def _limited(self, rendered: Rendered, found: int) -> int:
        """Of the positions `found` those that the model may have no more of than `positions`."""
        return found

    def limit(self, positions: int | None) -> None:
        """Examples that take more positions cannot be used; None: the model has no such limit."""
        if positions != self.positions:
            self.positions = positions
            self.fingerprint = f"{self.fingerprint}, {positions} positions"

    def group(self, kinds: np.ndarray) -> None:
        """Examples with a token of no kind cannot be used. kinds: as the attribute."""
        self.kinds = kinds
        digest = hashlib.sha256(kinds.tobytes()).hexdigest()[:16]
        self.fingerprint = f"{self.fingerprint}, kinds {digest}"

    def _check_kinds(self, ids: np.ndarray) -> None:
        if self.kinds is None or not len(lacking := ids[self.kinds[ids] < 0]):
            return
        token = self.tokenizer.convert_ids_to_tokens(int(lacking[0]))
        raise BadExample(
            f"token {token} (id {lacking[0]}) is in no group of model.moe.modality", "no kind"
        )

    def encode(
        self,
        example: Example,
        clips: Items[np.ndarray],
        rng: np.random.Generator | None = None,
        promised: int | None = None,
    ) -> Sequence:
        """The sequence to learn: clips of example.audio(), float32 [samples] at sample_rate.

        rng: draws one of its forms, and augments the input, in training (`augment`: on Philox);
        None in evaluation. promised: what `measure` said; a sequence more than 2% longer is a
        BadExample, for its micro-batch has no room for it.
        """
        form = example.drawn(rng)
        own = [*example.of_form(form, clips)]
        shown = self._shown(form, [len(clip) for clip in own], rng is not None, own)
        factors: tuple[float, ...] = ()
        if rng is not None and self.augment is not None and own:
            room = partial(self._room, shown, promised=promised)
            factors = tuple(filter(room, self.augment.factors))
        rngs = [rng, *(copy.deepcopy(rng) for _ in shown[1:])]  # each as the first is heard
        found = [
            self._sequence(example, one, own, factors) for one, own in zip(shown, rngs, strict=True)
        ]
        self._check_promised(sum(len(one.input_ids) for one in found), promised)
        sequence = found[0] if len(found) == 1 else pairs.joined(*found)
        if self.facts and rng is not None:
            sequence.arrays[FACTS] = [facts_of(example, form).packed()]
        return sequence

    def _sequence(
        self,
        example: Example,
        shown: _Shown,
        rng: np.random.Generator | None,
        factors: tuple[float, ...],
    ) -> Sequence:
        """factors: of speed, for which there is room."""
        varied = None
        if rng is not None and self.augment is not None and shown.clips:
            varied = Varied(self.augment, rng, factors)
        rest = iter(enumerate(shown.clips))
        rendered = shown.rendered
        parts = [
            self._encoded(segment, rest, None if learnt else rng, learnt, varied)
            for segment, learnt in zip(rendered.segments, rendered.learnt, strict=True)
        ]
        return self._joined(example, parts, rendered.learnt)

    @staticmethod
    def _check_promised(tokens: int, promised: int | None) -> None:
        """Raises BadExample where so many positions are more than `measure` said."""
        if promised is not None and tokens > promised * (1 + EXCESS):
            raise BadExample(
                f"takes {tokens} positions, but {promised} by the lengths its clips' headers give: "
                "the headers are wrong, or the files have changed since they were indexed (a new "
                "run measures them again)",
                "longer than indexed",
            )

    def prompt(self, example: Example, clips: Items[np.ndarray]) -> Sequence:
        """The sequence up to where the answer starts (of a conversation the last that is learnt),
        nothing of it learnt: for generation.

        clips: those of the input; clips of the output may follow and are not used.
        """
        rest = iter(enumerate(clips))
        segments = self.template.prompt(example)
        parts = [self._encoded(segment, rest, None, answer=False) for segment in segments]
        return self._joined(example, parts, [False] * len(parts))

    def speaking(self, example: Example, clips: Items[np.ndarray]) -> Sequence:
        """As `prompt`, up to where speech begins: behind what is written before it, where the
        example has that."""
        return self.prompt(example, clips)

    def _length(self, segment: Segment, samples: Iterator[int], answer: bool, factor: float) -> int:
        if isinstance(segment, np.ndarray):
            return len(segment)
        if isinstance(segment, Units):
            return self.part_length(segment, 0, answer)
        self._check_latents(segment)
        count = next(samples, 0)  # 0: nothing was measured, for this encoder takes no clips
        if factor != 1 and not answer:
            count = length_at(count, factor)
        self._check_length(count)
        return self.part_length(segment, count, answer)

    def _encoded(
        self,
        segment: Segment,
        clips: Iterator[tuple[int, np.ndarray]],
        rng: np.random.Generator | None,
        answer: bool,
        varied: Varied | None = None,
    ) -> Encoded:
        if isinstance(segment, np.ndarray):
            self._check_kinds(segment)
            return Encoded(segment)
        number, clip = next(clips, (0, None)) if isinstance(segment, Audio) else (0, None)
        if answer or clip is None:
            varied = None
        if varied is not None and clip is not None and self.sample_rate is not None:
            rate, factors = self.sample_rate, varied.factors
            clip = varied.by.varied(clip, rate, varied.rng, number, factors, self.limits)
        if clip is not None:
            self._check_length(len(clip))
        if isinstance(segment, Audio):
            self._check_latents(segment)
        self.part_length(segment, 0 if clip is None else len(clip), answer)  # for its refusals
        found = self.part_encoded(segment, clip, rng)
        self._check_kinds(found.ids)
        if varied is not None and clip is not None and self.spectrogram is not None:
            where = self.spectrogram
            arrays = varied.by.masked(found.arrays, where, len(clip), varied.rng, number)
            found = replace(found, arrays=arrays)
        return found

    def _check_latents(self, clip: Audio) -> None:
        """Raises UserError for latents where clips are read, and the other way round."""
        if (clip.latents is not None) != bool(self.latents_per_second):
            raise UserError(_WRONG_KIND[bool(self.latents_per_second)])

    def _check_most(self, samples: int, most: float | None) -> None:
        """Raises BadExample for a clip of more samples than `most`, which the model reads at most;
        None: all."""
        if most is not None and samples > most and self.sample_rate:
            raise BadExample(
                f"its clip is {samples / self.sample_rate:.2f} s, the model reads at most "
                f"{most / self.sample_rate:.2f} s",
                "too long",
            )

    def _check_length(self, samples: int) -> None:
        if self.sample_rate and samples < SHORTEST_S * self.sample_rate:
            raise BadExample(
                f"{samples} samples at {self.sample_rate} Hz: shorter than one frame "
                f"({SHORTEST_S} s)",
                "too short",
            )

    @staticmethod
    def _joined(example: Example, parts: list[Encoded], learnt: list[bool]) -> Sequence:
        ids = [np.zeros(0, np.int32), *(part.ids for part in parts)]
        labels = [
            part.ids if learns else np.full(len(part.ids), IGNORED, np.int32)
            for part, learns in zip(parts, learnt, strict=True)
        ]
        arrays: dict[str, list[np.ndarray]] = {}
        for part in parts:
            for name, values in part.arrays.items():
                arrays.setdefault(name, []).append(values)
        return Sequence(
            id=example.id,
            task=example.task,
            input_ids=np.concatenate(ids).astype(np.int32, copy=False),
            labels=np.concatenate([ids[0], *labels]).astype(np.int32, copy=False),
            arrays=arrays,
            seconds=sum(part.seconds for part in parts),
        )
