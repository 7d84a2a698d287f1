"""The weights of a sharded module, read when it is sharded: each worker its own rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from raysft.parallel.checkpoint_rows import Want
from raysft.parallel.unread import Place, Unread, forget, replace


def fill(
    module: nn.Module, unseen: Unread, places: Mapping[str, Place], device: torch.device
) -> None:
    """Give what is on meta in `module`, which FSDP2 has sharded, memory on `device`, and read it.

    places: of each of these parameters, by its names in `module`.
    """
    wants = []

    def made(name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if not parameter.is_meta:
            return None
        found = _materialised(parameter, device)
        wants.append(_want(found, places[name]))
        return found

    replace(module, made)
    unseen.read(wants)
    forget(module)


def _materialised(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    assert isinstance(parameter, DTensor), "only what is sharded is read here"
    local = torch.empty_like(parameter.to_local(), device=device)
    whole = DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return nn.Parameter(whole, parameter.requires_grad)


def _want(parameter: nn.Parameter, place: Place) -> Want:
    assert isinstance(parameter, DTensor)
    shape, offsets = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    local = parameter.to_local().detach()
    start = place.first + offsets[0]
    return Want(place.key, start, start + shape[0], local.dtype, local.copy_)
