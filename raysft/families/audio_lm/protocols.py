"""What is asked of processors, extractors and configs of transformers, where they have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from raysft.json_types import JsonObject

if TYPE_CHECKING:
    import numpy as np


class Extractor(Protocol):
    """What is asked of a feature extractor of transformers, where it has it."""

    sampling_rate: int
    feature_size: int
    n_fft: int
    dither: float
    hop_length: int
    chunk_length: int
    n_samples: int
    nb_max_frames: int
    min_length: int
    win_length: int
    frame_length: int
    num_frames_lfr: int
    stride_lfr: int
    frame_shift: int
    audio_compression_rate: int
    audio_downsample_rate: int
    audio_feat_stride: int
    audio_samples_per_token: int

    def __call__(self, audio: list[np.ndarray], **kwargs: object) -> object: ...

    def to_dict(self) -> JsonObject: ...

    def _get_num_audio_features(self, audio_lengths: list[int]) -> list[int]: ...


class Processor(Protocol):
    """What is asked of a processor of transformers, where it has it."""

    audio_token: str
    audio_bos_token: str
    audio_eos_token: str
    audio_kwargs: JsonObject
    feature_extractor: Extractor
    audio_processor: Extractor
    max_audio_len: int
    audio_seq_length: int
    audio_merge_size: int
    n_window: int

    def _process_audio(
        self, audio: list[np.ndarray], **kwargs: object
    ) -> tuple[Mapping[str, np.ndarray], list[str]]: ...

    def replace_audio_token(self, audio_inputs: JsonObject, audio_idx: int) -> str: ...

    def _merge_kwargs(self, tokenizer_init_kwargs: JsonObject) -> dict[str, JsonObject]: ...


class Config(Protocol):
    """What is asked of the config of a model, where it has it."""

    window_size: int
    downsample_rate: int
    time_reduction: int
    hidden_size: int
    d_model: int
    num_hidden_layers: int
    encoder_layers: int
    num_mel_bins: int
    n_window: int
    n_window_infer: int
    audio_merge_size: int
    context_size: int
    num_layers: int
    num_heads: int
    dim_head: int
    audio_config: Config
    encoder_config: Config
    projector_config: Config
    adaptor_config: Config
