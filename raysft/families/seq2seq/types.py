"""The model types of seq2seq beside Whisper: a row each.

Whisper reads every clip padded to one length. These read a clip at its own, alone (`one_length`):
what differs between them is here: what computes a clip's features, how many positions the encoder
makes of those, how much of a clip is read at most, and what the decoder is given before a text.

Pure data but for a few functions; imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from raysft.json_types import JsonObject

if TYPE_CHECKING:
    import numpy as np


class Config(Protocol):
    """What is asked of the config of a model, where it has it."""

    model_type: str
    vocab_size: int
    decoder_start_token_id: int | None
    max_source_positions: int
    conv_kernel_sizes: tuple[int, ...]
    input_feat_per_channel: int
    max_position_embeddings: int
    num_mel_bins: int
    subsampling_factor: int
    subsampling_conv_kernel_size: int
    subsampling_conv_stride: int
    encoder_config: Config


class Extractor(Protocol):
    """What is asked of a feature extractor of transformers, where it has it."""

    sampling_rate: int
    hop_length: int
    max_audio_clip_s: float

    def __call__(self, clip: np.ndarray, **kwargs: object) -> Mapping[str, np.ndarray]: ...

    def to_dict(self) -> JsonObject: ...


Count = TypeVar("Count", int, "np.ndarray")
Step = tuple[int, int, int]
"""What shortens a row: kernel, stride, and padding on each side, of a convolution or of frames."""


def through(count: Count, steps: tuple[Step, ...]) -> Count:
    """How long rows of this length are behind `steps`; below 1: nothing is left."""
    for kernel, stride, padding in steps:
        count = (count + 2 * padding - kernel) // stride + 1
    return count


@dataclass(frozen=True)
class ClipType:
    """How the clips of one model type are read.

    processor, extractor: their classes, "module:class".
    prompt: class of what stands before a text, "module:class".
    framing: (extractor) -> from samples to the frames of features that its mask counts.
    encoder: (config) -> from frames to the positions that the encoder makes of them.
    most: (config, extractor) -> samples of a clip that are read at most; None: all.
    settings: (config) -> what the extractor of a model without weights is given.
    features: their name among the model's inputs.
    text: the part of the config that has the decoder's vocabulary; None: the config itself.
    tokenizer: (model) -> its tokenizer, "module:function".
    spectrogram: whether its features are one; else they are samples.
    """

    processor: str
    extractor: str
    prompt: str
    framing: Callable[[Extractor], tuple[Step, ...]]
    encoder: Callable[[Config], tuple[Step, ...]]
    most: Callable[[Config, Extractor], int] | None
    settings: Callable[[Config], JsonObject]
    features: str = "input_features"
    text: str | None = None
    tokenizer: str = "raysft.families.seq2seq.clip_encode:plain_tokenizer"
    spectrogram: bool = True


def _hops(extractor: Extractor) -> tuple[Step, ...]:
    """Of the frames around every hop the last is not heard."""
    return ((extractor.hop_length, extractor.hop_length, 0),)


def _subsampling(config: Config) -> tuple[Step, ...]:
    """The convolutions of a FastConformer."""
    encoder = config.encoder_config
    kernel, stride = encoder.subsampling_conv_kernel_size, encoder.subsampling_conv_stride
    one = (kernel, stride, (kernel - 1) // 2)
    return (one,) * (encoder.subsampling_factor.bit_length() - 1)


def _kaldi(extractor: Extractor) -> tuple[Step, ...]:
    """Frames of 25 ms each 10 ms, those that lie within a clip."""
    rate = extractor.sampling_rate
    return ((rate * 25 // 1000, rate // 100, 0),)


def _halvings(config: Config) -> tuple[Step, ...]:
    """The convolutions of Speech2Text."""
    return tuple((kernel, 2, kernel // 2) for kernel in config.conv_kernel_sizes)


def _banks(config: Config) -> JsonObject:
    return {
        "feature_size": config.input_feat_per_channel,
        "num_mel_bins": config.input_feat_per_channel,
    }


def _framed(config: Config, extractor: Extractor) -> int:
    """What fills the frames that the config of a Speech2Text names."""
    ((size, hop, _),) = _kaldi(extractor)
    return (config.max_source_positions - 1) * hop + size


def _mels(config: Config) -> JsonObject:
    return {"feature_size": config.encoder_config.num_mel_bins}


def _unsplit(config: Config, extractor: Extractor) -> int:
    """Above it the extractor of Cohere ASR cuts a clip into several."""
    return round(extractor.max_audio_clip_s * extractor.sampling_rate)


def _named(config: Config, extractor: Extractor) -> int:
    """What fills the positions that the config of a FastConformer names."""
    encoder = config.encoder_config
    frames = encoder.max_position_embeddings * encoder.subsampling_factor
    return frames * extractor.hop_length


TYPES: dict[str, ClipType] = {
    "moonshine": ClipType(
        "transformers:Wav2Vec2Processor",
        "transformers:Wav2Vec2FeatureExtractor",
        "raysft.families.seq2seq.prompts:Untold",
        framing=lambda extractor: (),
        encoder=lambda config: ((127, 64, 0), (7, 3, 0), (3, 2, 0)),
        most=None,
        settings=lambda config: {"do_normalize": False, "return_attention_mask": True},
        features="input_values",
        spectrogram=False,
    ),
    "cohere_asr": ClipType(
        "transformers:CohereAsrProcessor",
        "transformers:CohereAsrFeatureExtractor",
        "raysft.families.seq2seq.prompts:Transcribing",
        framing=_hops,
        encoder=_subsampling,
        most=_unsplit,
        settings=_mels,
    ),
    "canary": ClipType(
        "transformers:CanaryProcessor",
        "transformers:ParakeetFeatureExtractor",
        "raysft.families.seq2seq.prompts:FromTo",
        framing=_hops,
        encoder=_subsampling,
        most=_named,
        settings=_mels,
        text="decoder_config",
    ),
    "speech_to_text": ClipType(
        "transformers:Speech2TextProcessor",
        "transformers:Speech2TextFeatureExtractor",
        "raysft.families.seq2seq.prompts:Ended",
        framing=_kaldi,
        encoder=_halvings,
        most=_framed,
        settings=_banks,
        tokenizer="raysft.families.seq2seq.sentencepiece:load",
    ),
}
