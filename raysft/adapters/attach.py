"""Adapters: what `peft.method` trains instead of all weights, through the peft library.

Stands between the built model and the strategy: `add_adapters` wraps a model that has its weights
(and the attention of packed rows) already. Every worker makes the same adapters: their random
numbers come from `run.seed`. A checkpoint holds what trains, and beside it the folder `adapter/`
in peft's own layout.

Rows of tokens that the run added to the tokenizer (speech units) train too, with lora, qlora and
adalora: input and output rows, which are one where the model ties them.

Costs nothing but the adapters' own memory. In half precision what is frozen is stored in it, norms
as well, so that what passes from layer to layer is never cast to float32 and back.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from raysft.adapters import adalora, experts
from raysft.adapters.start import fill, find
from raysft.config.combinations import contradictions
from raysft.config.families import Family
from raysft.config.schema import Config
from raysft.data.encode import model_family
from raysft.data.encode.families import model_type
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.models.base import SpeechModel
from raysft.models.loading import line_of, seeded, skeleton
from raysft.models.quantized import refuse_widths
from raysft.models.supervised import PREFIX
from raysft.models.targets import Targets, modules_named, resolve
from raysft.parallel import unread
from raysft.parallel.native import HALF

FOLDER = "adapter"  # in a checkpoint
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as peft calls them
VIRTUAL = ("prefix", "prompt")  # methods whose adapters are positions, not layers
NEW_ROWS = ("lora", "qlora", "adalora")  # methods for which peft trains single rows
# Norms of torch: mixed with what is in float32, on a CPU they raise.
OWN_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm)


class PeftAdapters:
    """Adapters of one model: their state beside the weights, and their files."""

    def __init__(self, model: PeftModel, of_experts: list[experts.Matrix]) -> None:
        """model: with its adapters, before a strategy changes its parameters. of_experts: those
        beside peft's."""
        self._experts = of_experts
        self._settings = experts.settled(
            _settings_of(model), experts.names_for_peft(of_experts, model.get_base_model())
        )
        self._layout, self._constants = _layout(model)
        self._ranks = adalora.Ranks(model) if "lora_E" in str(self._layout) else None

    @property
    def ranks(self) -> adalora.Ranks | None:
        """AdaLoRA's schedule; None for other methods."""
        return self._ranks

    def after_step(self, step: int) -> None:
        """See `Adapters.after_step`."""
        if self._ranks is not None:
            self._ranks.after_step(step)

    def tensors(self) -> dict[str, torch.Tensor]:
        """See `Adapters.tensors`."""
        return self._ranks.tensors() if self._ranks is not None else {}

    def facts(self) -> JsonObject:
        """See `Adapters.facts`."""
        return self._ranks.facts() if self._ranks is not None else {}

    def load_facts(self, facts: JsonObject) -> None:
        """See `Adapters.load_facts`."""
        if self._ranks is not None:
            self._ranks.load_facts(facts)

    def files(self, weights: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
        """The folder that PeftModel.from_pretrained loads, as path -> content.

        weights: as a checkpoint holds them. Reads nothing of the model, which may be training.
        """
        given = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
        named = {key: given[name] for key, name in self._layout.items()}
        named |= experts.to_files(self._experts, given)
        settings = copy.deepcopy(self._settings)
        if self._ranks is not None:
            named, pattern = adalora.cut(named)
            settings.rank_pattern = pattern
        content = {key: tensor.contiguous() for key, tensor in (named | self._constants).items()}
        saved = safetensors.torch.save(content, metadata={"format": "pt"})
        with tempfile.TemporaryDirectory() as scratch:
            settings.save_pretrained(scratch, auto_mapping_dict=settings.auto_mapping)
            written = (Path(scratch) / CONFIG).read_bytes()
        return {f"{FOLDER}/{CONFIG}": written, f"{FOLDER}/{WEIGHTS}": saved}


def check(config: Config, new_ids: Sequence[int] = (), total_steps: int = 0) -> None:
    """Raises UserError where `add_adapters` would for what shows without weights: layers that are
    not there, rows that the method cannot train, another adapter than the config's."""
    if config.peft.method != "none":
        family, net = model_family(config.model), skeleton(config.model)
        if config.peft.method == "qlora":
            refuse_widths(net, family)
        _refuse_new_parts(config, family, net)
        settings, names = _settings(config, net, family, new_ids, total_steps)
        find(config, settings, names, net, experts.matrices(config.peft, net))


def _refuse_new_parts(config: Config, family: Family, net: PreTrainedModel) -> None:
    """Raises UserError where the family gives parts of its own to a model that had none, and they
    would stay as they were drawn."""
    if config.model.path is None or config.peft.path is not None:
        return  # all of it is drawn, or the adapter has them
    if not family.every_causal_lm or model_type(config.model) in family.types:
        return
    own = [part for part in family.parts if hasattr(net, part)]
    if lacking := [part for part in own if part not in config.peft.modules_to_save]:
        raise UserError(
            f"peft.modules_to_save: {', '.join(lacking)} are new to the model at model.path, and "
            f"peft.method: {config.peft.method} would leave them as they are drawn: "
            f"peft.modules_to_save: [{', '.join(own)}]"
        )


def add_adapters(speech_model: SpeechModel, config: Config, total_steps: int) -> PeftAdapters:
    """Put the adapters of `config.peft` into `speech_model`; from here on only they train.

    speech_model: just built; its `model` and `supervised` become those with adapters. total_steps:
    of the run, for AdaLoRA's schedule; 0: it is not to be trained to an end. Raises UserError
    where the method cannot train this model, or `peft.path` is an adapter of something else.
    """
    model, of_experts = _inject(speech_model, config, total_steps, begin=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            unread.cast(parameter, torch.float32)
    if config.peft.method in VIRTUAL:
        speech_model.virtual = config.peft.virtual_tokens
    if config.peft.method == "prompt":
        speech_model.prepends = True
        model.register_forward_pre_hook(_without_positions, with_kwargs=True)
    try:
        speech_model.wrap(model)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        if config.peft.method not in VIRTUAL:
            raise
        raise UserError(
            f"peft.method: {config.peft.method} does not work with "
            f"{type(speech_model.net).__name__} ({line_of(error)}); use lora"
        ) from error
    speech_model.freeze_unreached()
    adapters = PeftAdapters(model, of_experts)
    if adapters.ranks is not None:
        speech_model.supervised.penalty = adapters.ranks.penalty
    # Last, for outside of a strategy's autocast half-precision matrices multiply nothing.
    _halve(model, HALF.get(config.train.precision))
    return adapters


def merge_adapters(
    speech_model: SpeechModel, config: Config, total_steps: int, weights: Mapping[str, torch.Tensor]
) -> None:
    """Make `speech_model` (just built, in float32) a plain model that says what the base says with
    adapters of these weights, named as a checkpoint names them. Not for methods in VIRTUAL."""
    model, of_experts = _inject(speech_model, config, total_steps)
    speech_model.wrap(model)
    speech_model.freeze_unreached()  # as training did: a checkpoint may lack what it froze
    given = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    lacking = {name for name, p in model.named_parameters() if p.requires_grad} - given.keys()
    if lacking:
        raise ValueError(f"the checkpoint lacks {len(lacking)} weights, such as {min(lacking)}")
    model.load_state_dict(given, strict=False)
    experts.merge(speech_model.net, of_experts)
    speech_model.wrap(model.merge_and_unload())


def _inject(
    speech_model: SpeechModel, config: Config, total_steps: int, begin: bool = False
) -> tuple[PeftModel, list[experts.Matrix]]:
    """The model of `speech_model` inside a peft model, and what of its experts has adapters. begin:
    with the weights at `peft.path`."""
    net, family = speech_model.net, model_family(config.model)
    settings, names = _settings(config, net, family, speech_model.new_ids, total_steps)
    of_experts = experts.matrices(config.peft, net)
    start = find(config, settings, names, net, of_experts) if begin else None
    # peft copies modules that train whole, with all that hangs on them.
    speech_model.supervised.release()
    with seeded(config.run.seed), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what peft calls
        model = get_peft_model(net, settings)
        if of_experts:
            experts.attach(config, net, of_experts)
    if (unseen := unread.of(net)) is not None:
        _read_rows(model, unseen)
    if names and (differ := set(model.targeted_module_names) ^ set(names)):
        raise ValueError(f"peft and raysft differ on {len(differ)} targets, such as {min(differ)}")
    if start is not None:
        fill(model, start, of_experts)
    settings.base_model_name_or_path = config.model.path
    return model, of_experts


def _read_rows(model: PeftModel, unseen: unread.Unread) -> None:
    """Give the rows of new tokens, which train, the content that they have in the tables; what is
    copied, to train whole, is read as that which it is a copy of."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copied in module.modules_to_save.values():
                unseen.copies(module.original_module, copied)
        if not isinstance(module, TrainableTokensLayer) or module.tied_adapter is not None:
            continue
        table = module.get_base_layer().weight
        if unread.is_stand_in(table):
            for name, delta in module.trainable_tokens_delta.items():
                rows = unseen.rows(table, module.token_indices[name])
                delta.data.copy_(rows)
                module.trainable_tokens_original[name].copy_(rows)


def _settings(
    config: Config, net: PreTrainedModel, family: Family, new_ids: Sequence[int], total_steps: int
) -> tuple[PeftConfig, tuple[str, ...]]:
    """peft's config for the plain model `net` of `family`, and the layers that get adapters."""
    for refused in contradictions(config):
        if refused.key.startswith(("peft.", "train.")):
            raise UserError(refused.text)
    method = config.peft.method
    if (why := family.refusal(method)) is not None:
        raise UserError(f"peft.method: {why}")
    rows = _new_rows(config, net, new_ids)
    names: tuple[str, ...] = ()
    if method in VIRTUAL:
        settings = _positions(config, net)
    else:
        targets = resolve(config.peft, net)
        names = targets.names
        settings = _layers_settings(config, targets, total_steps)
        if rows:
            settings.trainable_token_indices = rows
    settings.task_type = TaskType.CAUSAL_LM if family.every_causal_lm else None
    return settings, names


def _layers_settings(config: Config, targets: Targets, total_steps: int) -> PeftConfig:
    """Of the methods that change layers."""
    peft = config.peft
    shared: JsonObject = {
        "target_modules": targets.wanted,
        "exclude_modules": list(peft.exclude_modules) or None,
        "modules_to_save": list(peft.modules_to_save) or None,
    }
    if peft.method == "ia3":
        return IA3Config(**shared, feedforward_modules=targets.feedforward)
    shared |= {"lora_alpha": peft.alpha, "lora_dropout": peft.dropout}
    if peft.method == "adalora":
        return AdaLoraConfig(**shared, **adalora.schedule(peft, total_steps))
    return LoraConfig(**shared, r=peft.r, use_rslora=peft.rslora, use_dora=peft.dora)


def _positions(config: Config, net: PreTrainedModel) -> PeftConfig:
    """Of the methods that put positions in front of a sequence."""
    text = net.config.get_text_config()
    if config.peft.method == "prompt":
        # Random tokens of the vocabulary: random numbers are far from what layers are used to.
        return PromptTuningConfig(
            num_virtual_tokens=config.peft.virtual_tokens,
            prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
        )
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return PrefixTuningConfig(
        num_virtual_tokens=config.peft.virtual_tokens,
        num_layers=text.num_hidden_layers,
        num_attention_heads=heads,
        token_dim=heads * width,
    )


def _new_rows(config: Config, net: PreTrainedModel, new_ids: Sequence[int]) -> dict[str, list[int]]:
    """Tokens whose rows train, by the name of the table; none where the tables train whole."""
    method = config.peft.method
    ids = [int(i) for i in new_ids]
    tables = [net.get_input_embeddings(), net.get_output_embeddings()]
    names = {
        next(name for name, module in net.named_modules() if module is table): table
        for table in tables
        if table is not None
    }
    whole = set(modules_named("modules_to_save", config.peft.modules_to_save, net))
    tied = len({id(table.weight) for table in names.values()}) == 1
    if tied and whole & names.keys():
        raise UserError(
            f"peft.modules_to_save: {_leaf(min(whole & names.keys()))} shares its weights with "
            "another table (tie_word_embeddings), which would no longer be the same; leave it out: "
            "rows of new tokens train with lora, qlora and adalora by themselves"
        )
    left = [name for name in names if name not in whole]
    if not ids or not left:
        return {}
    if method not in NEW_ROWS:
        tables_named = ", ".join(_leaf(name) for name in names)
        remedy = f"peft.modules_to_save: [{tables_named}], or "
        if tied or method in VIRTUAL:
            remedy = ""
        raise UserError(
            f"peft.method: {method} cannot train single rows, and {len(ids)} unit tokens are new "
            f"to the tokenizer of this model; use {remedy}lora, qlora or adalora, or a model whose "
            "tokenizer has them (model.path)"
        )
    biased = [name for name in left if getattr(names[name], "bias", None) is not None]
    if biased:
        raise UserError(
            f"peft.method: peft trains no single rows of {_leaf(biased[0])}, which has a bias, and "
            f"{len(ids)} unit tokens are new; use peft.modules_to_save: "
            f"[{', '.join(_leaf(name) for name in names)}]"
        )
    return dict.fromkeys(left, ids)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _settings_of(model: PeftModel) -> PeftConfig:
    """A copy of the adapter's config as peft's save_pretrained writes it."""
    settings = copy.deepcopy(model.active_peft_config)
    settings.inference_mode = True
    for key, value in vars(settings).items():
        if isinstance(value, set):  # which would be written in another order every time
            setattr(settings, key, sorted(value))
    if settings.task_type is None:
        base = type(model.get_base_model())
        settings.auto_mapping = {
            "base_model_class": base.__name__,
            "parent_library": base.__module__,
        }
    return settings


def _layout(model: PeftModel) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Name in an adapter's file -> name of the parameter that is it, and what is no parameter.

    Worked out once: later the parameters are sharded, or just then being trained.
    """
    if model.active_peft_config.is_prompt_learning:
        return {"prompt_embeddings": "prompt_encoder.default.embedding.weight"}, {}
    canonical = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    state = dict(model.named_buffers(remove_duplicate=False))
    state |= dict(model.named_parameters(remove_duplicate=False))
    found = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    layout = {key: canonical[id(value)] for key, value in found.items() if id(value) in canonical}
    constants = {key: v.detach().clone() for key, v in found.items() if id(v) not in canonical}
    return layout, constants


def _without_positions(
    _model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """peft numbers positions anew, virtual ones first, and would say so in every pass."""
    return args, {name: value for name, value in kwargs.items() if name != "position_ids"}


def _halve(model: nn.Module, half: torch.dtype | None) -> None:
    """Store frozen float32 matrices, weights of norms and biases in half precision, and let layers
    with lora take what they are given in it. Vectors of other names stay, for exponentials are
    taken of some; so do torch's own norms, which autocast computes in float32."""
    if half is None:
        return
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            frozen = not parameter.requires_grad and parameter.dtype == torch.float32
            plain = name in ("weight", "bias") and not isinstance(module, OWN_NORMS)
            if frozen and (parameter.ndim >= 2 or plain):
                unread.cast(parameter, half)
        # peft casts to what the adapter is stored in, and autocast back. Dora computes norms in it.
        if isinstance(module, LoraLayer) and not module.lora_variant:
            module.cast_input_dtype_enabled = False
