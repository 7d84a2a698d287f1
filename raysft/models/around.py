"""A net of our own around a language model of transformers, which it asks for tables and layers."""

from __future__ import annotations

from abc import abstractmethod

from torch import nn
from transformers import GenerationMixin, PreTrainedModel


class AroundLM(PreTrainedModel, GenerationMixin):
    """A language model with something beside it."""

    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @property
    @abstractmethod
    def inner(self) -> PreTrainedModel:
        """The language model."""

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.inner.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """The language model's."""
        self.inner.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.inner.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """The language model's."""
        self.inner.set_output_embeddings(new_embeddings)

    def get_decoder(self, *args: object, **kwargs: object) -> nn.Module:
        """The language model's."""
        return self.inner.get_decoder(*args, **kwargs)
