"""Routers of their own for kinds of tokens (`model.moe.modality.from: one_router`), as Ming has.

The first kind has the model's own weight; the others have theirs beside it, as
`...gate.by_kind.KIND`, which start as copies of it and train as it does. transformers has no place
for them: loading a folder leaves them out, with a line, until `load` reads them from it. Where
`modules_to_save` names the router, peft trains a copy of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file

from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.models.routers import routers

NAME = "by_kind"
_PLACE = re.compile(rf"\.(\d+)\..*\.{NAME}\.(\w+)$")
_FILES = ("model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors")
_COPY, _COPIED = ".modules_to_save.", ".original_module"  # of a module that peft trains whole


def add(router: nn.Module, kinds: Sequence[str]) -> None:
    """Give `router` a weight for each of `kinds` beside its own, as that is now."""
    own = router.weight.detach()  # type: ignore[operator]
    router.add_module(NAME, nn.ParameterDict({kind: own.clone() for kind in kinds}))


def of(router: nn.Module) -> nn.ParameterDict | None:
    """The weights beside a router's own; None: it has one for all kinds."""
    found = getattr(router, NAME, None)
    return found if isinstance(found, nn.ParameterDict) else None


def copied(net: nn.Module) -> bool:
    """Whether peft has put copies in place of the routers of `net`."""
    return any(_COPY in name for name in routers(net))


@torch.no_grad()
def load(net: nn.Module, places: Sequence[str], hub: JsonObject) -> None:
    """Fill the weights beside the routers' own from the first of `places` that has them: a
    checkpoint, or the folder of an adapter.

    By layer and kind: a checkpoint may call the router itself otherwise. A router that peft has
    copied stays as it is. Raises UserError where some are in none of them.
    """
    wanted = {
        _key(f"{name}.{NAME}.{kind}"): weight
        for name, router in routers(net).items()
        if _COPIED not in name
        for kind, weight in (of(router) or {}).items()
    }
    lacking: set[tuple[int, str]] = set()
    for path in places:
        names = [(file, name) for file, name in _names(path, hub) if _PLACE.search(name)]
        there = {_key(name): (file, name) for file, name in names}
        lacking = wanted.keys() - there.keys()
        if not lacking:
            break
    else:
        layer, kind = min(lacking)
        raise UserError(
            f"{places[0]}: the router of {kind} in layer {layer} is not there, as its config.json "
            "says it is (raysft_moe_modality)"
        )
    for key, weight in wanted.items():
        file, name = there[key]
        with safe_open(file, "pt") as tensors:
            weight.copy_(tensors.get_tensor(name))


def _key(name: str) -> tuple[int, str]:
    found = _PLACE.search(name)
    assert found is not None
    return int(found[1]), found[2]


def _names(path: str, hub: JsonObject) -> list[tuple[str, str]]:
    """Files of a checkpoint and the names of what is in them."""
    hub = {name: value for name, value in hub.items() if name == "revision"}
    for file in _FILES:
        found = cached_file(path, file, _raise_exceptions_for_missing_entries=False, **hub)
        if found is None:
            continue
        if file.endswith(".json"):
            index: JsonObject = json.loads(Path(found).read_text(encoding="utf-8"))["weight_map"]
            files = {part: cached_file(path, part, **hub) for part in set(index.values())}
            return [(files[part], name) for name, part in index.items()]
        with safe_open(found, "pt") as tensors:
            return [(found, name) for name in tensors.keys()]  # noqa: SIM118 - it is no mapping
    return []
