"""What a step costs in floating-point operations, for `tflops` and `mfu` in metrics.jsonl.

Model FLOPs after PaLM (arXiv:2204.02311, appendix B): what the model needs, not what is computed.
Padding, recomputed activations and optimizer steps do not count. A multiplication with its addition
is two. For a matrix of N parameters and a token that passes through it:

    2N      forward
    2N      gradient of its input, unless nothing before it trains (a frozen audio encoder)
    2N      gradient of the matrix, if it trains

so 6N where all weights train and 4N where only adapters do (whose own small matrices count 6N).
Embeddings are looked up: they cost nothing. The head counts for supervised tokens only, for others
have no logits here. Of a mixture's experts those count that a token is sent to.

Attention: 12 L H D for each pair of positions (L layers, H heads of D dimensions: two products,
forward 4, backward 8), and half of that where it is causal: 6 L H D sum(length^2) over documents,
packed or not. Layers with a sliding window are left out of it, so it is rather too low there.

The encoder of Whisper takes every clip at one length, P positions: its 2N, 4N or 6N for each of
them and 12 L H D P^2 (4 L H D P^2 if frozen) for a clip, whatever its own length. That of a model
of audio_lm costs for each frame of its features 2N, 4N or 6N at the positions
where `EncoderCost` says that a matrix runs, and 12 L H D (4 L H D if frozen) for each pair that
attends. Rows of a fixed length count whole; padding to the longest clip does not.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel

from raysft.families.audio_lm.costs import EncoderCost
from raysft.families.audio_lm.types import COSTS
from raysft.models import copies, reach
from raysft.models.experts import CHOSEN

# Peak of dense products in bf16 or fp16, TFLOP/s, from the vendor's data sheets; the first name
# that is part of the device's wins. Devices that are not here have no `mfu`.
PEAKS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H800": 989.4,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "RTX 6000 Ada": 364.2,
    "RTX A6000": 154.8,
    "RTX 4090": 165.2,
    "L4": 121.0,
}
DECIDING = ("num_hidden_layers", "num_attention_heads")
# Parts of peft's wrappers that no token passes through.
_UNUSED = ("original_module", "trainable_tokens")


@dataclass(frozen=True)
class Cost:
    """FLOPs of training on one token, one supervised token, one pair of positions (of all length^2
    of a document), one clip, one frame of audio features, and one of `EncoderCost.attended`."""

    token: float
    supervised: float
    pair: float
    clip: float = 0.0
    frame: float = 0.0
    attended: float = 0.0

    def total(self, counts: Mapping[str, float]) -> float:
        """FLOPs of steps with these counts: tokens, supervised, squares, and of what is heard
        clips, or frames and attended."""
        return (
            self.token * counts.get("tokens", 0.0)
            + self.supervised * counts.get("supervised", 0.0)
            + self.pair * counts.get("squares", 0.0)
            + self.clip * counts.get("clips", 0.0)
            + self.frame * counts.get("frames", 0.0)
            + self.attended * counts.get("attended", 0.0)
        )


def cost_of(model: nn.Module, unreached: Collection[str] = ()) -> Cost | None:
    """The cost of training `model` (of transformers, or peft's around one) as it is frozen now.

    unreached: parameters that no token passes through, by the names of the model alone or of
    peft's. Called before a strategy shards its parameters. None where the formulas do not hold:
    layers that carry a state or that convolve, experts whose number a token is not known, an
    architecture without the usual names, an audio encoder whose cost is not known.
    """
    net = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
    if net.config.is_encoder_decoder:
        return _of_seq2seq(model, net, unreached)
    try:
        text = net.config.get_text_config()
    except ValueError:  # several
        return None
    hearing = _hearing(net)
    if not _usual(net, text) or (hearing is None and _hears_otherwise(net)):
        return None
    head = net.get_output_embeddings()
    own, heard = {id(part) for part in head.modules()}, set()
    rates: dict[int, tuple[float, bool]] = {}
    if hearing is not None:  # what sees is not reached
        rates = _rates(net, hearing)
        read = {id(part) for part in net.get_decoder().modules()}
        heard = {id(part) for part in net.modules()} - read
    token = supervised = frame = 0.0
    chosen = _chosen(text)
    for part, size, trains in _matrices(model, chosen, unreached):
        if id(part) in own:
            supervised += size * (6 if trains else 4)
        elif id(part) in rates:
            rate, before = rates[id(part)]
            frame += rate * size * (2 + 2 * trains + 2 * before)
        elif id(part) not in heard:
            token += size * (6 if trains else 4)
    layers = getattr(text, "layer_types", None)
    full = text.num_hidden_layers if layers is None else layers.count("full_attention")
    pair = 6.0 * full * text.num_attention_heads * _head_size(text)
    if hearing is None:
        return Cost(token, supervised, pair)
    passed = any(p.requires_grad for p in net.get_submodule(hearing.tower).parameters())
    return Cost(token, supervised, pair, 0.0, frame, 12.0 if passed else 4.0)


_HOLDS: dict[str, bool] = {}


def formula_holds(net: PreTrainedModel) -> bool:
    """Whether torch counts about as much (to 15%) on a small copy of `net`.

    Where a model computes other than its matrices say (layers that run several times, attention of
    another kind) a number would be wrong. Kept for the process; costs 0.1 s.
    """
    if net.get_output_embeddings() is None:  # it writes no tokens
        return False
    if net.config.is_encoder_decoder:  # Whisper's alone, which tests hold against torch
        return True
    key = f"{type(net)} {json.dumps(net.config.to_dict(), sort_keys=True, default=str)}"
    if key not in _HOLDS:
        _HOLDS[key] = _counted_alike(net)
    return _HOLDS[key]


def _counted_alike(net: PreTrainedModel) -> bool:
    try:
        small = copies.small_copy(net)
    except ValueError:
        return False
    cost = cost_of(small)
    if cost is None:
        return False
    # torch counts neither grouped products nor the CPU's attention.
    small.set_attn_implementation("eager")
    if hasattr(small, "set_experts_implementation"):
        small.set_experts_implementation("eager")
    size, length = small.get_input_embeddings().weight.shape[0], 48
    ids = (torch.arange(length) * 7 % max(1, size - 40)).unsqueeze(0)
    unreached = reach.unreached(small, {"input_ids": ids})
    cost = cost_of(small, unreached)
    with FlopCounterMode(display=False) as counter:
        small(input_ids=ids, use_cache=False).logits.sum().backward()
    # Without a kernel, torch computes and counts the pairs that nobody sees as well, those beyond
    # a window among them.
    text = small.config.get_text_config()
    windows = (getattr(text, "layer_types", None) or []).count("sliding_attention")
    beyond = 12.0 * windows * text.num_attention_heads * _head_size(text) * length**2
    counts = {"tokens": length, "supervised": length, "squares": 2 * length**2}
    assert cost is not None  # as above: what is not reached makes it smaller only
    return abs((cost.total(counts) + beyond) / counter.get_total_flops() - 1) < 0.15


def _hearing(net: PreTrainedModel) -> EncoderCost | None:
    return COSTS.get(net.config.model_type)


def _rates(net: PreTrainedModel, hearing: EncoderCost) -> dict[int, tuple[float, bool]]:
    """Of each module that audio passes through: positions a frame, and whether its input has a
    gradient, for it or something before it trains (not for what reads the features)."""
    parts = hearing.parts(net.config)
    found: dict[int, int] = {}
    trained = [False] * len(parts)
    for name, part in net.named_modules():
        number = next(
            (i for i, (path, _) in enumerate(parts) if f"{name}.".startswith(f"{path}.")), None
        )
        if number is not None:
            found[id(part)] = number
            trained[number] |= any(p.requires_grad for p in part.parameters(recurse=False))
    before = [i > 0 and any(trained[: i + 1]) for i in range(len(parts))]
    return {key: (parts[i][1], before[i]) for key, i in found.items()}


def _hears_otherwise(net: PreTrainedModel) -> bool:
    """Whether it has an audio encoder whose cost is not known."""
    return getattr(net.config, "audio_token_id", None) is not None


def _chosen(text: PreTrainedConfig) -> int | None:
    """How many experts a token is sent to."""
    found = (getattr(text, name, None) for name in CHOSEN)
    return next((count for count in found if isinstance(count, int)), None)


def _usual(net: PreTrainedModel, text: PreTrainedConfig) -> bool:
    """Whether every layer is attention and matrices, as the formulas have it."""
    layers = set(getattr(text, "layer_types", None) or ())
    own = {name: vars(text).get(text.attribute_map.get(name, name)) for name in DECIDING}
    if not all(isinstance(own[name], int) and own[name] for name in DECIDING):
        return False
    if text.to_dict().get("per_layer_config"):  # heads differ by layer
        return False
    if layers - {"full_attention", "sliding_attention"} or getattr(net, "_is_stateful", False):
        return False
    if not isinstance(_head_size(text), (int, float)):
        return False
    decoder = net.get_decoder() if hasattr(net, "get_decoder") else net
    for name, part in (decoder or net).named_modules():
        if "tower" in name or "vision" in name or "audio" in name:
            continue
        if isinstance(part, (nn.Conv1d, nn.LSTM, nn.GRU)):
            return False
        if isinstance(part, nn.ModuleList) and name.endswith("experts"):
            return False  # the share of them that a token takes is not in their shapes
        fused = [p for p in part.parameters(recurse=False) if p.ndim == 3]
        if fused and _chosen(text) is None:
            return False
    return True


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of the device at its best in `train.precision`; None where that is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in PEAKS.items() if part in name), None)


def _matrices(
    model: nn.Module, chosen: int | None = None, unreached: Collection[str] = ()
) -> Iterator[tuple[nn.Module, float, bool]]:
    """Of each matrix that tokens pass through: its module, its parameters (of fused experts
    [E, out, in] the share of the `chosen` ones), whether it trains."""
    for name, part in model.named_modules():
        if isinstance(part, nn.Embedding) or any(word in name for word in _UNUSED):
            continue
        for key, parameter in part.named_parameters(recurse=False):
            if parameter.ndim < 2 or any(word in key for word in _UNUSED):
                continue
            full = f"{name}.{key}"
            plain = full.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if full in unreached or plain in unreached:
                continue
            size = float(parameter.numel())
            if key == "weight" and hasattr(part, "in_features"):
                size = float(part.in_features * part.out_features)  # also where it is quantised
            elif parameter.ndim == 3 and chosen is not None and not isinstance(part, nn.Conv1d):
                size *= chosen / parameter.shape[0]
            yield part, size, parameter.requires_grad


def _head_size(text: PreTrainedConfig) -> float:
    keys, values = getattr(text, "qk_head_dim", None), getattr(text, "v_head_dim", None)
    if keys is not None and values is not None:
        # Compressed keys and values (MLA): the two products differ.
        return (keys + values) / 2
    found = getattr(text, "head_dim", None)
    return found or getattr(text, "hidden_size", 0) / text.num_attention_heads


def _of_seq2seq(model: nn.Module, net: PreTrainedModel, unreached: Collection[str]) -> Cost | None:
    """Of a Whisper: decoder tokens pass through the decoder and attend to all positions of a clip;
    these pass through the encoder, and through the decoder's keys and values of them.

    Tokens are counted with a clip's positions among them, so a clip costs that much less.
    """
    config = net.config
    if config.model_type != "whisper":  # others read a clip at its own length
        return None
    positions = config.max_source_positions
    encoder = net.get_encoder()
    own = {id(part) for part in net.get_output_embeddings().modules()}
    heard = {id(part) for part in encoder.modules()}
    keys = {
        id(part)
        for name, part in model.named_modules()
        if ".encoder_attn.k_proj" in name or ".encoder_attn.v_proj" in name
    }
    passed = any(p.requires_grad for p in encoder.parameters())
    token = supervised = clip = 0.0
    for part, size, trains in _matrices(model, None, unreached):
        if id(part) in own:
            supervised += size * (6 if trains else 4)
        elif id(part) in keys:
            clip += positions * size * ((4 if trains else 2) + (2 if passed else 0))
        elif id(part) not in heard:
            token += size * (6 if trains else 4)
    token += 12.0 * config.decoder_layers * config.d_model * positions
    pair = 6.0 * config.decoder_layers * config.d_model
    return Cost(token, supervised, pair, clip + _clip(encoder, config) - positions * token)


def _clip(tower: nn.Module, audio: PreTrainedConfig) -> float:
    positions = audio.max_source_positions
    passed = any(p.requires_grad for p in tower.parameters())
    total = 0.0
    for part, size, trains in _matrices(tower):
        # The first convolution runs at the rate of the frames, twice that of the positions.
        at = 2 * positions if getattr(part, "stride", None) == (1,) else positions
        total += at * size * (6 if trains else 4 if passed else 2)
    pairs = audio.encoder_layers * audio.d_model * positions**2
    return total + (12 if passed else 4) * pairs
