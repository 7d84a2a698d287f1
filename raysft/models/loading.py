"""From `model.path` or `model.config` to a transformers model with float32 weights on the CPU.

Stands between config and step. Every worker builds the same weights: random ones come from
`run.seed` alone. Cost: one read of the weights (safetensors only), or one random initialisation.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from raysft.config import schema
from raysft.data import remote_code
from raysft.data.encode import model_family, net_class
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.models.meta import on_meta
from raysft.parallel import unread

# New rows start at the mean of the old ones, plus noise of this share of their spread: the mean
# keeps new tokens from dominating the softmax, the noise tells them apart.
NEW_ROW_NOISE = 0.1
# Keys that transformers' models read although their config classes do not declare them.
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
UNDECLARED = {"model_type", "head_dim", "rope_theta", "rope_scaling", *SPECIAL_IDS}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers on the CPU from `seed`; the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def from_path(
    model: schema.Model, auto: Any, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """Load the weights of `model.path` with `auto.from_pretrained`, in float32 or quantised.

    Under `unread.deferring` matrices are stand-ins. Raises UserError if weights cannot be read, are
    not safetensors, or lack some of the model.
    """
    try:
        if model.trust_remote_code:
            _fetch_code(model, auto)
        with unread.reading_later() if unread.asked() else nullcontext():
            net, info = auto.from_pretrained(
                model.path,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **model.hub,
                **({"quantization_config": quantization} if quantization is not None else {}),
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"model.path {model.path}: {line_of(error)}") from error
    if quantization is not None:
        from raysft.models.quantized import unpacked

        unpacked(net)  # before anything goes through it
    if (unseen := unread.of(net)) is not None:
        unseen.stand_in(net)
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise UserError(
            f"model.path {model.path}: {len(lacking)} weights are missing or of another shape, "
            f"such as {lacking[0]}; is it a {auto.__name__} model?"
        )
    return net


def _fetch_code(model: schema.Model, auto: Any) -> None:
    """Bring the model's own code to where transformers keeps it, before weights are read."""
    with remote_code.one_at_a_time():
        config = AutoConfig.from_pretrained(model.path, **model.hub)
        found = (getattr(config, "auto_map", None) or {}).get(auto.__name__)
        if found is not None:
            get_class_from_dynamic_module(found, model.path, revision=model.revision)


def from_config(settings: JsonObject, auto: Any, seed: int) -> PreTrainedModel:
    """A model of random weights: `settings` is a transformers config with its model_type."""
    config = make_config(settings)
    make = getattr(auto, "from_config", None) or auto._from_config
    with seeded(seed):
        try:
            return make(config, dtype=torch.float32)
        except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
            raise UserError(f"model.config: {line_of(error)}") from error


def skeleton(model: schema.Model) -> PreTrainedModel:
    """The layers of the model without weights, as its family has it built: where its module has a
    `skeleton`, by that."""
    own = getattr(model_family(model).model_module(), "skeleton", plain_skeleton)
    return cast(PreTrainedModel, own(model))


def plain_skeleton(model: schema.Model) -> PreTrainedModel:
    """Those of the class of transformers that its family names."""
    auto = net_class(model)
    if model.path is None:
        config = make_config(model.config or {})
    else:
        # A class for a part of a checkpoint knows where in it its config is.
        configs = AutoConfig if hasattr(auto, "from_config") else auto.config_class
        try:
            config = configs.from_pretrained(model.path, **model.hub)
        except (OSError, ValueError) as error:
            raise UserError(f"model.path {model.path}: {line_of(error)}") from error
    try:
        with on_meta():
            if hasattr(auto, "from_config"):
                return auto.from_config(config, trust_remote_code=model.trust_remote_code)
            return auto._from_config(config)
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
        where = "model.config" if model.path is None else f"model.path {model.path}"
        raise UserError(f"{where}: {line_of(error)}") from error


def make_config(settings: JsonObject) -> PreTrainedConfig:
    """The transformers config of `settings`; raises UserError on keys its class does not have."""
    kind = settings["model_type"]
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(kind, CONFIG_MAPPING.keys(), 3)
        hint = f"; near ones are {', '.join(near)}" if near else ""
        raise UserError(f"model.config.model_type: transformers knows no {kind}{hint}")
    rest = {key: value for key, value in settings.items() if key != "model_type"}
    try:
        config = AutoConfig.for_model(kind, **rest)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.config: {line_of(error)}") from error
    _refuse_unknown("model.config", rest, config)
    for name in config.sub_configs:
        if isinstance(rest.get(name), dict):
            _refuse_unknown(f"model.config.{name}", rest[name], getattr(config, name))
    return config


def _refuse_unknown(where: str, given: JsonObject, config: PreTrainedConfig) -> None:
    """transformers keeps unknown keys as they are: a typing error would train another model."""
    known = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    known |= UNDECLARED
    for key in sorted(set(given) - known):
        near = difflib.get_close_matches(key, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{where}.{key}: unknown key for {config.model_type}{hint}")


def fill_from_tokenizer(settings: JsonObject, tokenizer: PreTrainedTokenizerBase) -> JsonObject:
    """`settings` of a text model with the tokenizer's special ids and room for all its tokens."""
    filled = dict(settings)
    filled["vocab_size"] = max(filled.get("vocab_size") or 0, len(tokenizer))
    for name in SPECIAL_IDS:
        filled.setdefault(name, getattr(tokenizer, name))
    # The embedding of a model's padding token is never trained: an end token must not be one.
    if filled["pad_token_id"] == filled["eos_token_id"]:
        filled["pad_token_id"] = None
    return filled


def refuse_layer_drop(model: schema.Model, config: PreTrainedConfig) -> None:
    """Raises UserError where `config`, that of `model`, has layers skipped at random in training.

    A skipped layer has no gradient, which other workers wait for, and which layers are skipped
    would depend on the worker.
    """
    where = (
        "model.config." if model.config is not None else f"model.path {model.path}: config.json: "
    )
    parts = {"": config, **{f"{name}.": getattr(config, name) for name in config.sub_configs}}
    for prefix, part in parts.items():
        for key in LAYER_DROPS:
            if share := getattr(part, key, 0):
                raise UserError(
                    f"{where}{prefix}{key}: {share}, but layers skipped at random cannot be "
                    "trained by several workers alike: set it to 0"
                )


@torch.no_grad()
def grow_vocabulary(net: PreTrainedModel, size: int, seed: int) -> None:
    """Give the embeddings (and an untied head) `size` rows; never fewer than they have.

    New rows: the mean of the old ones plus seeded noise of NEW_ROW_NOISE times their spread.
    """
    old = net.get_input_embeddings().weight.shape[0]
    if size <= old:
        return
    unseen = unread.of(net)
    if unseen is not None:
        unread.to_meta(net)
    with seeded(seed):
        net.resize_token_embeddings(size, mean_resizing=False)
    with seeded(seed):
        # A tied head is the same parameter: filled once.
        ends = (net.get_input_embeddings(), net.get_output_embeddings())
        for table in {id(end.weight): end for end in ends}.values():
            noise = torch.randn(size - old, table.weight.shape[1])
            if unseen is None:
                rows = table.weight[:old]
                table.weight[old:] = rows.mean(0) + noise * rows.std(0) * NEW_ROW_NOISE
            else:
                unseen.grow(table.weight, net, partial(_new_rows, noise))
            if getattr(table, "bias", None) is not None:
                table.bias[old:] = table.bias[:old].mean()
    if unseen is not None:
        unseen.stand_in(net)


def _new_rows(noise: torch.Tensor, mean: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    return mean + noise * spread * NEW_ROW_NOISE


def line_of(error: BaseException) -> str:
    """A library's message in one line, and not a long one."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."
