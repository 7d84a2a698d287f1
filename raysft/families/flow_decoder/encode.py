"""Encoder of flow decoders: speech tokens, a speaker embedding, and the mel of a clip.

Stands in the data tasks. An example is its one clip, whatever else is said in it, with the speech
tokens and the speaker embedding that its source has; where it has no tokens, they are made of the
clip by data.speech_tokens. An example takes as many positions as its mel has frames.

Costs 0.7 ms a second of audio for its mel, and what its tokens cost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence as Items
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raysft.config.schema import Data, Model
from raysft.data.clips import mels
from raysft.data.clips.audio import resample
from raysft.data.clips.file import resampled_length
from raysft.data.clips.speech_tokens import SpeechTokenizer, load
from raysft.data.encode.base import IGNORED, VERSION, Encoded, Encoder
from raysft.data.encode.verdict import Verdict
from raysft.data.encode.wordless import Wordless
from raysft.data.example import Audio, Example, Sequence, Units
from raysft.errors import BadExample, UserError
from raysft.families.flow_decoder.tokens import codes_of, rows_count

if TYPE_CHECKING:
    from raysft.families.flow_decoder.config import FlowDecoderConfig

CODES, MEL, VOICE, DRAWS = "codes", "mel", "voice", "draws"
"""Arrays of an example: int32 [rows, codebooks], float32 [frames, bins], float32 [1, values], and
int64 [1], the seed of what is random in its loss."""
SLACK_S = 0.2  # that tokens and mel may be apart: what encoders leave out at a clip's end


def make_encoder(model: Model, data: Data, run_folder: Path, kept: str | None) -> FlowEncoder:
    """See `raysft.data.encode.Encode`."""
    from raysft.families.flow_decoder.settings import config_of

    fitted = None
    if data.speech_tokens is not None:
        fitted = load(data.speech_tokens, run_folder)
    return FlowEncoder(data, config_of(model), fitted)


def check_model(model: Model) -> None:
    """See `raysft.data.encode.Encode`."""
    from raysft.families.flow_decoder.settings import config_of

    config_of(model)


class FlowEncoder(Encoder):
    """Speech tokens in, a mel out."""

    sample_rate: int
    says_language = False
    writes = False

    def __init__(
        self, data: Data, config: FlowDecoderConfig, speech_tokens: SpeechTokenizer | None
    ) -> None:
        """config: of the model. Raises UserError for what contradicts it."""
        if data.mode == "packed":
            raise UserError(
                "data.mode: packed, but a flow decoder has a row for each example: set padded"
            )
        self.config, self.mel = config, config.settings
        self.sounds = self.mel
        self.sample_rate = self.mel.rate
        self.speech_tokens = speech_tokens
        if speech_tokens is not None:
            _check_units(speech_tokens, config)
        self.template = Wordless()
        self.verdict = Verdict(config.model_type)
        books = [config.estimator, config.codebooks, config.tokens_per_second, config.upsample]
        told = [VERSION, "flow_decoder", books, config.speaker_width, self.mel.model_dump()]
        told.append(None if speech_tokens is None else speech_tokens.fingerprint())
        self.fingerprint = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def part_length(self, part: Audio | Units, samples: int, answer: bool) -> int:
        """Frames of a clip; units take none."""
        return mels.frames(samples, self.mel) if isinstance(part, Audio) else 0

    def part_encoded(
        self, part: Audio | Units, clip: np.ndarray | None, rng: np.random.Generator | None
    ) -> Encoded:
        """Parts are not encoded alone: see `encode`."""
        raise NotImplementedError("a flow decoder reads examples, not their parts")

    def measure(self, example: Example, samples: Items[int]) -> int:
        """Frames of its mel that its tokens speak. Raises BadExample: see `encode`."""
        _, units = _parts(example)
        self._check_voice(example)
        if units is None and self.speech_tokens is None:
            raise UserError(
                f"data: {example.id} has no speech tokens: name a source that has them, or set "
                "data.speech_tokens to make them of its clip"
            )
        if units is not None:
            codes_of(units.ids, self.config)  # for its refusals
        count = samples[0] if samples else 0
        self._check_length(count)
        return self._fit(count, self._rows(units, count))[1]

    def encode(
        self,
        example: Example,
        clips: Items[np.ndarray],
        rng: np.random.Generator | None = None,
        promised: int | None = None,
    ) -> Sequence:
        """As `Encoder.encode`: frames as positions (all learnt), with the arrays above.

        Raises BadExample for an example of no clip or several, of tokens beyond the codebooks or in
        wrong groups, without the speaker embedding that the model reads, or whose mel and tokens
        are of other lengths.
        """
        _, units = _parts(example)
        self._check_voice(example)
        wave = clips[0]
        self._check_length(len(wave))
        rows, frames = self._fit(len(wave), self._rows(units, len(wave)))
        self._check_promised(frames, promised)
        if units is not None:
            codes = codes_of(units.ids, self.config)
        else:
            assert self.speech_tokens is not None  # `measure` has asked for it
            heard = resample(wave, self.sample_rate, self.speech_tokens.sample_rate)
            codes = codes_of(self.speech_tokens.encode(heard).tolist(), self.config)
        arrays = {
            CODES: [codes[:rows]],
            MEL: [mels.log_mel(wave, self.mel)[:frames]],
            DRAWS: [np.array([example.seed(rng)], np.int64)],
        }
        if self.config.speaker_width:
            arrays[VOICE] = [np.array([example.voice], np.float32)]
        positions = np.zeros(frames, np.int32)
        seconds = len(wave) / self.sample_rate
        return Sequence(example.id, example.task, positions, positions.copy(), arrays, seconds)

    def prompt(self, example: Example, clips: Items[np.ndarray]) -> Sequence:
        """What is to be spoken: tokens and speaker, with as many positions as the mel will have
        frames. Raises BadExample as `encode` does.

        clips: that whose tokens are spoken, where the example brings none.
        """
        self._check_voice(example)
        units = next((part for part in example.parts if isinstance(part, Units)), None)
        if units is not None:
            codes = codes_of(units.ids, self.config)
        elif self.speech_tokens is not None and clips:
            heard = resample(clips[0], self.sample_rate, self.speech_tokens.sample_rate)
            codes = codes_of(self.speech_tokens.encode(heard).tolist(), self.config)
        else:
            raise BadExample("has no speech tokens to be spoken", "malformed record")
        rows, config = len(codes), self.config
        frames = rows * config.upsample
        if config.of_voicebox:
            second = float(config.tokens_per_second or 1)
            frames = round(rows / second * self.mel.frames_per_second)
        if frames < 1:
            raise BadExample("has no speech tokens to be spoken", "malformed record")
        arrays = {CODES: [codes]}
        if config.speaker_width:
            arrays[VOICE] = [np.array([example.voice], np.float32)]
        positions, seconds = np.zeros(frames, np.int32), frames / self.mel.frames_per_second
        return Sequence(
            example.id, example.task, positions, np.full(frames, IGNORED, np.int32), arrays, seconds
        )

    def _rows(self, units: Units | None, samples: int) -> int:
        if units is not None:
            return rows_count(len(units.ids), self.config)
        assert self.speech_tokens is not None
        rate = self.speech_tokens.sample_rate
        return self.speech_tokens.units_count(resampled_length(samples, self.sample_rate, rate))

    def _fit(self, samples: int, rows: int) -> tuple[int, int]:
        """Rows and frames of an example, as many of each as go together. Raises BadExample where
        one of them lasts longer than the other."""
        there = mels.frames(samples, self.mel)
        second = self.mel.frames_per_second
        spoken = rows / float(self.config.tokens_per_second or 1) * second
        if abs(spoken - there) > SLACK_S * second:
            raise BadExample(
                f"its speech tokens ({rows} rows) are {spoken / second:.2f} s and its clip "
                f"{there / second:.2f} s: they are not of this clip as it is, or "
                f"model.config.tokens_per_second ({self.config.tokens_per_second:g}) is another",
                "tokens of another length",
            )
        frames = there
        if not self.config.of_voicebox:
            rows = min(rows, there // self.config.upsample)
            frames = rows * self.config.upsample
        if rows < 1 or frames < 1:
            raise BadExample(
                f"its clip of {samples / self.sample_rate:.3f} s is too short: no frame of its mel "
                "has a speech token",
                "too short",
            )
        return rows, frames

    def _check_voice(self, example: Example) -> None:
        wanted = self.config.speaker_width
        if not wanted:
            return
        if not example.voice:
            raise BadExample(
                f"has no speaker embedding, and the model reads one of {wanted} values: make them "
                "with prepare.speakers, or set model.config.speaker_width: 0",
                "no speaker embedding",
            )
        if len(example.voice) != wanted:
            raise BadExample(
                f"its speaker embedding has {len(example.voice)} values, the model reads {wanted} "
                "(model.config.speaker_width)",
                "no speaker embedding",
            )
        values = np.asarray(example.voice, np.float32)
        if not np.isfinite(values).all() or not values.any():
            raise BadExample(
                "its speaker embedding points nowhere: it is all zeros, or not finite",
                "no speaker embedding",
            )


def _parts(example: Example) -> tuple[Audio, Units | None]:
    """Its clip and its tokens. Raises BadExample where there is not one clip, or more tokens."""
    clips = [part for part in example.parts if isinstance(part, Audio)]
    units = [part for part in example.parts if isinstance(part, Units)]
    if len(clips) != 1:
        raise BadExample(
            f"has {len(clips) or 'no'} clip{'s' * (len(clips) > 1)}, and a flow decoder learns "
            "the mel of one",
            "not one clip",
        )
    if len(units) > 1:
        raise BadExample("has several runs of speech tokens, expected one", "malformed record")
    return clips[0], units[0] if units else None


def _check_units(speech_tokens: SpeechTokenizer, config: FlowDecoderConfig) -> None:
    """Raises UserError where what data.speech_tokens makes is not what the model reads."""
    if config.codebooks != [speech_tokens.clusters]:
        raise UserError(
            f"model.config.codebooks: {config.codebooks}, but data.speech_tokens has "
            f"{speech_tokens.clusters} clusters: set [{speech_tokens.clusters}]"
        )
    if abs(float(config.tokens_per_second or 0) - speech_tokens.units_per_second) > 1e-6:
        raise UserError(
            f"model.config.tokens_per_second: {config.tokens_per_second:g}, but "
            f"data.speech_tokens makes {speech_tokens.units_per_second:g}: set "
            "data.speech_tokens.stack so that they agree"
        )
