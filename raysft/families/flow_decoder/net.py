"""The net of a flow decoder: speech tokens, a speaker and a prompt's mel -> velocities of a mel.

Under `model`, which lays batches out and makes the loss of what this computes. Each row of a batch
is computed as it would be alone. Importing it makes `AutoModel` know exported decoders.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from raysft.families.flow_decoder.config import MODEL_TYPE, FlowDecoderConfig
from raysft.families.flow_decoder.conformer import RelativeAttention, UpsampleConformer
from raysft.families.flow_decoder.dit import DiT
from raysft.families.flow_decoder.voicebox import Voicebox
from raysft.models.flow_parts import Silent

LOSSES = ("velocity", "scored", "tasks")
"""What of a batch the velocities are held against: no input of the net."""


class FlowDecoder(PreTrainedModel):
    """Of Step-Audio-EditX's shape, or USDM's: see `FlowDecoderConfig`.

    Its parts have the names that Step's training freezes by: input_embedding, encoder,
    encoder_proj, spk_embed_affine_layer, decoder. Voicebox has neither encoder nor encoder_proj.
    """

    config_class = FlowDecoderConfig
    config: FlowDecoderConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar = ["ConformerBlock", "DiTBlock", "VoiceboxBlock"]

    def __init__(self, config: FlowDecoderConfig) -> None:
        super().__init__(config)
        books, width, bins = len(config.codebooks or []), config.unit_width, config.settings.bins
        assert width is not None
        self.input_embedding = nn.Embedding(config.table_rows, width // books)
        if config.speaker_width:
            self.spk_embed_affine_layer = nn.Linear(config.speaker_width, bins)
        self.decoder: nn.Module
        if config.of_voicebox:
            self.decoder = Voicebox(config)
        else:
            self.encoder = UpsampleConformer(config)
            self.encoder_proj = nn.Linear(config.encoder_width, bins)
            self.decoder = DiT(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        std = float(self.config.initializer_range)
        if isinstance(module, Silent):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | nn.Conv1d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, RelativeAttention):
            nn.init.xavier_uniform_(module.content_bias)
            nn.init.xavier_uniform_(module.position_bias)

    def get_input_embeddings(self) -> nn.Module:
        """The table of codes."""
        return self.input_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Another table of codes."""
        assert isinstance(value, nn.Embedding)
        self.input_embedding = value

    def get_output_embeddings(self) -> None:
        """It writes no tokens."""
        return None

    def forward(
        self,
        input_ids: torch.Tensor,
        rows: torch.Tensor,
        frames: torch.Tensor,
        at: torch.Tensor,
        units: torch.Tensor,
        prompt: torch.Tensor,
        dropped: torch.Tensor,
        rows_of: torch.Tensor | None = None,
        voice: torch.Tensor | None = None,
    ) -> ModelOutput:
        """Velocities [R, T, bins], as `velocity`.

        input_ids: int64 [R, N, codebooks], places in the table. rows, frames: int64 [R], of the N
        and T how many there are. at: [R, T, bins], on its way from noise (t 0) to a mel (t 1).
        units: int64 [R], t in parts.T_UNITS. prompt: [R, T, bins], the mel where it is given, else
        0. dropped: bool [R], whether all conditions are left out. rows_of: int64 [R, T], voicebox:
        the row of codes that each frame is spoken by. voice: [R, speaker_width].
        """
        there = torch.arange(at.shape[1], device=at.device) < frames.unsqueeze(1)
        mean, speaker = self.conditions(input_ids, rows, at.shape[1], dropped, rows_of, voice)
        given = prompt * (~dropped).view(-1, 1, 1).to(prompt.dtype)
        return ModelOutput(velocity=self.decoder(at, units, mean, given, speaker, there))

    def conditions(
        self,
        input_ids: torch.Tensor,
        rows: torch.Tensor,
        length: int,
        dropped: torch.Tensor,
        rows_of: torch.Tensor | None = None,
        voice: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the decoder is told of `length` frames: their mean [R, T, bins] (voicebox: unit
        embeddings), and the speaker [R, bins] where it reads one. The rest, as in `forward`."""
        kept = ~dropped
        if self.config.of_voicebox:
            assert rows_of is not None
            nothing = self.config.table_rows - 1
            codes = input_ids.squeeze(-1).gather(1, rows_of)
            mean = self.input_embedding(codes.masked_fill(dropped.unsqueeze(1), nothing))
        else:
            known = torch.arange(input_ids.shape[1], device=rows.device) < rows.unsqueeze(1)
            embedded = self.input_embedding(input_ids).flatten(2)
            mean = self.encoder_proj(self.encoder(embedded, known))[:, :length]
            mean = mean * kept.view(-1, 1, 1).to(mean.dtype)
        speaker = None
        if voice is not None:
            # In float32: the lengths of embeddings are beyond half precision.
            direction = functional.normalize(voice.float(), dim=-1)
            layer = self.spk_embed_affine_layer
            speaker = layer(direction.to(layer.weight.dtype)).to(mean.dtype)
            speaker = speaker * kept.unsqueeze(1).to(mean.dtype)
        return mean, speaker


AutoConfig.register(MODEL_TYPE, FlowDecoderConfig, exist_ok=True)
AutoModel.register(FlowDecoderConfig, FlowDecoder, exist_ok=True)
