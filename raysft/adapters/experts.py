"""Adapters on the experts of a mixture (`peft.experts`), which transformers keeps as one matrix.

peft makes the whole update of every expert in each pass, as large as the experts themselves. Here
rows go through two narrow products beside the experts' own instead (`models.experts.LowRank`), so
that memory and time follow the rank. While a run lasts, A [E, r, in] and B [E, out, r] have the
experts first, as the experts' own matrices have; in files they lie as peft has them, whose
`target_parameters` they are:

    lora_A.weight [E r, in]     expert by expert
    lora_B.weight [out, r E]    rank by rank, each with its experts
    ....base_layer.lora_A...    of the first of a layer's two matrices; the last is outermost
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel

from raysft.config.schema import Config, Peft
from raysft.errors import UserError
from raysft.models import experts
from raysft.models.experts import LowRank
from raysft.models.targets import modules_named
from raysft.parallel.blocks import experts_of

INSIDE = "base_model.model."  # names of the plain model, in peft's


@dataclass(frozen=True)
class Matrix:
    """One matrix of the experts of a layer. layer: the module that holds it, in the plain model.
    key: of its adapter in peft's files, without the end."""

    layer: str
    name: str
    key: str

    @property
    def parameter(self) -> str:
        """Its name in the plain model."""
        return f"{self.layer}.{self.name}"

    @property
    def update(self) -> str:
        """The name of the module that trains, in peft's model."""
        return f"{INSIDE}{self.layer}.lora.{self.name}"


def matrices(peft: Peft, net: PreTrainedModel) -> list[Matrix]:
    """What gets adapters in the plain model `net`, layer by layer; [] without peft.experts.

    Raises UserError where there are no experts.
    """
    if not peft.experts:
        return []
    decoder = net.get_decoder()
    prefix = next(name for name, module in net.named_modules() if module is decoder)
    left = set(modules_named("exclude_modules", peft.exclude_modules, net))
    whole = set(modules_named("modules_to_save", peft.modules_to_save, net))
    found = []
    for layer, module in experts_of(net):
        held = any(f"{layer}.".startswith(f"{name}.") for name in whole)
        if layer in left or held or not layer.startswith(f"{prefix}."):
            continue
        names = [name for name, p in module.named_parameters(recurse=False) if p.ndim == 3]
        for depth, name in enumerate(reversed(names)):
            found.append(Matrix(layer, name, f"{INSIDE}{layer}{'.base_layer' * depth}"))
    if not found:
        raise UserError(
            f"peft.experts: {type(net).__name__} has no experts that could get adapters (of those "
            "that transformers keeps as one matrix a layer); leave it out"
        )
    return found


def attach(config: Config, net: PreTrainedModel, found: list[Matrix]) -> None:
    """Put an update beside each matrix. Random numbers come from the caller's generator."""
    peft = config.peft
    scale = peft.alpha / (peft.r**0.5 if peft.rslora else peft.r)
    for matrix in found:
        module: Any = net.get_submodule(matrix.layer)
        parameter = getattr(module, matrix.name)
        count, out, width = parameter.mT.shape if module.is_transposed else parameter.shape
        if not hasattr(module, "lora"):
            module.lora = nn.ModuleDict()
        module.lora[matrix.name] = LowRank(count, width, out, peft.r, scale, peft.dropout)
    experts.use(net, "torch")  # or by what `model.moe.experts` says, later


def merge(net: PreTrainedModel, found: list[Matrix]) -> None:
    """Add the updates to the matrices, and take them away."""
    for matrix in found:
        module: Any = net.get_submodule(matrix.layer)
        parameter = getattr(module, matrix.name)
        with torch.no_grad():
            for expert, own in enumerate(parameter):  # one at a time: all are as large as the model
                delta = module.lora[matrix.name].delta(expert)
                own += delta.mT if module.is_transposed else delta
    for layer in {matrix.layer for matrix in found}:
        del net.get_submodule(layer).lora


def settled(settings: PeftConfig, names: list[str]) -> PeftConfig:
    """`settings`, changed so that peft finds the adapters of these parameters. Its own form of them
    takes no dropout, which matters in training alone."""
    if names:
        settings.target_parameters = names
        settings.lora_dropout = 0.0
    return settings


def names_for_peft(found: list[Matrix], net: nn.Module) -> list[str]:
    """`found` as peft takes them: the ends of their names where no other parameter has them."""
    full = {matrix.parameter for matrix in found}
    short = {".".join(name.split(".")[-3:]) for name in full}
    return sorted(short if named(short, net) == full else full)


def named(wanted: Iterable[str] | None, net: nn.Module) -> set[str]:
    """The parameters of the plain model `net` that peft takes `target_parameters` for."""
    ends = tuple(f".{name}" for name in wanted or ())
    return {name for name, _ in net.named_parameters() if f".{name}".endswith(ends)}


def to_files(found: list[Matrix], weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adapters as peft's files have them. weights: by their names in peft's model."""
    files = {}
    for matrix in found:
        a, b = weights[f"{matrix.update}.A"], weights[f"{matrix.update}.B"]
        files[f"{matrix.key}.lora_A.weight"] = a.flatten(0, 1)
        files[f"{matrix.key}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1)
    return files


def take_from_files(
    found: list[Matrix], model: nn.Module, files: dict[str, torch.Tensor]
) -> str | None:
    """Give the updates of `model` (peft's) the weights of a file, which are taken out of it;
    returns the first that it lacks."""
    for matrix in found:
        update = model.get_submodule(matrix.update)
        assert isinstance(update, LowRank)
        a, b = (files.pop(f"{matrix.key}.lora_{part}.weight", None) for part in "AB")
        if a is None or b is None:
            return f"{matrix.key}.lora_{'A' if a is None else 'B'}.weight"
        count, rank, _ = update.A.shape
        with torch.no_grad():
            update.A.copy_(a.unflatten(0, (count, rank)))
            update.B.copy_(b.unflatten(1, (rank, count)).permute(2, 0, 1))
    return None
