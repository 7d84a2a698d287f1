"""What encoders of clips compute, for the FLOPs in metrics.jsonl (`train.flops`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from raysft.families.audio_lm.protocols import Config

if TYPE_CHECKING:
    import numpy as np

Count = TypeVar("Count", int, "np.ndarray")


@dataclass(frozen=True)
class EncoderCost:
    """What `train.flops` needs to count an encoder's FLOPs.

    parts: (config) -> (path of a module, positions at which each of its matrices runs for a frame)
        in the order in which features pass; of paths within each other the first one holds.
    attended: (config, frames of each clip, or of each row) -> pairs of positions that attend to
        each other, times the width of attention, summed over layers.
    tower: path of the module that attends.
    """

    parts: Callable[[Config], list[tuple[str, float]]]
    attended: Callable[[Config, np.ndarray], np.ndarray]
    tower: str = "model.audio_tower"

    def counts(self, config: Config, frames: np.ndarray) -> dict[str, float]:
        """Of a micro-batch, in what `train.flops` multiplies; frames: int64 of each clip or row."""
        attended = self.attended(config, frames)
        return {"frames": float(frames.sum()), "attended": float(attended.sum())}


def halved(frames: Count) -> Count:
    """After a convolution of stride 2."""
    return (frames - 1) // 2 + 1


def windowed(frames: Count, window: int) -> Count:
    """Three convolutions of stride 2 over each window of frames (qwen3_asr: 13 of 100)."""
    rest = frames % window
    return halved(halved(halved(rest))) + frames // window * 13


_TOWER, _PROJECTOR = "model.audio_tower", "model.multi_modal_projector"


def _whisper_parts(merged: int | None, config: Config) -> list[tuple[str, float]]:
    """A convolution at the rate of the frames, then half of it. merged: positions that the
    projector takes as one; None: as many as the config says."""
    merged = merged or config.audio_merge_size
    return [(f"{_TOWER}.conv1", 1), (_TOWER, 1 / 2), (_PROJECTOR, 1 / 2 / merged)]


def _whisper_attended(config: Config, frames: np.ndarray) -> np.ndarray:
    audio = config.audio_config
    return audio.num_hidden_layers * audio.hidden_size * (frames / 2) ** 2


def whisper(merged: int | None) -> EncoderCost:
    """Whisper's encoder over whole rows."""
    return EncoderCost(partial(_whisper_parts, merged), _whisper_attended)


def _qwen2_parts(config: Config) -> list[tuple[str, float]]:
    """A convolution at the rate of the frames, then half of it; pairs of positions averaged."""
    return [(f"{_TOWER}.conv1", 1), (_TOWER, 1 / 2), (_PROJECTOR, 1 / 4)]


def _qwen2_attended(config: Config, frames: np.ndarray) -> np.ndarray:
    """All positions of a clip."""
    audio = config.audio_config
    return audio.encoder_layers * audio.d_model * halved(frames) ** 2


def _qwen25_parts(config: Config) -> list[tuple[str, float]]:
    return [(f"{_TOWER}.conv1", 1), (f"{_TOWER}.proj", 1 / 4), (_TOWER, 1 / 2)]


def _qwen25_attended(config: Config, frames: np.ndarray) -> np.ndarray:
    """Within chunks of `2 * n_window` frames, half as many positions."""
    audio = config.audio_config
    chunk = 2 * audio.n_window
    pairs = frames // chunk * audio.n_window**2 + halved(frames % chunk) ** 2
    return audio.encoder_layers * audio.d_model * pairs


def _qwen3_parts(config: Config) -> list[tuple[str, float]]:
    """Three convolutions of stride 2 over time and mels, windows of 100 frames; 13 positions."""
    parts, mels, times = [], config.audio_config.num_mel_bins, 100
    for number in (1, 2, 3):
        mels, times = halved(mels), halved(times)
        parts.append((f"{_TOWER}.conv2d{number}", mels * times / 100))
    return [*parts, (_TOWER, times / 100), (_PROJECTOR, times / 100)]


def _qwen3_attended(config: Config, frames: np.ndarray) -> np.ndarray:
    """Within windows of `n_window_infer` frames."""
    audio = config.audio_config
    window = 2 * audio.n_window
    most = audio.n_window_infer // window * windowed(window, window)
    positions = windowed(frames, window)
    pairs = positions // most * most**2 + (positions % most) ** 2
    return audio.encoder_layers * audio.d_model * pairs


def _granite_parts(config: Config) -> list[tuple[str, float]]:
    """A conformer at the rate of the frames; queries of each window attend to its frames."""
    heard = "model.projector.qformer.encoder.layer"
    layers = range(config.projector_config.num_hidden_layers)
    keys = [f"{heard}.{n}.crossattention.attention.{of}" for n in layers for of in ("key", "value")]
    answered = ("model.projector", 1 / config.downsample_rate)
    first = ("model.encoder.input_linear", 1)
    return [first, ("model.encoder", 1), *((key, 1) for key in keys), answered]


def _granite_attended(config: Config, frames: np.ndarray) -> np.ndarray:
    """Whole blocks of `context_size` frames, in three products: one is for their distances."""
    audio = config.encoder_config
    pairs = -(-frames // audio.context_size) * audio.context_size**2
    return 3 / 2 * audio.num_layers * audio.num_heads * audio.dim_head * pairs


def _fun_asr_parts(config: Config) -> list[tuple[str, float]]:
    return [(f"{_TOWER}.layers.0.input_layernorm", 1), (_TOWER, 1), (_PROJECTOR, 1)]


def _fun_asr_attended(config: Config, frames: np.ndarray) -> np.ndarray:
    layers = (config.audio_config, config.adaptor_config)
    return sum(part.num_hidden_layers * part.hidden_size for part in layers) * frames**2


QWEN2 = EncoderCost(_qwen2_parts, _qwen2_attended)
QWEN25 = EncoderCost(_qwen25_parts, _qwen25_attended)
QWEN3 = EncoderCost(_qwen3_parts, _qwen3_attended)
GRANITE = EncoderCost(_granite_parts, _granite_attended, "model.encoder")
FUN_ASR = EncoderCost(_fun_asr_parts, _fun_asr_attended)
