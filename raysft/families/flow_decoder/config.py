"""The config of a flow decoder: codebooks, encoder, estimator, mel, and how it is trained."""

from __future__ import annotations

from typing import ClassVar

from pydantic import ValidationError
from transformers import PreTrainedConfig

from raysft.config.mel import Mel
from raysft.json_types import JsonObject

MODEL_TYPE = "raysft_flow_decoder"
DIT, VOICEBOX = "dit", "voicebox"

_DEFAULTS: dict[str, JsonObject] = {
    DIT: {  # Step-Audio-EditX
        "codebooks": [1024, 4096],
        "tokens_per_second": 25.0,
        "mel": {"preset": "step"},
        "unit_width": 512,
        "speaker_width": 192,
        "width": 512,
        "depth": 16,
        "heads": 8,
        "ffn": 2048,
        "sigma": 1e-6,
        "prompt_rate": 0.5,
    },
    VOICEBOX: {  # USDM
        "codebooks": [10000],
        "tokens_per_second": 50.0,
        "mel": {"preset": "usdm"},
        "unit_width": 1024,
        "speaker_width": 0,
        "width": 1024,
        "depth": 24,
        "heads": 16,
        "ffn": 4096,
        "sigma": 1e-4,
        "prompt_rate": 0.7,
    },
}


class FlowDecoderConfig(PreTrainedConfig):
    """What is None is as published: with dit by Step-Audio-EditX, with voicebox by USDM.

    estimator: what predicts velocities: dit or voicebox.
    codebooks: codes of each, one or two. Two are given interleaved, two tokens of the first and
        three of the second in turn, those of the second counted on from the first.
    tokens_per_second: rows of codes. mel: as `config.mel.Mel` has it.
    unit_width: of the embedding of a row. speaker_width: values of a speaker embedding; 0: none.
    encoder_*: of the encoder before dit: its width, heads, inner width, blocks before and behind
        the upsampling, and dropout. lookahead: rows that a row sees ahead. upsample: frames a row.
    width, depth, heads, ffn: of the estimator. conv_width, conv_groups, conv_depth: of voicebox's
        positions.
    sigma: of the noise left in the data. training_cfg_rate: share of examples that are learnt
        without conditions. prompt_rate: share of examples with a part of the mel given;
        prompt_share: of the mel, at most.
    """

    model_type = MODEL_TYPE
    attribute_map: ClassVar = {  # what estimates read
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "intermediate_size": "ffn",
    }

    estimator: str = DIT
    codebooks: list | None = None
    tokens_per_second: float | int | None = None
    mel: dict | None = None
    unit_width: int | None = None
    speaker_width: int | None = None
    encoder_width: int = 512
    encoder_heads: int = 8
    encoder_ffn: int = 2048
    encoder_blocks: int = 6
    encoder_up_blocks: int = 4
    encoder_dropout: float | int = 0.1
    lookahead: int = 3
    upsample: int = 2
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    ffn: int | None = None
    conv_width: int = 31
    conv_groups: int = 16
    conv_depth: int = 2
    sigma: float | int | None = None
    training_cfg_rate: float | int = 0.2
    prompt_rate: float | int | None = None
    prompt_share: float | int = 0.3
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs: object) -> None:
        if self.estimator not in _DEFAULTS:
            raise ValueError(f"estimator: {self.estimator}, expected dit or voicebox")
        for name, value in _DEFAULTS[self.estimator].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        assert self.mel is not None
        self.mel = _mel(self.mel).model_dump()
        for reason in self._mistakes():
            raise ValueError(reason)
        super().__post_init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Of text: it has none, and no head."""
        return 0

    @property
    def of_voicebox(self) -> bool:
        """Whether its estimator is voicebox."""
        return self.estimator == VOICEBOX

    @property
    def settings(self) -> Mel:
        """Of its mel."""
        assert self.mel is not None
        return _mel(self.mel)

    @property
    def table_rows(self) -> int:
        """Of the one table of all codes: with one more, where it stands for no code."""
        sizes = self.codebooks or []
        return sum(sizes) + (self.of_voicebox or len(sizes) == 2)

    def _mistakes(self) -> list[str]:
        found = []
        sizes = self.codebooks or []
        if not 1 <= len(sizes) <= 2 or not all(isinstance(n, int) and n > 0 for n in sizes):
            found.append(f"codebooks: {sizes}, expected the codes of one or two, such as [100]")
        if self.of_voicebox and len(sizes) != 1:
            found.append(f"codebooks: {sizes}, but voicebox reads one codebook")
        widths: list[tuple[str, int | None, int]] = [
            ("width", self.width, self.heads or 0),
            ("encoder_width", self.encoder_width, self.encoder_heads),
            ("unit_width", self.unit_width, len(sizes) or 1),
        ]
        if self.of_voicebox:
            widths.append(("width", self.width, self.conv_groups))
        for name, width, parts in widths:
            if not width or not parts or width % parts:
                found.append(f"{name}: {width} cannot be cut into {parts}")
        if self.conv_width % 2 == 0:
            found.append(f"conv_width: {self.conv_width}, expected an odd number")
        rates = ("training_cfg_rate", "prompt_rate", "prompt_share", "encoder_dropout", "sigma")
        for name in rates:
            if not 0 <= (getattr(self, name) or 0) < 1:
                found.append(f"{name}: {getattr(self, name)}, expected a share from 0 to 1")
        mel, rate = self.settings, float(self.tokens_per_second or 0)
        if rate <= 0:
            found.append(f"tokens_per_second: {self.tokens_per_second}, expected more than 0")
        elif not self.of_voicebox and abs(rate * self.upsample - mel.frames_per_second) > 1e-6:
            found.append(
                f"upsample: {self.upsample} frames for each of {rate:g} tokens a second, but the "
                f"mel has {mel.frames_per_second:g} frames a second"
            )
        return found


def _mel(given: JsonObject) -> Mel:
    """Raises ValueError naming what is wrong with it."""
    try:
        return Mel.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["mel", *map(str, first["loc"])])
        raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
