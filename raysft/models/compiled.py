"""train.compile: torch.compile on every block of a model, in place; names of parameters stay.

Blocks, not the whole: equal blocks share one compilation, sharded weights are gathered between
them, and what a model does once a step is not worth waiting for. Where every batch has its own
lengths they are compiled as unknowns, else as they are (`layout.Static`). Attention over packed
rows stays as it is, for it reads how long the documents are; a graph ends before it and another
begins after it. Evaluation is not compiled: a cache that grows would be, for every length.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from raysft.errors import UserError
from raysft.models.attention import NAME, segments_attention

SHAPES = 32  # trials of a budget, and rare rows


def compile_blocks(
    blocks: Iterable[nn.Module], device: torch.device, one_shape: Collection[nn.Module] = ()
) -> None:
    """Compile each of `blocks` at its first call; before a strategy shards them.

    one_shape: those of them whose inputs have the same shapes every time, but for rare ones.
    Raises UserError where there is no compiler for `device`.
    """
    _check_compiler(device)
    if one_shape:  # else torch gives up compiling a block after 8 shapes
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(SHAPES, dynamo.recompile_limit)
    ALL_ATTENTION_FUNCTIONS.register(NAME, torch.compiler.disable(segments_attention))
    for block in blocks:
        block.forward = _compiled(block, block in one_shape)


def _compiled(block: Any, one_shape: bool) -> Callable[..., object]:
    """The forward of a block, compiled below its checkpointing: a graph that ends in the middle of
    a checkpoint cannot be compiled from without. Hooks, as of sharding, stay outside."""
    own = block.forward
    plain = type(block).forward
    while plain.__code__.co_name == "forward_with_checkpointing":  # transformers'
        plain = plain.__wrapped__
    compiled = torch.compile(MethodType(plain, block), dynamic=not one_shape)

    def forward(*args: object, **kwargs: object) -> object:
        if not block.training:
            return own(*args, **kwargs)
        if getattr(block, "gradient_checkpointing", False):
            return block._gradient_checkpointing_func(partial(compiled, **kwargs), *args)
        return compiled(*args, **kwargs)

    return forward


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError("train.compile: needs Triton, which is not there; set it to false")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "train.compile: needs a C++ compiler on the CPU and finds none: install g++, name one "
            "in the environment variable CXX, or set it to false"
        ) from error
