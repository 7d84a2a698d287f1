"""zero3: weights that are not read yet, made DeepSpeed's one by one.

Rank 0 reads a weight whole and sends it to the others, of which each keeps its part before the next
one comes: nobody holds more than the parts of all and one of them whole.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn

from raysft.json_types import JsonObject
from raysft.parallel.checkpoint_rows import Want
from raysft.parallel.unread import Place, Unread, cast, forget, is_stand_in
from raysft.parallel.world import World


def fill(
    module: nn.Module,
    unseen: Unread,
    deepspeed: ModuleType,
    settings: JsonObject,
    dtype: torch.dtype,
    world: World,
) -> None:
    """Make every parameter of `module` one of DeepSpeed's, in `dtype`, with its content.

    settings: DeepSpeed's config. A collective.
    """
    places = unseen.places(module)
    named = dict(module.named_parameters())
    for parameter in named.values():
        if parameter.is_floating_point():
            cast(parameter, dtype)
    sharded: list[nn.Parameter] = []

    def shard(parameter: nn.Parameter) -> None:
        """Broadcasts what rank 0 has."""
        if not sharded:
            one = nn.ParameterList([parameter])
            deepspeed.zero.Init(module=one, config_dict_or_path=settings, dtype=dtype)
        else:
            convert: Callable[..., None] = vars(sharded[0])["convert_to_zero_parameters"]
            convert(param_list=[parameter])
        sharded.append(parameter)

    def want(parameter: nn.Parameter, place: Place) -> Want:
        def take(whole: torch.Tensor) -> None:
            parameter.data = whole
            shard(parameter)

        stop = place.first + parameter.shape[0]
        return Want(place.key, place.first, stop, parameter.dtype, take)

    wants = []
    for name, parameter in named.items():
        if is_stand_in(parameter):
            wants.append(want(parameter, places[name]))
        else:
            shard(parameter)
    if world.is_main:
        unseen.read(wants)
        wants = []
    shapes = {place.key: named[name].shape for name, place in places.items() if name in named}
    for asked in unseen.in_order(wants):
        asked.take(torch.empty(shapes[asked.key], dtype=asked.dtype))
    forget(module)
