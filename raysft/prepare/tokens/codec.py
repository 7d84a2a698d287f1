"""Neural codecs of transformers: codebooks of a clip, as one sequence of tokens.

Each is given its own feature extractor's inputs of one clip (which fills the last hop up), and all
its codebooks are asked for. EnCodec of 48 kHz, which is stereo and cut into scaled segments, is not
among them.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np

from raysft.config.listeners import TOKENS
from raysft.config.prepare import UnitsOfModels
from raysft.errors import UserError
from raysft.prepare import pretrained
from raysft.prepare.listener import Listener

KEY = f"{TOKENS}.model"


class Codec(Listener):
    """Tokens c x size + code, of codebook c and a code 0 .. size - 1 of it."""

    def __init__(self, settings: UnitsOfModels, folder: Path) -> None:
        """Raises UserError: no codec, or fewer codebooks than are asked for."""
        self.path = str(settings.model)
        self.pattern = settings.pattern or "interleave"
        self.codebooks = 1 if self.pattern == "first" else settings.codebooks
        self.extractor = pretrained.extractor(KEY, self.path, settings.revision)
        self.net = pretrained.net(KEY, _class_of(self.path, settings), self.path, settings.revision)
        if not callable(getattr(self.net, "encode", None)):
            raise UserError(f"{KEY}: {self.path} is a {type(self.net).__name__}, and no codec")
        if getattr(self.net.config, "audio_channels", 1) != 1:
            raise UserError(f"{KEY}: {self.path} is a stereo codec: take one of a single channel")
        self.sample_rate = int(self.extractor.sampling_rate)
        self.size = _codes(self.net.config)
        self._takes = set(inspect.signature(self.net.encode).parameters)

    def hear(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] -> int32 [codebooks x frames]."""

        def encode(samples: np.ndarray) -> np.ndarray:
            given = pretrained.inputs(self.extractor, samples, self.sample_rate)
            asked = {name: value for name, value in given.items() if name in self._takes}
            bands = getattr(self.net.config, "target_bandwidths", None)
            if bands:
                asked["bandwidth"] = max(bands)
            found = self.net.encode(**asked)
            codes = found.audio_codes
            codes = codes[0, 0] if codes.dim() == 4 else codes[0]  # EnCodec: of one segment
            mask = getattr(found, "audio_codes_mask", None)  # X-Codec2: frames that hear the clip
            if mask is not None:
                codes = codes[:, mask[0].reshape(-1).bool()]
            return codes.cpu().numpy()

        codes = pretrained.heard(KEY, self.path, clip, self.sample_rate, encode)
        if self.codebooks is not None and self.codebooks > len(codes):
            raise UserError(
                f"{TOKENS}.codebooks: {self.codebooks}, but {self.path} has {len(codes)}"
            )
        return arranged(codes[: self.codebooks], self.size, self.pattern == "flatten")


def arranged(codes: np.ndarray, size: int, flat: bool) -> np.ndarray:
    """[codebooks, frames] of codes 0 .. size - 1 -> int32 [codebooks x frames] of tokens: frame by
    frame, or (flat) codebook by codebook."""
    tokens = codes + size * np.arange(len(codes))[:, None]
    return (tokens if flat else tokens.T).reshape(-1).astype(np.int32)


def _class_of(path: str, settings: UnitsOfModels) -> str:
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(path, revision=settings.revision).model_type
    except (OSError, ValueError) as error:
        raise UserError(f"{KEY}: {path}: no model there: {error}".splitlines()[0]) from None
    from transformers.models.auto.modeling_auto import MODEL_FOR_AUDIO_TOKENIZATION_MAPPING

    known = {config.model_type for config in MODEL_FOR_AUDIO_TOKENIZATION_MAPPING}
    return "AutoModelForAudioTokenization" if kind in known else "AutoModel"


def _codes(config: object) -> int:
    """Codes of a codebook."""
    size = getattr(config, "codebook_size", None)
    if size is None:  # X-Codec2: one codebook, each of its dimensions in so many levels
        size = np.prod(getattr(config, "quantization_levels", None) or [1])
    return int(size)
