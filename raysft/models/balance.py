"""The balance loss of a mixture's routers, where its config asks for it (output_router_logits).

transformers adds router_aux_loss_coef times E sum_e f_e p_e to the loss of a batch: over E experts,
the share f_e of tokens sent to an expert times its mean probability p_e, over all layers and all
tokens but padding (Switch Transformer, Fedus et al. 2021, equations 4 to 6). It is no sum over
tokens, so it belongs to a set of tokens. Here that is the micro-batch, as it is there: a step's
balance loss is the mean over its micro-batches, weighted by their supervised tokens. The plan says
what is in a micro-batch, so it depends neither on the number of workers nor on a resume, nor on
rows being packed or padded.

`attach` lets transformers' own function read a packed row: what fills it up is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps

import torch
from torch import nn
from transformers import PreTrainedModel

from raysft.errors import UserError

FUNCTION = "load_balancing_loss_func"


def asked(net: nn.Module) -> bool:
    """Whether the config of `net` (or of what peft has wrapped) asks for a balance loss."""
    config = getattr(net, "config", None)
    if config is None:
        return False
    found = [config]
    if hasattr(config, "get_text_config"):
        try:
            found.append(config.get_text_config())
        except ValueError:  # several: none of them is a mixture that trains here
            found = [config]
    return any(getattr(part, "output_router_logits", False) for part in found)


def coefficient(net: nn.Module) -> float | None:
    """What the balance loss is multiplied by; None: there is none to train.

    Raises UserError where one is asked for that the model does not have.
    """
    if not asked(net):
        return None
    own: PreTrainedModel = next(
        (part for part in net.modules() if isinstance(part, PreTrainedModel)), net
    )
    text = own.config.get_text_config()
    found = getattr(own, "router_aux_loss_coef", None)
    if isinstance(found, (int, float)) and FUNCTION in vars(sys.modules[type(own).__module__]):
        return float(found) or None
    raise UserError(
        f"model: its config asks for the routers' balance loss (output_router_logits: true), which "
        f"transformers does not compute for {text.model_type}; set "
        "model.config.output_router_logits: false (with model.path: in its config.json)"
    )


def attach(net: PreTrainedModel) -> None:
    """Let the balance loss of `net` be computed on packed rows too."""
    module = sys.modules[type(net).__module__]
    own = vars(module).get(FUNCTION)
    if own is None or not asked(net) or hasattr(own, "__wrapped__"):
        return
    setattr(module, FUNCTION, _of_packed_rows(own))


def _of_packed_rows(own: Callable[..., torch.Tensor | int]) -> Callable[..., torch.Tensor | int]:
    @wraps(own)
    def balance(
        gate_logits: tuple[torch.Tensor, ...],
        num_experts: int | None = None,
        top_k: int = 2,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | int:
        if attention_mask is not None and hasattr(attention_mask, "document_lengths"):
            # Of a row that is filled up, what is no document is left out.
            attention_mask = attention_mask.counted  # type: ignore[attr-defined]
        return own(gate_logits, num_experts, top_k, attention_mask)

    return balance
