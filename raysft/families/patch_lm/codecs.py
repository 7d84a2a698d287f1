"""Codecs of transformers: a clip -> the continuous latents of its encoder, and back by its decoder.

Under `latents`, in the data tasks, and under whoever speaks. Latents are taken before they are
quantised, and of a VAE without its noise. A kind of codec is a row of KINDS. Its config is read at
once, its weights where the first clip is encoded or decoded, once a process.

A clip is encoded for itself and on one thread, so that its latents do not depend on what is read
beside it, nor on how many threads or workers there are. Other processors and other versions of
torch round otherwise.

Costs what the encoder costs: see `docs/speech_out.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raysft import hub
from raysft.config.patches import Codec
from raysft.errors import UserError, first_line
from raysft.json_types import JsonObject

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

KEY = "model.patches.codec"


@dataclass(frozen=True)
class Kind:
    """One type of codec. net: its class in transformers. channels: key of its config that counts
    them; "": one. encode: [1, 1, samples] -> [1, width, frames]. decode: the inverse, of any shape
    with the samples last. refused: keys of its config that have to be unset, and why."""

    net: str
    encode: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]
    decode: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]
    channels: str = ""
    refused: tuple[tuple[str, str], ...] = ()


KINDS = {
    "vibevoice_acoustic_tokenizer": Kind(
        "VibeVoiceAcousticTokenizerModel",
        lambda net, wave: net.encode(wave, sample=False).latents.transpose(1, 2),
        lambda net, latents: net.decode(latents.transpose(1, 2)).audio,
        channels="channels",
    ),
    "dac": Kind(
        "DacModel",
        lambda net, wave: net.encoder(wave),
        lambda net, latents: net.decoder(latents),
    ),
    "encodec": Kind(
        "EncodecModel",
        lambda net, wave: net.encoder(wave),
        lambda net, latents: net.decoder(latents),
        channels="audio_channels",
        refused=(
            ("normalize", "scales each clip, and latents would not know its loudness"),
            ("chunk_length_s", "cuts clips into chunks that overlap"),
        ),
    ),
}


@dataclass(frozen=True)
class Loudness:
    """What a codec's feature extractor makes of clips: to `target` dB below full scale."""

    target: float
    eps: float

    def __call__(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] -> the same, louder or quieter, within -1 and 1."""
        rms = np.sqrt(np.mean(np.square(clip)))
        found = clip * np.float32(10 ** (self.target / 20)) / (rms + np.float32(self.eps))
        peak = float(np.abs(found).max(initial=0.0))
        return found / np.float32(peak + self.eps) if peak > 1 else found


class CodecLatents:
    """Latents of a codec, normalised: see `latents.Latents`. hop: samples of a frame.

    What is left of a clip behind its last whole frame is not encoded.
    """

    def __init__(self, settings: Codec) -> None:
        """Reads the codec's config. Raises UserError where it is no codec that is known here, or
        another one than the settings say."""
        self.settings = settings
        config = _config(settings.path)
        self.kind = str(config.model_type)
        told = _told(settings.path, self.kind)
        own = {
            "rate": getattr(config, "sampling_rate", None) or told.get("sampling_rate"),
            "width": config.hidden_size,
        }
        for key, value in own.items():
            given = getattr(settings, key)
            if given is not None and value is not None and given != value:
                raise UserError(
                    f"{KEY}.{key}: {given}, but the codec at {settings.path} has {value}: leave it "
                    "out, or name the codec that is meant"
                )
        rate = own["rate"] or settings.rate
        if rate is None:
            raise UserError(
                f"{KEY}.rate: the codec at {settings.path} does not say for how many Hz it is: say "
                "it here"
            )
        self.rate, self.width = int(rate), int(own["width"])
        self.hop = int(config.hop_length)
        self.frames_per_second = self.rate / self.hop
        self._loudness = None
        if told.get("normalize_audio"):
            self._loudness = Loudness(
                float(told.get("target_dB_FS", -25)), float(told.get("eps", 1e-6))
            )

    def frames(self, samples: int) -> int:
        """Whole frames of a clip of so many samples."""
        return samples // self.hop

    def __call__(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] -> float32 [frames(samples), width]."""
        import torch

        count = self.frames(len(clip))
        if not count:  # which no net reads
            return np.zeros((0, self.width), np.float32)
        wave = clip[: count * self.hop].astype(np.float32, copy=False)
        if self._loudness is not None:
            wave = self._loudness(wave)
        net = _net(self.settings.path, self.kind)
        with _alone():
            given = torch.from_numpy(np.ascontiguousarray(wave)).view(1, 1, -1)
            found = KINDS[self.kind].encode(net, given)[0].T.numpy()
        if found.shape != (count, self.width):
            raise UserError(
                f"{KEY}: {self.settings.path} makes {len(found)} frames of {found.shape[1]} values "
                f"of {len(wave)} samples, and its config says {count} of {self.width}"
            )
        settings = self.settings
        return np.ascontiguousarray((found - np.float32(settings.mean)) / np.float32(settings.std))

    def wave(self, frames: np.ndarray) -> np.ndarray:
        """float32 [frames, width] -> float32 [frames * hop] at `rate`, by the codec's decoder."""
        import torch

        settings = self.settings
        raw = frames.astype(np.float32) * np.float32(settings.std) + np.float32(settings.mean)
        net = _net(settings.path, self.kind)
        with _alone():
            latents = torch.from_numpy(np.ascontiguousarray(raw.T)).unsqueeze(0)
            found = KINDS[self.kind].decode(net, latents).flatten().numpy()
        wanted = len(frames) * self.hop
        return np.pad(found[:wanted], (0, max(0, wanted - len(found)))).astype(np.float32)

    @property
    def facts(self) -> JsonObject:
        """Its settings, as the codec has them."""
        told = {"rate": self.rate, "width": self.width}
        return {"codec": self.settings.model_copy(update=told).model_dump()}

    @property
    def identity(self) -> JsonObject:
        """What decides the frames, wherever the codec lies."""
        facts = {key: value for key, value in self.facts["codec"].items() if key != "path"}
        return {"codec": {**facts, "kind": self.kind, "hop": self.hop}}


def _config(path: str) -> PreTrainedConfig:
    """Raises UserError where there is no codec that is known."""
    hub.check(path, f"{KEY}.path")
    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(f"{KEY}.path: {path} holds no weights (*.safetensors): name a whole codec")
    from transformers import AutoConfig

    known = ", ".join(KINDS)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{KEY}.path: no codec at {path!r}: {first_line(error)}") from None
    kind = KINDS.get(config.model_type)
    if kind is None:
        raise UserError(
            f"{KEY}.path: {path} is of type {config.model_type}; codecs that are known: {known}"
        )
    if kind.channels and (count := getattr(config, kind.channels)) != 1:
        raise UserError(f"{KEY}.path: {path} reads {count} channels; name a codec of one channel")
    for key, why in kind.refused:
        if getattr(config, key):
            raise UserError(f"{KEY}.path: {path} has {key}: it {why}; name a codec without")
    return config


def _told(path: str, kind: str) -> JsonObject:
    """What a feature extractor beside a codec says, where it alone says the rate."""
    if kind != "vibevoice_acoustic_tokenizer":
        return {}
    from transformers import FeatureExtractionMixin

    try:
        return FeatureExtractionMixin.get_feature_extractor_dict(path)[0]
    except (OSError, ValueError):
        return {}  # `rate` says it then


@lru_cache(maxsize=2)
def _net(path: str, kind: str) -> PreTrainedModel:
    """The codec itself, on the CPU. Raises UserError where its weights cannot be had."""
    import torch
    import transformers
    from safetensors import SafetensorError

    try:
        net, info = getattr(transformers, KINDS[kind].net).from_pretrained(
            path,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"{KEY}.path: {path} cannot be read: {first_line(error)}") from None
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise UserError(
            f"{KEY}.path: {path}: {len(lacking)} weights are missing or of another shape, such as "
            f"{lacking[0]}: name a whole codec"
        )
    return net.eval().requires_grad_(False)


@contextmanager
def _alone() -> Iterator[None]:
    """On one thread, in float32: more would round by their number."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)
