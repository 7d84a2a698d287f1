"""The config of a net of patch_lm: its language model, its heads, and how its latents are made."""

from __future__ import annotations

from typing import ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from raysft.json_types import JsonObject

MODEL_TYPE = "raysft_patch_lm"


class PatchLMConfig(PreTrainedConfig):
    """text_config: of the language model. latent_width: values of a frame. patch_size: frames of a
    patch. flow_*: of the flow head. latents: how frames are made of a clip, as `model.patches` says
    it. patch_token_id: stands where a patch is heard or spoken. roles: names of who asks
    and who answers."""

    model_type = MODEL_TYPE
    sub_configs_defaults: ClassVar[dict] = {
        "text_config": SubConfigSpec(AutoConfig, model_type="qwen3")
    }

    text_config: dict | PreTrainedConfig | None = None
    latent_width: int = 64
    patch_size: int = 5
    flow_width: int = 1024
    flow_depth: int = 28
    flow_heads: int = 16
    flow_mlp: float | int = 4
    flow_dropout: float | int = 0.1
    latents: dict | None = None
    patch_token_id: int | None = None
    roles: list | None = None

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        assert isinstance(self.text_config, PreTrainedConfig)
        self.tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)

    def get_text_config(self, *args: object, **kwargs: object) -> PreTrainedConfig:
        """That of the language model."""
        assert isinstance(self.text_config, PreTrainedConfig)
        return self.text_config

    @property
    def facts(self) -> JsonObject:
        """What `model.patches` can say of it."""
        return {
            "size": self.patch_size,
            "width": self.flow_width,
            "depth": self.flow_depth,
            "heads": self.flow_heads,
            "mlp": self.flow_mlp,
            "dropout": self.flow_dropout,
            "roles": self.roles or ["HUMAN", "ASSISTANT"],
        }
