"""Encoder of models that hear through their own processor (`types`).

Stands in the data tasks. A clip becomes what the processor makes of it alone: its text, tokenised,
and its features. Positions are planned from the number of samples; what the processor gives is
held against it.

Costs what the processor does for a clip of 2 s: 2 to 3 ms (qwen3_asr, granite_speech,
phi4_multimodal, gemma4); where it would take 18 ms to pad to 30 s, our log-mel takes 0.6 ms
(qwen2_5_omni), or 2 ms with the padding (audioflamingo3, musicflamingo, glmasr, voxtral).
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import numpy as np

from raysft.config.schema import Data, Model
from raysft.data.clips.features import LogMel
from raysft.data.clips.stripes import Spectrogram
from raysft.data.encode.base import VERSION, Encoded, Encoder
from raysft.data.example import Audio, Units
from raysft.data.text import Template, load_tokenizer
from raysft.errors import BadExample, UserError
from raysft.families.audio_lm.processors import Hearing
from raysft.families.audio_lm.protocols import Extractor, Processor
from raysft.families.audio_lm.types import AudioType, refuse_part
from raysft.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FEATURES = "features"  # of a clip: float32 [frames, mels] or [rows, mels, frames]
FRAMES = "frames"  # of each of its rows, how many are real: int32 [rows]


class ProcessorEncoder(Encoder):
    """Text and audio in, text out.

    row: of its model type. audio_token_id: what stands where audio is heard.
    """

    sample_rate: int

    def __init__(
        self, model: Model, data: Data, kind: str, row: AudioType, kept: str | None
    ) -> None:
        """kind: the model type. kept: the chat template of a run that has begun. Raises UserError
        for models, templates and settings that cannot be used."""
        if data.features != "model":
            raise UserError(
                f"data.features: {data.features}, but {kind} reads what its processor makes: "
                "leave data.features out"
            )
        if model.feature_extractor:
            raise UserError(
                f"model.feature_extractor: {kind} takes the settings of its processor: leave it out"
            )
        if row.package and find_spec(row.package[0]) is None:
            raise UserError(
                f"model: {kind} is built with {row.package[0]}, which is not installed: "
                f"pip install 'raysft[{row.package[1]}]'"
            )
        self.row = row
        self._hearing, own = Hearing.load(row.processor, model)
        tokenizer = load_tokenizer(model, 0)
        self._processor: Processor | None = self._hearing.processor(tokenizer)
        self.sample_rate = self._hearing.extractor.sampling_rate
        self.spectrogram = self._spectrogram()
        self._arguments = _arguments(self._processor, self._hearing.extractor, tokenizer)
        if row.interleaved:
            self._arguments["return_tensors"] = "pt"
        hole = self._processor.audio_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(hole)
        markup = hole
        if row.bracketed:
            markup = self._processor.audio_bos_token + hole + self._processor.audio_eos_token
        dialogues = resolve_name(row.template) if row.template else Template
        self.says_language = row.says_language
        self.template = dialogues(
            tokenizer,
            data,
            [hole],
            hole=hole,
            markup=row.markup or markup,
            own=None if kept or data.template == "plain" else own,
            kept=kept,
        )
        tokenizer.chat_template = self.template.source
        plain = row.silenced or row.layout == "rows"
        self._log_mel = _log_mel(self._hearing.extractor) if plain else None
        self.most = row.most(self._processor) if row.most else None
        self._lengths: dict[int, int] = {}
        self._around: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        settings = [VERSION, "audio_lm", kind, self.template.fingerprint]
        settings += [self._hearing.extractor.to_dict(), self._hearing.settings, self._arguments]
        told = json.dumps(settings, sort_keys=True, default=str)
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()

    def _spectrogram(self) -> Spectrogram | None:
        if not self.row.stacked:
            return None
        extractor = self._hearing.extractor
        hop = extractor.hop_length if self.row.layout == "rows" else 0
        stacked: int = getattr(extractor, "num_frames_lfr", self.row.stacked)
        return Spectrogram(FEATURES, stacked, hop=hop)

    @property
    def processor(self) -> Processor:
        """transformers' processor; made anew, once, where this encoder was sent to."""
        if self._processor is None:
            self._processor = self._hearing.processor(self.tokenizer)
        return self._processor

    def __getstate__(self) -> JsonObject:
        return {**self.__dict__, "_processor": None}

    def part_length(self, part: Audio | Units, samples: int, answer: bool) -> int:
        """Positions of the clip. BadExample: too long or too short."""
        refuse_part(part, answer)
        seconds = samples / self.sample_rate
        self._check_most(samples, self.most)
        tokens = self.row.tokens(self.processor, samples)
        if tokens < 1:
            raise BadExample(
                f"its clip of {seconds:.3f} s is too short: it gives no audio token", "too short"
            )
        if self.row.interleaved:
            return self._written_length(tokens)
        return tokens + self._more()

    def computed(self, samples: int) -> float:
        """Of rows all that they hold."""
        if self.row.layout == "frames":
            return super().computed(samples)
        size = self._hearing.extractor.n_samples
        return -(-samples // size) * size / self.sample_rate

    def part_encoded(
        self, part: Audio | Units, clip: np.ndarray | None, rng: np.random.Generator | None
    ) -> Encoded:
        """The text of the clip, tokenised, and its features (see FEATURES, FRAMES).

        Raises BadExample where the processor makes more or fewer positions of it than planned.
        """
        assert clip is not None  # units were refused
        if self._log_mel is not None and self.row.layout == "rows":
            return self._rows_by_log_mel(self._log_mel, part, clip)
        if self._log_mel is not None:
            return self._by_log_mel(self._log_mel, part, clip)
        made, (text,) = self.processor._process_audio([clip], **self._arguments)
        tokens = text.count(self.processor.audio_token)
        planned = self.row.tokens(self.processor, len(clip))
        if tokens != planned:
            raise BadExample(
                f"its clip of {len(clip)} samples becomes {tokens} audio tokens, {planned} were "
                "planned: transformers' processor counts otherwise than this raysft",
                "longer than indexed",
            )
        if self.row.interleaved:
            return Encoded(self._ids(text), len(clip) / self.sample_rate, self._arrays(made))
        before, after = self._text_around(text, tokens)
        audio = np.full(tokens, self.audio_token_id, np.int32)
        ids = np.concatenate([before, audio, after])
        return Encoded(ids, len(clip) / self.sample_rate, self._arrays(made))

    def _by_log_mel(self, front_end: LogMel, part: Audio | Units, clip: np.ndarray) -> Encoded:
        """The same without the processor: the frames that it would keep of a padded chunk."""
        tokens = self.part_length(part, len(clip), False) - self._more()
        before, after = next(iter(self._around.values()))
        audio = np.full(tokens, self.audio_token_id, np.int32)
        frames = front_end(clip)[: front_end.frames(len(clip))]
        ids = np.concatenate([before, audio, after])
        return Encoded(ids, len(clip) / self.sample_rate, {FEATURES: frames})

    def _rows_by_log_mel(self, front_end: LogMel, part: Audio | Units, clip: np.ndarray) -> Encoded:
        """The same of a clip that becomes rows of a chunk each, the last padded with silence."""
        tokens = self.part_length(part, len(clip), False) - self._more()
        before, after = next(iter(self._around.values()))
        ids = np.concatenate([before, np.full(tokens, self.audio_token_id, np.int32), after])
        size, long = self._hearing.extractor.n_samples, self._hearing.extractor.nb_max_frames
        pieces = [clip] if self.row.joined else np.split(clip, range(size, len(clip), size))
        rows, frames = [], []
        for piece in pieces:
            count = -(-len(piece) // size)
            whole = replace(front_end, chunk=count * size)
            heard = np.pad(piece, (0, max(0, whole.n_fft - len(piece))))
            shown = whole.pad(whole(heard), count * long)
            rows.append(shown.reshape(count, long, -1).transpose(0, 2, 1))
            frames += [whole.frames(len(piece))] if self.row.mask else [long] * count
        arrays = {
            FEATURES: np.ascontiguousarray(np.concatenate(rows)),
            FRAMES: np.array(frames, np.int32),
        }
        return Encoded(ids, len(clip) / self.sample_rate, arrays)

    def silence(self, samples: int) -> Encoded:
        """What a silent clip of so many samples becomes."""
        return self.part_encoded(Audio("silence"), np.zeros(samples, np.float32), None)

    def samples_of(self, positions: int) -> int:
        """About how many samples take so many positions, of what a clip may have."""
        second = self.row.tokens(self.processor, 10 * self.sample_rate) / 10
        samples = int(positions / second * self.sample_rate)
        return max(self.fewest(), samples if self.most is None else min(samples, self.most))

    def fewest(self) -> int:
        """Samples of a short clip that gives some audio tokens."""
        samples = self.sample_rate // 10
        while self.row.tokens(self.processor, samples) < 1:
            samples *= 2
        return samples

    def _arrays(self, made: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        features = np.asarray(made[self.row.features], np.float32)
        mask = made.get(self.row.mask) if self.row.mask else None
        if self.row.layout == "rows":
            frames = np.full(len(features), features.shape[self.row.time])
            if mask is not None:
                frames = np.asarray(mask).sum(-1)
            return {FEATURES: features, FRAMES: frames.astype(np.int32)}
        (found,) = features
        found = np.moveaxis(found, self.row.time - 1, 0)
        if mask is not None and np.asarray(mask).shape[-1] == len(found):
            found = found[np.asarray(mask)[0].astype(bool)]
        return {FEATURES: np.ascontiguousarray(found)}

    def _written_length(self, tokens: int) -> int:
        """Positions of a clip of so many audio tokens, with the text between them."""
        if tokens not in self._lengths:
            text = self.processor.replace_audio_token({"num_audio_tokens": [tokens]}, 0)
            self._lengths[tokens] = len(self._ids(text))
        return self._lengths[tokens]

    def _more(self) -> int:
        """Positions that the processor writes around the audio tokens of a clip."""
        if not self._around:
            seconds = 1.0
            clip = np.zeros(int(seconds * self.sample_rate), np.float32)
            _, (text,) = self.processor._process_audio([clip], **self._arguments)
            self._text_around(text, text.count(self.processor.audio_token))
        return sum(map(len, next(iter(self._around.values()))))

    def _text_around(self, text: str, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of what stands before and behind a clip's audio tokens, the same for every clip."""
        before, _, rest = text.partition(self.processor.audio_token)
        after = rest[(tokens - 1) * len(self.processor.audio_token) :]
        key = f"{before}{self.processor.audio_token}{after}"
        if key not in self._around:
            self._around[key] = (self._ids(before), self._ids(after))
        return self._around[key]

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer(text, add_special_tokens=False).input_ids, np.int32)


def _log_mel(extractor: Extractor) -> LogMel | None:
    """Our log-mel with the settings of `extractor`, where it is plain Whisper's."""
    from transformers import WhisperFeatureExtractor

    if type(extractor) is not WhisperFeatureExtractor or extractor.dither:
        return None
    return LogMel(
        extractor.sampling_rate,
        extractor.feature_size,
        extractor.n_fft,
        extractor.hop_length,
        extractor.n_samples,
    )


def _arguments(
    processor: Processor, extractor: Extractor, tokenizer: PreTrainedTokenizerFast
) -> JsonObject:
    """What the processor's own call gives its extractor."""
    merged = processor._merge_kwargs(tokenizer_init_kwargs=tokenizer.init_kwargs)["audio_kwargs"]
    if "sampling_rate" in inspect.signature(extractor.__call__).parameters:
        merged.setdefault("sampling_rate", extractor.sampling_rate)  # it would warn at every clip
    return merged
