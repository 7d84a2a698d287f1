"""What a worker is expected to hold, by the config and the model's shapes: nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from raysft.config.schema import Config
from raysft.config.strategies import Part, gradients_of, traits_of
from raysft.models.base import SpeechModel
from raysft.parallel.deepspeed_json import make_settings


@dataclass(frozen=True)
class Estimate:
    """Bytes. held: of the whole model, by part. sharded: parts of which a worker has its share
    only. activations: of a micro-batch, which each worker has its own of. buffers: of the strategy,
    whatever the model."""

    held: Mapping[Part, int]
    sharded: frozenset[Part]
    activations: float
    buffers: float = 0.0

    def state(self, shares: int) -> float:
        """What a worker holds between steps, where the model is cut into `shares`."""
        return self.buffers + sum(
            size / (shares if part in self.sharded else 1) for part, size in self.held.items()
        )


def estimate(config: Config, speech_model: SpeechModel, workers: int) -> Estimate:
    """Of training on `workers` workers. data.tokens_per_batch has to be a number for activations.

    Weights as they are stored, gradients and AdamW's two moments in float32; activations by the
    rule of Korthikanti et al. 2022 (34 bytes a position, layer and hidden unit in 16 bit, attention
    scores not kept), doubled in float32; one layer's and every layer's input under checkpointing.
    """
    parameters = list(speech_model.model.parameters())
    stored = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    traits = traits_of(config.parallel.strategy)
    sharded = set(traits.shards)
    between = gradients_of(config.parallel.gradients, trained)
    if traits.turns and config.data.lanes > workers and between == "whole":
        sharded.discard("gradients")
    text = speech_model.net.config.get_text_config()
    width = 4 if config.train.precision == "fp32" else 2
    row = 0 if config.data.tokens_per_batch == "auto" else config.data.tokens_per_batch
    row *= text.hidden_size
    layer = row * 17 * width
    kept = row * width * text.num_hidden_layers + layer
    return Estimate(
        {"weights": stored, "gradients": 4 * trained, "moments": 8 * trained},
        frozenset(sharded),
        kept if config.train.gradient_checkpointing else layer * text.num_hidden_layers,
        _buffers(config),
    )


def _buffers(config: Config) -> float:
    """Stage 3 of ZeRO reduces gradients in one buffer of float32, made beforehand."""
    if traits_of(config.parallel.strategy).stage != 3:
        return 0.0
    elements = make_settings(config, pin_memory=False)["zero_optimization"]["reduce_bucket_size"]
    return 4.0 * float(elements)
