"""The config of a pair: that of its language model, of its flow decoder, and what each weighs."""

from __future__ import annotations

from typing import ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from raysft.families.flow_decoder.config import FlowDecoderConfig

MODEL_TYPE = "raysft_pair"


class PairConfig(PreTrainedConfig):
    """text_config: of the language model. flow_config: of the decoder. llm_weight, flow_weight: of
    their losses, as Step-Audio-EditX's joint training has them."""

    model_type = MODEL_TYPE
    sub_configs_defaults: ClassVar[dict] = {
        "text_config": SubConfigSpec(AutoConfig, model_type="qwen3"),
        "flow_config": SubConfigSpec(FlowDecoderConfig),
    }

    text_config: dict | PreTrainedConfig | None = None
    flow_config: dict | PreTrainedConfig | None = None
    llm_weight: float | int = 0.4
    flow_weight: float | int = 0.6

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        assert isinstance(self.text_config, PreTrainedConfig)
        assert isinstance(self.flow_config, PreTrainedConfig)
        self.tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)

    def get_text_config(self, *args: object, **kwargs: object) -> PreTrainedConfig:
        """That of the language model."""
        assert isinstance(self.text_config, PreTrainedConfig)
        return self.text_config
