"""Models that hear through their own processor (`types`), trained as transformers has them.

Stands between config and step. A batch holds what the model's processor would give for its clips,
padding included, and each clip's embedding is what it is alone.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from pkgutil import resolve_name
from typing import Literal

import numpy as np
import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from raysft.config import schema
from raysft.data.encode import net_class
from raysft.data.example import MicroBatch
from raysft.errors import UserError
from raysft.families.audio_lm.costs import windowed
from raysft.families.audio_lm.processor_encode import FEATURES, FRAMES, ProcessorEncoder
from raysft.models import generation, loading, one_length
from raysft.models.base import IGNORED, Batch, Document, SpeechModel
from raysft.models.supervised import PREFIX

log = logging.getLogger(__name__)

# Of a checkpoint, beside weights, configs and tokenizer: what turns audio into features, what does
# so with images, the voices of qwen2_5_omni, what mistral-common reads.
FILES = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("spk_dict.pt", "tekken.json"),
)


class ProcessorLM(SpeechModel):
    """A model of one of `types`: features go through its encoder and take the place of the audio
    tokens."""

    def __init__(
        self,
        net: PreTrainedModel,
        mode: Literal["packed", "padded"],
        encoder: ProcessorEncoder,
        model: schema.Model,
    ) -> None:
        """model: where `net` comes from, and what belongs to it."""
        super().__init__(net, encoder.tokenizer, mode, [encoder.end_id])
        self.row, self.encoder, self.source = encoder.row, encoder, model
        self._silence = self.silent_document(encoder.fewest())
        self.placeholders = [encoder.audio_token_id]
        if self.pad_id == encoder.audio_token_id:  # padded positions would be heard (glmasr)
            self.pad_id = self.stop_ids[0]

    def dummy_document(self) -> Document:
        """A silent clip and an end token."""
        return self._silence

    def silent_document(self, samples: int) -> Document:
        """A silent clip of so many samples and an end token; nothing of it is learnt."""
        silent = self.encoder.silence(samples)
        ids = np.append(silent.ids, self.stop_ids[0]).astype(np.int32)
        arrays = {name: [array] for name, array in silent.arrays.items()}
        return Document(ids, np.full(len(ids), IGNORED, np.int32), "none", arrays)

    def full_document(self, length: int) -> Document:
        """A silent clip that fills about `length` positions and an end token."""
        return self.silent_document(self.encoder.samples_of(length))

    def counts(self, mb: MicroBatch) -> dict[str, float]:
        """As `SpeechModel.counts`, and where the encoder's cost is known: frames that it reads, and
        what they attend to (`EncoderCost.attended`)."""
        found = super().counts(mb)
        if self.row.cost is None:
            return found
        frames, clips = np.zeros(0, np.int64), mb.arrays.get(FEATURES)
        if clips is not None and self.row.layout == "rows":
            frames = np.full(len(clips.values), clips.values.shape[self.row.time])
        elif clips is not None:
            frames = clips.lengths.astype(np.int64)
        return found | self.row.cost.counts(self.net.config, frames)

    def touches_everything(self, documents: list[Document]) -> bool:
        """Whether the encoder runs."""
        return any(document.arrays.get(FEATURES) for document in documents)

    def features(self, documents: list[Document]) -> Batch:
        """The clips' features as the model takes them."""
        clips = [clip for d in documents for clip in d.arrays.get(FEATURES, [])]
        if self.row.layout == "rows":
            frames = [count for d in documents for count in d.arrays.get(FRAMES, [])]
            return self._rows(clips, frames)
        return self._frames(clips)

    def _rows(self, clips: list[np.ndarray], frames: list[np.ndarray]) -> Batch:
        features = np.concatenate(clips)
        found = {self.row.features: torch.from_numpy(features)}
        if self.row.mask:
            each = np.concatenate(frames)[:, None]
            mask = np.arange(features.shape[self.row.time]) < each
            found[self.row.mask] = torch.from_numpy(mask)
        return found

    def _frames(self, clips: list[np.ndarray]) -> Batch:
        lengths = np.array([len(clip) for clip in clips])
        longest = -(-lengths.max() // self.row.multiple) * self.row.multiple
        padding = np.nan if self.row.tower else 0.0
        padded = np.full((len(clips), longest, *clips[0].shape[1:]), padding, np.float32)
        for row, clip in zip(padded, clips, strict=True):
            row[: len(clip)] = clip
        if self.row.time == 2:
            padded = np.ascontiguousarray(padded.transpose(0, 2, 1))
        found = {self.row.features: torch.from_numpy(padded)}
        if self.row.counted:
            lengths = self.row.counted(self.net.config, lengths)
            longest = lengths.max()
        if self.row.sizes:
            found[self.row.sizes] = torch.from_numpy(lengths)
        if self.row.mask:
            found[self.row.mask] = torch.from_numpy(np.arange(longest) < lengths[:, None])
        return found

    def save(self, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As `SpeechModel.save`. A model that its checkpoint holds beside others
        (`AudioType.whole`) is written as that whole checkpoint, the others as model.path has
        them."""
        if self.row.whole is None or self.source.path is None:
            super().save(folder, state_dict)
            return
        if state_dict is not None:
            self._load(state_dict)
        generation.mend(self.net)
        whole = self._whole()
        setattr(whole, self.row.whole, self.net)
        setattr(whole.config, f"{self.row.whole}_config", self.net.config)
        whole.save_pretrained(folder)
        log.info(
            "written as the whole of %s, with what it trained under %s.: as transformers and vLLM "
            "look for it",
            self.source.path,
            self.row.whole,
        )
        self.save_processor(folder)

    def _load(self, state_dict: dict[str, torch.Tensor]) -> None:
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items()}
        lacking = set(self.net.load_state_dict(weights, strict=False).missing_keys)
        if lacking := lacking - self.net.all_tied_weights_keys.keys():
            raise ValueError(f"state_dict lacks {len(lacking)} weights, such as {min(lacking)}")

    def _whole(self) -> PreTrainedModel:
        """The model of all of model.path, in the precision it is there."""
        kind = resolve_name(f"transformers:{self.row.whole_net}")
        try:
            return kind.from_pretrained(
                self.source.path, dtype="auto", use_safetensors=True, **self.source.hub
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"model.path {self.source.path}: what lies beside its {self.row.whole} cannot be "
                f"read, and an export holds it too: {loading.line_of(error)}"
            ) from error

    def save_processor(self, folder: Path) -> None:
        """The tokenizer with its chat template, and the processor's files as they came."""
        hub, place = self.source.hub, self.source.path
        if place is None:
            hub, place = {}, self.source.tokenizer
        for name in FILES:
            found = cached_file(place, name, _raise_exceptions_for_missing_entries=False, **hub)
            if found is not None:
                shutil.copyfile(found, folder / name)
        super().save_processor(folder)


def _settle_attention(net: PreTrainedModel) -> None:
    """Parts of a config to which transformers gave no attention (the adaptor of fun_asr_nano) would
    add their mask to the scores as ones and zeros."""
    for part in vars(net.config).values():
        if isinstance(part, PreTrainedConfig) and part._attn_implementation is None:
            part._attn_implementation = net.config._attn_implementation


def audio_token(config: PreTrainedConfig) -> int | None:
    """The id that `config`, or its part for audio, gives to what is heard."""
    parts = (config, getattr(config, "audio_config", None))
    found = (getattr(part, "audio_token_id", None) for part in parts)
    return next((token for token in found if token is not None), None)


def make_model(
    model: schema.Model,
    data: schema.Data,
    encoder: ProcessorEncoder,
    seed: int,
    quantization: BitsAndBytesConfig | None = None,
) -> ProcessorLM:
    """The model of `model`, with an embedding for every token of the encoder's tokenizer."""
    row, tokenizer = encoder.row, encoder.tokenizer
    if model.config is None:
        net = loading.from_path(model, net_class(model), quantization)
    else:
        settings = dict(model.config)
        text = settings.get("text_config") or {}
        settings["text_config"] = loading.fill_from_tokenizer(text, tokenizer)
        net = loading.from_config(settings, net_class(model), seed)
    loading.grow_vocabulary(net, len(tokenizer), seed)
    if (own := audio_token(net.config)) != encoder.audio_token_id:
        raise UserError(
            f"model: its audio token is {own}, the tokenizer's is "
            f"{encoder.audio_token_id}; give the tokenizer that belongs to the model"
        )
    _settle_attention(net)
    if row.tower is not None:
        one_length.attach(net.get_submodule(row.tower))
    if row.window is not None:
        one_length.attach(net.get_submodule(row.window), windowed)
    if row.alike is not None:
        one_length.attach_alike(net.model, row.alike, row.multiple, row.time)
    return ProcessorLM(net, data.mode, encoder, model)
