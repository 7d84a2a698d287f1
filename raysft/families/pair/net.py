"""The net of a pair: both models side by side, computed in one forward pass.

Under `model`, which lays batches out and makes losses of what this computes.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from raysft.families.flow_decoder.config import FlowDecoderConfig
from raysft.families.flow_decoder.net import LOSSES, FlowDecoder
from raysft.families.pair.config import MODEL_TYPE, PairConfig
from raysft.models.around import AroundLM

FLOW = "flow_"  # before the names of the flow decoder's inputs


class PairForCausalLM(AroundLM):
    """llm: the language model. flow: the flow decoder. Neither computes by the other's."""

    config_class = PairConfig

    def __init__(
        self,
        config: PairConfig,
        llm: PreTrainedModel | None = None,
        flow: FlowDecoder | None = None,
    ) -> None:
        """llm, flow: those that are there already; None: of random weights."""
        super().__init__(config)
        self.llm = AutoModelForCausalLM.from_config(config.text_config) if llm is None else llm
        assert isinstance(config.flow_config, FlowDecoderConfig)
        self.flow = FlowDecoder(config.flow_config) if flow is None else flow
        self._velocity: torch.Tensor | None = None
        own = getattr(self.llm, "_no_split_modules", None) or ()
        self._no_split_modules = [*own, *FlowDecoder._no_split_modules]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Each of the two has done so."""

    @property
    def inner(self) -> PreTrainedModel:
        """See `AroundLM`."""
        return self.llm

    def forward(
        self, input_ids: torch.Tensor | None = None, **kwargs: object
    ) -> CausalLMOutputWithPast:
        """What the language model makes of its inputs. Where there are inputs of the flow decoder,
        under its names after `flow_`, its velocity waits for `take_velocity`."""
        own = {name.removeprefix(FLOW): kwargs.pop(name) for name in [*kwargs] if _flows(name)}
        found = self.llm(input_ids=input_ids, **kwargs)
        for name in LOSSES:  # of a batch as it is laid out
            own.pop(name, None)
        if own:
            self._velocity = self.flow(**own).velocity
        return found

    def take_velocity(self) -> torch.Tensor:
        """Of the last forward pass, which is given once: [R, T, bins]."""
        assert self._velocity is not None
        found, self._velocity = self._velocity, None
        return found


def _flows(name: str) -> bool:
    return name.startswith(FLOW)


AutoConfig.register(MODEL_TYPE, PairConfig, exist_ok=True)
AutoModelForCausalLM.register(PairConfig, PairForCausalLM, exist_ok=True)
