"""Which layers get adapters: from names, a regular expression or `all-linear` to layers.

Stands between config and peft, which matches names too, but without a word about those that match
nothing. Names match as in peft: a whole name, or its end after a dot; a string is one regular
expression for the whole name.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from raysft.config import schema
from raysft.errors import UserError

ALL_LINEAR = "all-linear"
KEYS_AND_VALUES = ("k_proj", "v_proj")
# Names by which peft's LoRA knows the matrices that transformers keeps as one for all experts.
EXPERT_LAYERS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


@dataclass(frozen=True)
class Targets:
    """Layers with adapters. wanted: as peft takes it. names: what that is in this model, in order.
    feedforward: (ia3) which of `wanted` scale a layer's input instead of its output."""

    wanted: list[str] | str
    names: tuple[str, ...]
    feedforward: list[str] | str | None = None


def resolve(peft: schema.Peft, net: PreTrainedModel) -> Targets:
    """The targets of `peft` in the plain model `net`.

    Raises UserError for what matches nothing, or matches layers that are not linear.
    """
    saved = set(modules_named("modules_to_save", peft.modules_to_save, net))
    excluded = set(modules_named("exclude_modules", peft.exclude_modules, net))

    def free(name: str) -> bool:
        held = any(name == module or name.startswith(f"{module}.") for module in saved)
        return name not in excluded and not held

    everything = peft.target_modules == ALL_LINEAR
    if everything:
        found = _linear_layers(net)
        if peft.method == "ia3":
            found = _ia3_layers(found, net)
    else:
        found = _named_layers(peft.target_modules, net)
    if peft.method in ("lora", "qlora") and _has_fused_experts(net):
        taken = [name for name in found if name.rpartition(".")[2] in EXPERT_LAYERS]
        if taken and not everything:
            raise UserError(
                f"peft.target_modules: {taken[0]}: in a mixture of experts peft takes this name "
                "for the experts; leave it out (theirs: peft.experts: true)"
            )
        found = [name for name in found if name not in taken]
    names = tuple(name for name in found if free(name))
    if not names:
        raise UserError(
            "peft.target_modules: peft.exclude_modules and peft.modules_to_save leave none of its "
            f"{len(found)} layers"
        )
    if peft.method == "ia3":
        inputs = [name for name in names if _is_feedforward(name, net)]
        wanted, feedforward = _short(names, net), _short(inputs, net)
        lists = isinstance(wanted, list) and isinstance(feedforward, list)
        if lists and not set(feedforward) <= set(wanted):  # which peft wants
            wanted, feedforward = list(names), inputs
        return Targets(wanted, names, feedforward)
    return Targets(_short(names, net) if everything else peft.target_modules, names)


def freeze(net: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop training the parameters of `net` whose names match a pattern (fnmatch); returns them.

    Raises UserError for a pattern that matches nothing, or if nothing is left to train.
    """
    parameters = dict(net.named_parameters())
    frozen: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(parameters, pattern)
        if not found:
            near = difflib.get_close_matches(pattern, parameters, 3, cutoff=0.3)
            raise UserError(
                f"train.freeze: {pattern} matches no parameter of {type(net).__name__}; "
                f"names look like {', '.join(near or list(parameters)[:3])}"
            )
        frozen.update(found)
    for name in frozen:
        parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise UserError("train.freeze: every parameter is frozen; nothing is left to train")
    return sorted(frozen)


def modules_named(key: str, wanted: Iterable[str], net: nn.Module) -> list[str]:
    """Full names of the modules that each of `wanted` names.

    Raises UserError, which names `key` of the config, where one names none.
    """
    names = [name for name, _ in net.named_modules() if name]
    found = []
    for name in wanted:
        matching = [other for other in names if matches(name, other)]
        if not matching:
            raise _nothing(key, name, names, net)
        found += matching
    return found


def matches(wanted: str, name: str) -> bool:
    """Whether a name in a list means the module `name`, as peft has it."""
    return name == wanted or name.endswith(f".{wanted}")


def matched(wanted: Iterable[str] | str, net: nn.Module) -> list[str]:
    """Names of the modules that peft takes `wanted` for, in the model's order."""
    test: Callable[[str], bool]
    if isinstance(wanted, str):
        pattern = re.compile(wanted)

        def test(name: str) -> bool:
            return pattern.fullmatch(name) is not None
    else:
        each = list(wanted)

        def test(name: str) -> bool:
            return any(matches(one, name) for one in each)

    return [name for name, _ in net.named_modules() if name and test(name)]


def _named_layers(wanted: list[str] | str, net: PreTrainedModel) -> list[str]:
    layers = dict(net.named_modules())
    if isinstance(wanted, str):
        try:
            found = matched(wanted, net)
        except re.error as error:
            raise UserError(
                f"peft.target_modules: {wanted!r} is no regular expression ({error}); a list of "
                f"names is [q_proj, v_proj], and {ALL_LINEAR} takes all"
            ) from None
        if not found:
            raise _nothing("target_modules", wanted, _linear_everywhere(net), net)
    else:
        if not wanted:
            raise UserError("peft.target_modules: empty; name layers, or leave it out")
        for name in wanted:
            if not matched([name], net):
                raise _nothing("target_modules", name, _linear_everywhere(net), net)
        found = matched(wanted, net)
    for name in found:
        if not isinstance(layers[name], nn.Linear):
            near = ", ".join(_leaves(_linear_everywhere(net)))
            raise UserError(
                f"peft.target_modules: {name} is no linear layer but a "
                f"{type(layers[name]).__name__}, which gets no adapter; linear are {near}"
            )
    return found


def _linear_everywhere(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]


def _linear_layers(net: PreTrainedModel) -> list[str]:
    """Linear layers of the language model: of no tower, no projector, and not the head."""
    decoder = net.get_decoder()
    prefix = next(name for name, module in net.named_modules() if module is decoder)
    found = [name for name in _linear_everywhere(net) if name.startswith(f"{prefix}.")]
    if not found:
        raise UserError(
            f"peft.target_modules: {ALL_LINEAR} finds no linear layer in the language model of "
            f"{type(net).__name__}; name layers"
        )
    return found


def _has_fused_experts(net: PreTrainedModel) -> bool:
    return any(p.ndim == 3 for p in net.get_decoder().parameters())


def _ia3_layers(linear: list[str], net: PreTrainedModel) -> list[str]:
    """Keys, values, and the layers that leave a feed-forward block (arXiv:2205.05638, 3.3)."""
    attention = [name for name in linear if name.rpartition(".")[2] in KEYS_AND_VALUES]
    if not attention:
        raise UserError(
            f"peft.target_modules: {type(net).__name__} has no {' and '.join(KEYS_AND_VALUES)}, "
            f"which ia3 scales; name its layers: {', '.join(_leaves(linear))}"
        )
    chosen = {*attention, *(name for name in linear if _is_feedforward(name, net))}
    return [name for name in linear if name in chosen]


def _is_feedforward(name: str, net: PreTrainedModel) -> bool:
    """Whether a layer's input is what a feed-forward block has inside: ia3 scales that."""
    parent = net.get_submodule(name.rpartition(".")[0])
    layer = net.get_submodule(name)
    widths = {part.hidden_size for part in _configs(net) if getattr(part, "hidden_size", None)}
    outside = getattr(layer, "out_features", None) in widths
    return outside and "attention" not in type(parent).__name__.lower()


def _configs(net: PreTrainedModel) -> list[PreTrainedConfig]:
    return [net.config, *(getattr(net.config, name) for name in net.config.sub_configs)]


def _short(names: Iterable[str], net: nn.Module) -> list[str] | str:
    """The last parts of `names`, or one expression, where they mean these layers and no others;
    else all of them."""
    full = list(names)
    leaves = _leaves(full)
    shared = [parts[0] for parts in zip(*(n.split(".") for n in full)) if len({*parts}) == 1]
    within = f"{re.escape('.'.join(shared))}\\..*\\.({'|'.join(leaves)})"
    for wanted in (leaves, within):
        if set(matched(wanted, net)) == set(full):
            return wanted
    return full


def _leaves(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _nothing(key: str, wanted: str, names: list[str], net: nn.Module) -> UserError:
    """That `wanted` matches nothing, with the names that are nearest to it."""
    short = _leaves(names)
    near = difflib.get_close_matches(wanted, [*short, *names], 3, cutoff=0.5)
    return UserError(
        f"peft.{key}: {wanted} matches no layer of {type(net).__name__}; "
        f"names look like {', '.join(near or [name for name in short if not name.isdigit()][:5])}"
    )
