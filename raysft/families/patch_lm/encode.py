"""Encoder of patch_lm: a clip becomes a token for each of its patches, and their frames.

Stands in the data tasks. A patch that is spoken is learnt: its label is the patch token, which the
model takes for "here speaks the flow head". What is left of a clip behind its last whole patch is
not heard.

Costs 0.05 ms for the text, and what the latents cost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence as Items
from pathlib import Path

import numpy as np

from raysft.config.patches import Codec, Patches
from raysft.config.schema import Data, Model
from raysft.data.clips.stripes import Spectrogram
from raysft.data.encode.base import VERSION, Encoded, Encoder
from raysft.data.encode.families import model_type
from raysft.data.example import Audio, Example, Sequence, Units
from raysft.data.tokenizer import add_markers, load_tokenizer, new_to_model
from raysft.errors import BadExample, UserError
from raysft.families.patch_lm.codecs import CodecLatents
from raysft.families.patch_lm.latents import ColumnLatents, latents_of
from raysft.families.patch_lm.prompt import ASKS, MARKERS, PATCH, MingPrompt

LATENTS = "latents"  # of the arrays of an example: frames [patches * size, width], one a clip
DRAWS = "draws"  # int64 [2]: of one that speaks the seed of its loss, and whether it is to train
FRAMES = ("mel", "codec", "column")  # of `Patches`: what frames are
SHAPE = ("size", "width", "depth", "heads", "mlp", "dropout", "roles")
"""Of `Patches`: what a net keeps in its config."""


class PatchEncoder(Encoder):
    """Text and patches. patches: what they are, with what the model at model.path says of them."""

    sample_rate: int
    template: MingPrompt

    def __init__(self, model: Model, data: Data, kept: str | None = None) -> None:
        """kept: the prompts of a run that has begun. Raises UserError for what cannot be used."""
        self.patches = settled(model)
        self.latents = latents_of(self.patches)
        self.sample_rate = self.latents.rate
        self.sounds = self.patches.mel
        if self.sounds is not None:
            self.spectrogram = Spectrogram(LATENTS)
        if isinstance(self.latents, CodecLatents):
            self.waves, self.spoken_rate = self.latents.wave, self.latents.rate
            self.frames_of = self.latents
        if isinstance(self.latents, ColumnLatents):
            if data.augment is not None:
                raise UserError(
                    "data.augment: varies clips, and model.patches.column reads latents: leave it "
                    "out"
                )
            self.latents_per_second = self.latents.rate
            self.raw, self.spoken_rate = self.latents.raw, self.latents.frames_per_second
            if (codec := self.latents.codec) is not None:
                self.waves, self.spoken_rate = codec.wave, codec.rate
        tokenizer = load_tokenizer(model, 0)
        ids, new = add_markers(tokenizer, MARKERS)
        self.new_ids = new_to_model(model, tokenizer, ids, new)
        default = Data.model_fields["prompts"].get_default(call_default_factory=True)
        own = {task: text for task, text in data.prompts.items() if text != default.get(task)}
        self.template = MingPrompt(tokenizer, {**ASKS, **own}, self.patches.roles, kept)
        self.patch_id = self.audio_id = self.template.id_of(PATCH)
        told = [VERSION, "patch_lm", self.template.fingerprint, self.latents.identity]
        told.append(self.patches.size)
        self.fingerprint = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def part_length(self, part: Audio | Units, samples: int, answer: bool) -> int:
        """Patches of the clip. BadExample: it has none. UserError: its latents are of another
        width."""
        if isinstance(part, Audio) and part.latents is not None:
            width = part.latents[1]
            if width != self.latents.width:
                raise UserError(
                    f"model.patches.column.width: {self.latents.width}, but the frames of its "
                    f"column have {width} values: say {width}"
                )
        found = self.latents.frames(samples) // self.patches.size
        if found < 1:
            raise BadExample(
                f"its clip of {samples / self.sample_rate:.3f} s is too short: it has no whole "
                f"patch of {self.patches.size} frames",
                "too short",
            )
        return found

    def part_encoded(
        self, part: Audio | Units, clip: np.ndarray | None, rng: np.random.Generator | None
    ) -> Encoded:
        """The patch tokens, and the frames of all patches."""
        assert clip is not None  # the prompt takes no units
        count = self.part_length(part, len(clip), False)
        frames = self.latents(clip)
        if len(frames) < count * self.patches.size:
            raise BadExample(
                f"its clip of {len(clip)} samples becomes {len(frames)} frames, "
                f"{self.latents.frames(len(clip))} were planned",
                "longer than indexed",
            )
        ids = np.full(count, self.patch_id, np.int32)
        own = np.ascontiguousarray(frames[: count * self.patches.size], np.float32)
        return Encoded(ids, len(clip) / self.sample_rate, {LATENTS: own})

    def speaking(self, example: Example, clips: Items[np.ndarray]) -> Sequence:
        """See `Encoder.speaking`."""
        rest = iter(enumerate(clips))
        segments = self.template.speaking(example)
        parts = [self._encoded(segment, rest, None, answer=False) for segment in segments]
        return self._joined(example, parts, [False] * len(parts))

    def encode(
        self,
        example: Example,
        clips: Items[np.ndarray],
        rng: np.random.Generator | None = None,
        promised: int | None = None,
    ) -> Sequence:
        """As `Encoder.encode`, and where it speaks the seed of what is drawn for its loss: of rng
        in training, of its id in evaluation."""
        found = super().encode(example, clips, rng, promised)
        if (found.labels == self.patch_id).any():
            found.arrays[DRAWS] = [np.array([example.seed(rng), rng is not None], np.int64)]
        return found


def make_encoder(model: Model, data: Data, run_folder: Path, kept: str | None) -> PatchEncoder:
    """See `raysft.data.encode.Encode`. Of the run's folder nothing is needed."""
    return PatchEncoder(model, data, kept)


def check_model(model: Model) -> None:
    """See `raysft.data.encode.Encode`."""
    latents_of(settled(model))


def settled(model: Model) -> Patches:
    """What patches are: `model.patches`, with what a model of this family says itself. Raises
    UserError where neither does, or they contradict each other."""
    from raysft.families.patch_lm.config import MODEL_TYPE, PatchLMConfig

    given = model.patches
    if model_type(model) != MODEL_TYPE:
        if given is None:
            raise UserError(
                "model.patches: is needed to give a language model patches: {mel: {preset: step}}"
            )
        return given
    if model.path is None:
        raise UserError(
            f"model.config.model_type: {MODEL_TYPE} is what a run makes: give the config of its "
            "language model here, model.family: patch_lm, and the rest as model.patches"
        )
    config = PatchLMConfig.from_pretrained(model.path, **model.hub)
    own = Patches.model_validate({**(config.latents or {}), **config.facts})
    if given is None:
        return own
    if own.column is not None and given.codec is not None:
        own.codec = given.codec  # which makes waves, and nothing that is learnt
    for key in (*FRAMES, *SHAPE):
        asked, made = getattr(given, key), getattr(own, key)
        if key in given.model_fields_set and asked != made and not _moved(asked, made):
            raise UserError(
                f"model.patches.{key}: the model at model.path was made with {made}: leave it out"
            )
    free = given.model_dump(include=given.model_fields_set - {*FRAMES, *SHAPE})
    if given.codec is not None and own.codec is not None:
        own.codec.path = given.codec.path
    return Patches.model_validate({**own.model_dump(), **free})


def _moved(asked: object, made: object) -> bool:
    """Whether a codec is the one of the model in all that is said, but for where it lies."""
    if not isinstance(asked, Codec) or not isinstance(made, Codec):
        return False
    said = asked.model_dump(include=asked.model_fields_set - {"path"})
    return said.items() <= made.model_dump().items()
