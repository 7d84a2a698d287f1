"""What the experts of a mixture do: counted by its routers, summed over workers, told in lines.

A line of experts.jsonl beside each of metrics.jsonl: tokens that went to each expert, by layer, of
each kind of token; metrics.jsonl has figures of it. What was counted since the last line, and for
how many steps experts have had no token, is saved with checkpoints, so that a run that goes on
writes the lines that it would have written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from raysft.json_types import JsonObject
from raysft.models.routing import Routing, Seen
from raysft.parallel import World

FILE = "experts.jsonl"
_NAMED = 8  # experts that a warning names


@dataclass
class Told:
    """Of the steps since the last time. figures: for metrics.jsonl; line: for experts.jsonl; dead:
    a warning, where experts have been without a token for long enough."""

    figures: dict[str, float]
    line: JsonObject
    dead: str | None


class Loads:
    """The loads of the experts of one run; the same on every worker, but for what is counted."""

    def __init__(self, routing: Routing, patience: int | None) -> None:
        """patience: steps without a token after which an expert is warned of; None: never."""
        self.routing, self.patience = routing, patience
        plan = routing.plan
        own = np.ones((len(routing.kinds), routing.experts), bool)
        for number, kind in enumerate(plan.kinds if plan is not None else ()):
            own[number] = np.isin(np.arange(routing.experts), kind.experts)
        self.own = own  # [kinds, experts]: which a kind may go to
        self.idle = np.zeros((len(routing.names), routing.experts), np.int64)
        self.warned = np.zeros_like(self.idle, dtype=bool)

    def _sums(self, world: World) -> Seen:
        """Of all workers. A collective."""
        seen = self.routing.seen
        parts = [seen.chosen, seen.tokens, seen.entropy]
        flat = torch.cat([part.flatten().to(world.device) for part in parts])
        pieces = world.sum_tensor(flat).cpu().split([part.numel() for part in parts])
        return Seen(*(new.view(old.shape) for new, old in zip(pieces, parts, strict=True)))

    def take(self, world: World, step: int, steps: int) -> Told:
        """What `steps` steps up to `step` did; counts anew from here on. A collective."""
        sums = self._sums(world)
        self._clear()
        chosen, tokens = sums.chosen.numpy(), sums.tokens.numpy()
        figures: dict[str, float] = {}
        for number, kind in enumerate(self.routing.kinds):
            if not tokens[:, number].any():
                continue
            own = chosen[:, number, self.own[number]]
            name = f"/{kind}" if kind else ""
            entropy = sums.entropy.numpy()[:, number].sum() / tokens[:, number].sum()
            most = np.log(own.shape[1]) if own.shape[1] > 1 else 1.0
            figures |= {
                f"experts/load_max{name}": round(float((own.max(1) / own.mean(1)).max()), 4),
                f"experts/dead{name}": round(float((own == 0).mean()), 6),
                f"experts/entropy{name}": round(float(entropy / most), 6),
            }
        counts = {
            kind or "all": chosen[:, number].astype(np.int64).tolist()
            for number, kind in enumerate(self.routing.kinds)
        }
        line = {"step": step, "layers": self.routing.names, "tokens": counts}
        return Told(figures, line, self._dead(chosen, tokens, steps))

    def _dead(self, chosen: np.ndarray, tokens: np.ndarray, steps: int) -> str | None:
        """Experts that have been without a token for `patience` steps, each said once; those of a
        kind of which there were no tokens are not dead."""
        had = chosen.sum(1) > 0
        there = ((tokens > 0)[:, :, None] & self.own).any(1)
        self.idle = np.where(had, 0, self.idle + np.where(there, steps, 0))
        self.warned &= ~had
        if self.patience is None:
            return None
        new = (self.idle >= self.patience) & ~self.warned
        if not new.any():
            return None
        self.warned |= new
        named = []
        for layer, expert in np.argwhere(new)[:_NAMED].tolist():
            named.append(f"{expert} of {self.routing.names[layer]}")
        rest = f", and {int(new.sum()) - _NAMED} more" if new.sum() > _NAMED else ""
        return (
            f"experts that no token has reached for {self.patience} steps (log.dead_experts): "
            f"{', '.join(named)}{rest}; of all experts {self.warned.mean():.1%} are so; "
            "model.moe.balance makes them be used alike"
        )

    def _clear(self) -> None:
        seen = self.routing.seen
        for part in (seen.chosen, seen.tokens, seen.entropy):
            part.zero_()

    def state(self, world: World) -> JsonObject:
        """For the checkpoint. A collective."""
        sums = self._sums(world)
        return {
            "chosen": sums.chosen.tolist(),
            "tokens": sums.tokens.tolist(),
            "entropy": sums.entropy.tolist(),
            "idle": self.idle.tolist(),
            "warned": self.warned.tolist(),
        }

    def load(self, state: JsonObject, world: World) -> None:
        """The inverse of `state`: rank 0 has counted what all have."""
        self.idle = np.array(state["idle"], np.int64)
        self.warned = np.array(state["warned"], bool)
        self._clear()
        if world.is_main:
            parts = [state[name] for name in ("chosen", "tokens", "entropy")]
            sums = [torch.tensor(part, dtype=torch.float64) for part in parts]
            self.routing.seen = Seen(*sums).to(self.routing.seen.chosen.device)
