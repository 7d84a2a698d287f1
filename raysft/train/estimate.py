"""What a worker is expected to hold, by the config and the model's shapes: nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raysft.config.schema import Config
from raysft.config.strategies import Part, gradients_of, traits_of
from raysft.models.base import SpeechModel
from raysft.parallel.deepspeed_json import make_settings

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


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

    Weights as they are stored (what trains twice, where there is a reference), gradients and
    AdamW's two moments in float32; activations see `_kept`: of every layer, or, under
    checkpointing, one layer's and every layer's input.
    """
    parameters = list(speech_model.model.parameters())
    stored = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    if config.train.referenced:
        stored += sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    traits = traits_of(config.parallel.strategy)
    sharded = set(traits.shards)
    between = gradients_of(config.parallel.gradients, trained)
    if traits.turns and config.data.lanes > workers and between == "whole":
        sharded.discard("gradients")
    text = speech_model.net.config.get_text_config()
    width = 4 if config.train.precision == "fp32" else 2
    rows = 0 if config.data.tokens_per_batch == "auto" else config.data.tokens_per_batch
    layers = text.num_hidden_layers
    checkpointing = config.train.gradient_checkpointing
    layer = rows * _kept(text, speech_model.net, width)
    own = speech_model.kept(rows, width, checkpointing)
    kept = layer * layers if own is None else own
    if checkpointing and own is None:
        kept = layer + rows * 4 * text.hidden_size * layers
    # The loss of chunks makes the gradient of the head while it goes forward.
    kept += rows * 12 * text.hidden_size + 4 * text.vocab_size * text.hidden_size * bool(rows)
    if width == 2 and rows:  # what autocast makes of weights that are kept in float32
        casts = 2 * sum(p.numel() for p in parameters if p.element_size() == 4 and p.dim() > 1)
        kept += casts / (layers if checkpointing else 1)
    return Estimate(
        {"weights": stored, "gradients": 4 * trained, "moments": 8 * trained},
        frozenset(sharded),
        kept,
        _buffers(config),
    )


def _kept(text: PretrainedConfig, net: nn.Module, width: int) -> float:
    """Bytes that a layer keeps of a position until the backward pass, attention scores not among
    them: what its norms read (float32, twice) and give, queries, keys, values and what attention
    gives, and of a gated MLP four times its inner size (of another, twice).

    Counted in transformers' own layers (Llama, Qwen3) with all weights trained; adapters keep less.
    """
    hidden = text.hidden_size
    heads = _number(text, "num_attention_heads") or 1
    size = _number(text, "head_dim") or hidden / heads
    groups = _number(text, "num_key_value_heads") or heads
    names = {name.rpartition(".")[2] for name, _ in net.named_modules()}
    gated = bool({"gate_proj", "gate_up_proj"} & names) or hasattr(text, "num_experts")
    inner = _number(text, "intermediate_size", "decoder_ffn_dim", "ffn_dim", "d_ff") or 4 * hidden
    if experts := _number(text, "num_experts_per_tok"):
        inner = experts * (_number(text, "moe_intermediate_size") or inner)
    normed = 2 * hidden + (heads + groups) * size * ("q_norm" in names)
    attention = 2 * (heads + groups) * size
    return normed * (8 + width) + width * (attention + inner * (4 if gated else 2))


def _number(text: PretrainedConfig, *names: str) -> float:
    """The first of these that a config has, the mean where it has one a layer; 0: none."""
    value = next((getattr(text, name) for name in names if getattr(text, name, None)), 0)
    return sum(value) / len(value) if isinstance(value, list | tuple) else float(value)


def _buffers(config: Config) -> float:
    """Stage 3 of ZeRO reduces gradients in one buffer of float32, made beforehand."""
    if traits_of(config.parallel.strategy).stage != 3:
        return 0.0
    elements = make_settings(config, pin_memory=False)["zero_optimization"]["reduce_bucket_size"]
    return 4.0 * float(elements)
