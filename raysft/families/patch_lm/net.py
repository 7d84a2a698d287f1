"""The net of patch_lm: a causal LM of transformers that hears and speaks patches of latents.

Under `model`, which lays batches out and makes losses of what this computes. A patch that is heard
or has been spoken takes a position of the language model, by its pooled frames; the hidden state
before a patch says what it will be, through the flow head; the one at it says, through the stop
head, whether it was the last. As in Ming-UniAudio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from raysft.families.patch_lm.config import MODEL_TYPE, PatchLMConfig
from raysft.families.patch_lm.flow_head import FlowHead
from raysft.models.around import AroundLM

LOSSES = ("owners", "speech_tasks", "velocity", "stops", "counted")
"""What of a batch the heads are held against: no input of the net."""


class Spoken(NamedTuple):
    """Of the patches to be spoken. velocity: [Q, S, latent], predicted. stop: [Q, 2], logits."""

    velocity: torch.Tensor
    stop: torch.Tensor


class LinearPooling(nn.Module):
    """Frames of a patch -> one embedding: RMSNorm and a linear layer, then their mean."""

    def __init__(self, latent: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(latent, eps=1e-6)
        self.linear = nn.Linear(latent, hidden)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """[P, S, latent] -> [P, hidden]."""
        return self.linear(self.norm(frames)).mean(1)


class PatchLMForCausalLM(AroundLM):
    """The language model with pooling, flow head and stop head."""

    config_class = PatchLMConfig

    def __init__(self, config: PatchLMConfig, language_model: PreTrainedModel | None = None):
        """language_model: one that is there already; None: one of random weights."""
        super().__init__(config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        hidden = config.get_text_config().hidden_size
        self.language_model = language_model
        self.pooling = LinearPooling(config.latent_width, hidden)
        self.flow_head = FlowHead(
            config.latent_width,
            hidden,
            config.flow_width,
            config.flow_depth,
            config.flow_heads,
            config.flow_mlp,
            config.flow_dropout,
        )
        self.stop_head = nn.Linear(hidden, 2)
        self.spoken: Spoken | None = None
        own = getattr(language_model, "_no_split_modules", None) or ()
        self._no_split_modules = [*own, "FlowBlock"]
        self.post_init()

    @classmethod
    def around(
        cls, language_model: PreTrainedModel, config: Callable[[PreTrainedConfig], PatchLMConfig]
    ) -> PatchLMForCausalLM:
        """A net with this language model, which keeps its weights, and the attention that it
        computes by: a config made of another's forgets that. config: made of its config."""
        attention = language_model.config._attn_implementation
        found = cls(config(language_model.config), language_model)
        found.config._attn_implementation = attention  # its parts' too
        return found

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.pooling.linear:
            # As embeddings are. Ming-UniAudio's start at zero, of which a language model's first
            # norm makes a thousandfold gradient.
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):  # of the flow head, and the stop head
            nn.init.xavier_uniform_(module.weight)
            # Not zero: nothing stands before a first patch, and a norm makes much of next to it.
            nn.init.normal_(module.bias, std=0.02)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)

    @property
    def inner(self) -> PreTrainedModel:
        """See `AroundLM`."""
        return self.language_model

    def embedded(
        self,
        input_ids: torch.Tensor,
        patches: torch.Tensor | None,
        patch_at: torch.Tensor | None,
    ) -> torch.Tensor:
        """Embeddings [R, L, hidden] of tokens, those of patches in their places."""
        found = self.get_input_embeddings()(input_ids)
        if patches is None or patch_at is None:
            return found
        pooled = self.pooling(patches).to(found.dtype)
        return found.flatten(0, 1).index_copy(0, patch_at, pooled).view_as(found)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        patches: torch.Tensor | None = None,
        patch_at: torch.Tensor | None = None,
        spoken: torch.Tensor | None = None,
        first: torch.Tensor | None = None,
        noisy: torch.Tensor | None = None,
        units: torch.Tensor | None = None,
        dropped: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """What the language model makes of tokens and patches; `spoken` holds, until it is taken,
        what the heads make of the patches to be spoken, where there are any.

        patches: [P, S, latent], in the order of their places. patch_at: int64 [P], flat position of
        each. spoken: int64 [Q], which of them are to be spoken. first: bool [Q], whether one is the
        first of its clip: nothing stands before it. noisy: [Q, S, latent]; units: int64 [Q]: see
        `flow_head`. dropped: bool [Q], whether its condition is left out, in training. The rest, as
        the language model has it.
        """
        for name in LOSSES:  # of a batch as it is laid out
            kwargs.pop(name, None)
        begun = past_key_values is not None and past_key_values.get_seq_length() > 0
        if inputs_embeds is None:
            assert input_ids is not None
            heard = (None, None) if begun else (patches, patch_at)
            inputs_embeds = self.embedded(input_ids, *heard)
        found, last = self.with_hidden(
            inputs_embeds=inputs_embeds, past_key_values=past_key_values, **kwargs
        )
        if spoken is not None:
            assert patches is not None and patch_at is not None and noisy is not None
            assert first is not None and units is not None and dropped is not None
            hidden = last.flatten(0, 1)
            at = patch_at[spoken]
            condition = hidden[at - 1]
            if self.training:
                condition = condition * (~dropped).to(condition.dtype).unsqueeze(1)
            before = patches[(spoken - 1).clamp(min=0)]
            before = before * (~first).to(before.dtype).view(-1, 1, 1)
            velocity = self.flow_head(noisy, units, condition, before)
            self.spoken = Spoken(velocity, self.stop_head(hidden[at]))
        return found

    def with_hidden(self, **kwargs: object) -> tuple[CausalLMOutputWithPast, torch.Tensor]:
        """What the language model makes of its inputs, and the hidden states [R, L, hidden] that
        its head was given."""
        held: list[torch.Tensor] = []

        def hold(head: nn.Module, args: tuple[torch.Tensor]) -> None:
            held.append(args[0])

        # Before the head's other hooks, which choose among them.
        hook = self.get_output_embeddings().register_forward_pre_hook(hold, prepend=True)
        try:
            found = self.language_model(**kwargs)
        finally:
            hook.remove()
        return found, held[0]

    def take_spoken(self) -> Spoken:
        """What the last forward pass made of the patches to be spoken, which is given once."""
        assert self.spoken is not None
        found, self.spoken = self.spoken, None
        return found


AutoConfig.register(MODEL_TYPE, PatchLMConfig, exist_ok=True)
AutoModelForCausalLM.register(PatchLMConfig, PatchLMForCausalLM, exist_ok=True)
