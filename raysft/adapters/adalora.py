"""AdaLoRA (arXiv:2303.10512): ranks that fall where they matter least, on the schedule of a run.

peft's rank allocator does the work. Here is what it leaves to a training loop: the orthogonality
term of the loss, a call after every step, and its state, which is in no adapter's weights.
"""

from __future__ import annotations

import torch
from peft import AdaLoraConfig, AdaLoraModel, PeftModel

from raysft.config import schema
from raysft.config.schedule import steps_of
from raysft.errors import UserError
from raysft.json_types import JsonObject

MANY = 10**9  # steps into which any schedule fits
AVERAGES = ("exp_avg_ipt", "exp_avg_unc")  # of the importance, and of how uncertain it is


def schedule(peft: schema.Peft, total_steps: int) -> dict[str, int]:
    """Arguments of peft's AdaLoraConfig. total_steps: 0 where nothing is trained.

    Raises UserError where ranks could not fall.
    """
    total_steps = total_steps or MANY
    tinit, tfinal = (steps_of(share, total_steps) for share in (peft.tinit, peft.tfinal))
    init_r = round(1.5 * peft.r) if peft.init_r is None else peft.init_r
    if init_r <= peft.r:
        raise UserError(
            f"peft.init_r: {init_r} is not above peft.r: {peft.r}, so no rank could fall; raise it"
        )
    if tinit >= total_steps - tfinal:
        raise UserError(
            f"peft.tinit, peft.tfinal: {tinit} and {tfinal} steps leave none of the {total_steps} "
            "steps for ranks to fall in; lower them"
        )
    return {
        "total_step": total_steps,
        "tinit": tinit,
        "tfinal": tfinal,
        "deltaT": peft.every,
        "init_r": init_r,
        "target_r": peft.r,
    }


class Ranks:
    """The schedule of one model's ranks.

    peft counts steps as the caller does. Here the first is 1, so that ranks fall after exactly
    `tinit` steps and are fixed for exactly the last `tfinal`.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        self._tuner: AdaLoraModel = model.base_model
        self._config: AdaLoraConfig = model.active_peft_config
        self._allocator = self._tuner.rankallocator
        self._step = 0

    def penalty(self) -> torch.Tensor:
        """orth_reg_weight times the mean of |A A' - 1| and |B' B - 1| (Frobenius norms).

        Of equation 4 of the paper, without the squares, as peft's AdaLoraModel.forward adds it to
        a loss that transformers computes.
        """
        terms = []
        for name, p in self._tuner.model.named_parameters():
            first, second = "lora_A" in name, "lora_B" in name
            if (first or second) and p.requires_grad:
                with torch.autocast(p.device.type, enabled=False):
                    product = p @ p.T if first else p.T @ p
                    one = torch.eye(len(product), dtype=p.dtype, device=p.device)
                    terms.append(torch.linalg.matrix_norm(product - one))
        return self._config.orth_reg_weight * torch.stack(terms).mean()

    def after_step(self, step: int) -> None:
        """Once weights have moved, while gradients are there. Steps may be left out: those whose
        gradients were skipped."""
        last = self._config.total_step - self._config.tfinal
        if self._step < last < step:
            self._tuner.update_and_allocate(last)
        self._tuner.update_and_allocate(step)
        self._step = step

    def tensors(self) -> dict[str, torch.Tensor]:
        """The allocator's running averages: the same names at every step."""
        found = {}
        for name, p in self._tuner.model.named_parameters():
            if "lora_" not in name or not p.requires_grad:
                continue
            # Zeros are what the allocator begins with, for a parameter it has not met.
            self._allocator.ipt.setdefault(name, torch.zeros_like(p).detach())
            for kind in AVERAGES:
                average = getattr(self._allocator, kind)
                found[f"{kind}.{name}"] = average.setdefault(name, torch.zeros_like(p).detach())
        return found

    def facts(self) -> JsonObject:
        """Which ranks are there, and as of which step."""
        return {"rank_pattern": self._config.rank_pattern, "step": self._step}

    def load_facts(self, facts: JsonObject) -> None:
        """The inverse of `facts`."""
        self._config.rank_pattern, self._step = facts["rank_pattern"], facts["step"]


def cut(
    weights: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, list[bool]] | None]:
    """An adapter's weights (peft's names) without the ranks that are zero, and peft's rank_pattern,
    None where there are none.

    By the weights, not by what the allocator decided last: between two of its changes a rank that
    it took away may have grown again, and still counts.
    """
    found, pattern = dict(weights), {}
    for name, values in weights.items():
        if not name.endswith(".lora_E"):
            continue
        stem = name.removesuffix("lora_E")
        there = values.flatten() != 0
        pattern[name.removeprefix("base_model.model.")] = there.tolist()
        found[name] = values[there]
        found[f"{stem}lora_A"] = weights[f"{stem}lora_A"][there]
        found[f"{stem}lora_B"] = weights[f"{stem}lora_B"][:, there]
    return found, None if all(all(mask) for mask in pattern.values()) else pattern
