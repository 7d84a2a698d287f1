"""Attention over packed rows that pays for the sum of the documents' squares, not for the row's.

Stands in the step: `attach` makes a transformers model use it, `document_mask` describes a row.
A row of documents with restarting positions would need a dense block mask of [T, T] under sdpa.
Here the "mask" that transformers hands to every layer is instead the row's document boundaries
(an int32 tensor [1, 1, 1, n + 1], which transformers passes on untouched because it is 4-d), so
no state is kept outside the call and a layer recomputed in the backward pass sees the same row.

- CUDA in half precision: one variable-length flash kernel of torch for the whole row.
- Elsewhere: causal sdpa on each document's slice; neighbours of equal length share one call.
- Without boundaries (padded rows, generation): transformers' own sdpa.

An encoder of clips packs them the same way, where each position sees all of its clip.

Cost: sum(length^2) instead of T^2. On CPU, 80 documents of 25 to 80 tokens take 25 ms forward and
backward sorted by length, 31 ms unsorted (4 heads of 32, 2 threads).
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from itertools import groupby
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.models.copies import with_weights

NAME = "segments"
# What a layer may be for a packed row to be exact: anything that carries state from one position
# to the next by other means than attention (recurrence, convolution) leaks between documents.
EXACT_LAYERS = {"full_attention", "sliding_attention"}
# Arguments that change the scores in a way the kernels used here do not compute.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
# Versions of torch that have this argument take heads in groups only with it.
_GROUPED: JsonObject = (
    {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
)


def document_mask(
    ends: torch.Tensor,
    device: torch.device | None = None,
    windows: bool = False,
    real: torch.Tensor | None = None,
    causal: bool = True,
) -> torch.Tensor:
    """The attention "mask" of a packed row.

    ends: int32 [n + 1], cumulative document lengths from 0 to T. Returns [1, 1, 1, n + 1] on
    `device` (default: where `ends` is). The lengths are read here, once and not by layer: `ends`
    on a GPU cost a synchronisation, on the CPU nothing. windows: the model puts its sliding window
    into the mask that this one replaces, so layers take it from their config. real: [1, T], 1 where
    there is a document, for what looks at tokens across them; None: everywhere. causal: False: a
    position also sees those after it, in its document.
    """
    mask = ends.view(1, 1, 1, -1).to(device or ends.device, non_blocking=True)
    # Tensors take attributes; `segments_attention` reads these.
    mask.document_lengths = ends.diff().tolist()  # type: ignore[attr-defined]
    mask.windows = windows  # type: ignore[attr-defined]
    mask.counted = real  # type: ignore[attr-defined]
    mask.causal = causal  # type: ignore[attr-defined]
    return mask


def segments_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: q [1, H, T, D], k [1, G, T, D], v [1, G, T, Dv].

    Returns [1, T, H, Dv]. Raises NotImplementedError for a model whose scores need more than a
    scale (capping, sinks, position biases): never computes something else in silence.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"packed attention does not support {name}")
    lengths: list[int] = attention_mask.document_lengths  # type: ignore[attr-defined]
    causal: bool = attention_mask.causal  # type: ignore[attr-defined]
    if sliding_window is None and attention_mask.windows:  # type: ignore[attr-defined]
        sliding_window = _window_of(module)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # Cast once: the slices would otherwise be cast one by one inside sdpa.
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    half = query.dtype in (torch.float16, torch.bfloat16)
    if device == "cuda" and half and not dropout and query.shape[-1] == value.shape[-1] <= 256:
        ends = attention_mask.flatten()
        longest = 1 << (max(lengths) - 1).bit_length()  # few values, whatever lies in a row
        return _varlen(query, key, value, ends, longest, scaling, sliding_window, causal), None
    parts = _by_document(query, key, value, lengths, dropout, scaling, sliding_window, causal)
    return parts, None


def used(model: PreTrainedModel, device: torch.device, half: bool) -> str:
    """Which attention the text decoder of `model` trains with, for the run's events."""
    config = model.config.get_text_config()
    if config._attn_implementation != NAME:
        return f"{config._attn_implementation} of transformers"
    same = getattr(config, "qk_head_dim", None) == getattr(config, "v_head_dim", None)
    if device.type == "cuda" and half and same and not getattr(config, "attention_dropout", 0.0):
        return "torch varlen (flash) on packed rows"
    return "torch sdpa, document by document"


def _window_of(module: nn.Module) -> int | None:
    """The window of a layer whose model has it in the mask: by its type, or of all layers."""
    config = module.config
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[module.layer_idx] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
    causal: bool,
) -> torch.Tensor:
    # Flash takes fewer heads of keys and values than of queries: repeated, they would be saved so.
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    # transformers' window counts the position itself, flash's counts the ones before it.
    left, right = -1 if window is None else window - 1, 0 if causal else -1
    out = varlen_attn(
        *(q, k, v, ends, ends, longest, longest),
        scale=scaling,
        window_size=(left, right),
        **_GROUPED,
    )
    return cast(torch.Tensor, out).unsqueeze(0)  # a pair where its log-sums are asked for


def _by_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    dropout: float,
    scaling: float | None,
    window: int | None,
    causal: bool,
) -> torch.Tensor:
    runs = [(len(list(run)), length) for length, run in groupby(lengths) if length]
    # One split for all: its backward joins the gradients in one copy, where separate slices would
    # each be padded to the whole row.
    sizes = [count * length for count, length in runs]
    slices = zip(runs, *(x[0].split(sizes, dim=1) for x in (query, key, value)), strict=True)
    outputs = []
    for (count, length), *qkv in slices:
        # [heads, count * length, dim] -> [count, heads, length, dim]
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)
        band = None if window is None or length <= window else _band(length, window, q.device)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=band,
            dropout_p=dropout,
            is_causal=causal and band is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0)


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Causal mask [length, length] of a sliding window that counts the position itself."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril().triu(1 - window)


ALL_ATTENTION_FUNCTIONS.register(NAME, segments_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def refusal(model: PreTrainedModel) -> str | None:
    """Why the text decoder of `model` cannot attend document by document, if its config tells."""
    try:
        config = model.config.get_text_config()
    except ValueError:
        return "it has several text models"
    others = sorted(set(getattr(config, "layer_types", None) or ()) - EXACT_LAYERS)
    if others:
        return f"it has layers of type {', '.join(others)}"
    if not model._supports_sdpa:
        return "transformers has no sdpa attention for it"
    return None


def attachable(model: PreTrainedModel) -> str | None:
    """Make the text decoder of `model` attend document by document; returns why it cannot."""
    if (reason := refusal(model)) is not None:
        return reason
    config = model.config.get_text_config()
    nested = config is not model.config
    model.set_attn_implementation({"text_config": NAME} if nested else NAME)
    if config._attn_implementation != NAME:
        return "its attention cannot be replaced"
    return None


def attach(model: PreTrainedModel, windows: bool = False) -> None:
    """Make the text decoder of `model` attend document by document, and see that it does.

    windows: as in `document_mask`. What there is to be proven is proven on a small copy (see
    `proof`); these are three forward passes of at most 12 tokens of the model itself. Raises
    UserError where a packed row would not equal its documents alone.
    """
    kind = model.config.get_text_config().model_type
    if (reason := attachable(model)) is not None:
        raise inexact(kind, reason)
    tried = with_weights(model)
    if tried is not model:
        attachable(tried)
    difference = packing_difference(tried, windows)
    # Rounding gives 1e-6; one position that sees another document gives 1e-2 and more.
    if not difference < 1e-4:
        raise inexact(kind, f"two packed documents differ by {difference:.1e} from each alone")


@torch.no_grad()
def packing_difference(model: PreTrainedModel, windows: bool = False) -> float:
    """Largest difference of logits, packed against alone, over the largest logit; 0 is exact."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    audio = getattr(model.config, "audio_token_id", None)
    size = min(16, model.get_input_embeddings().num_embeddings)
    vocabulary = [i for i in range(size) if i != audio]
    lengths = (5, 7)
    ids = [
        torch.tensor([[vocabulary[(3 * i + t * t + 1) % len(vocabulary)] for t in range(length)]])
        for i, length in enumerate(lengths)
    ]
    positions = [torch.arange(length).unsqueeze(0) for length in lengths]

    def logits(tokens: torch.Tensor, at: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        inputs = {"input_ids": tokens.to(device), "position_ids": at.to(device)}
        return model(**inputs, attention_mask=mask, use_cache=False).logits[0].float()

    ends = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)
    try:
        mask = document_mask(ends, windows=windows)
        packed = logits(torch.cat(ids, 1), torch.cat(positions, 1), mask)
        alone = torch.cat([logits(i, p, None) for i, p in zip(ids, positions, strict=True)])
    except (TypeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise inexact(model.config.model_type, f"a packed row fails with: {error}") from error
    finally:
        model.train(training)
    return ((packed - alone).abs().max() / alone.abs().max()).item()


def inexact(model_type: str, reason: str) -> UserError:
    """The refusal of data.mode: packed."""
    return UserError(
        f"data.mode: packed is not exact for model type {model_type}: {reason}; "
        "use data.mode: padded"
    )
