"""A small copy of a model's config: the same kinds of layers, little else.

What batches do to a model (who sees whom, which positions are counted from where, what is carried
from one batch to the next) is decided by its code and by a few lengths in its config: windows,
chunks, the length it was first trained on. So it can be proven on a copy of two to eight narrow
layers with random weights, whose lengths are short enough to have documents on both sides of each.

Widths shrink by whole heads and lengths to a dozen positions. Costs some milliseconds and a few MB.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from raysft.json_types import Json, JsonObject
from raysft.models.meta import on_meta
from raysft.parallel import unread

WINDOW = 8  # what windows and chunks become
ORIGINAL = 16  # the length a model was first trained on, before its positions were stretched
POSITIONS = 96  # how many positions there are
VOCABULARY = 160
MOST_LAYERS = 8
MOST_PARAMETERS = 60_000_000
SPECIAL = re.compile(r"_(token_id|token_index|id)$")
PERIODS = re.compile(r"(period|pattern|every_n|interval|_step|group_size|freq)")
WINDOWS = (
    *("sliding_window", "sliding_window_size", "attention_window_size", "local_attention"),
    *("window_size", "attention_chunk_size", "keep_window_size", "mamba_chunk_size"),
    *("chunk_size", "local_attention_window_len", "local_window_size"),
)
ORIGINALS = ("original_max_position_embeddings", "log_scaling_n_floor")
TABLES = (
    *("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len"),
    *("n_ctx", "seq_length", "max_sequence_length", "model_max_length"),
)
LENGTHS = {
    **dict.fromkeys(WINDOWS, WINDOW),
    **dict.fromkeys(ORIGINALS, ORIGINAL),
    **dict.fromkeys(TABLES, POSITIONS),
}
EXPERTS = {
    **dict.fromkeys(
        (
            *("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
            *("num_experts_total",),
        ),
        4,
    ),
    **dict.fromkeys(
        (
            *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"),
            *("top_k_experts", "num_selected_experts"),
        ),
        2,
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "zero_expert_num"), 1),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
}
HEADS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads"),
    *("decoder_attention_heads", "encoder_attention_heads"),
)
KEYS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
HIDDEN = ("hidden_size", "n_embd", "d_model")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LINEAR = re.compile(r"^(linear_.*num_(\w+_)?heads|linear_num_heads|index_n_heads)$")
BY_INDEX = re.compile(r"(_layers|_idxs|_indices|_layer_ids)$")
FEED_FORWARD = re.compile(
    r"(intermediate_size|intermediate_size_mlp|ffn_dim|ffn_hidden_size|dff|"
    r"n_inner|dim_ff|d_ff)$"
)


def small_config(config: PreTrainedConfig, narrow: bool = True) -> PreTrainedConfig:
    """A copy of `config` with few layers, short lengths, few experts and tokens.

    narrow: with fewer heads and hidden units too, which not every architecture takes.
    """
    small = copy.deepcopy(config)
    vars(small).pop("quantization_config", None)
    for part in parts(small):
        _layers(part)
        if getattr(part, "output_router_logits", False):
            _set(part, "output_router_logits", False)
        _lengths(part)
        for key, value in _own(part).items():
            if key in EXPERTS and isinstance(value, int) and value > EXPERTS[key]:
                _set(part, key, EXPERTS[key])
            elif narrow and FEED_FORWARD.search(key):
                _set(part, key, _capped(value, 64))
            elif key.startswith("vocab_size") or key == "decoder_vocab_size":
                _set(part, key, _capped(value, VOCABULARY))
        if narrow:
            _narrow(part)
        _clip_specials(part)
    return small


def lengths_of(config: PreTrainedConfig) -> dict[str, int]:
    """Lengths in `config` at which a model may change what it does: name -> positions."""
    found: dict[str, int] = {}
    for part in parts(config):
        for holder in (_own(part), *_ropes(part)):
            for key, value in holder.items():
                if key in LENGTHS and isinstance(value, int) and value > 0:
                    found[key] = value
    return found


def twin(net: PreTrainedModel) -> PreTrainedModel:
    """A model of the same weights as `net`, of its own."""
    return copy.deepcopy(net)


def small_copy(net: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A small model of the class and kind of `net`, with random weights that tell positions apart.

    Raises ValueError where its config cannot be made small.
    """
    errors = []
    for narrow in (True, False):
        try:
            config = small_config(net.config, narrow)
            with on_meta():
                size = sum(p.numel() for p in type(net)._from_config(config).parameters())
            if size > MOST_PARAMETERS:
                raise ValueError(f"{size:,} parameters are left of it")
            return make(type(net), config, seed)
        except (
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            AttributeError,
            ZeroDivisionError,
            RuntimeError,
            AssertionError,
        ) as error:
            errors.append(f"{type(error).__name__}: {error}")
    raise ValueError(errors[0])


def with_weights(net: PreTrainedModel) -> PreTrainedModel:
    """`net`, or a small copy of it where its own weights are not read yet: what can be tried out.

    Raises NoCopy where there is no such copy: it needs its weights.
    """
    if unread.of(net) is None:
        return net
    try:
        return small_copy(net)
    except ValueError as error:
        raise NoCopy(str(error)) from error


class NoCopy(Exception):
    """What would be tried on a small copy has to be tried on the model itself."""


def make(kind: type[PreTrainedModel], config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model of `config` whose every parameter has some noise: nothing starts at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = kind._from_config(copy.deepcopy(config), dtype=torch.float32)
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.is_floating_point():
                    parameter.add_(torch.randn(parameter.shape) * 0.08)
    return net.eval()


def parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and those within it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield from parts(part)


def _own(part: PreTrainedConfig) -> JsonObject:
    return dict(vars(part))


def _ropes(part: PreTrainedConfig) -> list[JsonObject]:
    rope = getattr(part, "rope_parameters", None)
    if not isinstance(rope, dict):
        return []
    return [rope, *(value for value in rope.values() if isinstance(value, dict))]


def _set(part: PreTrainedConfig, key: str, value: object) -> None:
    part.__dict__[key] = value


def _capped(value: Json, most: int) -> Json:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(_capped(item, most) for item in value)
    return min(value, most) if isinstance(value, int) else value


def _layers(part: PreTrainedConfig) -> None:
    """Keep one layer of each kind, at least two; or, where a pattern says which is which, one
    whole turn of it."""
    own = _own(part)
    key = next((k for k in LAYERS if isinstance(own.get(k), int)), None)
    for name, value in own.items():  # encoders and decoders of their own
        if name in ("encoder_layers", "decoder_layers") and isinstance(value, int):
            _set(part, name, min(value, 2))
    if key is None or own[key] < 2:
        return
    count = own[key]
    listed = {k: v for k, v in own.items() if isinstance(v, (list, tuple)) and v}
    by_layer = {k: v for k, v in listed.items() if len(v) == count}
    by_index = {
        k: v
        for k, v in listed.items()
        if k not in by_layer and BY_INDEX.search(k) and all(isinstance(i, int) for i in v)
    }
    turns = [v for k, v in own.items() if PERIODS.search(k) and type(v) is int and v > 1]
    turns += [len(v) for v in listed.values() if all(isinstance(i, str) for i in v)]
    kinds: dict[tuple[str, ...], int] = {}
    for layer in range(count):
        kind = [str(v[layer]) for v in by_layer.values()]
        kind += [str(layer in v) for v in by_index.values()]
        kinds.setdefault(tuple(kind), layer)
    kept = sorted(kinds.values())[:MOST_LAYERS]
    if by_layer or by_index:
        kept += [layer for layer in range(count) if layer not in kept][: max(0, 2 - len(kept))]
    else:
        kept = list(range(min(count, max([2, *(v for v in turns if v <= MOST_LAYERS)]))))
    kept.sort()
    for name, value in by_layer.items():
        _set(part, name, type(value)(value[layer] for layer in kept))
    for name, value in by_index.items():
        _set(part, name, type(value)(i for i, layer in enumerate(kept) if layer in value))
    _set(part, key, len(kept))
    for name in ("first_k_dense_replace", "num_dense_layers", "num_kv_shared_layers"):
        if isinstance(own.get(name), int):
            _set(part, name, min(own[name], 1))


def _lengths(part: PreTrainedConfig) -> None:
    own = _own(part)
    dynamic = any("dynamic" in str(rope.get("rope_type")) for rope in _ropes(part))
    for holder in (own, *_ropes(part)):
        for key, value in holder.items():
            if key not in LENGTHS or type(value) is not int or value <= 0:
                continue
            length = LENGTHS[key]
            if key not in TABLES:
                length = min(value, length)
            elif dynamic:  # which stretches positions beyond the table
                length = ORIGINAL
            if holder is own:
                _set(part, key, length)
            else:
                holder[key] = length


def _narrow(part: PreTrainedConfig) -> None:
    own = _own(part)
    heads = next((k for k in HEADS if isinstance(own.get(k), int)), None)
    hidden = next((k for k in HIDDEN if isinstance(own.get(k), int)), None)
    if hidden is None:
        return
    if heads is None:
        width = min(own[hidden], 64)
    else:
        keys = next((k for k in KEYS if isinstance(own.get(k), int)), None)
        ratio = own[heads] // own[keys] if keys else 1
        groups = min(own[keys] if keys else own[heads], 2 if ratio > 1 else 4)
        count = groups * min(max(1, ratio), 2)
        each = own[hidden] // own[heads]
        if own[hidden] % own[heads]:
            each = own.get("head_dim") or 32
        width = count * each
        for key in (*HEADS, *KEYS):
            if isinstance(own.get(key), int):
                _set(part, key, groups if key in KEYS else count)
    for key in (*HIDDEN, "attention_hidden_size", "lru_width"):
        if own.get(key) == own[hidden]:
            _set(part, key, width)
    linear = {k: own[k] for k in own if LINEAR.search(k) and isinstance(own[k], int) and own[k]}
    for key, value in linear.items():
        _set(part, key, min(value, 2 * value // min(linear.values())))
    for key in own:
        if key.startswith("linear_") and key.endswith("head_dim"):
            _set(part, key, _capped(own[key], 16))
    inner = own.get("mamba_expand", 0) * width
    if inner and isinstance(own.get("mamba_d_head"), int):
        size = min(own["mamba_d_head"], inner)
        _set(part, "mamba_d_head", size)
        _set(part, "mamba_n_heads", inner // size)


def _clip_specials(part: PreTrainedConfig) -> None:
    size = getattr(part, "vocab_size", None)
    if not isinstance(size, int):
        return
    for key, value in _own(part).items():
        if SPECIAL.search(key) and isinstance(value, int) and value >= size:
            _set(part, key, size - 1)
